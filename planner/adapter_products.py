"""Adapters whose change of a weight is a product of smaller matrices, as each tuner's `forward`
reads (peft/tuners/<method>, PEFT 0.21).

Local variables live here as long as they do there.
"""

from __future__ import annotations

from ftplan.planner import adapter_functions as g
from ftplan.planner import functions as f
from ftplan.planner.adapter import Adapter, base_weight, bias_of, shared
from ftplan.planner.model_spec import Linear
from ftplan.planner.modules import Numerics
from ftplan.planner.peft_options import PeftOptions
from ftplan.planner.tape import Tape, Tensor, Weight, constant, per_row, scaled

FLOAT32 = f.FLOAT32
INT64 = 8
VBLORA_TOPK = 2  # vectors mixed, PEFT's default
# AdaLoRA adds to the loss how far these are from orthogonal, so that backward begins with them.
_REGULARIZED = ("lora_A", "lora_B")


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
