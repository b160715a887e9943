"""Context parallelism in one process: torch's own ring attention, in a group that sends nothing.

accelerate and transformers cut each row among the GPUs and set FSDP2 up over them, as in a real
run. torch's templates of ring attention run with stand-ins for its flash kernel
(`torch/distributed/tensor/experimental/_context_parallel/_attention.py`); left out is only that
DTensor leads to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.big_modeling import _attach_context_parallel_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental._context_parallel import _attention
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from ftplan.launcher.dry_run.attention import flash_backward, flash_forward
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.fsdp import _unrecorded, fully_sharded
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.planner.context_parallel import check_ring_kernel
from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan

Adopt = Callable[..., None]

_SEQUENCE = 2  # dimension of (batch, heads, length, head_dim)


@contextmanager
def rows_divided(
    trainer: Any, recorder: Recorder, case: DryRunCase, adopt: Adopt
) -> Iterator[None]:
    """Within, this process is the first of `num_gpus` that divide the model, and of `cp_size` that
    divide each row. Raises InputError where they cannot."""
    check_ring_kernel(case.plan, case.kind, case.capability)
    try:
        _attach_context_parallel_hooks(trainer.model)
    except ValueError as error:  # windows
        raise InputError(str(error), "leave out `--cp-size`") from error
    state = trainer.accelerator.state
    with ExitStack() as stack:
        stack.enter_context(fully_sharded(trainer, recorder, case, adopt))
        select = _unrecorded(DeviceMesh.__getitem__)
        stack.enter_context(mock.patch.object(DeviceMesh, "__getitem__", select))
        config = _parallelism(case.plan)
        with _disable_current_modes():  # ranks are real numbers
            mesh = config.build_device_mesh("cpu")
            group = mesh["cp"].get_group()
        stack.enter_context(mock.patch.object(state, "parallelism_config", config))
        stack.enter_context(mock.patch.object(state, "device_mesh", mesh))
        stack.enter_context(mock.patch.object(_attention, "dist", _last_of(group)))
        plain = functional.scaled_dot_product_attention
        for name, attend in (("enable", _ring_attention(group)), ("disable", plain)):
            implementation = f"_{name}_context_parallel_dispatcher_impl"
            stack.enter_context(mock.patch.object(_attention, implementation, _putting(attend)))
        yield


def _parallelism(plan: TrainingPlan) -> ParallelismConfig:
    return ParallelismConfig(cp_size=plan.cp_size, dp_shard_size=plan.data_parallel_size)


def _putting(attend: Any) -> Callable[..., None]:
    """What torch does where rows begin or cease to be divided, without DTensor."""

    def put(*args: Any, **kwargs: Any) -> None:
        functional.scaled_dot_product_attention = attend

    return put


def _last_of(group: Any) -> Any:
    """torch.distributed as the last GPU of the ring sees it, which works on whole queries in every
    round and so takes the most."""
    last = dist.get_world_size(group) - 1
    return SimpleNamespace(
        get_rank=lambda _: last,
        get_world_size=dist.get_world_size,
        ProcessGroup=dist.ProcessGroup,
    )


class _RingAttention(torch.autograd.Function):
    """Attention of this GPU's part of each row to all of it: keeps query, key, value, the result
    and its log-sums."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, group: Any) -> Any:
        result, sums = _attention._templated_ring_attention(
            group, _SEQUENCE, _flash, query, key, value, is_causal=True
        )
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.group = group
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, result, sums = ctx.saved_tensors
        grads = _attention._templated_ring_attention_backward(
            ctx.group,
            _SEQUENCE,
            _flash_backward,
            gradients[0],
            "grad_out",
            query,
            key,
            value,
            result,
            sums,
            is_causal=True,
        )
        return (*grads, None)


def _flash(query: Any, key: Any, value: Any, *, is_causal: bool) -> tuple[Any, Any]:
    result, sums = flash_forward(*(t.transpose(1, 2) for t in (query, key, value)))
    return result.transpose(1, 2), sums


def _flash_backward(*, grad_out: Any, query: Any, key: Any, value: Any, **_: Any) -> Any:
    turned = (t.transpose(1, 2) for t in (grad_out, query, key, value))
    return tuple(t.transpose(1, 2) for t in flash_backward(*turned))


def _ring_attention(group: Any) -> Callable[..., Any]:
    def attend(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return _RingAttention.apply(query, key, value, group)

    return attend
