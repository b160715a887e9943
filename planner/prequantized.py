"""Bases that come quantized from the Hub: GPTQ and AWQ, 4 bits in groups."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Linear
from ftplan.planner.tape import Tape, Tensor, constant, scaled, times

PREQUANTIZED = ("gptq", "awq")
# Rows of a weight that share a scale and a zero point: what nearly every such checkpoint has
# (`group_size` in its quantization_config; arXiv 2210.17323, arXiv 2306.00978).
GROUP_SIZE = 128
_HALF = 2


def prequantized_bytes(linear: Linear, quantization: str) -> int:
    """Bytes of a 4-bit weight: packed values, packed zero points, fp16 scales; GPTQ's rows know
    their group by a number of 4 bytes (`g_idx`)."""
    groups = -(-linear.in_features // GROUP_SIZE)
    packed = (linear.in_features + groups) * linear.out_features // 2
    scales = groups * linear.out_features * _HALF
    return packed + scales + (4 * linear.in_features if quantization == "gptq" else 0)


class PrequantizedLinear:
    """AutoGPTQ's `tritonv2` kernel and AutoAWQ's: the weight is dequantized in fp16 for each
    product, and again for the gradient of the input (auto_gptq/nn_modules/triton_utils/dequant.py,
    awq/modules/linear/gemm.py)."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        linear = self.linear
        x = f.to_product(tape, x)
        tape.read(x)
        flops = times(x.elements, 2 * linear.out_features)
        tape.count(flops, _HALF)
        dense = tape.empty(constant(linear.num_weights), _HALF)
        result = tape.empty(scaled(x.elements, linear.out_features, linear.in_features), x.width)
        del dense
        if tape.differentiates(x):
            size, num_weights = (x.elements, x.width), linear.num_weights

            def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
                tape.count(flops, _HALF)
                dense = tape.empty(constant(num_weights), _HALF)
                gradient = tape.empty(*size)
                del dense
                return [gradient]

            tape.attach([result], [x], [], backward)
        return result
