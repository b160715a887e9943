"""Norms that few families have, on a tape: Cohere's, OLMo's, and StableLM's norm a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Norm
from ftplan.planner.tape import Tape, Tensor, Weight, scaled

if TYPE_CHECKING:
    from ftplan.planner.modules import Numerics


class CenteredNorm:
    """A LayerNorm without bias, written out in fp32 (CohereLayerNorm)."""

    def __init__(self, norm: Norm, numerics: Numerics) -> None:
        self.width = norm.width
        trained = f"{norm.name}.weight" in numerics.trained
        self.weight = Weight(norm.width * (norm.num_heads or 1), numerics.norms, trained=trained)

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        before = x.width
        hidden = f.cast(tape, x, f.FLOAT32)
        mean = f.mean(tape, hidden, self.width)
        variance = f.mean_of_squares(tape, f.subtract(tape, hidden, mean), self.width)
        root = f.reciprocal_root(tape, variance)
        hidden = f.multiply(tape, f.subtract(tape, hidden, mean), root)
        hidden = f.multiply(tape, f.cast(tape, self.weight, f.FLOAT32), hidden)
        return f.cast(tape, hidden, before)


class Float32LayerNorm:
    """A LayerNorm without weights over an fp32 copy, cast back (OlmoLayerNorm)."""

    def __init__(self, norm: Norm) -> None:
        self.width = norm.width

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        hidden = f.layer_norm(tape, f.cast(tape, x, f.FLOAT32), self.width, None, None)
        return f.cast(tape, hidden, x.width)


class NormOfEachHead:
    """A LayerNorm with a weight of its own for each head (StableLmLayerNormPerHead)."""

    def __init__(self, norm: Norm, numerics: Numerics) -> None:
        self.norm = norm
        trained = f"{norm.name}.weight" in numerics.trained
        self.weights = [
            Weight(norm.width, numerics.norms, trained=trained) for _ in range(norm.copies)
        ]

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        one_head = scaled(x.elements, 1, self.norm.copies)
        heads = f.split(tape, x, [one_head] * self.norm.copies)
        normalized = [
            f.layer_norm(tape, head, self.norm.width, weight, None)
            for head, weight in zip(heads, self.weights, strict=True)
        ]
        result = f.join(tape, normalized)
        result.by_heads = True
        return result
