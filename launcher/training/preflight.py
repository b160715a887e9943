"""Before the first step: what the machine has now, and two steps tried on the longest batches.

The trial is the run's own first two steps, which have the longest batches, with gradients of zero
and a learning rate of zero, so that no weight moves; and one evaluation batch while gradients and
optimizer states are there. Memory that runs out in it is answered as in any step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from transformers import DefaultFlowCallback, TrainerCallback

from ftplan.launcher.host import ram_bytes
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training.config import TrainConfig
from ftplan.launcher.training.measure import CpuAllocationRecorder, local_tensor, measured_memory
from ftplan.launcher.training.sharded import reshard
from ftplan.planner.errors import InputError, RunFailedError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.units import format_bytes

# What a row of metrics.jsonl, and record.json, call it.
PREFLIGHT = "preflight"

TRIAL_STEPS = 2

# On a processor the trial costs as much as two steps, and what it saves is a kill by the kernel: it
# is made where the plan needs more than this share of the RAM that is available.
TIGHT_ON_CPU = 0.8

Row = dict[str, Any]


# --- the machine


def check_machine(run: RunDir, config: TrainConfig, *, resume: bool) -> list[str]:
    """What a person should know before loading begins. Raises InputError or RunFailedError where
    the run cannot go on here."""
    written = run.read_plan()
    needs = written.get("needs", {})  # plans of before have none
    _check_writable(run)
    _check_disk(run, needs.get("disk_bytes", 0), resume=resume)
    if config.training_arguments["use_cpu"]:
        return []
    _check_features(config)
    lacking = list(_lacking_ram(needs.get("host_ram_bytes", 0)))
    with contextlib.suppress(InputError):  # a GPU that the catalog lacks may train all the same
        gpus = probe_machine(run_dir=run.root).gpus
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank < len(gpus):
            lacking += lacking_gpu(gpus[rank], required_bytes(written))
    return lacking


def _check_writable(run: RunDir) -> None:
    for folder in (run.root, run.checkpoints):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(
                f"`{folder}` cannot be written",
                "change its rights, or plan again with another `--runs-dir`",
            )


def _check_disk(run: RunDir, needed: int, *, resume: bool) -> None:
    written = run.checkpoints.rglob("*") if resume else ()
    needed -= sum(path.stat().st_size for path in written if path.is_file())
    free = shutil.disk_usage(run.root).free
    if needed > free:
        raise RunFailedError(
            f"checkpoints, the trained model and the rows take {format_bytes(needed)}, and "
            f"`{run.root}` has {format_bytes(free)} free",
            "free some disk, or plan again with another `--runs-dir`",
        )


def _check_features(config: TrainConfig) -> None:
    """Raises InputError for what the plan asks of the GPU or of packages that is not there."""
    settings, arguments = config.method_settings, config.training_arguments
    if not torch.cuda.is_available():
        raise InputError("torch sees no GPU here", "`ftplan doctor` says why")
    if (
        arguments["bf16"]
        and torch.cuda.get_device_capability()[0] < 8
        and torch.version.hip is None
    ):
        raise InputError(
            f"{torch.cuda.get_device_name()} does not compute in bfloat16",
            "plan again on this machine, or with `--mixed-precision fp16`",
        )
    needs = {
        "bitsandbytes": settings["quantization"] != "none" or "bnb" in arguments["optim"],
        "flash_attn": settings["attn_implementation"] == "flash_attention_2",
    }
    for package, needed in needs.items():
        if needed and importlib.util.find_spec(package) is None:
            raise InputError(
                f"the plan needs the package `{package}`, which is not installed",
                "`ftplan doctor` says how to install it; or plan again without it",
            )


def required_bytes(written: Mapping[str, Any]) -> int:
    """What plan.yaml says that the device must have free; 0 where it does not say."""
    return int(written.get("estimate", {}).get("per_gpu", {}).get("required_bytes", 0))


def lacking_gpu(gpu: Device, required: int) -> Iterator[str]:
    if required <= gpu.free_bytes:
        return
    others = [holder for holder in gpu.holders if holder.pid != os.getpid()]
    held = ", ".join(
        f"{one.name} (process {one.pid}) holds {format_bytes(one.used_bytes)}"
        for one in others
        if one.used_bytes is not None
    )
    yield (
        f"the plan needs {format_bytes(required)}, {format_bytes(gpu.free_bytes)} is free on "
        f"{gpu.name} now{f': {held}' if held else ''}"
    )


def _lacking_ram(needed: int) -> Iterator[str]:
    _, available = ram_bytes()
    if needed > available:
        yield (
            f"loading and training take {format_bytes(needed)} of the host's RAM, "
            f"{format_bytes(available)} is available now"
        )


# --- the trial


def is_worth_trying(run: RunDir, config: TrainConfig) -> bool:
    """On a GPU always, on a processor where memory is tight. Not where completions are generated,
    whose lengths no trial knows."""
    if OBJECTIVES[config.objective].generates:
        return False
    return not config.training_arguments["use_cpu"] or is_tight(run)


def is_tight(run: RunDir) -> bool:
    """Whether a processor's plan needs nearly all the RAM that is available."""
    _, available = ram_bytes()
    return required_bytes(run.read_plan()) > TIGHT_ON_CPU * available


def has_moved_weights(run: RunDir) -> bool:
    """Whether a trial of this run has, in an earlier process too: it is not made again."""
    rows = (row for row in run.metric_rows() if row.get("event") == PREFLIGHT)
    return any(row.get("weights_moved") for row in rows)


# In metrics.jsonl where a trial has moved a weight.
MOVED_ROW: Row = {
    "event": PREFLIGHT,
    "weights_moved": True,
    "said": "the trial of the longest batches moved weights: training begins anew without it",
}


def preflight_record(run: RunDir) -> Row:
    """`preflight` of record.json, where something was tried."""
    rows = [row for row in run.metric_rows() if row.get("event") == PREFLIGHT and "measured" in row]
    told = ("measured", "predicted")
    return {PREFLIGHT: {name: rows[-1][name] for name in told}} if rows else {}


class WeightsMovedError(Exception):
    """The trial has changed a weight: the trainer is of no use any more."""


def try_longest_batches(trainer: Any, predicted: Mapping[str, Any]) -> Row:
    """A row of metrics.jsonl with what two steps and an evaluation batch take, beside what was
    predicted. Leaves weights, random states and the trainer as they were.

    Raises WeightsMovedError where it could not.
    """
    before = _fingerprint(trainer.model)
    with _as_it_was(trainer), _changed(trainer.args, **_trial_arguments(trainer.args)):
        trainer.train()
    if _fingerprint(trainer.model) != before:
        raise WeightsMovedError
    measured = measured_memory(CpuAllocationRecorder())
    names = ("allocated_bytes", "reserved_bytes", "device_bytes")
    return {
        "event": PREFLIGHT,
        "measured": {name: measured[name] for name in names},
        "predicted": {name: predicted.get(name) for name in names},
        "said": f"tried the longest batches: {_beside(measured, predicted)}",
    }


def _beside(measured: Mapping[str, int | None], predicted: Mapping[str, Any]) -> str:
    taken, expected = measured["device_bytes"], predicted.get("device_bytes")
    if taken is None:
        return "there is room for them"
    said = f"{format_bytes(taken)} taken"
    return f"{said}, {format_bytes(expected)} predicted" if expected else said


def _trial_arguments(args: Any) -> dict[str, Any]:
    return {
        "max_steps": TRIAL_STEPS,
        # Enough for gradients to be there while a micro-batch goes backward.
        "gradient_accumulation_steps": min(2, args.gradient_accumulation_steps),
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "save_strategy": type(args.save_strategy)("no"),
    }


class _Trial(TrainerCallback):
    """Takes gradients away before a step, and evaluates a batch after the last."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for parameter in self.trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == TRIAL_STEPS - 1:  # counted after this
            _evaluate_longest(self.trainer)


def _evaluate_longest(trainer: Any) -> None:
    """One evaluation batch, of the longest held-out rows."""
    dataset = trainer.eval_dataset
    if dataset is None or not len(dataset):
        return
    column = next((c for c in ("input_ids", "chosen_ids") if c in dataset.column_names), None)
    if column is not None:
        lengths = [len(row) for row in dataset[column]]
        longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        dataset = dataset.select(longest[: trainer.args.per_device_eval_batch_size])
    batch = next(iter(trainer.get_eval_dataloader(dataset)))
    trainer.model.eval()
    trainer.prediction_step(trainer.model_wrapped, batch, True)
    trainer.model.train()


@contextlib.contextmanager
def _changed(args: Any, **changed: Any) -> Iterator[None]:
    kept = {name: getattr(args, name) for name in changed}
    _set(args, changed)
    try:
        yield
    finally:
        _set(args, kept)


def _set(args: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        object.__setattr__(args, name, value)  # they are checked where they are made


@contextlib.contextmanager
def _as_it_was(trainer: Any) -> Iterator[None]:
    """A trainer without callbacks but the trial's, its state and the random numbers put back."""
    handler, tasks = trainer.callback_handler, getattr(trainer, "tasks", None)
    callbacks, mode = handler.callbacks, trainer.model.training
    random_states, of_tasks = _random_states(), tasks.state() if tasks is not None else None
    counted = getattr(trainer, "_total_train_tokens", None)
    state, control = trainer.state, trainer.control
    handler.callbacks = [DefaultFlowCallback(), _Trial(trainer)]
    try:
        yield
    finally:
        handler.callbacks = callbacks
        trainer.model.zero_grad(set_to_none=True)
        trainer.optimizer = trainer.lr_scheduler = None
        handler.optimizer = handler.lr_scheduler = handler.train_dataloader = None
        trainer.state, trainer.control = state, control
        trainer.model.train(mode)
        if counted is not None:
            trainer._total_train_tokens = counted
        for metrics in getattr(trainer, "_metrics", {}).values():
            metrics.clear()
        if tasks is not None:
            tasks.restore(of_tasks)
            tasks.losses.clear()
        trainer.begin_anew()
        trainer.accelerator.free_memory()
        random_states()


def _random_states() -> Callable[[], None]:
    """Of all generators that training draws from; call what is returned to put them back."""
    python, of_numpy, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back() -> None:
        random.setstate(python)
        numpy.random.set_state(of_numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return put_back


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(model: torch.nn.Module) -> list[int]:
    """The sum of each trained weight's bits, of those that this process holds."""
    reshard(model)
    return [
        int(weights.view(_INTEGERS[weights.element_size()]).sum(dtype=torch.int64))
        for weights in (local_tensor(p.detach()) for p in model.parameters() if p.requires_grad)
    ]
