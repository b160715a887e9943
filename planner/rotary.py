"""Rotary positions on a tape, as the families' `apply_rotary_pos_emb` write them."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Attention
from ftplan.planner.tape import Tape, Tensor, scaled

POSITION_NUMBER_BYTES = 8


def table_bytes(attention: Attention, width: int) -> int:
    """Bytes of the tables for one position, and of its number. `width`: of the hidden state."""
    if not attention.rotary_dim:
        return 0
    # Cosines and sines in pairs, which gpt-oss does not repeat for both halves (its `emb = freqs`)
    # and complex tables hold as one complex number each.
    halved = attention.rotary_kind == "complex" or attention.sinks
    entries = attention.rotary_dim if halved else 2 * attention.rotary_dim
    return entries * table_width(attention, width) + POSITION_NUMBER_BYTES


def table_width(attention: Attention, width: int) -> int:
    """Bytes of an entry: of the hidden state's width, or fp32."""
    in_float32 = attention.rotary_in_float32 and attention.rotary_kind in ("half", "complex")
    return f.FLOAT32 if in_float32 else width


class Rotary:
    """Rotates the first `rotary_dim` values of each head of `head_dim`; the rest is joined on.

    `width`: of the hidden state, which tables share.
    """

    def __init__(self, attention: Attention, head_dim: int, width: int) -> None:
        self.attention, self.head_dim = attention, head_dim
        self.table_width = table_width(attention, width)
        self.turn = {"parts": self._turn_parts, "complex": self._turn_complex}.get(
            attention.rotary_kind, self._turn
        )
        # Cohere turns fp32 copies; OLMo's fp32 tables make fp32 of what they multiply.
        self.casts_first = attention.rotary_in_float32 and attention.rotary_kind == "pairs"

    def __call__(self, tape: Tape, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        a, rotary_dim = self.attention, self.attention.rotary_dim
        if rotary_dim == self.head_dim and (a.rotary_kind != "half" or not a.rotary_concatenates):
            return self._turn_both(tape, query, key)
        both = []
        turned = self._turn_both(
            tape, self._share(tape, query, rotary_dim), self._share(tape, key, rotary_dim)
        )
        for x, front in zip((query, key), turned, strict=True):
            rest = self._share(tape, x, self.head_dim - rotary_dim)
            joined = f.join(tape, [front, rest])
            joined.by_heads = True
            both.append(joined)
        return both[0], both[1]

    def _share(self, tape: Tape, x: Tensor, width: int) -> Tensor:
        """A view of `width` values of each head."""
        return f.part(tape, x, scaled(x.elements, width, self.head_dim))

    def _turn_both(self, tape: Tape, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        width = query.width
        if self.casts_first:
            query, key = f.cast(tape, query, f.FLOAT32), f.cast(tape, key, f.FLOAT32)
        query = self.turn(tape, query)
        key = self.turn(tape, key)
        if not self.attention.rotary_in_float32:
            return query, key
        query_again = f.cast(tape, query, width)
        return query_again, f.cast(tape, key, width)

    def _turn(self, tape: Tape, x: Tensor) -> Tensor:
        """x cos + rotate_half(x) sin; over neighbours (`pairs`) the sizes are the same."""
        straight = f.times_table(tape, x, self.table_width)
        half = scaled(x.elements, 1, 2)
        parts = [f.scale(tape, f.part(tape, x, half)), f.part(tape, x, half)]
        crossed = f.times_table(tape, f.join(tape, parts), self.table_width)
        return f.add(tape, straight, crossed)

    def _turn_parts(self, tape: Tape, x: Tensor) -> Tensor:
        """Both halves apart, then joined."""
        half = scaled(x.elements, 1, 2)
        first, second = f.part(tape, x, half), f.part(tape, x, half)
        turned = [self._crossed(tape, first, second), self._crossed(tape, second, first)]
        result = f.join(tape, turned)
        result.by_heads = True
        return result

    def _crossed(self, tape: Tape, x: Tensor, y: Tensor) -> Tensor:
        straight = f.times_table(tape, x, self.table_width)
        return f.subtract(tape, straight, f.times_table(tape, y, self.table_width))

    def _turn_complex(self, tape: Tape, x: Tensor) -> Tensor:
        """A product of complex numbers, in fp32."""
        return f.times_table(tape, f.cast(tape, x, f.FLOAT32), self.table_width)
