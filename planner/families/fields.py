"""Reading the fields of a `config.json`: their types, their defaults, their other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ftplan.planner.units import resolve_dtype

Config = Mapping[str, Any]


class FieldError(ValueError):
    """What is wrong with a field of a config.json, without the model's name."""


def require(config: Config, field: str) -> Any:
    """The field's value, null included."""
    if field not in config:
        raise FieldError(f"is incomplete: no `{field}`")
    return config[field]


def count(config: Config, field: str, least: int = 1) -> int:
    """A field that counts something: a whole number of at least `least`."""
    value = require(config, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FieldError(
            f"has `{field}`: {value!r}, where a whole number from {least} up is needed"
        )
    return value


def optional_count(config: Config, field: str) -> int | None:
    """The same for a field that may be missing or null."""
    return None if config.get(field) is None else count(config, field)


def flag(config: Config, field: str) -> bool:
    """A field that is true or false; null is false."""
    value = require(config, field)
    if value is not None and not isinstance(value, bool):
        raise FieldError(f"has `{field}`: {value!r}, where true or false is needed")
    return bool(value)


def number(config: Config, field: str) -> float:
    """A field that holds a number."""
    value = require(config, field)
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise FieldError(f"has `{field}`: {value!r}, where a number is needed")
    return value


def share(config: Config, field: str) -> float:
    """A field between 0 and 1, such as a dropout rate."""
    value = number(config, field)
    if not 0 <= value <= 1:
        raise FieldError(f"has `{field}`: {value!r}, where a number from 0 to 1 is needed")
    return value


def text(config: Config, field: str) -> str:
    """A field that holds a name."""
    value = require(config, field)
    if not isinstance(value, str):
        raise FieldError(f"has `{field}`: {value!r}, where a name is needed")
    return value


def section(config: Config, field: str) -> Config:
    """A field that holds a configuration of its own; left out or null: an empty one."""
    value = config.get(field)
    if value is not None and not isinstance(value, Mapping):
        raise FieldError(f"has `{field}`: {value!r}, where an object is needed")
    return value or {}


def whole_numbers(config: Config, field: str) -> list[int] | None:
    """A field that lists whole numbers; None where it is missing or null."""
    value = config.get(field)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(v, int) for v in value):
        raise FieldError(f"has `{field}`: {value!r}, where a list of whole numbers is needed")
    return list(value)


def layer_types(config: Config, derived: Callable[[int], str]) -> list[str]:
    """What kind of attention each layer has: as `layer_types` lists it, or as `derived` says."""
    depth = count(config, "num_hidden_layers")
    listed = config.get("layer_types")
    if listed is None:
        return [derived(index) for index in range(depth)]
    known = ("full_attention", "sliding_attention", "chunked_attention")
    if not isinstance(listed, list | tuple) or not all(kind in known for kind in listed):
        raise FieldError(f"has `layer_types`: {listed!r}, where a list of {known} is needed")
    if len(listed) < depth:
        raise FieldError(f"has {len(listed)} `layer_types` for {depth} `num_hidden_layers`")
    return list(listed[:depth])


def native_dtype(config: Config) -> str:
    """The dtype that the weights are stored in; fp32 where the file does not say."""
    dtype = config.get("torch_dtype") or config.get("dtype")
    return resolve_dtype(dtype) if isinstance(dtype, str) else "float32"


def architecture(config: Config, default: str) -> str:
    """The model class that the file names."""
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else default


def head_dim(config: Config) -> int:
    """`head_dim`; left out or null, the width over the heads."""
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    if heads > hidden:
        raise FieldError(f"has `num_attention_heads`: {heads}, more than `hidden_size`: {hidden}")
    return optional_count(config, "head_dim") or hidden // heads


def divided_head_dim(config: Config, width: str, heads: str) -> int:
    """The width over the heads, in architectures that have no other."""
    hidden, num_heads = count(config, width), count(config, heads)
    if hidden % num_heads:
        raise FieldError(f"has `{heads}`: {num_heads}, which does not divide `{width}`: {hidden}")
    return hidden // num_heads


def key_value_heads(config: Config) -> int:
    """`num_key_value_heads`; left out or null, every head."""
    heads = count(config, "num_attention_heads")
    kv_heads = optional_count(config, "num_key_value_heads") or heads
    if heads % kv_heads:
        raise FieldError(
            f"has `num_key_value_heads`: {kv_heads}, which does not divide the {heads} heads of "
            "`num_attention_heads`"
        )
    return kv_heads


def rotary_dim(config: Config, width: int) -> int:
    """How much of a head of that width is rotated: transformers 5 keeps the share of it in
    `rope_parameters`, earlier versions beside it."""
    parameters = section(config, "rope_parameters")
    inside = parameters.get("partial_rotary_factor") is not None
    return int(width * share(parameters if inside else config, "partial_rotary_factor"))


def with_defaults(config: Config) -> Config:
    """The config with what its class gives to fields that are left out, and with its own names
    for those that have two."""
    model_type = config["model_type"]
    renamed = {
        own: config[other]
        for other, own in OTHER_NAMES.get(model_type, {}).items()
        if other in config and own not in config
    }
    return {**CLASS_DEFAULTS.get(model_type, {}), **renamed, **config}


# What transformers' configuration classes (5.23) hold under two names: the second is the class's.
_GPT_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
OTHER_NAMES: dict[str, dict[str, str]] = {
    "bloom": {
        "n_embed": "hidden_size",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts"},
    "falcon": {"n_embed": "hidden_size"},
    "gpt2": _GPT_NAMES,
    "gpt_bigcode": _GPT_NAMES,
    "gpt_neo": {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    "gpt_neox": {"rotary_pct": "partial_rotary_factor"},
    "gpt_oss": {"num_experts": "num_local_experts"},
    "gptj": _GPT_NAMES,
    "mixtral": {"num_experts": "num_local_experts"},
    "olmoe": {"num_local_experts": "num_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "stablelm": {"rope_pct": "partial_rotary_factor"},
}

# What those classes give to a field that is left out. The sizes that every released file says
# are not among them: without these a file is damaged.
_NO_DROPOUT = {"attention_dropout": 0.0}
_SILU: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False, **_NO_DROPOUT}
_LLAMA_LIKE: dict[str, Any] = {**_SILU, "attention_bias": False}
_GRANITE: dict[str, Any] = {
    **_LLAMA_LIKE,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
}
_QWEN_WINDOW: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GLM: dict[str, Any] = {
    **_SILU,
    "attention_bias": True,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
}
_GEMMA: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 256,
    "tie_word_embeddings": True,
    **_NO_DROPOUT,
}
_GPT_DROPOUT = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
_LATENT: dict[str, Any] = {
    **_LLAMA_LIKE,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "bloom": {
        "apply_residual_connection_post_layernorm": False,
        "slow_but_exact": False,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": True,
        **_NO_DROPOUT,
    },
    "cohere": {**_LLAMA_LIKE, "tie_word_embeddings": True, "use_qk_norm": False},
    "deepseek_v2": {
        **_LATENT,
        "mlp_bias": False,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
    },
    "deepseek_v3": {
        **_LATENT,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_interleave": True,
    },
    "falcon": {
        "activation": "gelu",
        "alibi": False,
        "bias": False,
        "hidden_dropout": 0.0,
        "max_position_embeddings": 2048,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "tie_word_embeddings": True,
        **_NO_DROPOUT,
    },
    "gemma": {**_GEMMA, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16},
    "gemma2": {
        **_GEMMA,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {"tie_word_embeddings": True},
    "gemma3_text": {
        **_GEMMA,
        "hidden_activation": "gelu_pytorch_tanh",
        # Files of the multimodal models leave out what equals the class's.
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "glm": _GLM,
    "glm4": _GLM,
    "gpt2": {"activation_function": "gelu_new", "tie_word_embeddings": True, **_GPT_DROPOUT},
    "gpt_bigcode": {
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
        "tie_word_embeddings": True,
        **_GPT_DROPOUT,
    },
    "gpt_neo": {
        "activation_function": "gelu_new",
        "window_size": 256,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "tie_word_embeddings": True,
        **_NO_DROPOUT,
    },
    "gpt_neox": {
        "attention_bias": True,
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        **_NO_DROPOUT,
    },
    "gpt_oss": {
        **_SILU,
        "attention_bias": True,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
    },
    "gptj": {
        "activation_function": "gelu_new",
        "rotary_dim": 64,
        "tie_word_embeddings": False,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "granite": {**_GRANITE, "mlp_bias": False},
    "granitemoe": {**_GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "llama": {**_LLAMA_LIKE, "mlp_bias": False},
    "llama4_text": {
        **_LLAMA_LIKE,
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "no_rope_layer_interval": 4,
        "use_qk_norm": True,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
    },
    "mistral": {**_SILU, "num_key_value_heads": 8, "sliding_window": 4096},
    "mistral3": {
        "multimodal_projector_bias": False,
        "spatial_merge_size": 2,
        "tie_word_embeddings": True,
        "vision_feature_layer": -1,
    },
    "mixtral": {
        **_SILU,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "olmo": {**_LLAMA_LIKE, "clip_qkv": None},
    "olmo2": _LLAMA_LIKE,
    "olmoe": {
        **_LLAMA_LIKE,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "opt": {
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "dropout": 0.1,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "layerdrop": 0.0,
        "tie_word_embeddings": True,
        **_NO_DROPOUT,
    },
    "phi": {
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "tie_word_embeddings": False,
        **_NO_DROPOUT,
    },
    "phi3": {**_SILU, "partial_rotary_factor": 1.0, "resid_pdrop": 0.0, "sliding_window": None},
    "phimoe": {
        **_LLAMA_LIKE,
        "lm_head_bias": False,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2": {**_SILU, **_QWEN_WINDOW, "num_key_value_heads": 32},
    "qwen2_moe": {
        **_SILU,
        **_QWEN_WINDOW,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3": {**_LLAMA_LIKE, **_QWEN_WINDOW, "head_dim": 128, "num_key_value_heads": 32},
    "qwen3_moe": {
        **_LLAMA_LIKE,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
    },
    "smollm3": {
        **_LLAMA_LIKE,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "stablelm": {
        **_SILU,
        "hidden_dropout": 0.0,
        "num_key_value_heads": 32,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "use_qkv_bias": False,
    },
    "starcoder2": {
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_dropout": 0.0,
        "num_key_value_heads": 2,
        "residual_dropout": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_bias": True,
        **_NO_DROPOUT,
    },
}
