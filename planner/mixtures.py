"""Mixtures of experts on a tape (transformers.integrations.moe, and Llama 4's own)."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Experts, FeedForward, Linear
from ftplan.planner.modules import Mlp, Module, Numerics, PlainLinear, linear_module
from ftplan.planner.tape import Tape, Tensor, Weight, per_token, scaled

INDEX_BYTES = 8


class Router:
    """Scores experts, and picks some for each token."""

    def __init__(self, experts: Experts, numerics: Numerics) -> None:
        self.experts = experts
        if experts.router_is_linear:
            self.linear: Module = linear_module(experts.router, numerics)
        else:
            self.linear = PlainLinear(experts.router, numerics.weights, numerics.trained)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        """A weight for each expert that a token goes to."""
        x = f.cast(tape, x, f.FLOAT32) if self.experts.router_in_float32 else x
        logits = self.linear(tape, x)
        number = per_token(self.experts.num_experts_per_token)
        places = tape.empty(number, INDEX_BYTES)
        if self.experts.scoring == "best_softmax":
            best = f.pick(tape, logits, number, places)
            return f.cast(tape, f.softmax_in_float32(tape, best), logits.width)
        if self.experts.scoring == "sigmoid":
            return f.pick(tape, f.activate(tape, logits, "sigmoid"), number, places)
        probabilities = f.softmax_in_float32(tape, logits)
        return f.cast(tape, f.pick(tape, probabilities, number, places), logits.width)


class StackedExperts:
    """The weights of all experts, multiplied group by group.

    Autocast leaves grouped products alone: they compute in the dtype of the weights.
    """

    def __init__(self, block: FeedForward, numerics: Numerics) -> None:
        assert block.experts is not None
        self.block, self.width = block, numerics.weights
        number, trained = block.experts.num_experts, numerics.trained
        self.weights = [
            Weight(number * linear.num_weights, self.width, trained=linear.name in trained)
            for linear in block.matrices
        ]
        self.biases = [
            Weight(
                number * linear.out_features, self.width, trained=f"{linear.name}_bias" in trained
            )
            for linear in block.matrices
            if linear.bias
        ]

    def __call__(self, tape: Tape, x: Tensor, scores: Tensor) -> Tensor:
        hidden_size = self.block.output.out_features
        copies = scores.elements
        order, places = tape.empty(copies, INDEX_BYTES), tape.empty(copies, INDEX_BYTES)
        selected = f.pick(tape, x, scaled(copies, hidden_size, 1), places)
        sorted_scores = f.pick(tape, scores, copies, order)
        hidden, *_bias = self._product(tape, selected, 0)
        hidden = self._gate(tape, hidden)
        hidden, *_bias = self._product(tape, hidden, -1)
        weighted = f.multiply(tape, hidden, sorted_scores)
        back = tape.empty(copies, INDEX_BYTES)
        weighted = f.pick(tape, weighted, weighted.elements, back)
        summed = f.sum_groups(tape, weighted, per_token(hidden_size))
        return f.cast(tape, summed, x.width)

    def _product(self, tape: Tape, x: Tensor, number: int) -> list[Tensor]:
        """The product, to which a bias for each copy of a token is added in place."""
        linear: Linear = self.block.matrices[number]
        x = f.cast(tape, x, self.width)
        weight = self.weights[number]
        result = f.product(tape, x, weight, linear.in_features, linear.out_features)
        if not linear.bias:
            return [result]
        bias = f.look_up(tape, self.biases[number], result.elements)
        return [f.add_in_place(tape, result, bias), bias]

    def _gate(self, tape: Tape, both: Tensor) -> Tensor:
        half = scaled(both.elements, 1, 2)
        if self.block.activation == "gpt_oss_glu":
            return self._clamped_gate(tape, f.part(tape, both, half), f.part(tape, both, half))
        gate, up = f.split(tape, both, [half, half])
        return f.multiply(tape, f.activate(tape, gate, self.block.activation), up)

    def _clamped_gate(self, tape: Tape, gate: Tensor, up: Tensor) -> Tensor:
        """(up + 1) gate sigmoid(alpha gate), both clamped (GptOssExperts)."""
        gate = f.clamp(tape, gate)
        up = f.clamp(tape, up)
        share = f.activate(tape, f.scale(tape, gate), "sigmoid")
        gate = f.multiply(tape, gate, share)
        del share
        return f.multiply(tape, f.scale(tape, up), gate)


class MixtureOfExperts:
    """Router, experts, and a shared expert beside them; a gated one runs first (Qwen 2)."""

    def __init__(self, block: FeedForward, numerics: Numerics) -> None:
        assert block.experts is not None
        experts = block.experts
        self.router, self.stacked = Router(experts, numerics), StackedExperts(block, numerics)
        self.shared = Mlp(experts.shared, numerics) if experts.shared else None
        self.returns_scores = experts.returns_scores
        gate = experts.shared_gate
        self.gate = linear_module(gate, numerics) if gate else None

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        if self.shared is None:
            return self._without_shared(tape, x)
        if self.gate is None:
            mixed = self.stacked(tape, x, self.router(tape, x))
            return f.add(tape, mixed, self.shared(tape, x))
        beside = self.shared(tape, x)
        mixed = self.stacked(tape, x, self.router(tape, x))
        beside = f.multiply(tape, f.activate(tape, self.gate(tape, x), "sigmoid"), beside)
        return f.add(tape, mixed, beside)

    def _without_shared(self, tape: Tape, x: Tensor) -> Tensor:
        scores = self.router(tape, x)
        result = self.stacked(tape, x, scores)
        if self.returns_scores:  # the layer's variable that had attention's weights takes them
            tape.release_locals()
            tape.keep_local(scores)
        return result


class EveryExpert:
    """Every expert computes every token, weighted before it (Llama4TextMoe)."""

    def __init__(self, block: FeedForward, numerics: Numerics) -> None:
        assert block.experts is not None and block.experts.shared is not None
        self.block, self.number = block, block.experts.num_experts
        self.router = linear_module(block.experts.router, numerics)
        self.weights = [
            Weight(
                self.number * linear.num_weights,
                numerics.weights,
                trained=linear.name in numerics.trained,
            )
            for linear in block.matrices
        ]
        self.shared = Mlp(block.experts.shared, numerics)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        scores = self._scores(tape, x)
        hidden_size = self.block.output.out_features
        copies = f.expand(tape, x, per_token(self.number * hidden_size))
        weighted = f.multiply(tape, copies, scores)
        del copies
        mixed = self._product(tape, self._gated(tape, weighted), -1)
        beside = self.shared(tape, x)
        summed = f.sum_groups(tape, mixed, per_token(hidden_size))
        return f.add_in_place(tape, beside, summed)

    def _scores(self, tape: Tape, x: Tensor) -> Tensor:
        logits = self.router(tape, x)
        best = f.clone(tape, logits)
        share = f.activate(tape, f.cast(tape, best, f.FLOAT32), "sigmoid")
        return f.cast(tape, share, logits.width)

    def _gated(self, tape: Tape, x: Tensor) -> Tensor:
        both = self._product(tape, x, 0)
        half = scaled(both.elements, 1, 2)
        gate, up = f.split(tape, both, [half, half])
        return f.multiply(tape, up, f.activate(tape, gate, self.block.activation))

    def _product(self, tape: Tape, x: Tensor, number: int) -> Tensor:
        linear = self.block.matrices[number]
        x = f.to_product(tape, x)
        weight = tape.cast_weight(self.weights[number])
        return f.product(tape, x, weight, linear.in_features, linear.out_features)
