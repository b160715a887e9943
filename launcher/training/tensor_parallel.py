"""Training in processes that divide each layer's matrices (tensor parallelism): transformers
divides them as it loads them, here they are saved whole and read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.distributed import DistributedConfig

from ftplan.launcher.training.sharded import divides_matrices, whole_state

_OPTIMIZER, _SCHEDULER = "optimizer_0", "scheduler.pt"  # as FSDP's and the trainer's are named


def loading_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """For `from_pretrained`: each process reads its part of each matrix."""
    size = settings.get("tp_size", 1)
    return {"distributed_config": DistributedConfig(tp_size=size)} if size > 1 else {}


class DividedMatrices:
    """For trainers of transformers: checkpoints of a divided model hold whole weights. The trainer
    itself has no way to go on with such a model, and refuses to save its optimizer's states
    (transformers 5.23, `Trainer.__init__`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not divides_matrices(kwargs.get("model")):
            super().__init__(*args, **kwargs)
            return
        arguments = kwargs["args"]
        kept = arguments.save_only_model
        object.__setattr__(arguments, "save_only_model", True)
        super().__init__(*args, **kwargs)
        object.__setattr__(arguments, "save_only_model", kept)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        write = super()._save  # type: ignore[misc]
        if not divides_matrices(trainer.model):
            write(output_dir, state_dict)
            return
        state = whole_state(trainer) if state_dict is None else state_dict
        if trainer.is_world_process_zero():
            with _as_one_process(trainer.model):
                write(output_dir, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of the optimizer's states each process writes its part: nobody has RAM for all."""
        trainer: Any = self
        if not divides_matrices(trainer.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        dcp.save(_states(trainer), checkpoint_id=Path(output_dir) / _OPTIMIZER)
        if trainer.is_world_process_zero():
            torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        read = super()._load_from_checkpoint  # type: ignore[misc]
        if not divides_matrices(trainer.model):
            read(checkpoint, model)
            return
        model = trainer.model
        load = model.load_state_dict
        parts = dict(model.named_parameters(remove_duplicate=False))

        def load_parts(state: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            return load({n: _part(t, parts.get(n)) for n, t in state.items()}, *args, **kwargs)

        with mock.patch.object(model, "load_state_dict", load_parts):
            read(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        if checkpoint is None or not divides_matrices(trainer.model):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        states = _states(trainer)
        dcp.load(states, checkpoint_id=Path(checkpoint) / _OPTIMIZER)
        set_optimizer_state_dict(trainer.model, _optimizer(trainer), states)
        scheduler = torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True)
        trainer.lr_scheduler.load_state_dict(scheduler)


def _states(trainer: Any) -> dict[str, Any]:
    states: dict[str, Any] = get_optimizer_state_dict(trainer.model, _optimizer(trainer))
    return states


def _optimizer(trainer: Any) -> Optimizer:
    """Without accelerate's wrapper."""
    optimizer: Optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return optimizer


def _part(whole: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This process's part of it, divided as the parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


@contextmanager
def _as_one_process(model: Any) -> Iterator[None]:
    """Within, what saves the model neither gathers nor waits for the other processes."""
    config = model.config.__dict__
    kept = config.pop("distributed_config")
    try:
        yield
    finally:
        config["distributed_config"] = kept
