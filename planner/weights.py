"""Bytes of a loaded model, as it is held: by dtype, quantized, prepared for k-bit training.

Equations are numbered in docs/memory-model.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from ftplan.planner.model_spec import Linear, ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.prequantized import PREQUANTIZED, prequantized_bytes
from ftplan.planner.separate_experts import quantized_linears
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.units import FLOAT32_BYTES

# Weight quantization of bitsandbytes: 4 bits a weight and an fp32 scale for each block of 64;
# double quantization holds the scales in 8 bits with an fp32 scale for each 256 of them
# (arXiv 2305.14314, section 3).
QUANT_BLOCK_SIZE = 64
QUANT_SCALES_PER_BLOCK = 256
_SINGLE_QUANT_BYTES = 0.5 + 4 / QUANT_BLOCK_SIZE
_DOUBLE_QUANT_BYTES = 0.5 + 1 / QUANT_BLOCK_SIZE + 4 / (QUANT_BLOCK_SIZE * QUANT_SCALES_PER_BLOCK)


def weight_memory_bytes(
    model: ModelSpec, plan: TrainingPlan, stack: Stack = OWN_STACK, width: int | None = None
) -> int:
    """Bytes of the loaded model, eq. (1): quantized matrices, the rest in `dtype` or `width` bytes;
    in fp32 after k-bit preparation."""
    width = width or plan.weight_bytes
    if plan.quantization == "none":
        return model.num_parameters * width + model.buffer_bytes
    linears = list(_quantized_linears(model, stack))
    quantized = quantized_weights(model, stack)
    rest = model.num_parameters - quantized
    rest_bytes = rest * width + model.buffer_bytes
    if stack.kbit_prepare:
        outer = 2 * model.embedding_parameters if not model.tie_word_embeddings else 0
        rest_bytes = rest * FLOAT32_BYTES + model.buffer_bytes
        if stack.casts_back:
            rest_bytes -= outer * (FLOAT32_BYTES - 2)
    if plan.quantization in PREQUANTIZED:
        sizes = (count * prequantized_bytes(linear, plan.quantization) for count, linear in linears)
        return sum(sizes) + rest_bytes
    if plan.quantization == "int8":
        rows = sum(count * linear.out_features for count, linear in linears)
        return quantized + rows * FLOAT32_BYTES + rest_bytes
    return round(quantized * quantized_bytes_per_weight(plan)) + rest_bytes


def quantized_storages(model: ModelSpec, plan: TrainingPlan, stack: Stack) -> Iterator[int]:
    """Bytes of each tensor that quantized matrices are held in: numbers, and scales."""
    for count, linear in _quantized_linears(model, stack):
        if plan.quantization in PREQUANTIZED:
            yield from [prequantized_bytes(linear, plan.quantization)] * count
            continue
        if plan.quantization == "int8":
            numbers, scales = linear.num_weights, linear.out_features * FLOAT32_BYTES
        else:
            numbers = linear.num_weights // 2
            scales = round(linear.num_weights * quantized_bytes_per_weight(plan)) - numbers
        yield from [numbers, scales] * count


def quantized_weights(model: ModelSpec, stack: Stack) -> int:
    """How many weights are held quantized."""
    return sum(count * linear.num_weights for count, linear in _quantized_linears(model, stack))


def _quantized_linears(model: ModelSpec, stack: Stack) -> Iterator[tuple[int, Linear]]:
    """The modules that are held quantized, how many of each."""
    for layer, count in model.layer_counts.items():
        separate = stack.separates_experts
        for linear, copies in quantized_linears(layer, separate_experts=separate):
            yield count * copies, linear
    for linear in (*model.embedding_linears, *model.other_linears):
        if linear.quantizable:
            yield 1, linear


def quantized_bytes_per_weight(plan: TrainingPlan) -> float:
    """Bytes of one weight of a quantized base, its share of 4 bits' scales included."""
    if plan.quantization == "int8":
        return 1
    return _DOUBLE_QUANT_BYTES if plan.double_quant else _SINGLE_QUANT_BYTES
