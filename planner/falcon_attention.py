"""Falcon's attention on a tape: heads picked out of one product (transformers' FalconAttention)."""

from __future__ import annotations

from msgspec import structs

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Attention
from ftplan.planner.modules import Numerics, attention_kernel, linear_module
from ftplan.planner.rotary import Rotary
from ftplan.planner.tape import Tape, Tensor, per_token


class FalconAttention:
    """The product stays a local variable, as query, key and value do."""

    def __init__(self, attention: Attention, numerics: Numerics) -> None:
        self.attention = attention
        if attention.expands_key_value:
            heads = attention.num_heads
            attention = structs.replace(attention, num_key_value_heads=heads)
        self.input = linear_module(attention.inputs[0], numerics)
        self.output = linear_module(attention.output, numerics)
        self.kernel = attention_kernel(attention, numerics)
        self.rotary = Rotary(attention, attention.head_dim, numerics.residual)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        whole = self.input(tape, x)
        query, key, value = self._heads(tape, whole)
        if self.attention.rotary_dim:
            query, key = self.rotary(tape, query, key)
        result = self.kernel(tape, query, key, value)
        result = self.output(tape, result)
        del whole
        return result

    def _heads(self, tape: Tape, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views; but an index that is a list copies what it picks (`_split_heads`)."""
        a = self.attention
        query = f.part(tape, whole, per_token(a.query_width))
        widths = (a.key_width, a.value_width)
        if a.num_key_value_heads == a.num_heads and not a.expands_key_value:
            key, value = (f.part(tape, whole, per_token(width)) for width in widths)
            return query, key, value
        key, value = (f.part_copied(tape, whole, per_token(width)) for width in widths)
        if a.expands_key_value and a.num_key_value_heads > 1:
            query = f.clone(tape, query)
        if a.num_key_value_heads > 1:
            key, value = (self._for_each_query(tape, x) for x in (key, value))
        return query, key, value

    def _for_each_query(self, tape: Tape, x: Tensor) -> Tensor:
        result = f.expand(tape, x, per_token(self.attention.query_width))
        result.by_heads = False
        return result
