"""Checkpoints that are there whole or not at all, whatever ends the process or fills the disk.

The trainer writes each into `checkpoints/.saving`. Once all of it is on the disk it is sealed with
a manifest and renamed, and only then an older one goes. What is found in `.saving` is of a process
that was killed, and is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from msgspec import Struct

from ftplan.launcher import metrics_file
from ftplan.launcher.backends.job import GRACE_SECONDS as GRACE_VARIABLE
from ftplan.launcher.disk_full import free_bytes, is_disk_full
from ftplan.launcher.manifest import seal, sync_folder, total_bytes
from ftplan.launcher.run_dir import CHECKPOINT_PREFIX, RunDir
from ftplan.launcher.training.measure import storage_sizes
from ftplan.launcher.training.out_of_memory import is_out_of_memory
from ftplan.planner.errors import InputError
from ftplan.planner.units import MIB, format_bytes, format_seconds

_STAGING = ".saving"

# Beside a checkpoint: metrics, logs and status; and what its files are longer than what they hold.
_BESIDE_BYTES = 4 * MIB
_OVERHEAD = 1.02

# What Slurm (`KillWait`) and Kubernetes (`terminationGracePeriodSeconds`) leave between SIGTERM and
# SIGKILL unless told otherwise.
GRACE_SECONDS = 30.0

Tell = Callable[[str], None]


class SavingPart(Protocol):
    """Keeps something of its own in each checkpoint."""

    def saving(self, checkpoint: Path) -> contextlib.AbstractContextManager[None]:
        """Around the trainer's writing of this folder."""


class Shortage(Struct, frozen=True):
    """Bytes that a checkpoint needs and that are free; None where a quota or the like refuses."""

    needed_bytes: int
    free_bytes: int | None


class DurableCheckpoints:
    """For trainers of transformers. `keeper`: None, and the trainer saves as it does by itself."""

    keeper: CheckpointKeeper | None = None

    def _get_output_dir(self, trial: Any) -> str:
        if self.keeper is not None and self.keeper.is_writing:
            return str(self.keeper.staging)
        return str(super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        write = super()._save_checkpoint  # type: ignore[misc]
        if self.keeper is None:
            write(model, trial)
        else:
            self.keeper.save(lambda: write(model, trial))

    def _run_epoch(self, **parts: Any) -> None:
        """Nothing where the checkpoint is of the last step: the trainer would do one more."""
        trainer: Any = self
        if trainer.state.global_step < trainer.state.max_steps:
            super()._run_epoch(**parts)  # type: ignore[misc]

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        with _told_unreadable(checkpoint):
            super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _told_unreadable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _told_unreadable(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


@contextlib.contextmanager
def _told_unreadable(checkpoint: str | None) -> Iterator[None]:
    """What these versions of the libraries cannot read of a whole checkpoint, as an error that says
    so. A full GPU is none."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"checkpoint `{checkpoint}` cannot be read here: {said[:300]}",
            "resume with the versions that `environment.json` of the run names, or begin anew "
            "with `ftplan launch`",
        ) from error


class CheckpointKeeper:
    """Writes, counts and removes the checkpoints of one attempt.

    `tell`: what the person at the terminal is to know. Of several ranks the first decides.
    """

    def __init__(self, run: RunDir, trainer: Any, tell: Tell, parts: Iterable[SavingPart]) -> None:
        self.run, self.trainer, self.tell = run, trainer, tell
        self.parts = tuple(parts)
        self.is_writing = False
        self.shortage: Shortage | None = None
        self.save_seconds: float | None = None
        self._saved_name: str | None = None
        self._refused_at = 0.0
        self._slow_told = False
        last = run.last_checkpoint()
        self._expected_bytes = total_bytes(last) if last else None
        self._drop_staging()

    @property
    def staging(self) -> Path:
        return self.run.checkpoints / _STAGING

    @property
    def _is_first(self) -> bool:
        return bool(self.trainer.is_world_process_zero())

    def save(self, write: Callable[[], None]) -> None:
        """A checkpoint of the trainer's last step, unless it is there already or has no room."""
        name = f"{CHECKPOINT_PREFIX}{self.trainer.state.global_step}"
        began = time.monotonic()
        if not self._agreed(self._wanted(name)):
            return
        error = self._tried(lambda: self._write(name, write))
        if self._agreed(error is None):
            error = self._tried(lambda: self._publish(name)) if self._is_first else None
        if self._agreed(error is None):
            self._saved(name, time.monotonic() - began)
        else:
            self._drop_staging()
            needed, free = self._needed_bytes(), free_bytes(self.run.checkpoints)
            # A quota refuses although there is room.
            self._pause(Shortage(needed, free if free < needed else None))

    def spare(self) -> None:
        """Make room for results: all but the newest and the best checkpoint go."""
        self._rotate(keep=1)

    def room_again(self) -> bool:
        """Whether saving was paused, and there is room now."""
        if self.shortage is None or not self._is_first:
            return False
        return free_bytes(self.run.checkpoints) >= self._needed_bytes() and (
            self.shortage.free_bytes is not None or self._refused_long_ago()
        )

    def _refused_long_ago(self) -> bool:
        """Where free room does not tell, a try costs writing it all: no more often than this."""
        return time.monotonic() - self._refused_at > max(60.0, 20 * (self.save_seconds or 0.0))

    def _wanted(self, name: str) -> bool:
        if not self._is_first:
            return True
        if name == self._saved_name or self.trainer.state.global_step == 0:
            return False
        return self._has_room()

    def _has_room(self) -> bool:
        """Looks at the disk before anything is written; an older checkpoint makes room, as long as
        a whole one is left."""
        needed, free = self._needed_bytes(), free_bytes(self.run.checkpoints)
        if free < needed <= free + self._older_bytes():
            self._rotate(keep=1)
            free = free_bytes(self.run.checkpoints)
        if free < needed or not metrics_file.write_waiting(self.run.metrics):
            self._pause(Shortage(needed, free))
            return False
        return True

    def _older_bytes(self) -> int:
        """Of the checkpoints that another one is kept beside."""
        steps = sorted(self.run.checkpoint_steps().items())[:-1]
        return sum(total_bytes(path) or 0 for _, path in steps)

    def _needed_bytes(self) -> int:
        last = self._expected_bytes
        if last is None:
            last = checkpoint_bytes(self.trainer)
        return int(last * _OVERHEAD) + _BESIDE_BYTES

    def _write(self, name: str, write: Callable[[], None]) -> None:
        self.is_writing = True
        try:
            with contextlib.ExitStack() as stack:
                for part in self.parts:
                    stack.enter_context(part.saving(self.staging / name))
                write()
        finally:
            self.is_writing = False

    def _tried(self, action: Callable[[], None]) -> BaseException | None:
        """The error where the disk has filled up; what else goes wrong is raised."""
        try:
            action()
        except Exception as error:
            if not is_disk_full(error):
                self._drop_staging()
                raise
            return error
        return None

    def _publish(self, name: str) -> None:
        """To the disk, sealed, and renamed; then older ones may go."""
        if not metrics_file.write_waiting(self.run.metrics, sync=True):
            raise OSError(errno.ENOSPC, "no room for metrics.jsonl")
        staged, target = self.staging / name, self.run.checkpoints / name
        seal(staged, {"metrics_bytes": metrics_file.num_bytes(self.run.metrics)})
        if target.exists():  # a damaged one, or one of a run that was started anew by hand
            self._remove(target)
        staged.rename(target)
        sync_folder(self.run.checkpoints)
        self._rotate(keep=self.trainer.args.save_total_limit)
        self._drop_staging()

    def _saved(self, name: str, seconds: float) -> None:
        self._saved_name, self.save_seconds = name, seconds
        self._expected_bytes = total_bytes(self.run.checkpoints / name)
        if self.shortage is not None:
            self.shortage = None
            self.tell(f"there is room again: {name} is saved")
        if seconds > grace_seconds() and not self._slow_told:
            self._slow_told = True
            self.tell(
                f"{name} took {format_seconds(seconds)} to save, longer than the "
                f"{format_seconds(grace_seconds())} that a batch system leaves after SIGTERM: ask "
                f"for more and set {GRACE_VARIABLE}, or what is done since a checkpoint is lost"
            )

    def _pause(self, shortage: Shortage) -> None:
        began, self.shortage = self.shortage is None, shortage
        self._refused_at = time.monotonic()
        if began and self._is_first:
            self.tell(self._said(shortage))

    def _said(self, shortage: Shortage) -> str:
        kept = self.run.last_checkpoint()
        free = (
            f"{format_bytes(shortage.free_bytes)} is free"
            if shortage.free_bytes is not None
            else "the disk or a quota refused it"
        )
        return (
            f"no room for a checkpoint in `{self.run.checkpoints}`: it needs "
            f"{format_bytes(shortage.needed_bytes)}, {free}. Training goes on without saving"
            + (f"; {kept.name} is kept" if kept else "")
            + ". Make room, and the next one is saved at once"
        )

    def _rotate(self, keep: int | None) -> None:
        """Remove all but the newest and the best; and those of later steps, which this attempt has
        found damaged or is going to repeat."""
        if not keep:
            return
        step = self.trainer.state.global_step
        found = self.run.checkpoint_steps()
        best = self.trainer.state.best_global_step
        past = [one for one in sorted(found, reverse=True) if one <= step]
        for number in [*(one for one in found if one > step), *past[keep:]]:
            if number != best:
                self._remove(found[number])

    def _remove(self, checkpoint: Path) -> None:
        """By another name first: what is called a checkpoint is never half removed."""
        self.staging.mkdir(exist_ok=True)
        aside = self.staging / f"removed-{checkpoint.name}"
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            checkpoint.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _drop_staging(self) -> None:
        if self._is_first:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _agreed(self, fine: bool) -> bool:
        """Whether it is so on every rank."""
        if self.trainer.args.world_size <= 1:
            return fine
        troubled = torch.tensor([0 if fine else 1], device=self.trainer.args.device)
        return not bool(self.trainer.accelerator.reduce(troubled, "sum").item())


def checkpoint_bytes(trainer: Any) -> int:
    """What a first checkpoint comes to: weights that are saved, and the optimizer's states."""
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = [
        p for p in model.parameters() if p.requires_grad or not isinstance(model, PeftModel)
    ]
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    tensors = [v for state in states for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(storage_sizes([*parameters, *tensors]).values())


def grace_seconds(environ: Mapping[str, str] = os.environ) -> float:
    """Between the signal and the kill: what the environment says, or the usual."""
    try:
        return float(environ[GRACE_VARIABLE])
    except (KeyError, ValueError):
        return GRACE_SECONDS
