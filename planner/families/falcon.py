"""The reader for Falcon's three designs: falcon-rw, 7B, and the newer one of 40B and 180B."""

from __future__ import annotations

from typing import Any

from ftplan.planner.families.blocks import (
    Reader,
    decoder,
    equal_layers,
    layer_norm,
    placed,
    plain,
)
from ftplan.planner.families.fields import (
    Config,
    FieldError,
    count,
    divided_head_dim,
    flag,
    optional_count,
    refuse_dropout,
    text,
)
from ftplan.planner.model_spec import Attention, Layer, Linear, ModelSpec


def falcon(config: Config, name: str) -> ModelSpec:
    hidden = count(config, "hidden_size")
    for field in ("hidden_dropout", "attention_dropout"):
        refuse_dropout(config, field)
    intermediate = optional_count(config, "ffn_hidden_size") or 4 * hidden
    names = ("dense_h_to_4h", "dense_4h_to_h")
    parallel, new = flag(config, "parallel_attn"), flag(config, "new_decoder_architecture")
    if new and not parallel:
        raise FieldError("has `new_decoder_architecture` without `parallel_attn`")
    layer = Layer(
        attention=_falcon_attention(config),
        feed_forward=plain(
            hidden,
            intermediate,
            names,
            text(config, "activation"),
            bias=flag(config, "bias"),
            quantizable=False,
            multiplies_transposed=True,
        ),
        parallel=parallel,
        adds_in_place=True,
        normalizes_first=new,
        holds=("attended", "normalized", "weights"),
        **placed(config, _falcon_norms(config, parallel, new), layer_norm),
    )
    return decoder(
        config,
        name,
        "FalconForCausalLM",
        equal_layers(config, layer),
        final_norm=layer_norm("ln_f", hidden),
    )


def _falcon_norms(config: Config, parallel: bool, new: bool) -> dict[str, str]:
    """Two norms in a row, one for both blocks, or (40B and 180B) one for each."""
    if not parallel:
        return {
            "attention_norm": "input_layernorm",
            "feed_forward_norm": "post_attention_layernorm",
        }
    if new and optional_count(config, "num_ln_in_parallel_attn") in (None, 2):
        return {"attention_norm": "ln_attn", "feed_forward_norm": "ln_mlp"}
    return {"attention_norm": "input_layernorm"}


def _falcon_attention(config: Config) -> Attention:
    width = divided_head_dim(config, "hidden_size", "num_attention_heads")
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    new = flag(config, "new_decoder_architecture")
    if new:
        kv_heads = optional_count(config, "num_kv_heads") or heads
    else:
        kv_heads = 1 if flag(config, "multi_query") else heads
    if heads % kv_heads:
        raise FieldError(f"has `num_kv_heads`: {kv_heads}, which does not divide {heads} heads")
    linear: dict[str, Any] = {
        "bias": flag(config, "bias"),
        "quantizable": False,
        "multiplies_transposed": True,
    }
    fused_width = (heads + 2 * kv_heads) * width
    alibi = flag(config, "alibi")
    return Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        inputs=(
            Linear(name="query_key_value", in_features=hidden, out_features=fused_width, **linear),
        ),
        output=Linear(name="dense", in_features=hidden, out_features=hidden, **linear),
        rotary_dim=0 if alibi else width,
        alibi=alibi,
        picks_heads=True,
        expands_key_value=new,
    )


FALCON: dict[str, Reader] = {"falcon": falcon}
