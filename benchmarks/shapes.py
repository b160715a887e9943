"""Models that nobody released: random `config.json`s of each family of architectures.

A formula that fits the released shapes only, where widths are powers of two and heads fill the
width, is found out on these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from msgspec import Struct

Config = dict[str, Any]

_VOCABULARIES = (32000, 49152, 50257, 65024, 100352, 128256, 151936, 256000)
_POSITIONS = (2048, 4096, 8192, 32768, 131072)
_HEAD_DIMS = (64, 80, 96, 128, 256)
# The classes' own ids may lie outside a drawn vocabulary.
_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# GPT-2's names of the fields that all have.
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


class Family(Struct, frozen=True, kw_only=True):
    """What a draw needs to know of an architecture, by transformers' names.

    `shape`: a random `config.json`, without `model_type`. `attention`: the attention's linear
    modules; `embeddings`: the module of the tokens'. `attentions`: the kernels that transformers
    has for it.
    """

    shape: Callable[[Random], Config]
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    embeddings: str = "embed_tokens"
    attentions: tuple[str, ...] = ("eager", "sdpa", "flash_attention_2")


def random_config(model_type: str, rng: Random) -> Config:
    """A `config.json` of the family, from a few million parameters to some ten billion."""
    return {"model_type": model_type, **FAMILIES[model_type].shape(rng), **_NO_IDS}


def _spread(rng: Random, low: int, high: int, step: int = 1) -> int:
    """A multiple of `step`, as often between 1 and 2 times a size as between 2 and 4 times."""
    value = math.exp(rng.uniform(math.log(low), math.log(high)))
    return max(step, round(value / step) * step)


def _widths(rng: Random) -> Config:
    """Width, heads and depth. The heads fill the width."""
    head_dim = rng.choice(_HEAD_DIMS)
    heads = max(2, _spread(rng, 256, 6144) // head_dim)
    hidden = heads * head_dim
    return {
        "hidden_size": hidden,
        "intermediate_size": _spread(rng, round(1.5 * hidden), 5 * hidden, 32),
        "num_hidden_layers": _spread(rng, 4, 48),
        "num_attention_heads": heads,
        "vocab_size": rng.choice((*_VOCABULARIES, rng.randrange(5_000, 260_000))),
        "max_position_embeddings": rng.choice(_POSITIONS),
        "tie_word_embeddings": rng.random() < 0.4,
    }


def _groups(rng: Random, heads: int) -> int:
    """Key-value heads: any number that divides the heads."""
    return rng.choice([n for n in range(1, heads + 1) if heads % n == 0])


def _grouped(rng: Random) -> Config:
    shape = _widths(rng)
    return {**shape, "num_key_value_heads": _groups(rng, shape["num_attention_heads"])}


def _free_heads(rng: Random) -> Config:
    """As `_grouped`, with heads that need not fill the width. transformers wants it to be a
    multiple of their number all the same."""
    shape = _grouped(rng)
    return {**shape, "head_dim": rng.choice(_HEAD_DIMS)}


def _with(
    shape: Callable[[Random], Config], **options: Callable[[Random], Any]
) -> Callable[[Random], Config]:
    """A shape with further fields, each drawn."""
    return lambda rng: {**shape(rng), **{name: value(rng) for name, value in options.items()}}


def _coin(rng: Random) -> bool:
    return rng.random() < 0.5


def _window(rng: Random) -> int:
    return rng.choice((128, 512, 1024, 4096))


def _experts(field: str, width_field: str) -> Callable[[Random], Config]:
    """Grouped heads and a mixture whose experts' number and width have these names."""

    def shape(rng: Random) -> Config:
        experts = rng.choice((4, 8, 16, 64))
        return {
            **_free_heads(rng),
            width_field: _spread(rng, 128, 4096, 32),
            field: experts,
            "num_experts_per_tok": rng.choice((1, 2, 4)),
        }

    return shape


def _latent(rng: Random) -> Config:
    """DeepSeek's latent projections, shared experts and dense first layers."""
    shape = _experts("n_routed_experts", "moe_intermediate_size")(rng)
    del shape["head_dim"]
    rotated = rng.choice((32, 64))
    return {
        **shape,
        "num_key_value_heads": shape["num_attention_heads"],
        "n_shared_experts": rng.choice((1, 2)),
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": rng.choice((1, 3)),
        "q_lora_rank": rng.choice((None, 512, 1536)),
        "kv_lora_rank": rng.choice((256, 512)),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": 2 * rotated,
        "v_head_dim": rng.choice((64, 128)),
    }


def _falcon(rng: Random) -> Config:
    shape = _widths(rng)
    del shape["intermediate_size"]
    return {
        **shape,
        "multi_query": rng.random() < 0.7,
        "parallel_attn": _coin(rng),
        "bias": _coin(rng),
    }


def _renamed(shape: Callable[[Random], Config], names: Mapping[str, str]) -> Any:
    return lambda rng: {names.get(name, name): value for name, value in shape(rng).items()}


_FUSED = ("query_key_value", "dense")
_QK_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family(shape=_with(_free_heads, attention_bias=_coin, mlp_bias=_coin)),
    "mistral": Family(shape=_with(_free_heads, sliding_window=_window)),
    "qwen2": Family(shape=_grouped),
    "qwen3": Family(shape=_with(_free_heads, attention_bias=_coin)),
    "gemma": Family(shape=_free_heads),
    "gemma2": Family(
        shape=_with(_free_heads, sliding_window=_window),
        attentions=("eager", "flash_attention_2"),
    ),
    "gemma3_text": Family(shape=_with(_free_heads, sliding_window=_window)),
    "phi": Family(shape=_grouped, attention=("q_proj", "k_proj", "v_proj", "dense")),
    "phi3": Family(shape=_grouped, attention=("qkv_proj", "o_proj")),
    "olmo2": Family(shape=_grouped),
    "smollm3": Family(shape=_grouped),
    "stablelm": Family(
        shape=_with(_grouped, use_qkv_bias=_coin, qk_layernorm=_coin, use_parallel_residual=_coin)
    ),
    "granite": Family(shape=_grouped),
    "glm": Family(shape=_free_heads),
    "glm4": Family(shape=_free_heads),
    "starcoder2": Family(shape=_grouped),
    "gpt2": Family(
        shape=_renamed(_widths, _GPT2_NAMES), attention=("c_attn", "c_proj"), embeddings="wte"
    ),
    "gpt_bigcode": Family(
        shape=_with(_renamed(_widths, _GPT2_NAMES), multi_query=_coin),
        attention=("c_attn", "c_proj"),
        embeddings="wte",
    ),
    "opt": Family(
        shape=_renamed(_widths, {"intermediate_size": "ffn_dim"}),
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    ),
    "bloom": Family(
        shape=_renamed(_widths, {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}),
        attention=_FUSED,
        embeddings="word_embeddings",
        attentions=("eager",),
    ),
    "gpt_neox": Family(
        shape=_with(_widths, use_parallel_residual=_coin),
        attention=_FUSED,
        embeddings="embed_in",
    ),
    "falcon": Family(shape=_falcon, attention=_FUSED, embeddings="word_embeddings"),
    "mixtral": Family(shape=_experts("num_local_experts", "intermediate_size")),
    "qwen3_moe": Family(shape=_experts("num_experts", "moe_intermediate_size")),
    "qwen2_moe": Family(
        shape=_with(
            _experts("num_experts", "moe_intermediate_size"),
            shared_expert_intermediate_size=lambda rng: _spread(rng, 256, 8192, 32),
        )
    ),
    "deepseek_v2": Family(shape=_latent, attention=_QK_LATENT),
    "deepseek_v3": Family(shape=_latent, attention=_QK_LATENT),
    "llama4_text": Family(
        shape=_with(
            _experts("num_local_experts", "intermediate_size"),
            intermediate_size_mlp=lambda rng: _spread(rng, 512, 8192, 32),
            interleave_moe_layer_step=lambda rng: rng.choice((1, 2)),
        ),
        attentions=("eager", "sdpa"),
    ),
    "gpt_oss": Family(
        shape=_with(_experts("num_local_experts", "intermediate_size"), sliding_window=_window),
        attentions=("eager", "flash_attention_2"),
    ),
}
