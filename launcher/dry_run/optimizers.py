"""Optimizers on fake tensors: the real ones, and what CUDA or fakes make otherwise of them.

Each patch says which release it was read from.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.optimizer_steps import STATE_BLOCK_SIZE
from ftplan.planner.optimizers import Optimizer

_aten = torch.ops.aten

# Steps after which schedulefree's RAdam divides by denominators, with transformers' beta2 of 0.999
# (schedulefree 1.4.1, radam_schedulefree.py: `rho_t > 4.0`).
_RADAM_WARM_STEPS = 5

# GaLore's 8-bit optimizer is made of bitsandbytes' own.
_WITH_BITSANDBYTES = ("bitsandbytes", "galore_torch")

# Where the classes are that project gradients.
PROJECTORS = {
    "galore_torch": ("galore_torch.galore_projector", "GaLoreProjector"),
    "apollo_torch": ("apollo_torch.random_projector", "GradientProjector"),
}


def optimizer_states(optimizer: Any) -> Iterator[torch.Tensor]:
    """Every tensor that an optimizer keeps from step to step, also what it hides in objects."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for layer in getattr(inner, "optimizer_dict", {}).values():  # one for each parameter
        yield from optimizer_states(layer)
    keeps = [inner.state, *(group.get("state") for group in inner.param_groups)]
    keeps += [getattr(inner, name, None) for name in _ADALOMO_STATES]
    yield from _tensors(keeps)


_ADALOMO_STATES = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _tensors([getattr(value, name) for name in names])
        else:
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "ortho_matrix"):  # GaLore's and APOLLO's projectors
        yield from _tensors(value.ortho_matrix)


def optimizer_kernels(optimizer: Optimizer, kind: DeviceKind) -> dict[Any, Callable[..., Any]]:
    """What to run in the place of operations that optimizers alone use."""
    kernels: dict[Any, Callable[..., Any]] = {_aten._linalg_svd.default: _singular_values(kind)}
    if optimizer.module in _WITH_BITSANDBYTES and kind == "cpu":
        from bitsandbytes.backends.cpu import ops

        library: Any = torch.ops.bitsandbytes
        kernels[library.optimizer_update_32bit.default] = ops._optimizer_update_32bit_cpu
        kernels[library.optimizer_update_8bit_blockwise.default] = (
            ops._optimizer_update_8bit_blockwise_cpu
        )
    return kernels


def _singular_values(kind: DeviceKind) -> Callable[..., Any]:
    """GaLore's decomposition: its results and a copy of the matrix; on CUDA cuSOLVER gives V, from
    which the adjoint is copied (ATen/native/BatchLinearAlgebra.cpp and
    native/cuda/linalg/BatchLinearAlgebraLib.cpp). The libraries' workspaces are not known."""

    def decompose(
        matrix: torch.Tensor,
        full_matrices: bool = False,
        compute_uv: bool = True,
        *,
        driver: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, columns = matrix.shape
        least = min(rows, columns)
        results = (
            matrix.new_empty((least, rows)).t(),
            matrix.new_empty(least),
            matrix.new_empty((columns, least)).t(),
        )
        scratch = [matrix.new_empty(matrix.shape)]
        if kind == "cuda":
            scratch.append(matrix.new_empty((columns, least)))
        del scratch
        return results

    return decompose


@contextmanager
def optimizer_behaviour(optimizer: Optimizer, kind: DeviceKind) -> Iterator[None]:
    """Within, the optimizer works on fakes, as on a device of that kind."""
    with ExitStack() as stack:
        for target, replacement in _patches(optimizer, kind):
            # Without Triton some of the names are not there.
            stack.enter_context(mock.patch(target, replacement, create=True))
        yield


def _patches(optimizer: Optimizer, kind: DeviceKind) -> Iterable[tuple[str, Any]]:
    module = optimizer.module
    if module in _WITH_BITSANDBYTES:
        # Each of a process: of overrides, by the parameters' addresses, and of paged states, which
        # it keeps alive.
        yield "bitsandbytes.optim.optimizer.GlobalOptimManager._instance", None
        yield "bitsandbytes.functional.GlobalPageManager._instance", None
        yield "bitsandbytes.functional.get_paged", _unpaged
        yield "bitsandbytes.functional.fill", _nothing
        if kind == "cuda":
            yield "bitsandbytes.optim.optimizer.Optimizer8bit.fill_qmap", _fill_maps
    if module in PROJECTORS:
        yield renewed_projection(module)
    if module == "galore_torch":
        yield "torch.cuda.synchronize", _nothing
        from bitsandbytes.functional import optimizer_update_32bit

        update = partial(_without_norm, optimizer_update_32bit)
        yield "bitsandbytes.functional.optimizer_update_32bit", update
    if module == "torchao":
        from torchao.optim import subclass_4bit, subclass_8bit

        for states in (subclass_4bit, subclass_8bit):  # computed once, while numbers are numbers
            states.get_qmap_signed()
            states.get_qmap_unsigned()
        yield "torch.compile", _uncompiled
        yield "torchao.optim.adam.single_param_adam", _torchao_step
    elif module == "apollo_torch":
        # Drawn to be read as numbers, which fakes have not (apollo-torch 1.0.3).
        yield "apollo_torch.random_projector.next_seed", _same
    elif module == "lomo_optim":
        yield "torch.Tensor.cuda", _same
    elif module == "optimi" and kind == "cuda":
        # Kernels that write in place (torch-optimi 0.3.3, stableadamw.py).
        yield "optimi.stableadamw._default_to_triton", _always
        yield "optimi.stableadamw._triton_stableadamw", _nothing
    elif module == "grokadamw" and kind == "cuda":
        yield "grokadamw.GrokAdamW._update_group", staticmethod(_grokadamw_step)
    if optimizer.name == "schedule_free_radam":
        yield "schedulefree.RAdamScheduleFree.add_param_group", _warm_group


def renewed_projection(module: str) -> tuple[str, Any]:
    """GaLore's and APOLLO's projectors make the projection anew after `update_proj_gap` steps: here
    in each, so that it is seen beside all states."""
    where, name = PROJECTORS[module]
    project = getattr(importlib.import_module(where), name).project

    def projected(projector: Any, gradient: torch.Tensor, step: int) -> torch.Tensor:
        return project(projector, gradient, 0)

    return f"{where}.{name}.project", projected


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _same(value: Any, *args: Any) -> Any:
    return value


def _always(*args: Any) -> bool:
    return True


def _uncompiled(function: Any, **kwargs: Any) -> Any:
    return function


def _without_norm(
    update: Any, name: str, gradient: Any, parameter: torch.Tensor, *args: Any, **more: Any
) -> None:
    """GaLore asks bitsandbytes 0.50 for a norm of each parameter, whose number fakes have not."""
    copy = parameter.data.float()
    del copy
    update(name, gradient, parameter, *args, **{**more, "max_unorm": 0.0})


def _unpaged(*shape: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """Managed memory, which fakes have not; it counts as the GPU's."""
    return torch.empty(shape, dtype=dtype)


def _fill_maps(optimizer: Any) -> None:
    """bitsandbytes' two maps of codes: made on the host, they come to the GPU with the states."""
    if optimizer.initialized:
        optimizer.name2qmap = {name: torch.empty(256) for name in ("dynamic", "udynamic")}


def _warm_group(optimizer: Any, group: dict[str, Any]) -> None:
    """Begin after the first steps, which need less."""
    torch.optim.Optimizer.add_param_group(optimizer, group | {"k": _RADAM_WARM_STEPS})


def _torchao_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    step: torch.Tensor,
    exp_avg: torch.Tensor,
    *further: Any,
) -> None:
    """The buffers of torchao 0.18's compiled step of one tensor, as Inductor of torch 2.13 lays
    them out on the processor; unquantized states are updated in one kernel, in place.

    8 bits: scales and scaled values of both states. 4 bits: their unpacked bytes and codes of
    int64 besides.
    """
    if not is_traceable_wrapper_subclass(exp_avg):
        return
    count = parameter.numel()
    four_bits = type(exp_avg).__name__ == "OptimState4bit"
    buffers = []
    for _ in range(2):
        if four_bits:
            buffers.append(parameter.new_empty(count, dtype=torch.uint8))
        scales = parameter.new_empty(count // STATE_BLOCK_SIZE, dtype=torch.float32)
        buffers += [scales, parameter.new_empty(count, dtype=torch.float32)]
    if four_bits:
        buffers += [parameter.new_empty(count, dtype=torch.int64) for _ in range(2)]


def _grokadamw_step(
    group: dict[str, Any], params: list[Any], grads: list[Any], grokking_signal: Any
) -> None:
    """grokadamw 0.1.2: states live on the host, one tensor's come to the GPU. What its variables
    hold of the tensor before goes when they are set anew."""
    held: dict[str, torch.Tensor] = {}
    for parameter in params:
        for name in ("exp_avg", "exp_avg_sq", "grok_ema"):
            held[name] = torch.empty_like(parameter)
        scaled = torch.empty_like(parameter)
        held["grok_grad"] = torch.empty_like(parameter)
        del scaled
        roots = torch.empty_like(parameter)
        del roots
