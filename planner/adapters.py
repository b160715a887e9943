"""PEFT's adapters on a tape, each as its tuner's `forward` reads (peft/tuners/<method>, PEFT 0.21).

Local variables live here as long as they do there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ftplan.planner import adapter_functions as g
from ftplan.planner import functions as f
from ftplan.planner.model_spec import Linear
from ftplan.planner.modules import (
    Linear4bit,
    Linear8bit,
    LoraLinear,
    Module,
    Numerics,
    PlainLinear,
    base_linear,
)
from ftplan.planner.peft_options import PeftOptions
from ftplan.planner.tape import Tape, Tensor, Weight, constant, per_token, scaled
from ftplan.planner.trained import Trained

FLOAT32 = f.FLOAT32


def adapter_maker(
    options: PeftOptions, trained: Trained
) -> Callable[[Linear, Numerics], Module] | None:
    """What puts the method's adapter around a linear module; None where it adapts none."""
    kind = _ADAPTERS.get(options.peft_type)
    if kind is None:
        return None

    def make(linear: Linear, numerics: Numerics) -> Module:
        ranked = dataclasses.replace(numerics, rank=trained.rank_of(linear))
        return kind(linear, ranked, options)

    return make


def _lora(linear: Linear, numerics: Numerics, options: PeftOptions) -> Module:
    if options.flag("use_dora"):
        return DoraLinear(linear, numerics)
    bias, trains_a = options.flag("lora_bias"), options.method != "lora-fa"
    return LoraLinear(linear, numerics, bias=bias, trains_a=trains_a)


class DoraLinear(LoraLinear):
    """LoRA, and the length of each of the weight's rows (peft.tuners.lora.dora)."""

    def __init__(self, linear: Linear, numerics: Numerics) -> None:
        super().__init__(linear, numerics)
        self.linear, self.rank = linear, numerics.rank
        # TRL turns what is trained beside a quantized base into bf16, all but this vector.
        width = self.width if self.quantization == "none" else FLOAT32
        self.magnitude = Weight(linear.out_features, width, trained=True)

    def _on_plain(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        before = result.width
        x = f.cast(tape, x, self.width)
        result = self._with_magnitude(tape, x, result)
        return f.cast(tape, result, before)

    def _on_quantized(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        if self.quantization != "int8":
            result = f.clone(tape, result)
        before = result.width
        if tape.autocast is None:
            x = f.cast(tape, x, self.width)
        result = self._with_magnitude(tape, x, result)
        return result if tape.autocast else f.cast(tape, result, before)

    def _with_magnitude(self, tape: Tape, x: Tensor, result: Tensor) -> Tensor:
        if not self.dropout:
            return f.add(tape, result, self._scaled(tape, x, result))
        x = f.dropout(tape, x, self.dropout)
        return f.add(tape, result, self._scaled(tape, x, None))

    def _scaled(self, tape: Tape, x: Tensor, base_result: Tensor | None) -> Tensor:
        """What is added; `base_result` is none where dropout changes the adapter's input."""
        linear = self.linear
        change = f.cast(tape, self._change_of_weight(tape), x.width)
        weight = f.cast(tape, base_weight(tape, self.base), x.width)
        norm = self._norm(tape, weight, g.detached(change))
        scale = g.divide(tape, self.magnitude, norm)
        lora_result = self.lora_b(tape, self.lora_a(tape, x))
        if base_result is None:
            base_result = g.matmul(tape, x, weight, linear.in_features, linear.out_features)
        elif linear.bias:
            base_result = f.add(tape, base_result, bias_of(self.base))
        less = f.scale(tape, scale)
        left = f.multiply(tape, less, base_result)
        right = f.scale(tape, f.multiply(tape, scale, lora_result))
        return f.add(tape, left, right)

    def _change_of_weight(self, tape: Tape) -> Tensor:
        """The product of the adapter's matrices, as its modules multiply the identity."""
        side = self.linear.in_features
        identity = g.matrix(tape, side, side, self.width)
        return self.lora_b(tape, self.lora_a(tape, identity))

    def _norm(self, tape: Tape, weight: Tensor, change: Tensor) -> Tensor:
        weight = f.add(tape, weight, f.scale(tape, change))
        return tape.empty(constant(self.linear.out_features), weight.width)


def base_weight(tape: Tape, base: Module) -> Tensor:
    """The weight of a linear module, dequantized where it is quantized."""
    if isinstance(base, Linear4bit):
        return base._dequantize(tape, base.width)
    if isinstance(base, Linear8bit):
        return tape.empty(constant(base.linear.num_weights), FLOAT32)
    assert isinstance(base, PlainLinear)
    return base.weight


def bias_of(base: Module) -> Weight:
    assert isinstance(base, PlainLinear) and base.bias is not None
    return base.bias


class Adapter:
    """A linear module and what a method adds to it."""

    def __init__(self, linear: Linear, numerics: Numerics, options: PeftOptions) -> None:
        self.linear, self.numerics, self.options = linear, numerics, options
        self.base = base_linear(linear, numerics)
        self.width, self.rank = numerics.adapters, numerics.rank
        self.wide, self.deep = linear.out_features, linear.in_features
        self.add_parameters()

    def add_parameters(self) -> None:
        raise NotImplementedError

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def is_quantized(self) -> bool:
        return self.numerics.quantization != "none"

    @property
    def is_4bit(self) -> bool:
        return self.numerics.quantization in ("nf4", "fp4")

    def weight(self, *shape: int) -> Weight:
        """A parameter that is trained."""
        return Weight(_size(shape), self.width, trained=True)

    @staticmethod
    def frozen(*shape: int) -> Weight:
        return Weight(_size(shape), FLOAT32, trained=False)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


class Ia3Linear(Adapter):
    """A factor for each result, or for each input of a feed-forward module (tuners/ia3)."""

    def add_parameters(self) -> None:
        self.is_feed_forward = self.linear.name in self.options.values["feedforward"]
        self.factors = self.weight(self.deep if self.is_feed_forward else self.wide)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        if self.is_quantized:
            return self._on_quantized(tape, x)
        before = x.width
        factors = f.scale(tape, self.factors)
        if self.is_feed_forward:
            x = f.cast(tape, x, self.width)
            changed = f.cast(tape, f.multiply(tape, x, factors), before)
            return self.base(tape, changed)
        result = self.base(tape, x)
        return f.cast(tape, f.multiply(tape, result, factors), result.width)

    def _on_quantized(self, tape: Tape, x: Tensor) -> Tensor:
        factors = f.scale(tape, self.factors)
        if tape.autocast is None:
            x = f.cast(tape, x, FLOAT32)
        if self.is_feed_forward:
            result = self.base(tape, f.multiply(tape, x, factors))
        else:
            result = self.base(tape, x)
            result = f.multiply(tape, result, factors)
        return f.clone(tape, result) if self.is_4bit else result


class AdaloraLinear(Adapter):
    """Low-rank matrices with a diagonal between them, all at their first rank (tuners/adalora)."""

    def add_parameters(self) -> None:
        rank = self.rank
        self.a, self.e = self.weight(rank, self.deep), self.weight(rank)
        self.b = self.weight(self.wide, rank)
        self.rank_number = Weight(1, FLOAT32, trained=not self.is_quantized and self.width == 4)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        if self.is_4bit:
            result = f.clone(tape, result)
        number = f.scale(tape, self.rank_number)
        if not (self.is_quantized and tape.autocast):
            x = f.cast(tape, x, self.width)
        change = self._change(tape, x)
        change = f.scale(tape, change)
        return g.add_in_place(tape, result, g.divide(tape, change, number))

    def _change(self, tape: Tape, x: Tensor) -> Tensor:
        dropped = f.dropout(tape, x, self.numerics.dropout)
        down = g.view(tape, f.multiply(tape, self.a, self.e))
        middle = g.matmul(tape, dropped, down, self.deep, self.rank)
        return g.matmul(tape, middle, g.view(tape, self.b), self.rank, self.wide)


class LohaLinear(Adapter):
    """The product, element by element, of two low-rank matrices (tuners/loha)."""

    def add_parameters(self) -> None:
        left, right = (self.wide, self.rank), (self.rank, self.deep)
        self.factors = [self.weight(*shape) for shape in (left, right, left, right)]

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base(tape, x)
        result = f.add(tape, result, self._change(tape, x))
        return f.cast(tape, result, before)

    def _change(self, tape: Tape, x: Tensor) -> Tensor:
        change = self._change_of_weight(tape)
        x = f.cast(tape, x, change.width)
        return g.matmul(tape, x, change, self.deep, self.wide)

    def _change_of_weight(self, tape: Tape) -> Tensor:
        """A function with a backward of its own (`HadaWeight`), which knows no autocast."""
        size, width = constant(self.wide * self.deep), self.width
        grads_of = [(factor.elements, factor.width) for factor in self.factors]
        compute = tape.autocast or width
        if tape.autocast and width != tape.autocast:
            copies = [tape.cast_weight(factor) for factor in self.factors]
            del copies
        left, right = tape.empty(size, compute), tape.empty(size, compute)
        both = tape.empty(size, compute)
        del left, right
        change = tape.like(both)
        del both
        if not tape.differentiates(*self.factors):
            return change

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            incoming = gradients[0]
            assert incoming is not None
            scaled_ = tape.like(incoming)
            grads: f.Gradients = []
            for first, second in (grads_of[:2], grads_of[2:]):
                other = tape.empty(size, width)
                product = tape.empty(size, width)
                del other
                grads += [tape.empty(*first), tape.empty(*second)]
            del product, scaled_
            return grads

        tape.attach([change], self.factors, tape.save(*self.factors), backward)
        return change


class LokrLinear(LohaLinear):
    """The Kronecker product of two small matrices (tuners/lokr)."""

    def add_parameters(self) -> None:
        self.one, self.two = [
            [self.weight(*shape) for shape in shapes]
            for shapes in lokr_shapes(self.linear, self.options, self.rank)
        ]
        sides = lokr_sides(self.linear, self.options)
        (self.out_1, self.out_2), (self.in_1, self.in_2) = sides

    def _change_of_weight(self, tape: Tape) -> Tensor:
        one = self._factor(tape, self.one, self.out_1, self.in_1)
        two = self._factor(tape, self.two, self.out_2, self.in_2)
        size = constant(self.wide * self.deep)
        return f.scale(tape, g.outer(tape, one, two, size))

    def _factor(self, tape: Tape, parts: list[Weight], wide: int, deep: int) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return g.matmul(tape, parts[0], parts[1], self.rank, deep)


_ADAPTERS: dict[str, Callable[[Linear, Numerics, PeftOptions], Module]] = {
    "LORA": _lora,
    "IA3": Ia3Linear,
    "ADALORA": AdaloraLinear,
    "LOHA": LohaLinear,
}
