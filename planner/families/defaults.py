"""What a field means that a `config.json` leaves out or calls differently.

Both tables follow transformers' configuration classes (5.23); `tests/` compares them.
"""

from __future__ import annotations

from typing import Any

from ftplan.planner.families.fields import Config


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
