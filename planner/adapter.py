"""What PEFT's adapters on a tape have in common: the module beneath, and their parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from ftplan.planner import adapter_functions as g
from ftplan.planner import functions as f
from ftplan.planner.adapter_counts import tensors_beside
from ftplan.planner.model_spec import Linear
from ftplan.planner.modules import (
    Linear4bit,
    Linear8bit,
    Module,
    Numerics,
    PlainLinear,
    base_linear,
)
from ftplan.planner.peft_options import PeftOptions
from ftplan.planner.tape import Tape, Tensor, Weight, constant

FLOAT32 = f.FLOAT32


def shared(num_elements: int, width: int) -> Weight:
    """A parameter that has a gradient already."""
    weight = Weight(num_elements, width, trained=True)
    weight.gradient = weight
    return weight


def base_weight(tape: Tape, base: Module) -> Tensor:
    """The weight of a linear module, dequantized where it is quantized."""
    if isinstance(base, Linear4bit):
        return base._dequantize(tape, base.width)
    if isinstance(base, Linear8bit):
        return tape.empty(constant(base.linear.num_weights), FLOAT32)
    assert isinstance(base, PlainLinear)
    return base.weight


def bias_of(base: Module) -> Weight:
    assert isinstance(base, PlainLinear | Linear4bit | Linear8bit) and base.bias is not None
    return base.bias


class Adapter(ABC):
    """A linear module and what a method adds to it.

    `added`: parameters by PEFT's name, without the module's and the adapter's own.
    """

    def __init__(self, linear: Linear, numerics: Numerics, options: PeftOptions) -> None:
        self.linear, self.numerics, self.options = linear, numerics, options
        self.base = base_linear(linear, numerics)
        self.width, self.rank = numerics.adapters, numerics.rank
        self.wide, self.deep = linear.out_features, linear.in_features
        tensors = tensors_beside(linear, options, numerics.rank)
        self.added = {
            **{name: self._trained(*shape) for name, shape in tensors.trained.items()},
            **{name: self._frozen(*shape) for name, shape in tensors.frozen.items()},
        }

    @abstractmethod
    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        """The module's result with what is added, as the tuner's `forward` reads."""

    def _trained(self, *shape: int) -> Weight:
        return Weight(math.prod(shape), self.width, trained=True)

    @staticmethod
    def _frozen(*shape: int) -> Weight:
        return Weight(math.prod(shape), FLOAT32, trained=False)

    @property
    def is_quantized(self) -> bool:
        return self.numerics.quantization != "none"

    @property
    def is_4bit(self) -> bool:
        return self.numerics.quantization in ("nf4", "fp4")

    def base_result(self, tape: Tape, x: Tensor) -> Tensor:
        """The module's own result; of a 4-bit one a copy."""
        result = self.base(tape, x)
        return f.clone(tape, result) if self.is_4bit else result

    def cast_input(self, tape: Tape, x: Tensor) -> Tensor:
        """x in the dtype of what is added."""
        return f.cast(tape, x, self.width)

    def multiply_input(self, tape: Tape, x: Tensor, change: Tensor) -> Tensor:
        """x times a change of the whole weight."""
        return g.matmul(tape, x, change, self.deep, self.wide)
