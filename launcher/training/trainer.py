"""TRL's SFTTrainer as runs use it, and the callback that reports each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from ftplan.launcher.metrics_file import append_row
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.step_seconds import PROFILED_STEPS
from ftplan.launcher.training.importance import importance
from ftplan.launcher.training.measure import (
    CpuAllocationRecorder,
    allocated_peak,
)
from ftplan.launcher.training.order import PlannedOrder
from ftplan.launcher.training.tasks import TaskCollator
from ftplan.launcher.training.token_mean import TokenMeanEvaluation
from ftplan.launcher.training.zero import held_by_engine


class PlannedTrainer(TokenMeanEvaluation, PlannedOrder, SFTTrainer):
    """Plain fine-tuning in the planned order.

    `stock_loss`: the loss from the full logits, as transformers computes it, instead of TRL's
    fused output projection.
    """

    def __init__(self, *args: Any, stock_loss: bool = False, **kwargs: Any) -> None:
        self.stock_loss = stock_loss
        super().__init__(*args, **kwargs)
        if self.tasks is not None:
            trainer: Any = self
            trainer.data_collator = TaskCollator(trainer.data_collator)
            self.tasks.losses.watch(trainer.model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        trainer: Any = self
        if self.tasks is not None and "task_ids" not in trainer._signature_columns:
            # Columns that no model takes are left out of batches.
            trainer._signature_columns = [*trainer._signature_columns, "task_ids"]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = Trainer.compute_loss if self.stock_loss else SFTTrainer.compute_loss
        if self.tasks is None:
            return loss(self, model, inputs, *args, **kwargs)
        with self.tasks.losses.of(inputs.pop("task_ids")):
            return loss(self, model, inputs, *args, **kwargs)


class StepReporter(TrainerCallback):
    """Writes a row of metrics.jsonl for every step."""

    def __init__(self, run: RunDir, recorder: CpuAllocationRecorder) -> None:
        self.run = run
        self.recorder = recorder
        self.trainer: PlannedTrainer | None = None
        self.skipped_step = -1  # has no row: `bad_steps.StepGuard` tells of it
        self.highest: Callable[[], dict[str, int]] = dict  # bytes, before counters were reset
        self._began = 0.0
        self._seconds = 0.0
        self._tokens = 0
        self._first_step = 0
        # Tokens of the longest micro-batches that memory was measured in: the first of their steps,
        # and those that met gradients.
        self.longest = [0, 0]
        self._measures = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step = state.global_step

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.trainer is not None:
            self.trainer.step_tokens, self.trainer.step_longest = 0, [0, 0]
        profiled = state.global_step - self._first_step < PROFILED_STEPS
        self._measures = profiled or args.device.type != "cpu"
        if args.device.type == "cpu" and profiled:
            beside = models_beside(self.trainer)
            remembered = (*importance(model), *held_by_engine(self.trainer))
            self.recorder.start(model, optimizer, beside, remembered)
        _synchronize(args)
        self._began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _synchronize(args)
        self._seconds = time.monotonic() - self._began
        self.recorder.stop()
        self._tokens = self.trainer.step_tokens if self.trainer else 0
        if self.trainer is not None and self._measures:
            self.longest = list(map(max, self.longest, self.trainer.step_longest))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        if state.global_step == self.skipped_step:
            return
        row = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "grad_norm": float(logs["grad_norm"]) if "grad_norm" in logs else None,
            "learning_rate": float(logs["learning_rate"]),
            "epoch": state.epoch,
            "seconds": self._seconds,
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / self._seconds if self._seconds else None,
            "allocated_bytes": allocated_peak(self.recorder, self.highest()),
            **{name: value for name, value in logs.items() if name.startswith(_TOLD)},
            **_task_metrics(self.trainer),
        }
        append_metric(self.run, row)


def models_beside(trainer: Any) -> list[torch.nn.Module]:
    """The reference model, and those that judge completions, where the trainer holds any."""
    judges = [getattr(judge, "model", None) for judge in getattr(trainer, "reward_funcs", ())]
    found = [getattr(trainer, "ref_model", None), *judges]
    return [model for model in found if isinstance(model, torch.nn.Module)]


# Of what TRL's trainers log of a step, what tells how preferences and rewards go.
_TOLD = ("reward", "kl", "completions/mean_length")


def _task_metrics(trainer: Any) -> dict[str, Any]:
    tasks = getattr(trainer, "tasks", None)
    return tasks.metrics if tasks is not None else {}


def append_metric(run: RunDir, row: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    append_row(run.metrics, row)


def _synchronize(args: TrainingArguments) -> None:
    if args.device.type == "cuda":
        torch.cuda.synchronize()
