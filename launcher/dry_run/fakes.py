"""From a model on the meta device to the same model on fake tensors.

A fake tensor has shape, dtype, device and lifetime, and no data. bitsandbytes' parameter classes
do not survive that, so a quantized layer gets plain parameters with the storages that it has on a
GPU; its forward and backward stay bitsandbytes' own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftplan.planner.memory import QUANT_BLOCK_SIZE, QUANT_SCALES_PER_BLOCK


def make_fake(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Replace every parameter and buffer of `model` by a fake one; tied ones stay tied.

    `dtype`: of the weights before they were quantized.
    """
    done: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            if hasattr(module, "quant_state") and hasattr(module, "compute_dtype"):
                _quantize_4bit(module, dtype)
            elif hasattr(module, "state") and hasattr(module.state, "CB"):
                _quantize_8bit(module)
            for name, parameter in module._parameters.items():
                if parameter is not None and not _is_fake(parameter):
                    if id(parameter) not in done:
                        done[id(parameter)] = _fake_parameter(parameter)
                    module._parameters[name] = done[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None and not _is_fake(buffer):
                    if id(buffer) not in done:
                        done[id(buffer)] = _empty_like(buffer)
                    module._buffers[name] = done[id(buffer)]


def _is_fake(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "fake_mode")


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_empty_like(parameter), requires_grad=parameter.requires_grad)


def _quantize_4bit(module: Any, dtype: torch.dtype) -> None:
    """The storages of a Linear4bit after loading: packed weights, scales, and their scales."""
    from bitsandbytes.functional import QuantState

    weight = module.weight
    shape = weight.shape
    num_blocks = math.ceil(shape.numel() / QUANT_BLOCK_SIZE)
    nested = weight.compress_statistics
    storage = weight.quant_storage
    packed = torch.empty((shape.numel() + 1) // (2 * storage.itemsize), 1, dtype=storage)
    state = QuantState(
        absmax=torch.empty(num_blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=shape,
        code=torch.empty(16),
        blocksize=QUANT_BLOCK_SIZE,
        quant_type=weight.quant_type,
        dtype=dtype,
    )
    if nested:
        state.offset = torch.empty(())
        state.state2 = QuantState(
            absmax=torch.empty(math.ceil(num_blocks / QUANT_SCALES_PER_BLOCK)),
            code=torch.empty(256),
            blocksize=QUANT_SCALES_PER_BLOCK,
            dtype=torch.float32,
        )
        state.nested = True
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.quant_state, parameter.quant_type = state, weight.quant_type
    parameter.compress_statistics, parameter.blocksize = nested, QUANT_BLOCK_SIZE
    module.weight = parameter
    module.quant_state = state
    module.support_avx512bf16_for_cpu = False


def _quantize_8bit(module: Any) -> None:
    """The storages of a Linear8bitLt after loading: int8 weights and a scale for each row."""
    weight = module.weight
    codes = torch.empty(weight.shape, dtype=torch.int8)
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.CB = parameter.SCB = None
    parameter.has_fp16_weights = False
    module.weight = parameter
    module.state.CB, module.state.SCB = codes, torch.empty(weight.shape[0])


def quantization_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Scales and code tables of one module's quantized weight."""
    found: list[torch.Tensor] = []
    state: Any = getattr(module, "quant_state", None)
    while state is not None:
        found += [t for t in (state.absmax, state.code, state.offset) if t is not None]
        state = state.state2
    eight_bit: Any = getattr(module, "state", None)
    if getattr(eight_bit, "SCB", None) is not None:
        found.append(eight_bit.SCB)
    return found
