"""Tensor parallelism in one process: transformers' own, in a group that sends nothing.

transformers divides the model by its plan, as `from_pretrained(distributed_config=...)` does, and
torch's DTensor computes with what the first GPU holds; only the collectives are torch's fake ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from ftplan.launcher.dry_run.fsdp import _WAIT, _unrecorded, _waited, group_of
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan

_EMPTY = torch.ops.aten.empty.memory_format
# How DTensor finds out what an operation returns: on tensors of the undivided shapes.
_WHOLE_SHAPES = "_propagate_tensor_meta_non_cached"

Adopt = Callable[..., None]


@contextmanager
def tensor_parallel(
    trainer: Any, recorder: Recorder, plan: TrainingPlan, adopt: Adopt
) -> Iterator[None]:
    """Within, this process is the first of `tp_size` that divide the trainer's model. `adopt` puts
    what each GPU holds on record."""
    model = trainer.model
    with ExitStack() as stack:
        stack.enter_context(group_of(plan.tp_size))
        with _disable_current_modes():  # ranks are real numbers
            mesh = init_device_mesh("cpu", (plan.tp_size,), mesh_dim_names=("tp",))
        whole_shapes = _unrecorded(getattr(ShardingPropagator, _WHOLE_SHAPES))
        stack.enter_context(mock.patch.object(ShardingPropagator, _WHOLE_SHAPES, whole_shapes))
        recorder.decompositions[_WAIT] = _waited
        recorder.decompositions[_EMPTY] = _empty
        recorder.on_host = True  # each GPU reads its part of the files; the whole is never there
        divide(model, mesh)
        recorder.on_host = False
        adopt(recorder, model)
        yield


def divide(model: Any, mesh: DeviceMesh) -> None:
    """Divide the model's parameters over the GPUs of the mesh by transformers' plan.

    Raises InputError for a model that has none, or whose heads do not divide.
    """
    _check_heads(model.config.get_text_config(), mesh.size())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if tied:  # transformers divides a model before it ties its weights
        model.get_output_embeddings().weight = _unshared(model.get_output_embeddings().weight)
    try:
        plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    except ValueError as error:
        raise InputError(
            f"transformers has no plan of tensor parallelism for `{model.config.model_type}`",
            "use `--sharding fsdp` in the place of `--tp-size`",
        ) from error
    apply_tensor_parallelism(model, mesh, plan)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def _check_heads(config: Any, tp_size: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads"):
        number = getattr(config, name, None) or tp_size
        if number % tp_size:
            raise InputError(
                f"`--tp-size {tp_size}` does not divide the {name} {number} of this model",
                f"use a size that divides {number}",
            )


def _unshared(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight), requires_grad=weight.requires_grad)


def _empty(*args: Any, **kwargs: Any) -> torch.Tensor:
    """DTensor asks for strides by tensors on the meta device, which are no memory."""
    if torch.device(kwargs.get("device") or "cpu").type == "meta":
        with _disable_current_modes():
            return _EMPTY(*args, **kwargs)
    return _EMPTY(*args, **kwargs)
