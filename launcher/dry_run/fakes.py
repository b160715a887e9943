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

from ftplan.planner.weights import QUANT_BLOCK_SIZE, QUANT_SCALES_PER_BLOCK


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer of `model` by a fake one; tied ones stay tied."""
    done: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            if is_4bit(module):
                _fake_4bit(module)
            elif is_8bit(module):
                _fake_8bit(module)
            for name, parameter in module._parameters.items():
                if parameter is not None and not _is_fake(parameter):
                    if id(parameter) not in done:
                        done[id(parameter)] = _fake_parameter(parameter)
                    module._parameters[name] = done[id(parameter)]
            for holder in (module._buffers, *_holders(module)):
                for name, tensor in holder.items():
                    if isinstance(tensor, torch.Tensor) and not _is_fake(tensor):
                        if id(tensor) not in done:
                            done[id(tensor)] = _empty_like(tensor)
                        holder[name] = done[id(tensor)]


def _holders(module: nn.Module) -> list[dict[str, Any]]:
    """Where a module keeps tensors that are neither parameters nor buffers: its attributes, and
    dictionaries among them (PEFT's indices)."""
    attributes = vars(module)
    registered = (module._parameters, module._buffers, module._modules)
    inner = (value for value in attributes.values() if type(value) is dict)
    return [attributes, *(holder for holder in inner if all(holder is not r for r in registered))]


def held_tensors(module: nn.Module) -> list[torch.Tensor]:
    """What `module` itself keeps beside parameters and buffers."""
    return [
        value
        for holder in _holders(module)
        for value in holder.values()
        if isinstance(value, torch.Tensor)
    ]


def _is_fake(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "fake_mode")


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
    fake = nn.Parameter(_empty_like(parameter), requires_grad=parameter.requires_grad)
    for hook in (parameter._backward_hooks or {}).values():
        fake.register_hook(hook)
    return fake


def quantize_blank(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the quantized layers of a model on the meta device the storages that they have once
    loaded, before PEFT looks at them. `dtype`: of the weights before they were quantized."""
    with torch.device("meta"):
        for module in model.modules():
            if is_4bit(module):
                _quantize_4bit(module, dtype)
            elif is_8bit(module):
                _quantize_8bit(module)


def is_4bit(module: nn.Module) -> bool:
    """Whether bitsandbytes holds the module's weight in 4 bits."""
    return hasattr(module, "quant_state") and hasattr(module, "compute_dtype")


def is_8bit(module: nn.Module) -> bool:
    """Whether bitsandbytes holds the module's weight in int8."""
    return hasattr(module, "state") and hasattr(module.state, "CB")


def _quantize_4bit(module: Any, dtype: torch.dtype) -> None:
    """The storages of a Linear4bit after loading: packed weights, scales, and their scales."""
    from bitsandbytes.functional import QuantState

    weight = module.weight
    shape = weight.shape
    num_blocks = math.ceil(shape.numel() / QUANT_BLOCK_SIZE)
    nested = weight.compress_statistics
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
    storage = weight.quant_storage
    packed = (shape.numel() + 1) // (2 * storage.itemsize)
    weight.data = torch.empty(packed, 1, dtype=storage)
    weight.quant_state = module.quant_state = state
    weight.blocksize = QUANT_BLOCK_SIZE
    module.support_avx512bf16_for_cpu = False


def _quantize_8bit(module: Any) -> None:
    """The storages of a Linear8bitLt after loading: int8 weights and a scale for each row."""
    weight = module.weight
    weight.data = torch.empty(weight.shape, dtype=torch.int8)
    weight.CB, weight.SCB = weight.data, torch.empty(weight.shape[0])


def _fake_4bit(module: Any) -> None:
    """A plain parameter in the place of bitsandbytes' own."""
    weight = module.weight
    state = module.quant_state
    while state is not None:
        for name in ("absmax", "code", "offset"):
            if getattr(state, name) is not None:
                setattr(state, name, _empty_like(getattr(state, name)))
        state = state.state2
    parameter: Any = nn.Parameter(_empty_like(weight), requires_grad=False)
    parameter.quant_state, parameter.quant_type = module.quant_state, weight.quant_type
    parameter.compress_statistics = weight.compress_statistics
    parameter.blocksize = weight.blocksize
    module.weight = parameter


def _fake_8bit(module: Any) -> None:
    """A plain parameter in the place of bitsandbytes' own."""
    codes = _empty_like(module.weight)
    scales = _empty_like(module.weight.SCB)
    parameter: Any = nn.Parameter(codes, requires_grad=False)
    parameter.CB = parameter.SCB = None
    parameter.has_fp16_weights = False
    module.weight = parameter
    module.state.CB, module.state.SCB = codes, scales


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
