"""Readers for models whose code transformers 5 does not have: only the repository's own runs them.

They follow the `modeling_*.py` of those repositories; counts are compared with published ones.
"""

from __future__ import annotations

from msgspec import structs

from ftplan.planner.families.blocks import Reader, decoder, equal_layers, placed, rms
from ftplan.planner.families.fields import (
    Config,
    FieldError,
    count,
    divided_head_dim,
    flag,
    key_value_heads,
    optional_count,
)
from ftplan.planner.model_spec import Attention, FeedForward, Layer, Linear, ModelSpec


def internlm2(config: Config, name: str) -> ModelSpec:
    config = {"tie_word_embeddings": False, "bias": False, **config}
    width = divided_head_dim(config, "hidden_size", "num_attention_heads")
    hidden, intermediate = count(config, "hidden_size"), count(config, "intermediate_size")
    heads, kv_heads = count(config, "num_attention_heads"), key_value_heads(config)
    bias = flag(config, "bias")
    fused_width = (heads + 2 * kv_heads) * width
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        inputs=(Linear(name="wqkv", in_features=hidden, out_features=fused_width, bias=bias),),
        output=Linear(name="wo", in_features=hidden, out_features=hidden, bias=bias),
        rotary_dim=width,
    )
    feed_forward = FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(
            Linear(name="w1", in_features=hidden, out_features=intermediate),
            Linear(name="w3", in_features=hidden, out_features=intermediate),
        ),
        output=Linear(name="w2", in_features=intermediate, out_features=hidden),
    )
    norms = {"attention_norm": "attention_norm", "feed_forward_norm": "ffn_norm"}
    layer = Layer(attention=attention, feed_forward=feed_forward, **placed(config, norms))
    return _remote(config, name, "InternLM2ForCausalLM", layer)


def baichuan(config: Config, name: str) -> ModelSpec:
    width = divided_head_dim(config, "hidden_size", "num_attention_heads")
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    intermediate = count(config, "intermediate_size")
    # Both sizes have one model type. The code of the 7B rotates, that of the 13B uses ALiBi;
    # vLLM tells them apart by the width as well (`baichuan.py`).
    rotates = hidden == 4096
    context = optional_count(config, "max_position_embeddings") or count(config, "model_max_length")
    config = {"tie_word_embeddings": False, **config, "max_position_embeddings": context}
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        inputs=(Linear(name="W_pack", in_features=hidden, out_features=3 * hidden),),
        output=Linear(name="o_proj", in_features=hidden, out_features=hidden),
        rotary_dim=width if rotates else 0,
        alibi=not rotates,
    )
    feed_forward = FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(
            Linear(name="gate_proj", in_features=hidden, out_features=intermediate),
            Linear(name="up_proj", in_features=hidden, out_features=intermediate),
        ),
        output=Linear(name="down_proj", in_features=intermediate, out_features=hidden),
    )
    layer = Layer(attention=attention, feed_forward=feed_forward, **placed(config))
    return _remote(config, name, "BaichuanForCausalLM", layer)


def chatglm(config: Config, name: str) -> ModelSpec:
    """ChatGLM2, ChatGLM3 and the first GLM-4-9B."""
    config = {**_CHATGLM_DEFAULTS, **config}
    for field in ("apply_residual_connection_post_layernorm", "add_bias_linear"):
        if flag(config, field):
            raise FieldError(f"has `{field}`, which no released model has")
    for field in ("rmsnorm", "post_layer_norm"):
        if not flag(config, field):
            raise FieldError(f"has no `{field}`, which every released model has")
    config = {
        **config,
        "num_hidden_layers": count(config, "num_layers"),
        "vocab_size": count(config, "padded_vocab_size"),
        "max_position_embeddings": count(config, "seq_length"),
    }
    layer = Layer(
        attention=_chatglm_attention(config),
        feed_forward=_chatglm_feed_forward(config),
        **placed(config),
    )
    spec = _remote(config, name, "ChatGLMForConditionalGeneration", layer)
    return structs.replace(spec, final_norm=rms("final_layernorm", spec.hidden_size))


# ChatGLMConfig in the repositories of ChatGLM3 and GLM-4-9B.
_CHATGLM_DEFAULTS = {
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}


def _chatglm_attention(config: Config) -> Attention:
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    width = count(config, "kv_channels")
    grouped = flag(config, "multi_query_attention")
    kv_heads = count(config, "multi_query_group_num") if grouped else heads
    fused_width = (heads + 2 * kv_heads) * width
    return Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        inputs=(
            Linear(
                name="query_key_value",
                in_features=hidden,
                out_features=fused_width,
                bias=flag(config, "add_qkv_bias"),
            ),
        ),
        output=Linear(name="dense", in_features=heads * width, out_features=hidden),
        rotary_dim=width // 2,
        rotary_kind="pairs",
        rotary_concatenates=True,
    )


def _chatglm_feed_forward(config: Config) -> FeedForward:
    hidden, intermediate = count(config, "hidden_size"), count(config, "ffn_hidden_size")
    return FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(Linear(name="dense_h_to_4h", in_features=hidden, out_features=2 * intermediate),),
        output=Linear(name="dense_4h_to_h", in_features=intermediate, out_features=hidden),
    )


def qwen(config: Config, name: str) -> ModelSpec:
    """The first Qwen. Its `intermediate_size` counts both halves of the gated block."""
    config = {"kv_channels": 128, "no_bias": True, "tie_word_embeddings": False, **config}
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    intermediate, width = count(config, "intermediate_size") // 2, count(config, "kv_channels")
    bias, inner = not flag(config, "no_bias"), heads * width
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        inputs=(Linear(name="c_attn", in_features=hidden, out_features=3 * inner, bias=True),),
        output=Linear(name="c_proj", in_features=inner, out_features=hidden, bias=bias),
        rotary_dim=width,
    )
    feed_forward = FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(
            Linear(name="w1", in_features=hidden, out_features=intermediate, bias=bias),
            Linear(name="w2", in_features=hidden, out_features=intermediate, bias=bias),
        ),
        output=Linear(name="c_proj", in_features=intermediate, out_features=hidden, bias=bias),
    )
    norms = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
    layer = Layer(attention=attention, feed_forward=feed_forward, **placed(config, norms))
    spec = _remote(config, name, "QWenLMHeadModel", layer)
    return structs.replace(spec, final_norm=rms("ln_f", spec.hidden_size))


def _remote(config: Config, name: str, default_class: str, layer: Layer) -> ModelSpec:
    layers = equal_layers(config, layer)
    return decoder(config, name, default_class, layers, code="remote")


REMOTE: dict[str, Reader] = {
    "baichuan": baichuan,
    "chatglm": chatglm,
    "internlm2": internlm2,
    "qwen": qwen,
}
