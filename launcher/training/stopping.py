"""How a run ends when it is asked to: with a checkpoint, within the time that it is left.

A signal is noted, and training goes on to the end of its step where that and the checkpoint fit
into the grace period; else it breaks off between two micro-batches, and the checkpoint is of the
step before. Nothing is torn by a kill that comes all the same.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftplan.launcher.training.checkpoints import CheckpointKeeper, grace_seconds


class Stopped(BaseException):
    """SIGINT or SIGTERM where there is nothing to finish; carries the exit status. As
    KeyboardInterrupt it is no Exception, so that nobody takes it for an error."""

    def __init__(self, exit_status: int) -> None:
        super().__init__(exit_status)
        self.exit_status = exit_status


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint once it has been asked to; and has one saved as soon as a
    full disk has room again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.keeper: CheckpointKeeper | None = None
        self.number: int | None = None
        self._asked_at = 0.0
        self._began = 0.0
        self._done = 0  # micro-batches of this step
        self._random: dict[str, Any] | None = None

    @property
    def exit_status(self) -> int | None:
        return None if self.number is None else 128 + self.number

    def ask(self, number: int) -> None:
        """Note a signal. Raises Stopped at the second Ctrl-C; a batch system and the launcher may
        each send one of other kinds."""
        if self.number == number == signal.SIGINT:
            raise Stopped(128 + number)
        if self.number is None:
            self.number, self._asked_at = number, self.clock()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self._began, self._done = self.clock(), 0
        if args.gradient_accumulation_steps > 1:
            self._random = random_states()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self._done += 1
        # Ranks are asked together, at the end of a step.
        if self.number is None or args.world_size > 1 or self._step_fits(args):
            return
        if self._random is not None:
            restore_random(self._random)
        self._end(control)

    def _step_fits(self, args: TrainingArguments) -> bool:
        """Whether the rest of the step and a checkpoint fit into what is left of the grace."""
        now = self.clock()
        left = args.gradient_accumulation_steps - self._done
        rest = left * (now - self._began) / self._done
        save = (self.keeper.save_seconds if self.keeper else None) or 0.0
        return bool(now - self._asked_at + rest + save <= grace_seconds())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        wanted = self.keeper is not None and self.keeper.room_again()
        if args.world_size > 1:
            number, wanted_of_any = _of_any_rank(args.device, self.number or 0, int(wanted))
            self.number, wanted = number or None, bool(wanted_of_any)
        if self.number is not None:
            self._end(control)
        elif wanted:
            control.should_save = True

    def _end(self, control: TrainerControl) -> None:
        control.should_save = control.should_training_stop = True


def _of_any_rank(device: torch.device, *numbers: int) -> list[int]:
    """The highest of all ranks: signals reach some only, and all have to stop at the same step."""
    together = torch.tensor(numbers, device=device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MAX)
    return [int(number) for number in together.tolist()]


def random_states() -> dict[str, Any]:
    """Of all generators that a checkpoint keeps."""
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "cpu": torch.random.get_rng_state(),
        "cuda": torch.cuda.random.get_rng_state_all() if torch.cuda.is_initialized() else None,
    }


def restore_random(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.random.set_rng_state_all(states["cuda"])
