"""Experts as modules of their own, one after the other: mixtures before transformers 5."""

from __future__ import annotations

from collections.abc import Callable

from ftplan.planner import functions as f
from ftplan.planner.model_spec import FeedForward, Layer, Linear
from ftplan.planner.tape import Tape, Tensor, per_token, scaled

Module = Callable[[Tape, Tensor], Tensor]


def expert_linears(block: FeedForward) -> tuple[Linear, ...]:
    """The linear modules of one expert: `w1`, `w3` and `w2` (MixtralBlockSparseTop2MLP)."""
    narrow, wide = block.intermediate_size, block.output.out_features
    return (
        Linear(name="w1", in_features=wide, out_features=narrow),
        Linear(name="w3", in_features=wide, out_features=narrow),
        Linear(name="w2", in_features=narrow, out_features=wide),
    )


def quantized_linears(layer: Layer, *, separate_experts: bool) -> list[tuple[Linear, int]]:
    """A layer's modules that a quantized base holds quantized, and how many of each."""
    linears = [(linear, 1) for linear in layer.linears if linear.quantizable]
    experts = layer.feed_forward.experts
    if experts is not None and separate_experts:
        linears += [(one, experts.num_experts) for one in expert_linears(layer.feed_forward)]
    return linears


class SeparateExperts:
    """MixtralSparseMoeBlock of transformers 4: each expert takes the tokens that chose it, as many
    as the others, and adds its result in place."""

    def __init__(
        self, block: FeedForward, router: Module, make: Callable[[Linear], Module]
    ) -> None:
        assert block.experts is not None
        self.block, self.router = block, router
        linears = expert_linears(block)
        self.experts = [[make(linear) for linear in linears] for _ in range(self._num_experts)]

    @property
    def _num_experts(self) -> int:
        assert self.block.experts is not None
        return self.block.experts.num_experts

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        logits = self.router(tape, x)
        probabilities = f.softmax_in_float32(tape, logits)
        chosen = f.part_copied(tape, probabilities, per_token(self.block.active_copies))
        scores = f.cast(tape, chosen, x.width)
        total = tape.like(x)
        for expert in self.experts:
            total = f.add_rows_in_place(tape, total, self._run(tape, x, scores, expert))
        return total

    def _run(self, tape: Tape, x: Tensor, scores: Tensor, expert: list[Module]) -> Tensor:
        share = scaled(scores.elements, 1, self._num_experts)
        width = self.block.output.out_features
        current = f.part_copied(
            tape, x, scaled(per_token(width * self.block.active_copies), 1, self._num_experts)
        )
        w1, w3, w2 = expert
        gated = f.activate(tape, w1(tape, current), self.block.activation)
        hidden = f.multiply(tape, gated, w3(tape, current))
        del gated
        hidden = w2(tape, hidden)
        weighted = f.multiply(tape, hidden, f.part_copied(tape, scores, share))
        return f.cast(tape, weighted, x.width)
