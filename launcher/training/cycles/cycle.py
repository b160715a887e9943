"""What such a method does in a run, and what it keeps in a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftplan.launcher.run_dir import RunDir, read_mapping, write_json
from ftplan.launcher.training.trainer import append_metric
from ftplan.planner.errors import InputError

STATE = "cycle.json"
TENSORS = "cycle.safetensors"

# PEFT's name of the one adapter that is trained.
ADAPTER = "default"


class Cycle(TrainerCallback):
    """A method's part in the training loop.

    What it keeps of itself in a checkpoint is written before the trainer writes there.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.notice: Callable[[str], None] = lambda text: None

    def prepare(self, trainer: Any, checkpoint: Path | None) -> None:
        """What comes before training, or before it goes on from a checkpoint."""

    def advance(self, state: TrainerState, parts: Mapping[str, Any]) -> None:
        """After an optimizer step. `parts`: the trainer's model, optimizer, learning rate, ..."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to know."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors that a resumed run needs."""
        return {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        self.advance(state, parts)

    @contextmanager
    def saving(self, checkpoint: Path) -> Iterator[None]:
        """While the trainer writes this checkpoint."""
        if os.environ.get("RANK", "0") == "0":
            self.keep(checkpoint)
        yield

    def keep(self, checkpoint: Path) -> None:
        """Write what a resumed run needs."""
        write_json(checkpoint / STATE, self.state())
        if tensors := self.tensors():
            save_file(tensors, checkpoint / TENSORS)

    def tell(self, event: str, **details: Any) -> None:
        """A row of metrics.jsonl that is no step's."""
        append_metric(self.run, {"event": event, **details})


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was kept there; raises InputError where the method has kept nothing."""
    if not (checkpoint / STATE).is_file():
        raise InputError(
            f"checkpoint `{checkpoint}` does not say how far the method was (`{STATE}`)",
            "delete it, and the run goes on from the one before, or start the run anew",
        )
    return read_mapping(checkpoint / STATE)


def read_tensors(checkpoint: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors that were kept there."""
    path = checkpoint / TENSORS
    return load_file(path, device=str(device)) if path.is_file() else {}
