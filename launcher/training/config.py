"""train.yaml, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.launcher.data.hashes import RowHashes
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.tasks import RowTasks
from ftplan.launcher.run_dir import RunDir, read_mapping
from ftplan.planner.errors import InputError
from ftplan.planner.tasks import TaskWeighting


class DataConfig(Struct, frozen=True, kw_only=True):
    """Files of rows, and how they are read. `sha256`: of what was profiled."""

    files: tuple[Path, ...]
    sha256: str
    columns: Mapping[str, str]


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

    @property
    def objective(self) -> str:
        return str(self.method_settings["objective"])

    @property
    def max_length(self) -> int:
        return int(self.training_arguments["max_length"])

    def task_number(self, held_out_row: Row) -> int:
        """The task of a row that is evaluated; 0 where rows have none."""
        if self.tasks is None:
            return 0
        return self.tasks.number(held_out_row, held_out_file=self.eval_data is not None)

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


def checked_objective(objective: str) -> str:
    """The objective, if ftplan's training process has it; raises InputError otherwise."""
    if objective == "grpo":
        raise InputError(
            "prompts alone are for online methods, which need a reward function: "
            "`--objective grpo` is for estimates",
            "add answers to the rows, or ask `ftplan estimate MODEL --objective grpo`",
        )
    return objective


def read_train_config(run: RunDir) -> TrainConfig:
    """Raises InputError naming the missing key."""
    raw = read_mapping(run.train)
    try:
        checked_objective(raw["method_settings"]["objective"])
        return TrainConfig(
            model=raw["model"],
            data=_data_config(run, raw["data"]),
            eval_data=_data_config(run, raw["eval_data"]) if raw["eval_data"] else None,
            test_share=raw["test_share"],
            tasks=RowTasks.from_dict(raw["tasks"]) if raw["tasks"] else None,
            task_weighting=_task_weighting(raw["task_weighting"]),
            overlong=raw["overlong"],
            hashes=_hashes(raw["hashes"]),
            method=raw["method"],
            method_settings=raw["method_settings"],
            loss=checked_loss(raw["loss"], raw["trainer"]),
            training_arguments=raw["training_arguments"],
        )
    except KeyError as error:
        raise InputError(f"`{run.train}` has no `{error.args[0]}`") from error


def _task_weighting(raw: Mapping[str, Any]) -> TaskWeighting:
    return TaskWeighting(
        weighting=raw["weighting"],
        temperature=raw["temperature"],
        weights=tuple(raw["weights"]),
    )


def _hashes(raw: Mapping[str, str]) -> RowHashes:
    return RowHashes(**{name: raw[name] for name in RowHashes.__struct_fields__})


def _data_config(run: RunDir, raw: Mapping[str, Any]) -> DataConfig:
    return DataConfig(
        files=tuple(run.root / file for file in raw["files"]),
        sha256=raw["sha256"],
        columns=raw["columns"],
    )
