"""Readers for mixtures of experts."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from ftplan.planner.families.blocks import (
    Reader,
    decoder,
    equal_layers,
    float32_rms,
    gated,
    layer_norm,
    layers_of_kinds,
    mixture,
    placed,
    rms,
    separate_attention,
    window,
)
from ftplan.planner.families.fields import (
    Config,
    count,
    flag,
    head_dim,
    key_value_heads,
    layer_types,
    optional_count,
    whole_numbers,
)
from ftplan.planner.families.llama_like import refuse_clipping, rotated_layers
from ftplan.planner.model_spec import (
    Attention,
    FeedForward,
    Latent,
    Layer,
    Linear,
    ModelSpec,
    Norm,
)


def mixtral(config: Config, name: str) -> ModelSpec:
    attention = separate_attention(
        config, input_bias=False, output_bias=False, sliding_window=window(config)
    )
    experts = mixture(config, normalizes_scores=True)
    layer = Layer(attention=attention, feed_forward=experts, **placed(config))
    return decoder(config, name, "MixtralForCausalLM", equal_layers(config, layer))


def phimoe(config: Config, name: str) -> ModelSpec:
    bias, hidden = flag(config, "attention_bias"), count(config, "hidden_size")
    attention = separate_attention(
        config, input_bias=bias, output_bias=bias, sliding_window=window(config)
    )
    experts = mixture(config, scoring="sparsemixer", **_router_module(config))
    layer = Layer(attention=attention, feed_forward=experts, **placed(config, norm=layer_norm))
    return decoder(
        config,
        name,
        "PhimoeForCausalLM",
        equal_layers(config, layer),
        final_norm=layer_norm("norm", hidden),
        lm_head_bias=flag(config, "lm_head_bias"),
    )


def _router_module(config: Config) -> dict[str, Any]:
    """A router whose class derives from torch's Linear, as fields of Experts."""
    router = Linear(
        name="router",
        in_features=count(config, "hidden_size"),
        out_features=count(config, "num_local_experts"),
        quantizable=False,
    )
    return {"router": router, "router_is_linear": True}


def olmoe(config: Config, name: str) -> ModelSpec:
    bias, hidden = flag(config, "attention_bias"), count(config, "hidden_size")
    refuse_clipping(config)
    key_width = hidden // count(config, "num_attention_heads") * key_value_heads(config)
    attention = separate_attention(
        config,
        input_bias=bias,
        output_bias=bias,
        query_norm=rms("q_norm", hidden),
        key_norm=rms("k_norm", key_width),
    )
    experts = mixture(
        config, experts="num_experts", normalizes_scores=flag(config, "norm_topk_prob")
    )
    layer = Layer(attention=attention, feed_forward=experts, **placed(config))
    return decoder(config, name, "OlmoeForCausalLM", equal_layers(config, layer))


def granitemoe(config: Config, name: str) -> ModelSpec:
    bias = flag(config, "attention_bias")
    layer = Layer(
        attention=separate_attention(config, input_bias=bias, output_bias=bias),
        feed_forward=mixture(config, router_name="router", scoring="best_softmax"),
        scales_residual=True,
        **placed(config),
    )
    return decoder(
        config,
        name,
        "GraniteMoeForCausalLM",
        equal_layers(config, layer),
        scales_inputs=True,
        scales_logits=True,
    )


def _sparse_layers(config: Config) -> list[bool]:
    """Which layers hold experts: every `decoder_sparse_step`th but for `mlp_only_layers`."""
    step = count(config, "decoder_sparse_step")
    dense = whole_numbers(config, "mlp_only_layers") or []
    depth = count(config, "num_hidden_layers")
    return [index not in dense and (index + 1) % step == 0 for index in range(depth)]


def qwen2_moe(config: Config, name: str) -> ModelSpec:
    windows = flag(config, "use_sliding_window")
    first_without = count(config, "max_window_layers", least=0)
    kinds = layer_types(
        config,
        lambda index: (
            "sliding_attention"
            if windows and (index + 1) % 2 and index < first_without
            else "full_attention"
        ),
    )

    def build(kind: tuple[str, bool]) -> Layer:
        attention_kind, is_sparse = kind
        attention = separate_attention(
            config,
            input_bias=flag(config, "qkv_bias"),
            output_bias=False,
            sliding_window=window(config, attention_kind) if windows else None,
        )
        feed_forward = _qwen2_experts(config) if is_sparse else gated(config)
        return Layer(attention=attention, feed_forward=feed_forward, **placed(config))

    layers = layers_of_kinds(list(zip(kinds, _sparse_layers(config), strict=True)), build)
    return decoder(config, name, "Qwen2MoeForCausalLM", layers)


def _qwen2_experts(config: Config) -> FeedForward:
    shared_size = count(config, "shared_expert_intermediate_size")
    hidden = count(config, "hidden_size")
    return mixture(
        config,
        intermediate="moe_intermediate_size",
        experts="num_experts",
        normalizes_scores=flag(config, "norm_topk_prob"),
        shared=gated(config, intermediate_size=shared_size),
        shared_gate=Linear(name="shared_expert_gate", in_features=hidden, out_features=1),
    )


def qwen3_moe(config: Config, name: str) -> ModelSpec:
    bias = flag(config, "attention_bias")
    attention = separate_attention(
        config,
        input_bias=bias,
        output_bias=bias,
        norm=rms,
        sliding_window=window(config) if flag(config, "use_sliding_window") else None,
    )

    def build(is_sparse: bool) -> Layer:
        experts = mixture(
            config,
            intermediate="moe_intermediate_size",
            experts="num_experts",
            normalizes_scores=flag(config, "norm_topk_prob"),
        )
        feed_forward = experts if is_sparse else gated(config)
        return Layer(attention=attention, feed_forward=feed_forward, **placed(config))

    layers = layers_of_kinds(_sparse_layers(config), build)
    return decoder(config, name, "Qwen3MoeForCausalLM", layers)


def deepseek_v2(config: Config, name: str) -> ModelSpec:
    bias = flag(config, "mlp_bias")
    attention = _latent_attention(config, "complex")
    layers = _deepseek_layers(config, attention, bias=bias)
    return decoder(config, name, "DeepseekV2ForCausalLM", layers)


def deepseek_v3(config: Config, name: str) -> ModelSpec:
    attention = _latent_attention(config, "parts" if flag(config, "rope_interleave") else "half")
    layers = _deepseek_layers(
        config,
        attention,
        scoring="sigmoid",
        normalizes_scores=flag(config, "norm_topk_prob"),
        router_correction=True,
    )
    return decoder(config, name, "DeepseekV3ForCausalLM", layers)


def _deepseek_layers(
    config: Config, attention: Attention, bias: bool = False, **more: Any
) -> tuple[Layer, ...]:
    """The first layers dense, the others with experts; `more`: further fields of these."""
    first = count(config, "first_k_dense_replace", least=0)
    depth = count(config, "num_hidden_layers")
    shared_size = count(config, "moe_intermediate_size") * count(config, "n_shared_experts")

    def build(is_sparse: bool) -> Layer:
        experts = mixture(
            config,
            intermediate="moe_intermediate_size",
            experts="n_routed_experts",
            router_in_float32=True,
            shared=gated(config, bias=bias, intermediate_size=shared_size),
            **more,
        )
        feed_forward = experts if is_sparse else gated(config, bias=bias)
        return Layer(attention=attention, feed_forward=feed_forward, **placed(config))

    return layers_of_kinds([index >= first for index in range(depth)], build)


def _latent_attention(config: Config, rotary_kind: str) -> Attention:
    """Keys and values (and queries, where `q_lora_rank` is said) through a narrow middle."""
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    bias = flag(config, "attention_bias")
    plain_width = count(config, "qk_nope_head_dim")
    rotated_width = count(config, "qk_rope_head_dim")
    value_width, key_rank = count(config, "v_head_dim"), count(config, "kv_lora_rank")
    query_rank, width = optional_count(config, "q_lora_rank"), plain_width + rotated_width
    keys = Latent(
        down=Linear(
            name="kv_a_proj_with_mqa",
            in_features=hidden,
            out_features=key_rank + rotated_width,
            bias=bias,
        ),
        norm=rms("kv_a_layernorm", key_rank),
        up=Linear(
            name="kv_b_proj",
            in_features=key_rank,
            out_features=heads * (plain_width + value_width),
        ),
    )
    query = Linear(name="q_proj", in_features=hidden, out_features=heads * width)
    return Attention(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        value_head_dim=value_width,
        inputs=() if query_rank else (query,),
        latents=(_latent_query(query, query_rank, bias), keys) if query_rank else (keys,),
        output=Linear(
            name="o_proj", in_features=heads * value_width, out_features=hidden, bias=bias
        ),
        rotary_dim=rotated_width,
        rotary_kind=rotary_kind,
        rotary_in_float32=rotary_kind == "complex",
        rotary_concatenates=True,
    )


def _latent_query(query: Linear, rank: int, bias: bool) -> Latent:
    return Latent(
        down=Linear(name="q_a_proj", in_features=query.in_features, out_features=rank, bias=bias),
        norm=rms("q_a_layernorm", rank),
        up=Linear(name="q_b_proj", in_features=rank, out_features=query.out_features),
    )


def gpt_oss(config: Config, name: str) -> ModelSpec:
    bias, hidden = flag(config, "attention_bias"), count(config, "hidden_size")
    kinds = layer_types(
        config, lambda index: "full_attention" if index % 2 else "sliding_attention"
    )
    num_experts = count(config, "num_local_experts")
    experts = _transposed(
        mixture(
            config,
            scoring="best_softmax",
            returns_scores=True,
            router=Linear(name="router", in_features=hidden, out_features=num_experts, bias=True),
        ),
        bias=True,
    )
    experts = structs.replace(experts, activation="gpt_oss_glu")

    def build(kind: str) -> Layer:
        attention = separate_attention(
            config,
            input_bias=bias,
            output_bias=bias,
            rotary_kind="parts",
            rotary_concatenates=True,
            sinks=True,
            sliding_window=window(config, kind),
        )
        return Layer(attention=attention, feed_forward=experts, **placed(config, norm=float32_rms))

    return decoder(
        config,
        name,
        "GptOssForCausalLM",
        layers_of_kinds(kinds, build),
        final_norm=float32_rms("norm", hidden),
        supports_sdpa=False,
    )


def _transposed(experts: FeedForward, bias: bool = False) -> FeedForward:
    """The same experts, held as `in_features x out_features`."""
    return structs.replace(
        experts,
        inputs=tuple(
            structs.replace(linear, transposed=True, bias=bias) for linear in experts.inputs
        ),
        output=structs.replace(experts.output, transposed=True, bias=bias),
    )


def llama4_text(config: Config, name: str) -> ModelSpec:
    rotated = rotated_layers(config)
    kinds = layer_types(
        config, lambda index: "chunked_attention" if rotated[index] else "full_attention"
    )
    depth = count(config, "num_hidden_layers")
    step = count(config, "interleave_moe_layer_step")
    sparse = whole_numbers(config, "moe_layers")
    if sparse is None:
        sparse = list(range(step - 1, depth, step))

    def build(kind: tuple[bool, str, bool]) -> Layer:
        is_rotated, attention_kind, is_sparse = kind
        return Layer(
            attention=_llama4_attention(config, is_rotated, attention_kind),
            feed_forward=_llama4_experts(config) if is_sparse else _llama4_dense(config),
            holds=("attended",),
            **placed(config),
        )

    layers = layers_of_kinds(
        [(rotated[i], kinds[i], i in sparse) for i in range(depth)],
        build,
    )
    return decoder(config, name, "Llama4ForCausalLM", layers)


def _llama4_attention(config: Config, is_rotated: bool, kind: str) -> Attention:
    bias, width = flag(config, "attention_bias"), head_dim(config)
    norm = Norm(name="qk_norm", width=width, scaled=False)
    normalizes = is_rotated and flag(config, "use_qk_norm")
    is_chunked = kind == "chunked_attention"
    return separate_attention(
        config,
        input_bias=bias,
        output_bias=bias,
        query_norm=norm if normalizes else None,
        key_norm=norm if normalizes else None,
        normalizes_after_rotation=True,
        rotary_dim=width if is_rotated else 0,
        rotary_kind="complex",
        rotary_in_float32=True,
        scales_query=flag(config, "attn_temperature_tuning") and not is_rotated,
        chunk_size=optional_count(config, "attention_chunk_size") if is_chunked else None,
    )


def _llama4_dense(config: Config) -> FeedForward:
    return gated(config, intermediate_size=count(config, "intermediate_size_mlp"))


def _llama4_experts(config: Config) -> FeedForward:
    return _transposed(
        mixture(
            config,
            scoring="sigmoid",
            every_expert=True,
            shared=gated(config),
            **_router_module(config),
        )
    )


MIXTURES: dict[str, Reader] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "granitemoe": granitemoe,
    "llama4_text": llama4_text,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "phimoe": phimoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
}
