"""Mixtures of experts on a tape (transformers.integrations.moe, and Llama 4's own)."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import FeedForward, Linear
from ftplan.planner.modules import Mlp, Numerics, PlainLinear, linear_module
from ftplan.planner.tape import Tape, Tensor, Weight, per_token, scaled


class MixtureOfExperts:
    """Router, stacked experts by grouped products, and shared experts beside them
    (transformers.integrations.moe, `grouped_mm_experts_forward`).

    Autocast leaves grouped products alone: they compute in the dtype of the weights.
    """

    def __init__(self, block: FeedForward, numerics: Numerics) -> None:
        assert block.experts is not None
        self.block, self.experts = block, block.experts
        self.width, trained = numerics.weights, numerics.trained
        router = self.experts.router
        if self.experts.router_is_linear:
            self.router = linear_module(router, numerics)
        else:
            self.router = PlainLinear(router, numerics.weights, trained)
        num_experts = self.experts.num_experts
        self.weights = [
            Weight(num_experts * linear.num_weights, self.width, trained=linear.name in trained)
            for linear in block.matrices
        ]
        self.biases = [
            Weight(
                num_experts * linear.out_features,
                self.width,
                trained=f"{linear.name}_bias" in trained,
            )
            if linear.bias
            else None
            for linear in block.matrices
        ]
        self.shared = Mlp(self.experts.shared, numerics) if self.experts.shared else None
        gate = self.experts.shared_gate
        self.shared_gate = linear_module(gate, numerics) if gate else None

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        scores = self._route(tape, x)
        mixed = self._mix(tape, x, scores)
        if self.shared is None:
            return mixed
        beside = self.shared(tape, x)
        if self.shared_gate is not None:
            open_ = f.activate(tape, self.shared_gate(tape, x), "sigmoid")
            beside = f.multiply(tape, open_, beside)
        return f.add(tape, mixed, beside)

    def _route(self, tape: Tape, x: Tensor) -> Tensor:
        """A weight for each expert that a token goes to."""
        logits = self.router(tape, x)
        probabilities = f.softmax_in_float32(tape, logits)
        chosen = f.part_copied(tape, probabilities, per_token(self.block.active_copies))
        return f.cast(tape, chosen, logits.width)

    def _mix(self, tape: Tape, x: Tensor, scores: Tensor) -> Tensor:
        copies, hidden_size = self.block.active_copies, self.block.output.out_features
        selected = f.part_copied(tape, x, per_token(copies * hidden_size))
        sorted_scores = f.part_copied(tape, scores, scores.elements)
        products = list(zip(self.block.matrices, self.weights, self.biases, strict=True))
        hidden = self._product(tape, selected, *products[0])
        hidden = self._gate(tape, hidden)
        hidden = self._product(tape, hidden, *products[-1])
        weighted = f.multiply(tape, hidden, sorted_scores)
        del hidden
        restored = f.part_copied(tape, weighted, weighted.elements)
        summed = f.sum_groups(tape, restored, per_token(hidden_size))
        return f.cast(tape, summed, x.width)

    def _product(
        self, tape: Tape, x: Tensor, linear: Linear, weight: Weight, bias: Weight | None
    ) -> Tensor:
        x = f.cast(tape, x, self.width)
        return f.product(tape, x, weight, linear.in_features, linear.out_features, bias)

    def _gate(self, tape: Tape, both: Tensor) -> Tensor:
        half = scaled(both.elements, 1, 2)
        gate, up = f.split(tape, both, [half, half])
        return f.multiply(tape, f.activate(tape, gate, self.block.activation), up)
