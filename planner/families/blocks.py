"""Blocks that several families share, built from the fields of a `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from ftplan.planner.families.fields import (
    Config,
    architecture,
    count,
    flag,
    head_dim,
    key_value_heads,
    native_dtype,
    optional_count,
    share,
    text,
)
from ftplan.planner.model_spec import (
    Attention,
    Experts,
    FeedForward,
    Layer,
    Linear,
    ModelSpec,
    Norm,
)

Reader = Callable[[Config, str], ModelSpec]
Kind = TypeVar("Kind", bound=Hashable)


def rms(name: str, width: int) -> Norm:
    """Llama's RMSNorm."""
    return Norm(name=name, width=width)


def float32_rms(name: str, width: int) -> Norm:
    """An RMSNorm that is cast back after its weight (OLMo 2, gpt-oss)."""
    return Norm(name=name, width=width, scales_in_float32=True)


def gemma_rms(name: str, width: int) -> Norm:
    """Gemma's RMSNorm."""
    return Norm(name=name, width=width, scales_in_float32=True, offset=True)


def layer_norm(name: str, width: int) -> Norm:
    """torch's LayerNorm with weight and bias."""
    return Norm(name=name, width=width, kind="layer", bias=True)


BEFORE_BLOCKS = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
AROUND_BLOCKS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "post_feed_forward_norm": "post_feedforward_layernorm",
}


def placed(
    config: Config,
    names: Mapping[str, str] = BEFORE_BLOCKS,
    norm: Callable[[str, int], Norm] = rms,
) -> dict[str, Any]:
    """A layer's norms over the hidden state, as fields of Layer."""
    hidden = count(config, "hidden_size")
    return {place: norm(name, hidden) for place, name in names.items()}


def separate_attention(
    config: Config,
    *,
    input_bias: bool,
    output_bias: bool,
    output_name: str = "o_proj",
    norm: Callable[[str, int], Norm] | None = None,
    **more: Any,
) -> Attention:
    """Attention with `q_proj`, `k_proj`, `v_proj` and an output projection.

    `norm`: how each head's queries and keys are normalized, if they are. `more`: further fields
    of Attention.
    """
    hidden, width = count(config, "hidden_size"), head_dim(config)
    heads, kv_heads = count(config, "num_attention_heads"), key_value_heads(config)
    query, key_value = heads * width, kv_heads * width
    return Attention(
        **{
            "num_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": width,
            "inputs": (
                Linear(name="q_proj", in_features=hidden, out_features=query, bias=input_bias),
                Linear(name="k_proj", in_features=hidden, out_features=key_value, bias=input_bias),
                Linear(name="v_proj", in_features=hidden, out_features=key_value, bias=input_bias),
            ),
            "output": Linear(
                name=output_name, in_features=query, out_features=hidden, bias=output_bias
            ),
            "query_norm": norm("q_norm", width) if norm else None,
            "key_norm": norm("k_norm", width) if norm else None,
            "rotary_dim": width,
            "dropout": share(config, "attention_dropout"),
            **more,
        }
    )


def gated(
    config: Config,
    *,
    bias: bool = False,
    intermediate_size: int | None = None,
    activation: str = "hidden_act",
) -> FeedForward:
    """A block of `gate_proj`, `up_proj` and `down_proj`; `activation`: the field that names it."""
    hidden = count(config, "hidden_size")
    intermediate = intermediate_size or count(config, "intermediate_size")
    return FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(
            Linear(name="gate_proj", in_features=hidden, out_features=intermediate, bias=bias),
            Linear(name="up_proj", in_features=hidden, out_features=intermediate, bias=bias),
        ),
        output=Linear(name="down_proj", in_features=intermediate, out_features=hidden, bias=bias),
        activation=text(config, activation),
    )


def fused_gated(config: Config) -> FeedForward:
    """A block of `gate_up_proj` and `down_proj`."""
    hidden, intermediate = count(config, "hidden_size"), count(config, "intermediate_size")
    return FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(Linear(name="gate_up_proj", in_features=hidden, out_features=2 * intermediate),),
        output=Linear(name="down_proj", in_features=intermediate, out_features=hidden),
        activation=text(config, "hidden_act"),
    )


def plain(
    hidden: int,
    intermediate: int,
    names: tuple[str, str],
    activation: str,
    **linear: Any,
) -> FeedForward:
    """A block of two matrices; `linear`: further fields of both."""
    fields = {"bias": True, **linear}
    return FeedForward(
        intermediate_size=intermediate,
        gated=False,
        inputs=(Linear(name=names[0], in_features=hidden, out_features=intermediate, **fields),),
        output=Linear(name=names[1], in_features=intermediate, out_features=hidden, **fields),
        activation=activation,
    )


def mixture(
    config: Config,
    *,
    intermediate: str = "intermediate_size",
    experts: str = "num_local_experts",
    router_name: str = "gate",
    **more: Any,
) -> FeedForward:
    """Stacked gated experts (`gate_up_proj`, `down_proj` parameters) behind a router.

    `intermediate`, `experts`: the fields that say how wide and how many; `more`: further fields of
    Experts.
    """
    hidden, width = count(config, "hidden_size"), count(config, intermediate)
    num_experts = count(config, experts)
    return FeedForward(
        intermediate_size=width,
        gated=True,
        inputs=(Linear(name="gate_up_proj", in_features=hidden, out_features=2 * width),),
        output=Linear(name="down_proj", in_features=width, out_features=hidden),
        activation=text(config, "hidden_act"),
        experts=Experts(
            **{
                "num_experts": num_experts,
                "num_experts_per_token": count(config, "num_experts_per_tok"),
                "router": Linear(name=router_name, in_features=hidden, out_features=num_experts),
                **more,
            }
        ),
    )


def equal_layers(config: Config, layer: Layer) -> tuple[Layer, ...]:
    """`num_hidden_layers` times the same layer."""
    return (layer,) * count(config, "num_hidden_layers")


def layers_of_kinds(kinds: Sequence[Kind], build: Callable[[Kind], Layer]) -> tuple[Layer, ...]:
    """A layer for each of `kinds`, those of one kind the same object."""
    built = {kind: build(kind) for kind in dict.fromkeys(kinds)}
    return tuple(built[kind] for kind in kinds)


def window(config: Config, kind: str = "sliding_attention") -> int | None:
    """The sliding window of a layer of that kind; null: none."""
    return optional_count(config, "sliding_window") if kind == "sliding_attention" else None


def decoder(
    config: Config, name: str, default_class: str, layers: tuple[Layer, ...], **more: Any
) -> ModelSpec:
    """The fields that most families share under the same names; `more`: further ones."""
    hidden = count(config, "hidden_size")
    return ModelSpec(
        **{
            "name": name,
            "architecture": architecture(config, default_class),
            "model_type": text(config, "model_type"),
            "hidden_size": hidden,
            "vocab_size": count(config, "vocab_size"),
            "max_position_embeddings": count(config, "max_position_embeddings"),
            "layers": layers,
            "final_norm": rms("norm", hidden),
            "tie_word_embeddings": flag(config, "tie_word_embeddings"),
            "native_dtype": native_dtype(config),
            **more,
        }
    )
