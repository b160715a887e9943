"""Readers for dense decoders with rotary positions and gated feed-forward blocks."""

from __future__ import annotations

from typing import Any

from ftplan.planner.families.blocks import (
    Reader,
    decoder,
    equal_layers,
    float32_rms,
    fused_gated,
    gated,
    layer_norm,
    layers_of_kinds,
    placed,
    plain,
    rms,
    separate_attention,
    window,
)
from ftplan.planner.families.fields import (
    Config,
    FieldError,
    count,
    flag,
    head_dim,
    key_value_heads,
    layer_types,
    refuse_dropout,
    rotary_dim,
    share,
    text,
    whole_numbers,
)
from ftplan.planner.model_spec import Attention, Layer, Linear, ModelSpec, Norm


def llama(config: Config, name: str, approximate: str | None = None) -> ModelSpec:
    bias = flag(config, "attention_bias")
    layer = Layer(
        attention=separate_attention(config, input_bias=bias, output_bias=bias),
        feed_forward=gated(config, bias=flag(config, "mlp_bias")),
        **placed(config),
    )
    layers = equal_layers(config, layer)
    return decoder(config, name, "LlamaForCausalLM", layers, approximate=approximate)


def mistral(config: Config, name: str) -> ModelSpec:
    attention = separate_attention(
        config, input_bias=False, output_bias=False, sliding_window=window(config)
    )
    layer = Layer(attention=attention, feed_forward=gated(config), **placed(config))
    return decoder(config, name, "MistralForCausalLM", equal_layers(config, layer))


def qwen_layer_types(config: Config) -> list[str]:
    """Layers from `max_window_layers` up have a window, where windows are used at all."""
    first = count(config, "max_window_layers", least=0)
    windows = flag(config, "use_sliding_window") and config["sliding_window"] is not None
    return layer_types(
        config,
        lambda index: "sliding_attention" if windows and index >= first else "full_attention",
    )


def qwen2(config: Config, name: str) -> ModelSpec:
    def build(kind: str) -> Layer:
        attention = separate_attention(
            config, input_bias=True, output_bias=False, sliding_window=window(config, kind)
        )
        return Layer(attention=attention, feed_forward=gated(config), **placed(config))

    layers = layers_of_kinds(qwen_layer_types(config), build)
    return decoder(config, name, "Qwen2ForCausalLM", layers)


def qwen3(config: Config, name: str) -> ModelSpec:
    bias = flag(config, "attention_bias")

    def build(kind: str) -> Layer:
        attention = separate_attention(
            config,
            input_bias=bias,
            output_bias=bias,
            norm=rms,
            sliding_window=window(config, kind),
        )
        return Layer(attention=attention, feed_forward=gated(config), **placed(config))

    layers = layers_of_kinds(qwen_layer_types(config), build)
    return decoder(config, name, "Qwen3ForCausalLM", layers)


def glm(config: Config, name: str) -> ModelSpec:
    layer = Layer(
        attention=_glm_attention(config), feed_forward=fused_gated(config), **placed(config)
    )
    return decoder(config, name, "GlmForCausalLM", equal_layers(config, layer))


def glm4(config: Config, name: str) -> ModelSpec:
    names = {
        "attention_norm": "input_layernorm",
        "post_attention_norm": "post_self_attn_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "post_feed_forward_norm": "post_mlp_layernorm",
    }
    layer = Layer(
        attention=_glm_attention(config),
        feed_forward=fused_gated(config),
        **placed(config, names),
    )
    return decoder(config, name, "Glm4ForCausalLM", equal_layers(config, layer))


def _glm_attention(config: Config) -> Attention:
    return separate_attention(
        config,
        input_bias=flag(config, "attention_bias"),
        output_bias=False,
        rotary_dim=rotary_dim(config, head_dim(config)),
        rotary_kind="pairs",
        rotary_concatenates=True,
    )


def olmo(config: Config, name: str) -> ModelSpec:
    def norm(norm_name: str, width: int) -> Norm:
        return Norm(
            name=norm_name, width=width, kind="layer", scaled=False, computes_in_float32=True
        )

    bias = flag(config, "attention_bias")
    refuse_clipping(config)
    layer = Layer(
        attention=separate_attention(
            config, input_bias=bias, output_bias=bias, rotary_in_float32=True
        ),
        feed_forward=gated(config),
        **placed(config, norm=norm),
    )
    final_norm = norm("norm", count(config, "hidden_size"))
    return decoder(
        config, name, "OlmoForCausalLM", equal_layers(config, layer), final_norm=final_norm
    )


def refuse_clipping(config: Config) -> None:
    """Raises FieldError for queries, keys and values that are clipped (OLMo's `clip_qkv`)."""
    if config["clip_qkv"] is not None:
        raise FieldError("has `clip_qkv`, which the closed form does not model")


def olmo2(config: Config, name: str) -> ModelSpec:
    bias, width = flag(config, "attention_bias"), head_dim(config)
    attention = separate_attention(
        config,
        input_bias=bias,
        output_bias=bias,
        query_norm=float32_rms("q_norm", count(config, "num_attention_heads") * width),
        key_norm=float32_rms("k_norm", key_value_heads(config) * width),
        rotary_in_float32=True,
    )
    behind = {
        "post_attention_norm": "post_attention_layernorm",
        "post_feed_forward_norm": "post_feedforward_layernorm",
    }
    layer = Layer(
        attention=attention,
        feed_forward=gated(config),
        **placed(config, behind, float32_rms),
    )
    return decoder(
        config,
        name,
        "Olmo2ForCausalLM",
        equal_layers(config, layer),
        final_norm=float32_rms("norm", count(config, "hidden_size")),
    )


def rotated_layers(config: Config) -> list[bool]:
    """Which layers rotate queries and keys: as `no_rope_layers` lists them (1: rotated), or all
    but every `no_rope_layer_interval`th."""
    depth = count(config, "num_hidden_layers")
    listed = whole_numbers(config, "no_rope_layers")
    if not listed:
        interval = count(config, "no_rope_layer_interval")
        return [bool((index + 1) % interval) for index in range(depth)]
    if len(listed) < depth:
        raise FieldError(f"has {len(listed)} `no_rope_layers` for {depth} `num_hidden_layers`")
    return [bool(rotated) for rotated in listed[:depth]]


def smollm3(config: Config, name: str) -> ModelSpec:
    bias, rotated = flag(config, "attention_bias"), rotated_layers(config)
    windows = flag(config, "use_sliding_window")
    kinds = layer_types(
        config,
        lambda index: "sliding_attention" if windows and not rotated[index] else "full_attention",
    )

    def build(kind: tuple[bool, str]) -> Layer:
        is_rotated, attention_kind = kind
        attention = separate_attention(
            config,
            input_bias=bias,
            output_bias=bias,
            rotary_dim=head_dim(config) if is_rotated else 0,
            sliding_window=window(config, attention_kind) if windows else None,
        )
        return Layer(
            attention=attention,
            feed_forward=gated(config, bias=flag(config, "mlp_bias")),
            **placed(config),
        )

    layers = layers_of_kinds(list(zip(rotated, kinds, strict=True)), build)
    return decoder(config, name, "SmolLM3ForCausalLM", layers)


def stablelm(config: Config, name: str) -> ModelSpec:
    width, hidden = head_dim(config), count(config, "hidden_size")
    refuse_dropout(config, "hidden_dropout")
    norms: dict[str, Any] = {}
    if flag(config, "qk_layernorm"):
        norms["query_norm"] = _norm_a_head(width, count(config, "num_attention_heads"))
        norms["key_norm"] = _norm_a_head(width, key_value_heads(config))
    attention = separate_attention(
        config,
        input_bias=flag(config, "use_qkv_bias"),
        output_bias=False,
        rotary_dim=rotary_dim(config, width),
        rotary_concatenates=True,
        **norms,
    )
    parallel = flag(config, "use_parallel_residual")
    before = placed(config, norm=layer_norm)
    if parallel:
        del before["feed_forward_norm"]
    layer = Layer(
        attention=attention,
        feed_forward=gated(config),
        parallel=parallel,
        holds=("normalized", "attended"),
        **before,
    )
    return decoder(
        config,
        name,
        "StableLmForCausalLM",
        equal_layers(config, layer),
        final_norm=layer_norm("norm", hidden),
    )


def _norm_a_head(width: int, heads: int) -> Norm:
    """StableLM 2's list of LayerNorms, one for each head."""
    return Norm(name="norms", width=width, kind="layer", copies=heads)


def granite(config: Config, name: str) -> ModelSpec:
    bias = flag(config, "attention_bias")
    layer = Layer(
        attention=separate_attention(config, input_bias=bias, output_bias=bias),
        feed_forward=gated(config, bias=flag(config, "mlp_bias")),
        scales_residual=True,
        **placed(config),
    )
    return decoder(
        config,
        name,
        "GraniteForCausalLM",
        equal_layers(config, layer),
        scales_inputs=True,
        scales_logits=True,
    )


def cohere(config: Config, name: str) -> ModelSpec:
    def norm(norm_name: str, width: int, num_heads: int | None = None) -> Norm:
        return Norm(
            name=norm_name,
            width=width,
            kind="centered",
            scales_in_float32=True,
            num_heads=num_heads,
        )

    bias, width = flag(config, "attention_bias"), head_dim(config)
    hidden = count(config, "hidden_size")
    norms: dict[str, Any] = {}
    if flag(config, "use_qk_norm"):
        norms = {
            "query_norm": norm("q_norm", width, count(config, "num_attention_heads")),
            "key_norm": norm("k_norm", width, key_value_heads(config)),
        }
    layer = Layer(
        attention=separate_attention(
            config,
            input_bias=bias,
            output_bias=bias,
            rotary_kind="pairs",
            rotary_in_float32=True,
            **norms,
        ),
        feed_forward=gated(config),
        attention_norm=norm("input_layernorm", hidden),
        parallel=True,
    )
    return decoder(
        config,
        name,
        "CohereForCausalLM",
        equal_layers(config, layer),
        final_norm=norm("norm", hidden),
        scales_logits=True,
    )


def starcoder2(config: Config, name: str) -> ModelSpec:
    hidden, bias = count(config, "hidden_size"), flag(config, "use_bias")
    attention = separate_attention(
        config, input_bias=bias, output_bias=bias, sliding_window=window(config)
    )
    feed_forward = plain(
        hidden,
        count(config, "intermediate_size"),
        ("c_fc", "c_proj"),
        text(config, "hidden_act"),
        bias=bias,
    )
    layer = Layer(
        attention=attention,
        feed_forward=feed_forward,
        dropout=share(config, "residual_dropout"),
        **placed(config, norm=layer_norm),
    )
    return decoder(
        config,
        name,
        "Starcoder2ForCausalLM",
        equal_layers(config, layer),
        final_norm=layer_norm("norm", hidden),
        embedding_dropout=share(config, "embedding_dropout"),
    )


def phi3(config: Config, name: str) -> ModelSpec:
    hidden, width = count(config, "hidden_size"), head_dim(config)
    heads, kv_heads = count(config, "num_attention_heads"), key_value_heads(config)
    fused_width = (heads + 2 * kv_heads) * width
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        inputs=(Linear(name="qkv_proj", in_features=hidden, out_features=fused_width),),
        output=Linear(name="o_proj", in_features=heads * width, out_features=hidden),
        rotary_dim=rotary_dim(config, width),
        rotary_concatenates=True,
        sliding_window=window(config),
        dropout=share(config, "attention_dropout"),
    )
    layer = Layer(
        attention=attention,
        feed_forward=fused_gated(config),
        dropout=share(config, "resid_pdrop"),
        **placed(config),
    )
    return decoder(config, name, "Phi3ForCausalLM", equal_layers(config, layer))


LLAMA_LIKE: dict[str, Reader] = {
    "cohere": cohere,
    "glm": glm,
    "glm4": glm4,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "olmo": olmo,
    "olmo2": olmo2,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
}
