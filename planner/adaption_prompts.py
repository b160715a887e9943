"""LLaMA-Adapter's prompts on a tape (PEFT 0.21, peft/tuners/adaption_prompt/layer.py)."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.modules import Module, Numerics, SelfAttention
from ftplan.planner.tape import Form, Tape, Tensor, Weight, per_row, per_token, scaled


class PromptedAttention:
    """Attention, and by a gate what the same queries find in a learned prompt.

    The queries are computed once more, and so are the values, which nothing needs.
    """

    def __init__(self, attention: SelfAttention, hidden_size: int, numerics: Numerics) -> None:
        self.attended, self.tokens = attention, numerics.prompt_tokens
        self.shape = attention.attention
        width = numerics.prompt_width
        self.prompt = Weight(self.tokens * hidden_size, width, trained=True)
        self.gate = Weight(1, width, trained=True)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        output = self.attended(tape, x)
        of_prompt = self._project(tape, tape.cast_weight(self.prompt))
        key, value = (self._of_rows(tape, one) for one in of_prompt[1:])
        query = self._query(tape, x)
        width = query.width
        scores = f.scale(tape, self._product(tape, query, key, self._scores))
        shares = f.cast(tape, f.softmax_in_float32(tape, scores), width)
        scores = f.multiply(tape, self.gate, shares)
        del shares
        found = self._product(tape, scores, value, per_token(self.shape.result_width))
        found = f.clone(tape, found)
        if not self.shape.is_fused:
            found = self.attended.output(tape, found)
        return f.cast(tape, f.add(tape, output, found), width)

    @property
    def _scores(self) -> Form:
        return per_token(self.shape.num_heads * self.tokens)

    def _project(self, tape: Tape, x: Tensor) -> list[Tensor]:
        """Query, key and value; of the prompt no query where modules are apart."""
        if self.shape.is_fused:
            whole = self.attended.inputs[0](tape, x)
            third = scaled(whole.elements, 1, 3)
            return f.split(tape, whole, [third] * 3)
        return [x, *(module(tape, x) for module in self.attended.inputs[1:])]

    def _of_rows(self, tape: Tape, x: Tensor) -> Tensor:
        """A copy for each row; where modules are apart, another one for each query head."""
        a = self.shape
        copies = f.part_copied(tape, x, per_row(x.elements[0]))
        if a.is_fused:
            return copies
        size = scaled(copies.elements, a.num_heads, a.num_key_value_heads)
        return f.expand(tape, copies, size)

    def _query(self, tape: Tape, x: Tensor) -> Tensor:
        if self.shape.is_fused:
            return self._project(tape, x)[0]
        first, _, last = self.attended.inputs
        query, values = first(tape, x), last(tape, x)
        turned = self.attended.rotary.turn(tape, query)
        del values
        return turned

    def _product(self, tape: Tape, left: Tensor, right: Tensor, elements: Form) -> Tensor:
        left = f.by_heads(tape, f.to_product(tape, left))
        right = f.by_heads(tape, f.to_product(tape, right))
        flops = per_token(2 * self.shape.query_width * self.tokens)
        return f.batched_product(tape, left, right, elements, flops)


def prompted(attention: Module, hidden_size: int, numerics: Numerics) -> Module:
    """The attention module, with a prompt where its layer has one."""
    if not numerics.prompt_tokens:
        return attention
    assert isinstance(attention, SelfAttention)
    return PromptedAttention(attention, hidden_size, numerics)
