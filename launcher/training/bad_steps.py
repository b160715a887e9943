"""Bad numbers in training: steps that are not finite are skipped and recorded, and a run that only
makes bad steps ends with causes and remedies. Rules and thresholds: `planner.bad_steps`."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftplan.launcher.run_dir import RunDir, read_mapping
from ftplan.launcher.training.config import TrainConfig
from ftplan.launcher.training.rows import TrainingRows
from ftplan.launcher.training.trainer import StepReporter, append_metric
from ftplan.launcher.training.zero import loss_scale
from ftplan.planner.bad_steps import (
    DEAD_STEPS,
    EXPLODED_STEPS,
    LOWEST_LOSS_SCALE,
    SAID,
    SKIPPED,
    SPIKE,
    Circumstances,
    LossLevel,
    SkipCount,
    Trouble,
    remedies,
)
from ftplan.planner.errors import InputError, RunFailedError

# Enough to tell rows apart, and nothing to read them from.
_HASH_DIGITS = 12

# What `torch.multinomial` says where no token can be drawn. On a GPU it is an assertion of the
# device, which may be any other.
_SAMPLING_FAILED = ("probability tensor contains either",)

# Rows that one event names; a step may have thousands.
_ROWS_NAMED = 32


class BatchRows:
    """Which rows of the dataset each micro-batch of this process holds: noted as they are fetched,
    and taken off in the same order as steps use them up."""

    def __init__(self) -> None:
        self._fetched: deque[list[int]] = deque()

    def follow(self, loader: Any) -> None:
        """Watch the dataset of a prepared data loader. torch's fetcher asks it for whole batches by
        `__getitems__`; where a worker process does so, nothing is noted here."""
        self._fetched.clear()
        dataset = getattr(loader, "dataset", None)
        fetch = getattr(dataset, "__getitems__", None)
        if dataset is None or fetch is None or getattr(fetch, "is_followed", False):
            return

        def fetched(rows: list[int]) -> Any:
            self._fetched.append([int(row) for row in rows])
            return fetch(rows)

        fetched.is_followed = True  # type: ignore[attr-defined]
        dataset.__getitems__ = fetched

    def take(self) -> list[int]:
        """Rows of the next micro-batch; none where they are not known."""
        return self._fetched.popleft() if self._fetched else []


class StepGuard(TrainerCallback):
    """Watches a trainer's losses and gradients. `failure`: why the run has to end, None so far."""

    def __init__(
        self,
        trainer: Any,
        run: RunDir,
        config: TrainConfig,
        rows: TrainingRows,
        reporter: StepReporter,
    ) -> None:
        self.trainer = trainer
        self.run = run
        self.config = config
        self.rows = rows
        self.reporter = reporter
        self.failure: RunFailedError | None = None
        self.batches = BatchRows()
        self.skips = SkipCount()
        self.level = LossLevel()
        self._losses: list[torch.Tensor] = []
        self._batches: list[list[int]] = []
        self._grad_norm = 0.0
        self._common: set[str] | None = None  # rows of every skipped step
        self._without_loss = 0
        self._wrap()

    def _wrap(self) -> None:
        """See the loss of every micro-batch and the norm of every gradient, whichever trainer of
        transformers' or TRL's makes them."""
        trainer, step, norm = self.trainer, self.trainer.training_step, self.trainer._get_grad_norm

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._batches.append(self.batches.take())
            try:
                loss = step(*args, **kwargs)
            except RuntimeError as error:
                if not any(said in str(error) for said in _SAMPLING_FAILED):
                    raise
                self._record(self.trainer.state.global_step + 1, "sampling", [-1])
                raise self._failed(SAID["sampling"], "sampling") from error
            self._losses.append(loss.detach())
            return loss

        def get_grad_norm(*args: Any, **kwargs: Any) -> Any:
            found = norm(*args, **kwargs)
            self._grad_norm = float(found)
            return found

        trainer.training_step = training_step
        trainer._get_grad_norm = get_grad_norm

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.batches.follow(self.trainer.callback_handler.train_dataloader)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.batches.follow(parts.get("train_dataloader"))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self._losses, self._batches = [], []

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **parts: Any,
    ) -> None:
        optimizer._is_overflow = False  # of the step before
        bad_batches = [
            number for number, loss in enumerate(self._losses) if not torch.isfinite(loss).all()
        ]
        trouble = self._trouble(bool(bad_batches))
        self.skips.add(skipped=trouble is not None)
        if trouble is None:
            return
        self._skip(optimizer)
        step = state.global_step + 1
        self.reporter.skipped_step = step
        # A gradient is that of all rows; a loss, perhaps on another process, that of some.
        every = range(len(self._batches))
        self._record(step, trouble, bad_batches if trouble == "loss" else every)
        why = self.skips.verdict()
        if steps_in_backward(str(args.optim)):
            why = f"in step {step}, which `{args.optim}` takes while gradients are computed"
        if why:
            self.failure = self._failed(f"{SAID[trouble]} {why}", trouble)

    def _trouble(self, bad_loss: bool) -> Trouble | None:
        """What is wrong with this step, of any process; all come to the same answer."""
        scaler = self.trainer.accelerator.scaler
        scale = loss_scale(self.trainer) if scaler is None else float(scaler.get_scale())
        bad_gradient = not math.isfinite(self._grad_norm)
        if scale is None:
            overflow = False
        else:  # what has it skips such steps itself, looking for its scale
            overflow = bad_gradient and scale < LOWEST_LOSS_SCALE
            bad_gradient = False
        found = self._of_any([bad_loss, bad_gradient, overflow])
        names: tuple[Trouble, ...] = ("loss", "gradient", "overflow")
        return next((name for name, is_so in zip(names, found, strict=True) if is_so), None)

    def _of_any(self, flags: Sequence[bool]) -> list[bool]:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return list(flags)
        mine = torch.tensor(flags, dtype=torch.int32, device=accelerator.device)
        return [bool(count) for count in accelerator.reduce(mine, "sum").tolist()]

    def _skip(self, optimizer: Any) -> None:
        """Leave weights, optimizer states and the schedule as they are: the trainer's next call of
        `optimizer.step` does nothing, and says that it has not."""
        scaler, usual = self.trainer.accelerator.scaler, optimizer.step

        def step(closure: Any = None) -> None:
            optimizer.step = usual
            if scaler is not None:  # gradients are unscaled; the scale is not at fault
                scaler.update(scaler.get_scale())
            optimizer._is_overflow = True

        optimizer.step = step

    def _record(self, step: int, trouble: Trouble, bad_batches: Sequence[int]) -> None:
        mine = sorted({row for number in bad_batches for row in self._batches[number]})
        found = [named for each in self._of_all(self._named(mine)) for named in each]
        rows = {f"row {row['number']} of {row['file']}" for row in found if "number" in row}
        self._common = rows if self._common is None else self._common & rows
        self._without_loss += sum(row.get("tokens_with_loss") == 0 for row in found)
        if self.trainer.is_world_process_zero():
            append_metric(
                self.run,
                {
                    "event": SKIPPED,
                    "at_step": step,
                    "why": trouble,
                    "num_rows": len(found),
                    "rows": found[:_ROWS_NAMED],
                },
            )

    def _named(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [self._name(row) for row in rows]

    def _name(self, row: int) -> dict[str, Any]:
        """Where a row is in the data, and a hash of its tokens; never its text."""
        values = self.rows.dataset[row]
        tokens = json.dumps(values, sort_keys=True, default=str).encode()
        name: dict[str, Any] = {"sha256": hashlib.sha256(tokens).hexdigest()[:_HASH_DIGITS]}
        source = self.rows.source(row)
        if source is not None:
            file, number = source
            name = {"file": self.config.data.files[file].name, "number": number, **name}
        if row < len(self.rows.lengths):
            name["tokens"] = int(self.rows.lengths[row])
        if "labels" in values:
            name["tokens_with_loss"] = sum(label >= 0 for label in values["labels"][1:])
        return name

    def _of_all(self, mine: Any) -> list[Any]:
        if self.trainer.accelerator.num_processes == 1:
            return [mine]
        every: list[Any] = [None] * self.trainer.accelerator.num_processes
        torch.distributed.all_gather_object(every, mine)
        return every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> TrainerControl:
        if self.failure is not None:
            # The weights are those of the last good step, unless the optimizer went ahead.
            control.should_save = not steps_in_backward(str(args.optim))
            control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **parts: Any,
    ) -> TrainerControl:
        """The mean loss of all processes, which each of them is told."""
        step = state.global_step
        if not logs or "loss" not in logs or self.reporter.skipped_step == step:
            return control
        if self.config.rewards:  # such a loss is around 0, whatever the model learns
            return control
        loss, level = float(logs["loss"]), self.level.level
        if self.level.add(loss, self._grad_norm) and state.is_world_process_zero:
            self._record_spike(step, loss, level)
        if self.failure is None and self.level.has_exploded():
            said = (
                f"the loss has exploded: {loss:.3g} at step {step}, where {level:.3g} was usual; "
                f"for {EXPLODED_STEPS} steps it has not come back"
            )
            self.failure = self._failed(said, "explosion")
        elif self.failure is None and self.level.is_dead():
            said = (
                f"nothing is learned any more: the gradient was exactly 0 in {DEAD_STEPS} steps "
                f"in a row, and the loss is {loss:.3g}"
            )
            self.failure = self._failed(said, "dead")
        if self.failure is not None:
            control.should_training_stop = True
        return control

    def _record_spike(self, step: int, loss: float, level: float | None) -> None:
        rows = sorted({row for batch in self._batches for row in batch})
        append_metric(
            self.run,
            {
                "event": SPIKE,
                "at_step": step,
                "loss": loss,
                "level": level,
                "grad_norm": self._grad_norm,
                "num_rows": len(rows),
                "rows": self._named(rows[:_ROWS_NAMED]),
            },
        )

    def _failed(self, said: str, trouble: Any) -> RunFailedError:
        settings, arguments = self.config.method_settings, self.config.training_arguments
        found = Circumstances(
            mixed_precision=settings["mixed_precision"],
            dtype=_published_dtype(self.config.model),
            learning_rate=arguments["learning_rate"],
            max_grad_norm=arguments["max_grad_norm"],
            bad_weights=bad_weights(self.trainer.model),
            rows_without_loss=self._without_loss,
            one_row=next(iter(self._common or ())) if len(self._common or ()) == 1 else "",
        )
        return RunFailedError(said, "; ".join(remedies(trouble, found)))


def bad_weights(model: Any) -> str:
    """The name of the first floating-point weight that is not finite throughout."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            return str(name).removeprefix("base_model.model.")  # PEFT's
    return ""


def steps_in_backward(optim: str) -> bool:
    """Whether an optimizer changes each weight as soon as its gradient is there, so that no step
    can be skipped: LOMO, and what transformers calls layerwise."""
    return "lomo" in optim or optim.endswith("layerwise")


def _published_dtype(model: str) -> str:
    try:
        config = read_mapping(Path(model) / "config.json")
    except InputError:
        return ""
    return str(config.get("dtype") or config.get("torch_dtype") or "")
