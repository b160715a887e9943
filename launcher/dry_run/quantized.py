"""What bitsandbytes' CUDA kernels allocate (bitsandbytes.backends.cuda.ops, 0.50), on fakes.

Their registered shape functions give the results only, not what lives within.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ftplan.planner.weights import QUANT_SCALES_PER_BLOCK


def _gemm_4bit(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    shape: Any,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `bitsandbytes::gemm_4bit` allocates: scales, the dequantized weight, the product.

    So above 1,536 tokens; below, a fused kernel may save the dequantized weight, depending on the
    card.
    """
    ops: Any = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        assert absmax_offset is not None
        scales = ops.dequantize_blockwise.default(
            absmax_8bit, absmax, absmax_code, QUANT_SCALES_PER_BLOCK, torch.float32
        )
        absmax = scales + absmax_offset
        del scales
    dense = ops.dequantize_4bit.default(weight, absmax, blocksize, quant_type, shape, inputs.dtype)
    return nn.functional.linear(inputs, dense, bias)


def _int8_vectorwise_quant(
    inputs: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows in int8 with a scale each. Outlier columns depend on data: taken as none, where
    models have some in a thousand (arXiv 2208.07339, section 4)."""
    scales = inputs.new_empty(inputs.numel() // inputs.shape[-1], dtype=torch.float32)
    codes = inputs.new_empty(inputs.shape, dtype=torch.int8)
    columns = None
    if threshold > 0:
        outliers = inputs.abs() >= threshold
        del outliers
        columns = inputs.new_empty(0, dtype=torch.int64)
    return codes, scales, columns


def _int8_scaled_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    row_scales: torch.Tensor,
    column_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The product in int32, then in fp16, then in `dtype`."""
    shape = (*left.shape[:-1], right.shape[0])
    product = left.new_empty(shape, dtype=torch.int32)
    result = left.new_empty(shape, dtype=torch.float16)
    del product
    return result.to(dtype or torch.float16)


def _int8_mixed_scaled_mm(
    inputs: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    row_scales: torch.Tensor,
    column_scales: torch.Tensor,
    outlier_cols: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without outlier columns, as `_int8_vectorwise_quant` has it."""
    result = _int8_scaled_mm(left, right, row_scales, column_scales, bias, inputs.dtype)
    return result, inputs.new_empty(0)


def int8_matmul(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    state: Any = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> Any:
    """`bitsandbytes.matmul` as on a GPU; on the processor it trains by another function."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    return MatMul8bitLt.apply(inputs, weight, out, bias, state)


def _dequantize_weight(weight: Any, state: Any = None) -> torch.Tensor:
    """PEFT's function of that name, which knows a quantized weight by the name of its class."""
    from bitsandbytes import functional

    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    return functional.int8_vectorwise_dequant(weight.data, state.SCB)


def _dequantize_module(module: Any) -> torch.Tensor:
    weight = module.weight
    if hasattr(weight, "quant_state") or hasattr(weight, "has_fp16_weights"):
        return _dequantize_weight(weight, getattr(module, "state", None))
    return weight


def dequantization(quantization: str) -> list[tuple[tuple[Any, str], Callable[..., Any]]]:
    """Where PEFT dequantizes weights of a base held so: ((module, name), what to put there)."""
    if quantization == "none":
        return []
    replaced: dict[str, Callable[..., Any]] = {
        "dequantize_bnb_weight": _dequantize_weight,
        "dequantize_module_weight": _dequantize_module,
    }
    loaded: list[Any] = list(sys.modules.values())
    return [
        ((module, name), function)
        for module in loaded
        for name, function in replaced.items()
        if getattr(module, "__name__", "").startswith("peft.") and name in vars(module)
    ]


def quantized_kernels(quantization: str) -> dict[Any, Callable[..., Any]]:
    """What to run in the place of each kernel of a base held so; nothing for `none`."""
    if quantization == "none":
        return {}
    ops: Any = torch.ops.bitsandbytes
    return {
        ops.gemm_4bit.default: _gemm_4bit,
        ops.int8_vectorwise_quant.default: _int8_vectorwise_quant,
        ops.int8_scaled_mm.default: _int8_scaled_mm,
        ops.int8_mixed_scaled_mm.default: _int8_mixed_scaled_mm,
    }
