"""What happens when memory runs out: something is given up, and the run goes on.

In forward and backward the weights are still those after the step before, so the step is computed
again in smaller pieces. Where the state may be torn, the run goes on from its last checkpoint, or
from its start. On several GPUs it does so everywhere: the other ranks wait in a collective, and end
when this one does.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from msgspec import Struct, convert, structs

from ftplan.launcher.host import ram_bytes, read_text
from ftplan.launcher.metrics_file import append_row
from ftplan.launcher.next_plans import num_next_plans, take_next_plan
from ftplan.launcher.processes import descendants
from ftplan.launcher.run_dir import RunDir, read_mapping, write_json, write_text
from ftplan.launcher.training.config import TrainConfig
from ftplan.launcher.training.labels import predicted
from ftplan.planner.errors import RunFailedError
from ftplan.planner.out_of_memory import (
    EVENT,
    Change,
    Lowered,
    Place,
    next_change,
    row_pieces,
)
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.units import format_bytes

T = TypeVar("T")

# Exit status of a process whose run is to be started again as it stands (EX_TEMPFAIL).
AGAIN = 75

# How libraries say that memory is gone where they raise no torch.OutOfMemoryError: CUDA's, HIP's
# and MPS's own calls and bitsandbytes' ("out of memory"), cuBLAS, cuDNN and cuSOLVER, torch's and
# the system's allocators of host memory. accelerate 1.15, utils/memory.py
# `should_reduce_batch_size`; c10/core/impl/alloc_cpu.cpp.
_FORMS = re.compile(
    r"\bout of memory\b"
    r"|CU(?:BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
    r"|[Cc]annot allocate memory"
    r"|std::bad_alloc"
)
_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

# Which part of a run a function is; of those on the stack the innermost.
_PLACES: Mapping[str, Place] = {
    "build_trainer": "load",
    "_inner_training_loop": "optimizer step",
    "training_step": "forward",
    "backward": "backward",
    "_save_checkpoint": "save",
    "save": "save",
    "_evaluate": "evaluation",
    "evaluate": "evaluation",
    "_of_stages": "evaluation",
}

# torch's older, reentrant function needs hooks that a trainer sets when it is made.
_CHECKPOINTING = {"use_reentrant": False}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory has run out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and _FORMS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class Trouble(Struct, frozen=True, kw_only=True):
    """Where memory ran out, and what the allocator says of it."""

    place: Place
    said: str
    figures: Mapping[str, int | None]

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        return cls(
            place=_place_of(error.__traceback__), said=said, figures=allocator_figures(str(error))
        )


def _place_of(traceback: TracebackType | None) -> Place:
    place: Place = "load"
    while traceback is not None:
        place = _PLACES.get(traceback.tb_frame.f_code.co_name, place)
        traceback = traceback.tb_next
    return place


def allocator_figures(said: str = "") -> dict[str, int | None]:
    """Bytes by the allocator's own count; on a processor the kernel's. `requested_bytes` is what
    the error names."""
    found = _REQUEST.search(said)
    requested = int(float(found[1]) * _UNITS[found[2]]) if found else None
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        stats = torch.cuda.memory_stats()
        free, total = torch.cuda.mem_get_info()
        return {
            "requested_bytes": requested,
            "allocated_bytes": stats.get("allocated_bytes.all.current"),
            "allocated_peak_bytes": stats.get("allocated_bytes.all.peak"),
            "reserved_bytes": stats.get("reserved_bytes.all.current"),
            "free_bytes": free,
            "total_bytes": total,
        }
    _, available = ram_bytes()
    return {"requested_bytes": requested, "free_bytes": available}


class StartAgain(Exception):
    """What has been given up takes effect with the run's next start."""


class Recovery:
    """What a run computes with, and what it gives up when memory runs out.

    `lowered` is written to the run directory at every change, so that a resume goes on with it.
    """

    def __init__(self, run: RunDir, config: TrainConfig, *, tried: bool = False) -> None:
        """`tried`: whether the longest batches have been, before another start."""
        self.run = run
        self.tried = tried
        self.config = config
        self.lowered = _read_lowered(run, config)
        # DeepSpeed's engine is made once in a process, on one GPU too.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.is_distributed = several or config.deepspeed is not None
        self._next_plan: int | None = None

    @property
    def plan(self) -> TrainingPlan:
        """plan.yaml's, with what train.yaml says of rows."""
        arguments = self.config.training_arguments
        plan = ReasonedPlan.from_dict(self.run.read_plan()["plan"]).plan
        return plan.replace(
            per_device_train_batch_size=arguments["per_device_train_batch_size"],
            gradient_accumulation_steps=arguments["gradient_accumulation_steps"],
        )

    @property
    def redoes_steps(self) -> bool:
        """Whether a step that has failed in forward or backward has left the weights as they were,
        and no other process waits for it."""
        return not self.is_distributed and not self.plan.optimizer.steps_in_backward

    def lowered_config(self) -> TrainConfig:
        """The configuration with what is set before a trainer is made."""
        if not self.lowered.checkpoints_all:
            return self.config
        changed = {
            **self.config.training_arguments,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": _CHECKPOINTING,
        }
        return structs.replace(self.config, training_arguments=changed)

    def give_up(self, trouble: Trouble) -> Change:
        """Choose, record and keep what is given up next. Raises RunFailedError where nothing is
        left."""
        left = num_next_plans(self.run) - self.lowered.plans_used
        change = next_change(self.plan, self.lowered, trouble.place, left)
        self._tell(trouble, change)
        if change is None:
            raise self._ended(trouble)
        if change.lowered.plans_used > self.lowered.plans_used:
            self._next_plan = change.lowered.plans_used
        else:
            self.lowered = change.lowered
            write_json(self.run.lowered, structs.asdict(self.lowered))
        return change

    def in_place(self, trouble: Trouble, trainer: Any) -> None:
        """Give something up and let `trainer` go on with it. Raises StartAgain where it cannot."""
        before = self.lowered
        self.give_up(trouble)
        if self.is_distributed or self._next_plan is not None:
            raise StartAgain
        release_memory()
        self.apply(trainer)
        if self.lowered.checkpoints_all and not before.checkpoints_all:
            trainer.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=_CHECKPOINTING
            )

    def apply(self, trainer: Any) -> None:
        """Have a trainer compute with so many rows at once."""
        trainer.recovery = self
        if not isinstance(trainer, InPieces) or not trainer.is_divisible:
            trainer.args.per_device_eval_batch_size = self.lowered.eval_rows

    def evaluated(self, evaluate: Callable[[], T], trainer: Any) -> T:
        """An evaluation, which changes nothing: it is begun anew with fewer rows at once."""
        while True:
            try:
                return evaluate()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                trouble = Trouble.of(error)
            self.in_place(trouble, trainer)

    def saved(self, save: Callable[[], T], trainer: Any) -> T:
        """What has been trained, saved; without the optimizer's states where there is no room for
        both."""
        try:
            return save()
        except Exception as error:
            if not is_out_of_memory(error) or self.is_distributed:
                raise
            trouble = Trouble.of(error)
        self._note(trouble, "the optimizer's states", "training has ended, and they are not saved")
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
        trainer.accelerator.free_memory()
        trainer.model.zero_grad(set_to_none=True)
        release_memory()
        return save()

    def record(self) -> dict[str, Any]:
        """`out_of_memory` of record.json, where memory has run out."""
        rows = [row for row in self.run.metric_rows() if row.get("event") == EVENT]
        return {"out_of_memory": rows} if rows else {}

    def note_checkpoint(self, trouble: Trouble, *, again: bool) -> None:
        if again:
            self._note(trouble, "free blocks of memory", "the checkpoint is written again")
        else:
            self._note(trouble, "this checkpoint", "training goes on, and the one before is kept")

    def make_ready(self, trouble: Trouble | None) -> bool:
        """Make ready for another start, where `trouble` is given it gives something up first;
        whether that goes on from a checkpoint. On several GPUs the process ends here."""
        if trouble is not None:
            self.give_up(trouble)
        number = self._next_plan
        if number is not None:
            take_next_plan(self.run, number)
            kept = [row for row in self.run.metric_rows() if row.get("event") == EVENT]
            write_text(self.run.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        if self.is_distributed:
            self._end_for_another_start()
        release_memory()
        return number is None

    def _end_for_another_start(self) -> None:
        """The launcher starts all ranks anew; a rank that has gone lets none of them go on."""
        write_json(self.run.status, {"stage": EVENT, "pid": os.getpid(), "again": True})
        sys.stdout.flush()
        sys.stderr.flush()
        _end_other_ranks()
        os._exit(AGAIN)  # torch's own end would wait for the other ranks

    def _tell(self, trouble: Trouble, change: Change | None) -> None:
        if change is None:
            self._note(trouble, None, None)
        else:
            self._note(trouble, change.what, change.why, structs.asdict(change.lowered))

    def _note(
        self, trouble: Trouble, what: str | None, why: str | None, now: Mapping[str, Any] = {}
    ) -> None:
        """A row of metrics.jsonl; `said` of it is what the terminal shows."""
        steps = [row["step"] for row in self.run.metric_rows() if "step" in row]
        said = f"memory ran out in {_PLACE_TITLES[trouble.place]}{_asked(trouble)}"
        row = {
            "event": EVENT,
            "place": trouble.place,
            "at_step": max(steps, default=0) + 1,
            "error": trouble.said,
            **trouble.figures,
            "what": what,
            "why": why,
            "now": dict(now) or None,
            "said": f"{said}; {f'{what}: {why}' if what else 'nothing is left to give up'}",
        }
        append_row(self.run.metrics, row)

    def _ended(self, trouble: Trouble) -> RunFailedError:
        checkpoint = self.run.last_checkpoint()
        rows = self.lowered.train_rows
        hint = "take a shorter `--max-length`, a smaller model, or a larger GPU"
        if trouble.place == "save" and checkpoint is not None:
            hint = f"end other programs, then go on with `ftplan resume {self.run.quoted}`"
        write_json(self.run.status, {"stage": "failed", "pid": os.getpid()})
        return RunFailedError(
            f"out of memory in {_PLACE_TITLES[trouble.place]} with {rows} row"
            f"{'' if rows == 1 else 's'} at once, and nothing is left to give up: {trouble.said}",
            hint,
        )


_PLACE_TITLES: Mapping[Place, str] = {
    "load": "loading the model",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer step": "the optimizer's step",
    "evaluation": "evaluation",
    "save": "saving",
}


def _end_other_ranks() -> None:
    """Of this machine. They wait in a collective, and torch's launcher would give them half a
    minute before it ends them."""
    if (run_id := os.environ.get("TORCHELASTIC_RUN_ID")) is None:
        return
    own = f"TORCHELASTIC_RUN_ID={run_id}"
    for pid in descendants(os.getppid()):
        environ = read_text(Path(f"/proc/{pid}/environ")).split("\0")
        if pid != os.getpid() and own in environ:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _asked(trouble: Trouble) -> str:
    requested, free = trouble.figures["requested_bytes"], trouble.figures["free_bytes"]
    if requested is None or free is None:
        return ""
    return f" ({format_bytes(requested)} asked for, {format_bytes(free)} free)"


def _read_lowered(run: RunDir, config: TrainConfig) -> Lowered:
    """As planned, but for what has been given up."""
    arguments = config.training_arguments
    every = (arguments.get("gradient_checkpointing_kwargs") or {}).get("every_n_layers", 1)
    planned = {
        "train_rows": arguments["per_device_train_batch_size"],
        "eval_rows": arguments["per_device_eval_batch_size"],
        "checkpoints_all": bool(arguments["gradient_checkpointing"]) and every == 1,
    }
    given_up = read_mapping(run.lowered) if run.lowered.is_file() else {}
    return convert({**planned, **given_up}, Lowered)


def release_memory() -> None:
    """Give back what nothing refers to, the allocator's free blocks too."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def carried_through(
    run: RunDir,
    read_config: Callable[[RunDir], TrainConfig],
    attempt: Callable[[Recovery, bool | str], int],
    *,
    resume: bool | str,
) -> int:
    """The exit status of `attempt`, which is made again where memory runs out and the state of the
    run may be torn. It is told whether to go on from a checkpoint."""
    tried = False
    while True:
        recovery = Recovery(run, read_config(run), tried=tried)
        try:
            return attempt(recovery, resume)
        except StartAgain:
            trouble = None
        except Exception as error:
            if not is_out_of_memory(error) or isinstance(error, RunFailedError):
                raise
            trouble = Trouble.of(error)
        # Out of the handlers, so that no traceback holds on to the model.
        tried = recovery.tried
        resume = recovery.make_ready(trouble)


class InPieces:
    """For trainers of transformers: a micro-batch is computed in pieces of as many rows as there is
    memory for, with the loss and the gradients of the whole.

    `recovery`: None before a run has one. `is_divisible`: whether the loss of a micro-batch is that
    of its rows. `has_pairs`: whether a batch has the chosen answers first, and as many rejected
    ones behind.
    """

    recovery: Recovery | None = None
    is_divisible = True
    has_pairs = False
    _step: int | None = None
    _seen: list[tuple[Any, ...]]

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        if self.recovery is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self._step != trainer.state.global_step:
            self._step, self._seen = trainer.state.global_step, []
        self._seen.append((inputs, num_items_in_batch))
        begun = [(inputs, num_items_in_batch)]
        while True:
            try:
                return self._computed(model, begun)
            except Exception as error:
                if not is_out_of_memory(error) or not self.recovery.redoes_steps:
                    raise
                trouble = Trouble.of(error)
            self.recovery.in_place(trouble, self)
            begun = self._seen  # what was left of the step's gradients may be half of them
            self._forget_gradients(model)

    def begin_anew(self) -> None:
        """Forget the step at hand: the next one may have its number."""
        self._step = None

    def _computed(self, model: Any, batches: list[tuple[Any, ...]]) -> Any:
        """The last micro-batch's loss; gradients of all of them."""
        trainer: Any = self
        for inputs, num_items in batches[:-1]:
            with trainer.accelerator.no_sync(model=model):
                self._whole(model, inputs, num_items)
        return self._whole(model, *batches[-1])

    def _whole(self, model: Any, inputs: dict[str, Any], num_items: Any) -> Any:
        trainer: Any = self
        shares = self._shares(inputs, trainer.recovery.lowered.train_rows, num_items)
        steps, total = trainer.current_gradient_accumulation_steps, 0.0
        try:
            for number, (piece, share) in enumerate(shares, start=1):
                # What the trainer divides a mean over rows by, so that pieces add up to the whole.
                trainer.current_gradient_accumulation_steps = steps / share
                last = number == len(shares)
                waits = trainer.accelerator.no_sync(model=model)
                with contextlib.nullcontext() if last else waits:
                    total += super().training_step(model, piece, num_items)  # type: ignore[misc]
        finally:
            trainer.current_gradient_accumulation_steps = steps
        return total

    def _forget_gradients(self, model: Any) -> None:
        trainer: Any = self
        model.zero_grad()
        if getattr(trainer, "tasks", None) is not None:
            trainer.tasks.losses.clear()

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        whole = super().prediction_step  # type: ignore[misc]
        if self.recovery is None or not self.is_divisible or not prediction_loss_only:
            return whole(model, inputs, prediction_loss_only, ignore_keys)
        shares = self._shares(inputs, self.recovery.lowered.eval_rows, None)
        if len(shares) == 1:
            return whole(model, inputs, prediction_loss_only, ignore_keys)
        losses = [share * whole(model, piece, True, ignore_keys)[0] for piece, share in shares]
        return sum(losses), None, None

    def _shares(
        self, inputs: dict[str, Any], at_once: int, num_items: Any
    ) -> list[tuple[dict[str, Any], float]]:
        """Pieces of a batch, each with its share of the batch's mean loss: by tokens where that is
        a mean over them, else by rows. Trainers change the mappings that they are given."""
        copies = 2 if self.has_pairs else 1
        num_rows = len(inputs["input_ids"]) // copies
        if not self.is_divisible or num_rows <= at_once:
            return [(dict(inputs), 1.0)]
        ranges = row_pieces(num_rows, at_once)
        pieces = [_rows_of(inputs, rows, num_rows, copies) for rows in ranges]
        labels = inputs.get("labels")
        if labels is None or num_items is not None:
            return [
                (piece, len(rows) / num_rows) for piece, rows in zip(pieces, ranges, strict=True)
            ]
        counts = [max(1, int(predicted(piece["labels"]).sum())) for piece in pieces]
        return [(piece, n / sum(counts)) for piece, n in zip(pieces, counts, strict=True)]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint that there is no memory for is left out, and training goes on."""
        save, recovery = super()._save_checkpoint, self.recovery  # type: ignore[misc]
        if recovery is None or recovery.is_distributed:
            save(*args, **kwargs)
            return
        for again in (True, False):
            try:
                save(*args, **kwargs)
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                trouble = Trouble.of(error)
            release_memory()
            recovery.note_checkpoint(trouble, again=again)


def _rows_of(inputs: dict[str, Any], rows: range, num_rows: int, copies: int) -> dict[str, Any]:
    """Some rows of a batch. Tensors have the batch's rows first, of pairs those of both halves;
    anything else is of the batch as a whole."""

    def some(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        if len(value) == num_rows:
            return value[rows.start : rows.stop]
        if len(value) == num_rows * copies:
            return torch.cat([half[rows.start : rows.stop] for half in value.chunk(copies)])
        return value

    return {name: some(value) for name, value in inputs.items()}
