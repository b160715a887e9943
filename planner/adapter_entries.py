"""Adapters that scale, replace or add single entries, directions or frequencies of a weight
(peft/tuners/<method>, PEFT 0.21).

Local variables live here as long as they do there.
"""

from __future__ import annotations

from ftplan.planner import adapter_functions as g
from ftplan.planner import functions as f
from ftplan.planner.adapter import Adapter, base_weight, bias_of
from ftplan.planner.model_spec import Linear
from ftplan.planner.modules import Numerics
from ftplan.planner.peft_options import PeftOptions
from ftplan.planner.tape import Tape, Tensor, constant, scaled, times

FLOAT32 = f.FLOAT32
COMPLEX = 8  # two fp32 numbers
INT64 = 8


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


class BeftLinear(Adapter):
    """A bias (tuners/beft)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        result = self.base(tape, x)
        summed = f.add(tape, result, self.added["beft_bias"])
        return f.cast(tape, summed, result.width)


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
