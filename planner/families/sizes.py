"""Specifications of bare sizes (`7B`)."""

from __future__ import annotations

from typing import Any

from ftplan.planner.errors import InputError
from ftplan.planner.families.defaults import with_defaults
from ftplan.planner.families.llama_like import llama
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.units import format_count


def spec_from_size(num_parameters: int, name: str) -> ModelSpec:
    """A Llama-shaped decoder of about `num_parameters`, for questions about a bare size.

    A released model within 5 % of the size is taken as it is (by `7B` people mean 6.74 B);
    elsewhere the nearest ones are scaled, depth and width together with the cube root. The
    result says what it is in `approximate` and always carries its own exact count.

    Raises InputError below MIN_SIZE_PARAMETERS, where embeddings make up most of a model.
    """
    if num_parameters < MIN_SIZE_PARAMETERS:
        raise InputError(
            f"a model of {format_count(num_parameters)} parameters is too small to stand for",
            "give a size from `50M` up, such as `135M` or `7B`, or a folder with a config.json",
        )
    released = [_llama_shape(name, *anchor) for anchor in SIZE_ANCHORS]
    scaled = [_scaled(anchor, num_parameters, name) for anchor in SIZE_ANCHORS]

    def distance(spec: ModelSpec) -> float:
        return abs(spec.num_parameters / num_parameters - 1)

    nearest = min(released, key=distance)
    return nearest if distance(nearest) <= 0.05 else min(scaled, key=distance)


MIN_SIZE_PARAMETERS = 50_000_000

# (layers, hidden, intermediate, heads, key-value heads, vocabulary) of released Llama-shaped
# models, from their config.json: SmolLM2-135M, 360M, 1.7B; TinyLlama; Llama-3.2-3B; Llama-2-7B;
# Llama-3.1-8B; Llama-2-13B; Llama-33B; Yi-34B; Llama-65B; Llama-2-70B; Llama-3.1-405B.
SIZE_ANCHORS: tuple[tuple[int, int, int, int, int, int], ...] = (
    (30, 576, 1536, 9, 3, 49152),
    (32, 960, 2560, 15, 5, 49152),
    (22, 2048, 5632, 32, 4, 32000),
    (24, 2048, 8192, 32, 32, 49152),
    (28, 3072, 8192, 24, 8, 128256),
    (32, 4096, 11008, 32, 32, 32000),
    (32, 4096, 14336, 32, 8, 128256),
    (40, 5120, 13824, 40, 40, 32000),
    (60, 6656, 17920, 52, 52, 32000),
    (60, 7168, 20480, 56, 8, 64000),
    (80, 8192, 22016, 64, 64, 32000),
    (80, 8192, 28672, 64, 8, 32000),
    (126, 16384, 53248, 128, 8, 128256),
)


def _scaled(
    anchor: tuple[int, int, int, int, int, int], num_parameters: int, name: str
) -> ModelSpec:
    """The anchor scaled in width to the wanted count, in the best of the depths around it."""
    layers, hidden, intermediate, heads, kv_heads, vocab = anchor
    unscaled = _llama_shape(name, *anchor)
    factor = (num_parameters / unscaled.num_parameters) ** (1 / 3)
    head_dim, groups = hidden // heads, heads // kv_heads
    scaled_kv_heads = max(1, round(kv_heads * factor))
    scaled_heads = scaled_kv_heads * groups
    scaled_hidden = scaled_heads * head_dim
    scaled_intermediate = max(64, round(intermediate / hidden * scaled_hidden / 64) * 64)
    width = (scaled_hidden, scaled_intermediate, scaled_heads, scaled_kv_heads, vocab)
    one_layer = _llama_shape(name, 1, *width)
    layer_parameters = one_layer.layers[0].num_parameters
    for_layers = num_parameters - (one_layer.num_parameters - layer_parameters)
    depth = max(3, round(layers * factor))
    depths = range(depth - depth // 3, depth + depth // 3 + 1)
    best = min(depths, key=lambda d: abs(d * layer_parameters - for_layers))
    return _llama_shape(name, best, *width)


def _llama_shape(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int
) -> ModelSpec:
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }
    return llama(
        with_defaults(config),
        name,
        approximate=f"a Llama-shaped decoder: {layers} layers of width {hidden}, "
        f"vocabulary {vocab}",
    )


def config_of_size(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a specification that `spec_from_size` made."""
    layer = spec.layers[0]
    return {
        "model_type": spec.model_type,
        "hidden_size": spec.hidden_size,
        "intermediate_size": layer.feed_forward.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": layer.attention.num_heads,
        "num_key_value_heads": layer.attention.num_key_value_heads,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
    }
