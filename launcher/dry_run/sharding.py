"""How the model's state lies on one of several GPUs, and what they exchange."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.fakes import held_tensors, quantization_tensors
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.dry_run.zero import optimizer_sharded
from ftplan.launcher.dry_run.zero3 import parameters_partitioned
from ftplan.planner.sharding import ZERO


def spread(trainer: Any, recorder: Recorder, case: DryRunCase) -> AbstractContextManager[None]:
    """Within, the trainer's model lies on this GPU as the plan spreads it, and is on record."""
    if case.plan.tp_size > 1:
        from ftplan.launcher.dry_run.tensor_parallel import tensor_parallel  # as long

        return tensor_parallel(trainer, recorder, case.plan, adopt)
    if case.plan.cp_size > 1:
        from ftplan.launcher.dry_run.context_parallel import rows_divided

        return rows_divided(trainer, recorder, case, adopt)
    if case.plan.sharding == "fsdp":
        from ftplan.launcher.dry_run.fsdp import fully_sharded  # torch's takes a while to load

        return fully_sharded(trainer, recorder, case, adopt)
    if case.plan.sharding == "zero3":
        return parameters_partitioned(trainer, recorder, case.plan, adopt)
    if case.plan.sharding in ZERO:
        return optimizer_sharded(trainer, recorder, case.plan, adopt)
    return _whole(trainer, recorder, case.plan.num_gpus)


@contextmanager
def _whole(trainer: Any, recorder: Recorder, num_gpus: int) -> Iterator[None]:
    """Every GPU holds all."""
    adopt(recorder, trainer.model)
    if num_gpus > 1:
        _add_buckets(recorder, trainer.model)
    yield


def adopt(
    recorder: Recorder, model: Any, *, parameters: bool = True, held_as: str = "weights"
) -> None:
    """Put the model's parameters (unless they are elsewhere) and all else that it holds on
    record. `held_as`: the component of the base."""
    adapted = hasattr(model, "peft_config")
    for module in model.modules():
        path = recorder.path_of(module)
        for parameter in module._parameters.values():
            if parameter is not None and parameters:
                added = adapted and parameter.requires_grad
                recorder.adopt([parameter], "adapters" if added else held_as, path)
        buffers = [b for b in module._buffers.values() if b is not None]
        held = [*buffers, *quantization_tensors(module), *held_tensors(module)]
        recorder.adopt(held, held_as, path)


def _add_buckets(recorder: Recorder, model: nn.Module) -> None:
    """DDP's copies of all gradients, which it sends (`gradient_as_bucket_view` is off). They are
    counted by parameter, though parameters share buckets of 25 MiB."""
    for name, parameter in model.named_parameters():  # tied ones once
        if parameter.requires_grad:
            recorder.draft.born(
                num_bytes=parameter.numel() * parameter.element_size(),
                path=name.rpartition(".")[0],
                operation="DDP bucket",
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                component="communication",
            )
