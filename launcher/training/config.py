"""train.yaml, read and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.launcher.data.hashes import RowHashes
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.tasks import RowTasks
from ftplan.launcher.data.templates import Template
from ftplan.launcher.run_dir import RunDir, checked_folder_name, read_mapping
from ftplan.launcher.trackers import checked_trackers
from ftplan.planner.errors import InputError
from ftplan.planner.tasks import TaskWeighting


class DataConfig(Struct, frozen=True, kw_only=True):
    """Files of rows, and how they are read. `sha256`: of what was profiled."""

    files: tuple[Path, ...]
    sha256: str
    columns: Mapping[str, str]


class KeptRows(Struct, frozen=True):
    """How many rows a later stage replays, and how long they are at most."""

    stage: str
    rows: int
    max_length: int


class StageConfig(Struct, frozen=True, kw_only=True):
    """What a run has to do as one stage of several.

    `earlier`: runs of earlier stages that are evaluated at its end. `keeps`: its held-out rows, for
    later stages. `replayed`: folders of rows that earlier stages have kept for it.
    """

    earlier: tuple[RunDir, ...] = ()
    keeps: bool = False
    keeps_to_replay: tuple[KeptRows, ...] = ()
    replayed: tuple[Path, ...] = ()


class MicroBatches(Struct, frozen=True):
    """How the plan cuts a step's rows: `rows` for each of `num_processes` at once, and
    `accumulation_steps` times so many. The order of rows follows it, whoever trains on them."""

    rows: int = 1
    num_processes: int = 1
    accumulation_steps: int = 1

    @classmethod
    def planned(cls, raw: Mapping[str, Any]) -> MicroBatches:
        arguments = raw["training_arguments"]
        return cls(
            rows=arguments["per_device_train_batch_size"],
            num_processes=raw["num_processes"],
            accumulation_steps=arguments["gradient_accumulation_steps"],
        )

    def accumulation_steps_of(self, num_processes: int) -> int:
        """With which so many processes train on the same rows in a step. Raises InputError where
        they cannot."""
        in_all = self.num_processes * self.accumulation_steps
        if num_processes < 1 or in_all % num_processes:
            able = [str(n) for n in range(1, in_all + 1) if in_all % n == 0]
            raise InputError(
                f"a step of {in_all} micro-batches cannot be shared by {num_processes} GPUs",
                f"use `--num-gpus {' or '.join(able)}`: each step keeps its rows then",
            )
        return in_all // num_processes


class TrainConfig(Struct, frozen=True, kw_only=True):
    """What the training process is to do."""

    model: str
    data: DataConfig
    eval_data: DataConfig | None
    test_share: float
    tasks: RowTasks | None = None
    task_weighting: TaskWeighting = TaskWeighting()
    overlong: str
    hashes: RowHashes
    method: str
    method_settings: Mapping[str, Any]
    loss: str
    training_arguments: Mapping[str, Any]
    rewards: Mapping[str, Any] = {}
    """What judges completions, where the model makes them."""
    adapter: Path | None = None
    """A trained one that goes on being trained."""
    stage: StageConfig | None = None
    micro_batches: MicroBatches = MicroBatches()
    deepspeed: Mapping[str, Any] | None = None
    """DeepSpeed's configuration, where it divides the model."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the metrics besides metrics.jsonl."""
    template: Template = Template(name="model")
    add_tokens: tuple[str, ...] = ()

    @property
    def objective(self) -> str:
        return str(self.method_settings["objective"])

    @property
    def max_length(self) -> int:
        """Of a whole row, the completion that the model makes of it included."""
        if self.rewards:
            return int(self.rewards["max_length"])
        return int(self.training_arguments["max_length"])

    def task_number(self, held_out_row: Row) -> int:
        """The task of a row that is evaluated; 0 where rows have none."""
        if self.tasks is None:
            return 0
        return self.tasks.number(held_out_row, held_out_file=self.eval_data is not None)

    @property
    def completion_length(self) -> int:
        """Tokens that the model adds to a prompt; 0 where rows have their answers."""
        return int(self.training_arguments["max_completion_length"]) if self.rewards else 0

    @property
    def is_quantized(self) -> bool:
        return bool(self.method_settings["quantization"] != "none")


def checked_loss(loss: str, trainer: str) -> str:
    """The loss, if ftplan's training process has it; raises InputError otherwise.

    Both are settings of estimates too, where people ask about what they run elsewhere.
    """
    if trainer != "trl":
        raise InputError(
            f"runs are launched with TRL's trainer; `--trainer {trainer}` is for estimates",
            "leave `--trainer` out",
        )
    if loss == "liger":
        raise InputError(
            "TRL's trainer brings a fused loss of its own; `--loss liger` is for estimates",
            "use `--loss trl-fused`, the default, or `--loss stock`",
        )
    return loss


def read_train_config(run: RunDir) -> TrainConfig:
    """Raises InputError naming the missing key."""
    raw = read_mapping(run.train)
    try:
        planned = MicroBatches.planned(raw)
        return TrainConfig(
            model=str((run.root / raw["model"]).resolve()),
            data=_data_config(run, raw["data"]),
            eval_data=_data_config(run, raw["eval_data"]) if raw["eval_data"] else None,
            test_share=raw["test_share"],
            tasks=RowTasks.from_dict(raw["tasks"]) if raw["tasks"] else None,
            task_weighting=_task_weighting(raw["task_weighting"]),
            overlong=raw["overlong"],
            hashes=_hashes(raw["hashes"]),
            template=Template(name=raw["template"]["name"], text=raw["template"]["text"]),
            add_tokens=tuple(raw["add_tokens"]),
            method=raw["method"],
            method_settings=raw["method_settings"],
            loss=checked_loss(raw["loss"], raw["trainer"]),
            training_arguments=_for_processes(
                _checked_arguments(run, raw["training_arguments"]),
                planned,
                _num_processes() // raw["method_settings"].get("tp_size", 1),
            ),
            micro_batches=planned,
            deepspeed=checked_deepspeed(run, raw["deepspeed"]),
            rewards=raw["rewards"] or {},
            report_to=checked_trackers(raw["report_to"]),
            adapter=run.root / raw["adapter"] if raw.get("adapter") else None,
            stage=_stage_config(run, raw["stage"]) if raw.get("stage") else None,
        )
    except KeyError as error:
        raise InputError(f"`{run.train}` has no `{error.args[0]}`") from error


def _num_processes() -> int:
    """As torch's launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _for_processes(
    arguments: Mapping[str, Any], planned: MicroBatches, num_processes: int
) -> Mapping[str, Any]:
    """The arguments with as many micro-batches a process as make the rows of a planned step."""
    if num_processes == planned.num_processes:
        return arguments
    steps = planned.accumulation_steps_of(num_processes)
    return {**arguments, "gradient_accumulation_steps": steps}


# Of trainers' arguments, what would write or send anything outside of the run directory, run code
# that comes with a model, or load what is no part of the run.
_REFUSED = re.compile(
    r".*_dir|push_to_hub|hub_.*|.*_hub_.*|trackio_.*|resume_from_checkpoint|trust_remote_code"
    r"|.*_init_kwargs|chat_template_path|vllm_.*|accelerator_config|fsdp_config|deepspeed"
)


def _checked_arguments(run: RunDir, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in arguments:
        if _REFUSED.fullmatch(name):
            raise InputError(
                f"`{run.train}` sets `{name}`, which a run may not set for itself",
                f"remove `{name}` from its `training_arguments`",
            )
    return arguments


# Of DeepSpeed's configuration, what its engine reads to divide a model. Others of its settings
# write files and send figures to trackers.
_DEEPSPEED = {"device", "zero_optimization", "bf16", "fp16", "gradient_clipping"} | {
    *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
}


def checked_deepspeed(run: RunDir, config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Raises InputError for settings that ftplan does not write."""
    if config is None:
        return None
    zero = config["zero_optimization"]
    offloads = (zero.get(f"offload_{part}") or {} for part in ("optimizer", "param"))
    elsewhere = {name for offload in offloads for name in offload}
    for name in sorted({*config, *elsewhere} - _DEEPSPEED):
        raise InputError(
            f"`{run.train}` sets `{name}` of DeepSpeed, which a run may not set for itself",
            f"remove `{name}` from its `deepspeed`",
        )
    return config


def _kept_rows(run: RunDir, raw: Mapping[str, Any]) -> KeptRows:
    kept = KeptRows(**raw)
    checked_folder_name(kept.stage, run.train)
    return kept


def _task_weighting(raw: Mapping[str, Any]) -> TaskWeighting:
    return TaskWeighting(
        weighting=raw["weighting"],
        temperature=raw["temperature"],
        weights=tuple(raw["weights"]),
    )


def _hashes(raw: Mapping[str, str]) -> RowHashes:
    return RowHashes(**{name: raw[name] for name in RowHashes.__struct_fields__})


def _stage_config(run: RunDir, raw: Mapping[str, Any]) -> StageConfig:
    return StageConfig(
        earlier=tuple(RunDir(run.root / name) for name in raw["earlier"]),
        keeps=raw["keeps"],
        keeps_to_replay=tuple(_kept_rows(run, kept) for kept in raw["keeps_to_replay"]),
        replayed=tuple(run.root / folder for folder in raw["replayed"]),
    )


def _data_config(run: RunDir, raw: Mapping[str, Any]) -> DataConfig:
    return DataConfig(
        files=tuple(run.root / file for file in raw["files"]),
        sha256=raw["sha256"],
        columns=raw["columns"],
    )
