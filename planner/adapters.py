"""PEFT's adapters on a tape, each as its tuner's `forward` reads (peft/tuners/<method>, PEFT 0.21).

Local variables live here as long as they do there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

from ftplan.planner import adapter_functions as g
from ftplan.planner import functions as f
from ftplan.planner.adapter_counts import oft_block, scales_input, tensors_beside
from ftplan.planner.model_spec import Linear, Parameter
from ftplan.planner.modules import (
    Linear4bit,
    Linear8bit,
    LoraLinear,
    Module,
    Numerics,
    PlainLinear,
    base_linear,
    called,
)
from ftplan.planner.peft_options import PeftOptions
from ftplan.planner.tape import Tape, Tensor, Weight, constant, per_row, scaled, times
from ftplan.planner.trained import Trained

FLOAT32 = f.FLOAT32
COMPLEX = 8  # two fp32 numbers
INT64 = 8
VBLORA_TOPK = 2  # vectors mixed, PEFT's default

# What all modules share of a method and train: its gradient grows from the last layer on.
_SHARED = ("shared.vblora_vector_bank", "shared.unilora_theta_d", ".lily_B.weight")
# AdaLoRA adds to the loss how far these are from orthogonal, so that backward begins with them.
_REGULARIZED = ("lora_A", "lora_B")


def adapter_maker(
    options: PeftOptions, trained: Trained, *, loss_in_model: bool
) -> Callable[[Linear, Numerics], Module] | None:
    """What puts the method's adapter around a linear module; None where it adapts none.

    `loss_in_model`: the model computes the loss, to which AdaLoRA adds a term.
    """
    if options.peft_type == "IA3":
        return lambda linear, numerics: Ia3Linear(
            linear, numerics, options, scales_input=scales_input(linear, trained)
        )
    kind = _ADAPTERS.get(options.peft_type)
    if options.peft_type == "ADALORA":
        kind = partial(AdaloraLinear, regularized=loss_in_model)
    if kind is None:
        return None

    def make(linear: Linear, numerics: Numerics) -> Module:
        ranked = dataclasses.replace(numerics, rank=trained.rank_of(linear))
        return kind(linear, ranked, options)

    return make


def early_gradient_bytes(
    options: PeftOptions, trained: Trained, width: int, *, loss_in_model: bool
) -> int:
    """Bytes of gradients that are there before backward reaches the layers."""
    if options.peft_type == "ADALORA" and not loss_in_model:
        return 0
    return width * sum(p.num_elements for p in _early(options, trained))


def loss_copy_bytes(options: PeftOptions, trained: Trained, *, loss_in_model: bool) -> int:
    """Bytes that AdaLoRA's term of the loss keeps: each matrix in 16 bits, and transposed."""
    if options.peft_type != "ADALORA" or not loss_in_model:
        return 0
    return 2 * 2 * sum(p.num_elements for p in _early(options, trained))


def unseen_gradient_bytes(options: PeftOptions, trained: Trained, width: int) -> int:
    """Bytes that gradients hold beside what they are gradients of: OSF's are views of those of
    matrices joined with frozen ones, where no hook makes new ones."""
    if options.peft_type != "OSF":
        return 0
    return width * sum(p.num_elements for p in trained.adapters if p.name.endswith("V_low"))


def _early(options: PeftOptions, trained: Trained) -> list[Parameter]:
    if options.peft_type == "ADALORA":
        return [p for p in trained.adapters if p.name.endswith(_REGULARIZED)]
    return [p for p in trained.adapters if p.name.endswith(_SHARED)]


def shared(num_elements: int, width: int) -> Weight:
    """A parameter that has a gradient already."""
    weight = Weight(num_elements, width, trained=True)
    weight.gradient = weight
    return weight


def _lora(linear: Linear, numerics: Numerics, options: PeftOptions) -> Module:
    if options.flag("use_dora"):
        return DoraLinear(linear, numerics)
    bias, trains_a = options.flag("lora_bias"), options.method != "lora-fa"
    lora = LoraLinear(linear, numerics, bias=bias, trains_a=trains_a)
    return called(lora, numerics, lora.reads)


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
        if self.quantization in ("nf4", "fp4"):
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
    assert isinstance(base, PlainLinear | Linear4bit | Linear8bit) and base.bias is not None
    return base.bias


class Adapter:
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

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        raise NotImplementedError

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


class Ia3Linear(Adapter):
    """A factor for each result, or for each input of a feed-forward module (tuners/ia3)."""

    def __init__(
        self, linear: Linear, numerics: Numerics, options: PeftOptions, scales_input: bool
    ) -> None:
        super().__init__(linear, numerics, options)
        self.is_feed_forward = scales_input
        self.factors = self._trained(self.deep if scales_input else self.wide)

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

    def __init__(
        self, linear: Linear, numerics: Numerics, options: PeftOptions, regularized: bool
    ) -> None:
        super().__init__(linear, numerics, options)
        for name in _REGULARIZED if regularized else ():
            self.added[name].gradient = self.added[name]

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base_result(tape, x)
        number = tape.empty(constant(1), FLOAT32)
        if not (self.is_quantized and tape.autocast):
            x = f.cast(tape, x, self.width)
        change = self._change(tape, x)
        held = change if self.is_quantized else None
        change = f.scale(tape, change)
        change = g.divide(tape, change, number)
        del held
        return g.add_in_place(tape, result, change)

    def _change(self, tape: Tape, x: Tensor) -> Tensor:
        dropped = f.dropout(tape, x, self.numerics.dropout)
        w = self.added
        down = g.view(tape, f.multiply(tape, w["lora_A"], w["lora_E"]))
        middle = g.matmul(tape, dropped, down, self.deep, self.rank)
        return g.matmul(tape, middle, g.view(tape, w["lora_B"]), self.rank, self.wide)


class LohaLinear(Adapter):
    """The product, element by element, of two low-rank matrices (tuners/loha)."""

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
        factors = list(self.added.values())
        grads_of = [(factor.elements, factor.width) for factor in factors]
        compute = tape.autocast or width
        if tape.autocast and width != tape.autocast:
            copies = [tape.cast_weight(factor) for factor in factors]
            del copies
        left, right = tape.empty(size, compute), tape.empty(size, compute)
        both = tape.empty(size, compute)
        del left, right
        change = tape.like(both)
        del both
        if not tape.differentiates(*factors):
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

        tape.attach([change], factors, tape.save(*factors), backward)
        return change


class LokrLinear(LohaLinear):
    """The Kronecker product of two small matrices, either of which may be one of two
    (tuners/lokr)."""

    def _change_of_weight(self, tape: Tape) -> Tensor:
        one, two = self._factor(tape, "lokr_w1"), self._factor(tape, "lokr_w2")
        size = constant(self.wide * self.deep)
        return f.scale(tape, g.outer(tape, one, two, size))

    def _factor(self, tape: Tape, name: str) -> Tensor:
        if name in self.added:
            return self.added[name]
        left, right = self.added[f"{name}_a"], self.added[f"{name}_b"]
        deep = right.elements[0] // self.rank
        return g.matmul(tape, left, right, self.rank, deep)


class OftLinear(Adapter):
    """Blocks of the input are turned by orthogonal matrices (tuners/oft)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        x = self.cast_input(tape, x)
        x = self._turned(tape, x)
        result = self.base(tape, f.cast(tape, x, before))
        return f.cast(tape, result, before)

    def _turned(self, tape: Tape, x: Tensor) -> Tensor:
        weight = self.added["oft_R.weight"]
        block = oft_block(self.linear, self.options)
        turn = self._rotation(tape, weight, block)
        blocks = g.view_copied_back(tape, x)
        if self.options.flag("block_share"):
            turn = f.part_copied(tape, turn, constant(self.deep * block))
        turned = g.batched(tape, blocks, turn, x.elements, block)
        whole = f.clone(tape, turned)
        return f.cast(tape, whole, x.width)

    def _rotation(self, tape: Tape, weight: Weight, block: int) -> Tensor:
        """Cayley's transform as the first terms of a Neumann series."""
        blocks = weight.elements[0] // (block * (block - 1) // 2)
        skew = self._skew(tape, weight, blocks * block * block)
        identity = g.matrix(tape, block, block, weight.width)
        turn = tape.empty(skew.elements, weight.width)
        del identity
        turn = g.add_in_place(tape, turn, skew, scales=True)
        power = g.batched(tape, skew, skew, skew.elements, block)
        turn = g.add_in_place(tape, turn, power, scales=True)
        for scales in (True, False):  # five terms, of which the last counts once
            power = g.batched(tape, power, skew, skew.elements, block)
            turn = g.add_in_place(tape, turn, power, scales=scales)
        return turn

    @staticmethod
    def _skew(tape: Tape, weight: Weight, num_elements: int) -> Tensor:
        matrix = g.put_at(tape, weight, constant(num_elements))
        return g.subtract(tape, matrix, matrix)


class VeraLinear(Adapter):
    """Two vectors around frozen matrices that all modules share (tuners/vera)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base_result(tape, x)
        base_width = result.width
        down, up = self._frozen(self.rank, self.deep), self._frozen(self.wide, self.rank)
        x = self.cast_input(tape, x)
        middle = g.matmul(tape, x, down, self.deep, self.rank)
        middle = f.multiply(tape, self.added["vera_lambda_d"], middle)
        change = g.matmul(tape, middle, up, self.rank, self.wide)
        del middle
        change = f.multiply(tape, self.added["vera_lambda_b"], change)
        result = f.add(tape, result, change)
        del change
        result = f.cast(tape, result, base_width)
        return f.cast(tape, result, before)


class HraLinear(Adapter):
    """A chain of reflections of the weight (tuners/hra)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before, side = x.width, self.deep
        new_weight = g.matrix(tape, side, side, FLOAT32)
        reflections = self._reflections(tape)
        new_weight = g.matmul(tape, new_weight, reflections, side, side)
        weight = f.cast(tape, base_weight(tape, self.base), new_weight.width)
        new_weight = g.matmul(tape, weight, new_weight, side, side)
        x = f.cast(tape, x, new_weight.width)
        bias = bias_of(self.base) if self.linear.bias else None
        result = f.product(tape, f.to_product(tape, x), new_weight, side, self.wide, bias)
        return f.cast(tape, result, before)

    def _reflections(self, tape: Tape) -> Tensor:
        side, u = self.deep, self.added["hra_u"]
        norm = g.norm(tape, u, constant(self.rank))
        u_normed = g.divide(tape, u, norm)
        weight = g.matrix(tape, side, side, u_normed.width)
        for _ in range(self.rank):
            column = f.part(tape, u_normed, constant(side))
            along = g.matmul(tape, f.scale(tape, weight), column, side, 1)
            along = g.matmul(tape, along, column, 1, side)
            weight = g.subtract(tape, weight, along)
            del along
        return weight


class C3aLinear(Adapter):
    """Circular convolutions of blocks, by Fourier transforms (tuners/c3a)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base(tape, x)
        x = f.cast(tape, x, FLOAT32)
        kernel = f.cast(tape, self.added["c3a_kernel"], FLOAT32)
        x = f.scale(tape, self._convolved(tape, x, kernel))
        result = g.add_in_place(tape, result, f.cast(tape, x, result.width))
        return f.cast(tape, result, before)

    def _convolved(self, tape: Tape, x: Tensor, kernel: Tensor) -> Tensor:
        """`BlockCircularConvolution`; the real part is a view of the complex result."""
        saved = tape.save(x, kernel)
        result_size = scaled(x.elements, self.wide, self.deep)
        x_size, kernel_size = x.elements, kernel.elements
        transformed, of_kernel = tape.like(x, COMPLEX), tape.like(kernel, COMPLEX)
        product = tape.empty(result_size, COMPLEX)
        del transformed, of_kernel
        whole = tape.empty(result_size, COMPLEX)
        del product
        result = Tensor(whole.storage, whole.elements, FLOAT32)
        if not tape.differentiates(x, kernel):
            return result

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            incoming = tape.empty(result_size, COMPLEX)
            of_kernel = tape.empty(kernel_size, COMPLEX)
            product = tape.empty(x_size, COMPLEX)
            del of_kernel
            of_x = tape.empty(x_size, COMPLEX)
            del product
            transformed = tape.empty(x_size, COMPLEX)
            product = tape.empty(kernel_size, COMPLEX)
            del transformed
            of_kernel = tape.empty(kernel_size, COMPLEX)
            del incoming, product
            gradient = tape.empty(kernel_size, FLOAT32)
            del of_kernel
            return [Tensor(of_x.storage, x_size, FLOAT32), gradient]

        tape.attach([result], [x, kernel], saved, backward)
        return result


class RoadLinear(Adapter):
    """Pairs of results are turned (tuners/road)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base_result(tape, x)
        before = result.width
        if not (self.is_quantized and tape.autocast):
            result = self.cast_input(tape, result)
        result = self._turned(tape, result)
        return f.cast(tape, result, before)

    def _turned(self, tape: Tape, x: Tensor) -> Tensor:
        first, second = self._columns(tape)
        half = scaled(x.elements, 1, 2)
        left, right = f.part(tape, x, half), f.part(tape, x, half)
        crossed = f.join(tape, [f.scale(tape, right), left])
        straight = f.multiply(tape, x, first)
        return f.add(tape, straight, f.multiply(tape, crossed, second))

    def _columns(self, tape: Tape) -> tuple[Tensor, Tensor]:
        size = constant(self.wide)
        theta = f.part_copied(tape, self.added["road_theta"], size)
        alpha = f.part_copied(tape, self.added["road_alpha"], size)
        cosine, sine = (f.activate(tape, theta, name) for name in ("cos", "sin"))
        return f.multiply(tape, alpha, cosine), f.multiply(tape, alpha, sine)


class MissLinear(Adapter):
    """One small matrix that the sums of the input's parts are multiplied with (tuners/miss)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base_result(tape, x)
        block = self.added["miss_block"]
        x = self.cast_input(tape, x)
        sums = g.reduced(
            tape, g.view_copied_back(tape, x), scaled(x.elements, self.rank, self.deep)
        )
        result = f.add(tape, result, g.matmul(tape, sums, block, self.rank, self.wide))
        return f.cast(tape, result, before)


class BeftLinear(Adapter):
    """A bias (tuners/beft)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        summed = f.add(tape, result, self.added["beft_bias"])
        return f.cast(tape, summed, result.width)


class RandloraLinear(Adapter):
    """Scaled sums of frozen bases that all modules share (tuners/randlora)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base_result(tape, x)
        bases = g.view(tape, self._scaled(tape))
        other = self._frozen(max(self.wide, self.deep), self._inner)
        first, second = (bases, other) if self.deep <= self.wide else (other, bases)
        x = f.cast(tape, x, FLOAT32)
        change = g.matmul(tape, x, first, self.deep, self._inner)
        change = g.matmul(tape, change, second, self._inner, self.wide)
        held = change if self.is_quantized else None
        change = f.scale(tape, change)
        result = f.add(tape, result, change)
        del held
        return f.cast(tape, result, before)

    @property
    def _inner(self) -> int:
        return self.added["randlora_lambda"].elements[0]

    def _scaled(self, tape: Tape) -> Tensor:
        """`UniqueBaseGrad`: a gradient for each of the scales, by one product more."""
        scales = [self.added["randlora_lambda"], self.added["randlora_gamma"]]
        size = constant(self._inner * min(self.wide, self.deep))
        sizes = [(scale.elements, scale.width) for scale in scales]
        product = tape.empty(size, FLOAT32)
        result = tape.empty(size, FLOAT32)
        del product
        if not tape.differentiates(*scales):
            return result

        def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            grads: f.Gradients = []
            for one in sizes:
                product = tape.empty(size, FLOAT32)
                grads.append(tape.empty(*one))
                del product
            return grads

        tape.attach([result], scales, tape.save(*scales), backward)
        return result


class VbloraLinear(Adapter):
    """Low-rank matrices, mixed from the best of a bank of vectors (tuners/vblora)."""

    def __init__(self, linear: Linear, numerics: Numerics, options: PeftOptions) -> None:
        super().__init__(linear, numerics, options)
        vectors, length = options.count("num_vectors"), options.count("vector_length")
        self.bank = shared(vectors * length, self.width)
        self.length, self.vectors = length, vectors

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base(tape, x)
        down = self._mixed(tape, self.added["vblora_logits_A"])
        up = f.clone(tape, self._mixed(tape, self.added["vblora_logits_B"]))
        x = self.cast_input(tape, x)
        change = g.matmul(tape, x, down, self.deep, self.rank)
        change = g.matmul(tape, change, up, self.rank, self.wide)
        result = f.add(tape, result, change)
        return f.cast(tape, result, before)

    def _mixed(self, tape: Tape, logits: Weight) -> Tensor:
        """Softmax of the highest logits, and the sum of their vectors."""
        places = logits.elements[0] // self.vectors
        chosen = f.part_copied(tape, logits, constant(VBLORA_TOPK * places))
        indices = tape.empty(constant(VBLORA_TOPK * places), INT64)
        shares = f.softmax_in_float32(tape, chosen)
        vectors = g.looked_up(tape, self.bank, constant(VBLORA_TOPK * places * self.length))
        weighted = g.outer(tape, shares, vectors, vectors.elements)
        del indices
        return g.reduced(tape, weighted, constant(places * self.length))


class UniloraLinear(Adapter):
    """Low-rank matrices, looked up in one vector that all modules share (tuners/unilora)."""

    def __init__(self, linear: Linear, numerics: Numerics, options: PeftOptions) -> None:
        super().__init__(linear, numerics, options)
        self.theta = shared(options.count("theta_d_length"), self.width)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base(tape, x)
        down, up = (self._looked_up(tape, f"unilora_scales_{letter}") for letter in "AB")
        x = self.cast_input(tape, x)
        change = g.matmul(tape, x, down, self.deep, self.rank)
        change = g.matmul(tape, change, up, self.rank, self.wide)
        result = f.add(tape, result, change)
        return f.cast(tape, result, before)

    def _looked_up(self, tape: Tape, name: str) -> Tensor:
        scales = self.added[name]
        return f.multiply(tape, g.looked_up(tape, self.theta, scales.elements), scales)


class HiraLinear(Adapter):
    """Low-rank matrices that scale the weight element by element (tuners/hira)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base_result(tape, x)
        before = result.width
        down, up = self.added["hira_A"], self.added["hira_B"]
        if self.is_quantized:
            weight = base_weight(tape, self.base)
            if tape.autocast is None:
                x = self.cast_input(tape, x)
            product = g.matmul(tape, up, down, self.rank, self.deep)
        else:
            weight = base_weight(tape, self.base)
            product = g.matmul(tape, g.view(tape, down), g.view(tape, up), self.rank, self.wide)
            x = self.cast_input(tape, x)
        change = self.multiply_input(tape, x, f.multiply(tape, weight, product))
        result = f.add(tape, result, change)
        return f.cast(tape, result, before)


class DeloraLinear(Adapter):
    """Low-rank matrices of bounded length (tuners/delora)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before, rank, w = x.width, self.rank, self.added
        result = self.base(tape, x)
        change = tape.like(result)
        inner = f.times_table(tape, x, w["delora_w_norm"].width)
        inner = g.matmul(tape, inner, w["delora_A"], self.deep, rank)
        lengths = [g.norm(tape, w[name], constant(rank)) for name in ("delora_A", "delora_B")]
        scale = g.divide(tape, f.scale(tape, w["delora_lambda"]), f.multiply(tape, *lengths))
        inner = f.multiply(tape, inner, scale)
        inner = g.matmul(tape, inner, w["delora_B"], rank, self.wide)
        change = g.add_in_place(tape, change, inner)
        result = f.add(tape, result, f.cast(tape, change, result.width))
        return f.cast(tape, result, before)


class GraloraLinear(Adapter):
    """Low-rank matrices for blocks of the weight (tuners/gralora)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base(tape, x)
        change = self._change(tape, x)
        scaled_ = f.scale(tape, f.cast(tape, change, result.width))
        result = g.add_in_place(tape, result, scaled_)
        return f.cast(tape, result, before)

    def _change(self, tape: Tape, x: Tensor) -> Tensor:
        parts, w = self.options.count("gralora_k"), self.added
        middle_size = scaled(x.elements, parts * self.rank, self.deep)
        result_size = scaled(x.elements, self.wide, self.deep)
        blocks = g.view_copied_back(tape, self.cast_input(tape, x))
        middle = g.batched(tape, blocks, w["gralora_A"], middle_size, self.deep // parts)
        del blocks
        mixed = g.reordered(tape, middle)
        del middle
        return f.clone(tape, g.batched(tape, mixed, w["gralora_B"], result_size, self.rank))


class GloraLinear(Adapter):
    """Low-rank changes of weight, input and bias (tuners/glora), in PEFT's configuration."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        base_result = self.base(tape, x)
        weight = base_weight(tape, self.base)
        factor, addend = (self._path(tape, letter, self.wide, self.deep) for letter in "AB")
        changed = self._combined(tape, weight, factor, addend)
        bias = self._bias(tape, weight) if self.linear.bias else None
        x = f.to_product(tape, x)
        adapted = f.product(tape, x, f.to_product(tape, changed), self.deep, self.wide, bias)
        result = f.add(tape, base_result, adapted)
        result = g.subtract(tape, result, f.scale(tape, base_result))
        return f.cast(tape, result, base_result.width)

    def _path(self, tape: Tape, letter: str, wide: int, deep: int) -> Tensor:
        down, up = (self.added[f"glora_{letter}.{name}"] for name in ("Xd", "Xu"))
        product = g.matmul(tape, down, up, down.elements[0] // wide, deep)
        return f.cast(tape, product, self.numerics.weights)

    @staticmethod
    def _combined(tape: Tape, own: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
        return f.add(tape, f.add(tape, own, f.multiply(tape, own, factor)), addend)

    def _bias(self, tape: Tape, weight: Tensor) -> Tensor:
        own, width = bias_of(self.base), self.numerics.weights
        inputs = self._path(tape, "C", self.deep, 1)
        factor, addend = (f.cast(tape, self.added[f"glora_{x}.X"], width) for x in "DE")
        combined = self._combined(tape, own, factor, addend)
        return f.add(tape, combined, g.matmul(tape, weight, inputs, self.deep, 1))


class LilyLinear(Adapter):
    """Low-rank matrices, the second mixed of several that modules of a name share (tuners/lily)."""

    def __init__(self, linear: Linear, numerics: Numerics, options: PeftOptions) -> None:
        super().__init__(linear, numerics, options)
        self.parts = options.count("num_B")
        self.a = self._trained(self.rank, self.deep)
        self.b = shared(self.parts * self.rank * self.wide, self.width)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        stacked = g.view(tape, self.b)
        x = self.cast_input(tape, x)
        hidden = g.matmul(tape, x, self.a, self.deep, self.rank)
        router = self.added["lily_router.weight"]
        logits = g.matmul(tape, hidden, router, self.rank, self.parts)
        shares = f.softmax_in_float32(tape, logits)
        shares = g.averaged(tape, shares, constant(self.parts))
        mixed_size = constant(self.rank * self.wide)
        mixed = g.batched(tape, shares, stacked, mixed_size, self.parts)
        change = g.matmul(tape, hidden, mixed, self.rank, self.wide)
        return f.add(tape, result, f.cast(tape, f.scale(tape, change), result.width))


class DeftLinear(Adapter):
    """A low-rank part of the result is replaced, in fp32 (tuners/deft)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before, w = x.width, self.added
        base_result = self.base(tape, x)
        result = f.cast(tape, base_result, FLOAT32)
        if self.linear.bias:
            base_product = g.subtract(tape, result, f.cast(tape, bias_of(self.base), FLOAT32))
        else:
            base_product = result
        x = f.cast(tape, x, FLOAT32)
        projection = f.cast(tape, w["deft_P"], FLOAT32)
        right = f.activate(tape, projection, "relu")
        inner = g.matmul(tape, base_product, right, self.wide, self.rank)
        removed = g.matmul(tape, inner, g.view(tape, projection), self.rank, self.wide)
        del inner
        result = g.subtract(tape, result, removed)
        if "deft_R" in w:
            put = f.scale(tape, f.cast(tape, w["deft_R"], FLOAT32))
            inner = g.matmul(tape, x, put, self.deep, self.rank)
            put_back = g.matmul(tape, inner, g.view(tape, projection), self.rank, self.wide)
            del inner
            result = f.add(tape, result, put_back)
            del put_back
        return f.cast(tape, result, before)


class PeanutLinear(Adapter):
    """A small network of the weight (tuners/peanut), in PEFT's configuration."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        change = self._change_of_weight(tape)
        x = f.cast(tape, x, change.width)
        change = self.multiply_input(tape, x, change)
        return f.add(tape, result, f.cast(tape, change, result.width))

    def _change_of_weight(self, tape: Tape) -> Tensor:
        down, up = self.added["peanut_A.weight"], self.added["peanut_B.weight"]
        weight = f.cast(tape, base_weight(tape, self.base), down.width)
        inner = g.matmul(tape, weight, g.view(tape, down), self.wide, self.rank)
        inner = f.activate(tape, inner, "relu")
        return f.scale(tape, g.matmul(tape, inner, up, self.rank, self.wide))


class ShiraLinear(Adapter):
    """Some of the weights themselves (tuners/shira)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        weight = f.clone(tape, base_weight(tape, self.base))
        values = self.added["shira_weight"]
        places = tape.empty(times(values.elements, 2), INT64)
        weight = g.add_sparse(tape, weight, f.scale(tape, values), places)
        bias = bias_of(self.base) if self.linear.bias else None
        x, weight = f.to_product(tape, x), f.to_product(tape, weight)
        return f.product(tape, x, weight, self.deep, self.wide, bias)


class SupertuningLinear(Adapter):
    """Some of the weights themselves, chosen by size (tuners/supertuning)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        weight, values = base_weight(tape, self.base), self.added["supertuning_values"]
        places = tape.empty(values.elements, INT64)
        changed = g.scattered(tape, weight, f.cast(tape, values, weight.width), places)
        bias = bias_of(self.base) if self.linear.bias else None
        x, changed = f.to_product(tape, x), f.to_product(tape, changed)
        return f.product(tape, x, changed, self.deep, self.wide, bias)


class PsoftLinear(Adapter):
    """A turn within the principal subspace of the weight (tuners/psoft)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        before, rank, w = result.width, self.rank, self.added
        x = f.cast(tape, x, FLOAT32)
        inner = g.matmul(tape, x, w["_psoft_A_cache"], self.deep, rank)
        turned = self._turned(tape, inner)
        change = self._spread(tape, inner, turned)
        result = f.add(tape, result, f.scale(tape, change))
        return f.cast(tape, result, before)

    def _spread(self, tape: Tape, inner: Tensor, turned: Tensor) -> Tensor:
        less = g.subtract(tape, turned, inner)
        return g.matmul(tape, less, self.added["_psoft_B_cache"], self.rank, self.wide)

    def _turned(self, tape: Tape, x: Tensor) -> Tensor:
        rank = self.rank
        vectors = [self.added[f"psoft_R.vector_{name}"] for name in "ab"]
        skew = g.put_at(tape, self.added["psoft_R.weight"], constant(rank * rank))
        turn = g.subtract(tape, skew, skew)
        for vector in vectors:
            turn = f.multiply(tape, turn, vector)
        x = f.cast(tape, x, FLOAT32)
        return g.matmul(tape, x, g.view(tape, turn), rank, rank)


class FourierftLinear(Adapter):
    """Some frequencies of the change of the weight (tuners/fourierft)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        result = self.base(tape, x)
        change = self._change_of_weight(tape)
        x = f.cast(tape, x, change.width)
        result = f.add(tape, result, self.multiply_input(tape, x, change))
        return f.cast(tape, result, before)

    def _change_of_weight(self, tape: Tape) -> Tensor:
        spectrum = self.added["fourierft_spectrum"]
        dense = g.put_at(tape, f.cast(tape, spectrum, FLOAT32), constant(self.wide * self.deep))
        change = f.scale(tape, g.inverse_transform(tape, dense))
        return f.cast(tape, change, spectrum.width)


class PveraLinear(Adapter):
    """VeRA with a distribution in the place of a value (tuners/pvera)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before, rank = x.width, self.rank
        result = self.base_result(tape, x)
        down, up = self._frozen(2 * rank, self.deep), self._frozen(self.wide, rank)
        x = self.cast_input(tape, x)
        middle = g.matmul(tape, x, down, self.deep, 2 * rank)
        middle = f.multiply(tape, self.added["pvera_lambda_d"], middle)
        half = scaled(middle.elements, 1, 2)
        mean, variance = f.split(tape, middle, [half, half])
        sampled = self._sampled(tape, mean, variance)
        change = g.matmul(tape, sampled, up, rank, self.wide)
        del sampled
        change = f.multiply(tape, self.added["pvera_lambda_b"], change)
        result = f.add(tape, result, change)
        if not self.is_quantized:
            del change
        return f.cast(tape, result, before)

    @staticmethod
    def _sampled(tape: Tape, mean: Tensor, variance: Tensor) -> Tensor:
        deviation = g.exponential(tape, f.scale(tape, variance))
        noise = tape.like(deviation)
        return f.add(tape, mean, f.multiply(tape, noise, deviation))


class PolyLinear(Adapter):
    """Low-rank matrices, mixed for each row by its task (tuners/poly)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before, rank = x.width, self.rank
        result = self.base(tape, x)
        down, up = self._mixed(tape, "A", self.deep), self._mixed(tape, "B", self.wide)
        x = f.cast(tape, x, down.width)
        inner_size = scaled(x.elements, rank, self.deep)
        inner = g.batched(tape, x, down, inner_size, self.deep)
        result_size = scaled(x.elements, self.wide, self.deep)
        change = f.scale(tape, g.batched(tape, inner, up, result_size, rank))
        result = g.add_in_place(tape, result, change)
        return f.cast(tape, result, before)

    def _mixed(self, tape: Tape, letter: str, side: int) -> Tensor:
        skills, splits = self.options.count("n_skills"), self.options.count("n_splits")
        logits = self.added["poly_router.module_logits"]
        shares = f.part_copied(tape, logits, per_row(splits * skills))
        stacked = g.view(tape, self.added[f"poly_lora_{letter}"])
        return g.batched(tape, shares, stacked, per_row(side * self.rank), skills)


class WaveftLinear(FourierftLinear):
    """Some wavelet coefficients of the change of the weight (tuners/waveft), of PEFT's family."""

    def _change_of_weight(self, tape: Tape) -> Tensor:
        size = constant(self.wide * self.deep)
        dense = g.put_at(tape, self.added["waveft_spectrum"], size)
        half, quarter = scaled(size, 1, 2), scaled(size, 1, 4)
        quarters = [f.part(tape, f.part(tape, dense, half), quarter) for _ in range(4)]
        stacked = f.join(tape, quarters)
        change = g.convolved(tape, f.to_product(tape, stacked))
        del stacked
        return f.scale(tape, change)


class TinyloraLinear(Adapter):
    """A few numbers within the singular space of the weight (tuners/tinylora)."""

    def __init__(self, linear: Linear, numerics: Numerics, options: PeftOptions) -> None:
        super().__init__(linear, numerics, options)
        self.v = self._trained(options.count("u"))

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before, rank, w = x.width, self.rank, self.added
        result = self.base(tape, x)
        square = rank * rank
        turn = g.matmul(tape, self.v, w["tinylora_P"], self.v.elements[0], square)
        x = f.cast(tape, x, FLOAT32)
        inner = g.matmul(tape, x, w["tinylora_A"], self.deep, rank)
        inner = g.matmul(tape, inner, turn, rank, rank)
        change = g.matmul(tape, inner, w["tinylora_B"], rank, self.wide)
        result = f.add(tape, result, change)
        return f.cast(tape, result, before)


class BoftLinear(Adapter):
    """The input is turned by a matrix of orthogonal blocks, permuted there and back (tuners/boft).
    PEFT's own kernel, where it could be compiled, makes a matrix of the same size."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        identity = g.matrix(tape, self.deep, self.deep, before)
        ones = tape.empty(constant(self.wide), before)
        blocks = self._blocks(tape)
        permutation = f.cast(tape, self.added["boft_P"], before)
        blocks = f.cast(tape, blocks, before)
        mixed = self._square(tape, blocks, permutation)
        mixed = self._square(tape, permutation, mixed)
        rotation = f.cast(tape, self._square(tape, mixed, identity), before)
        del identity
        scale = f.multiply(tape, self.added["boft_s"], ones)
        turned = g.matmul(tape, x, rotation, self.deep, self.deep)
        result = self.base(tape, turned)
        bias = self._bias()
        if bias is not None:
            result = g.subtract(tape, result, bias)
        result = f.multiply(tape, result, scale)
        if bias is not None:
            result = f.add(tape, result, bias)
        return f.cast(tape, result, before)

    def _bias(self) -> Weight | None:
        if not self.linear.bias:
            return None
        if isinstance(self.base, PlainLinear):
            return bias_of(self.base)
        return Weight(self.wide, self.numerics.weights, trained=False)

    def _square(self, tape: Tape, left: Tensor, right: Tensor) -> Tensor:
        return g.matmul(tape, left, right, self.deep, self.deep)

    def _blocks(self, tape: Tape) -> Tensor:
        """Cayley's transform of each block, in fp32, put on the diagonal of a matrix."""
        weight = self.added["boft_R"]
        skew = f.scale(tape, g.subtract(tape, weight, weight))
        identity = tape.empty(constant(self.deep), FLOAT32)
        plus, minus = f.add(tape, identity, skew), g.subtract(tape, identity, skew)
        turns = f.cast(tape, g.solved(tape, plus, minus), weight.width)
        return g.put_at(tape, turns, constant(self.deep * self.deep))


class OsfLinear(Adapter):
    """The lesser singular directions of the weight (tuners/osf). Hooks keep their gradients
    orthogonal to the others where the base is fp32: PEFT loses them as it casts adapters."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before, w = x.width, self.added
        result = self.base(tape, x)
        low = w["osf_svd_params.S_low"].elements[0]
        scaled_ = f.multiply(tape, self._projected(tape, "U"), w["osf_svd_params.S_low"])
        at_first = f.multiply(tape, w["_osf_U_low_init"], w["_osf_S_low_init"])
        up = f.join(tape, [scaled_, f.scale(tape, at_first)])
        del scaled_, at_first
        down = f.join(tape, [self._projected(tape, "V"), w["_osf_V_low_init"]])
        x = self.cast_input(tape, x)
        inner = g.matmul(tape, x, down, self.deep, 2 * low)
        change = g.matmul(tape, inner, up, 2 * low, self.wide)
        result = f.add(tape, result, f.cast(tape, change, before))
        return f.cast(tape, result, before)

    def _projected(self, tape: Tape, letter: str) -> Tensor:
        """A factor, whose gradient the hook replaces: it multiplies by the kept directions and
        subtracts, or by its own at first where these span the rest."""
        factor = self.added[f"osf_svd_params.{letter}_low"]
        if self.numerics.weights != FLOAT32:
            return factor
        kept = self.added.get(f"_osf_{letter}_high")
        low = self.added["osf_svd_params.S_low"].elements[0]
        side = self.wide if letter == "U" else self.deep
        inner = constant(low * (low if kept is None else kept.elements[0] // side))
        return g.projected(tape, factor, inner, subtracts=kept is not None)


_ADAPTERS: dict[str, Callable[[Linear, Numerics, PeftOptions], Module]] = {
    "LORA": _lora,
    "LOHA": LohaLinear,
    "LOKR": LokrLinear,
    "OFT": OftLinear,
    "VERA": VeraLinear,
    "HRA": HraLinear,
    "C3A": C3aLinear,
    "ROAD": RoadLinear,
    "MISS": MissLinear,
    "BEFT": BeftLinear,
    "RANDLORA": RandloraLinear,
    "VBLORA": VbloraLinear,
    "UNILORA": UniloraLinear,
    "HIRA": HiraLinear,
    "DELORA": DeloraLinear,
    "GRALORA": GraloraLinear,
    "GLORA": GloraLinear,
    "LILY": LilyLinear,
    "DEFT": DeftLinear,
    "PEANUT": PeanutLinear,
    "SHIRA": ShiraLinear,
    "SUPERTUNING": SupertuningLinear,
    "PSOFT": PsoftLinear,
    "FOURIERFT": FourierftLinear,
    "WAVEFT": WaveftLinear,
    "PVERA": PveraLinear,
    "POLY": PolyLinear,
    "TINYLORA": TinyloraLinear,
    "OSF": OsfLinear,
    "BOFT": BoftLinear,
}
