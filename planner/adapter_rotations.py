"""Adapters that turn a weight or what comes to it: orthogonal matrices, reflections, angles
(peft/tuners/<method>, PEFT 0.21).

Local variables live here as long as they do there.
"""

from __future__ import annotations

from ftplan.planner import adapter_functions as g
from ftplan.planner import functions as f
from ftplan.planner.adapter import Adapter, base_weight, bias_of
from ftplan.planner.adapter_counts import oft_block
from ftplan.planner.modules import PlainLinear
from ftplan.planner.tape import Tape, Tensor, Weight, constant, scaled

FLOAT32 = f.FLOAT32


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


class HraLinear(Adapter):
    """A chain of reflections of the weight (tuners/hra)."""

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before, side = x.width, self.deep
        new_weight = g.matrix(tape, side, side, FLOAT32)
        reflections = self._reflections(tape)
        new_weight = f.cast(tape, new_weight, reflections.width)
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
