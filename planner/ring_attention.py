"""Attention of one GPU's part of each row to the whole row, on a tape: torch's ring attention,
eq. (13).

Each round works on the keys and values of another GPU, all of which are gathered at once; results
of rounds are merged in fp32 by their log-sums. The last GPU of the ring is followed, which works on
whole queries in every round and so takes the most; after the third round nothing new comes.
Source: `_templated_ring_attention` and `_templated_ring_attention_backward` of
torch/distributed/tensor/experimental/_context_parallel/_attention.py in torch 2.13, with
accelerate's `allgather`.
"""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Attention
from ftplan.planner.tape import Form, Tape, Tensor, add_forms, per_pair, per_token, scaled, times

_ROUNDS_TO_FOLLOW = 3


class RingAttention:
    """Keeps what FlashAttention-2 keeps: query, key, value, the result and its log-sums.

    `padded`: width of all query heads as the kernel's backward rounds it up.
    """

    def __init__(self, attention: Attention, num_gpus: int, padded: int) -> None:
        self.attention, self.num_gpus, self.padded = attention, num_gpus, padded
        self.rounds = range(1, min(num_gpus, _ROUNDS_TO_FOLLOW))

    def __call__(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result, sums = self._forward(tape, query, key, value)
        if not tape.differentiates(query, key, value):
            return result
        value = _in_order_of_heads(tape, value)
        saved = tape.save(query, key, value, result, sums)
        backward = self._backward

        def back(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
            return backward(tape, *saved[:3])

        tape.attach([result], [query, key, value], saved, back)
        return result

    def _forward(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._count(tape, 2, query.width)
        own = [tape.like(key), tape.like(value)]
        size, width = per_token(self.attention.result_width), query.width
        sums = self._sums(tape)
        gathered = self._gathered(tape, key, value)
        block = tape.empty(size, width)
        total = tape.empty(size, f.FLOAT32)
        for number in self.rounds:
            own.clear()
            self._sent(tape, key, value, number)
            block = tape.empty(size, width)
            further = tape.empty(size, f.FLOAT32)
            difference = tape.like(further)
            change = tape.like(further)
            del difference
            total = tape.like(change)
            del change, further
        result = tape.empty(size, width)
        del gathered, block, total
        return result, sums

    def _backward(self, tape: Tape, query: Tensor, key: Tensor, value: Tensor) -> f.Gradients:
        self._count(tape, 5, query.width)
        both = add_forms(key.elements, value.elements)
        of_query = tape.like(query, f.FLOAT32)
        of_own = [tape.like(key, f.FLOAT32), tape.like(value, f.FLOAT32)]
        own = [tape.like(key), tape.like(value)]
        sent = tape.empty(both, key.width)
        gathered = tape.empty(times(both, self.num_gpus), key.width)
        grads = self._flash_backward(tape, query, key, value, 1)
        in_order = [tape.like(key, f.FLOAT32), tape.like(value, f.FLOAT32)]
        leaving = tape.empty(both, f.FLOAT32)
        in_order.clear()
        arriving = tape.empty(both, f.FLOAT32)
        for number in self.rounds:
            own.clear()
            if number < self.num_gpus - 1:
                sent = tape.empty(both, key.width)
            grads = self._flash_backward(tape, query, key, value, 2)
            of_own.clear()
            del leaving
            of_own += [tape.like(key, f.FLOAT32), tape.like(value, f.FLOAT32)]
            leaving = tape.empty(both, f.FLOAT32)
            arriving = tape.empty(both, f.FLOAT32)
        result = tape.like(query)
        del of_query
        whole = tape.empty(both, key.width)
        del grads, sent, gathered, leaving, arriving
        of_key = Tensor(whole.storage, key.elements, key.width)
        return [result, of_key, Tensor(whole.storage, value.elements, value.width)]

    def _flash_backward(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor, parts: int
    ) -> list[Tensor]:
        """The kernel's, on one of so many parts of the keys (`AttentionKernel._flash`)."""
        a = self.attention
        grads = [tape.like(query)]
        grads += [tape.empty(scaled(x.elements, 1, parts), x.width) for x in (key, value)]
        products = self._sums(tape)
        accumulator = tape.empty(per_token(self.padded), f.FLOAT32)
        if a.num_heads != a.num_key_value_heads:
            size = scaled(query.elements, 1, parts)
            expanded = [tape.empty(size, key.width) for _ in "kv"]
            del expanded
        del products, accumulator
        return grads

    def _sums(self, tape: Tape) -> Tensor:
        return tape.empty(per_token(self.attention.num_heads), f.FLOAT32)

    def _gathered(self, tape: Tape, key: Tensor, value: Tensor) -> Tensor:
        """Keys and values of all GPUs; each sends its own joined."""
        both = add_forms(key.elements, value.elements)
        sent = tape.empty(both, key.width)
        gathered = tape.empty(times(both, self.num_gpus), key.width)
        del sent
        return gathered

    def _sent(self, tape: Tape, key: Tensor, value: Tensor, number: int) -> None:
        """Every round but the last joins them, though they are gathered already."""
        if number < self.num_gpus - 1:
            tape.empty(add_forms(key.elements, value.elements), key.width)

    def _count(self, tape: Tape, products: int, width: int) -> None:
        """Half of the own part's scores are masked out, and half of each other part's left out."""
        a = self.attention
        each: Form = per_pair(products * (a.query_width + a.result_width) // 2)
        tape.count(times(each, self.num_gpus), width)


def _in_order_of_heads(tape: Tape, x: Tensor) -> Tensor:
    """x, whose gradient comes head by head and is copied into the order of tokens."""
    if not tape.differentiates(x):
        return x
    result = Tensor(x.storage, x.elements, x.width)
    size = x.elements, x.width

    def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
        return [tape.empty(*size)]

    tape.attach([result], [x], [], backward)
    return result
