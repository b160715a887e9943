"""Model specifications from `config.json`, one reader for each family of architectures.

Input is the mapping that the Hub's `config.json` holds, under Hugging Face's field names.
Counts that follow from it are compared with transformers' own in `tests/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.model_spec import (
    Attention,
    Experts,
    FeedForward,
    Layer,
    Linear,
    ModelSpec,
    Norm,
)
from ftplan.planner.units import format_count, resolve_dtype

Config = Mapping[str, Any]


def spec_from_config(config: Config, name: str) -> ModelSpec:
    """The specification of the model that `config` (a parsed `config.json`) describes.

    Raises InputError when fields are missing or of the wrong type, UnknownNameError when
    the family is not known.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"model `{name}`: config.json does not hold an object")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(
            f"model `{name}`: config.json has no `model_type`",
            "is this the folder of a transformers model?",
        )
    if config.get("is_encoder_decoder"):
        raise InputError(
            f"model `{name}` (`{model_type}`) is an encoder-decoder",
            "ftplan plans decoder-only language models",
        )
    reader = FAMILIES.get(model_type)
    if reader is None:
        raise UnknownNameError("architecture", model_type, FAMILIES)
    try:
        return reader(config, name)
    except _FieldError as error:
        raise InputError(f"model `{name}`: config.json {error}") from None


def stand_in_spec(config: Config, name: str) -> ModelSpec:
    """A Llama-shaped decoder in the place of an architecture that the closed form does not know.

    It serves the settings of a plan that is then run dry; its counts are no one's. Raises
    InputError where not even width, depth, heads and vocabulary are said.
    """
    said = config.get("text_config", config)
    model_type = str(config.get("model_type"))
    try:
        shape = {
            field: next(_count(said, other) for other in (field, *others) if other in said)
            for field, others in _OTHER_NAMES.items()
        }
    except (StopIteration, _FieldError):
        raise InputError(
            f"model `{name}`: ftplan does not know `{model_type}`, nor does its config.json say "
            + ", ".join(f"`{field}`" for field in _OTHER_NAMES)
        ) from None
    shape["intermediate_size"] = 4 * shape["hidden_size"]
    heads = shape["num_attention_heads"]
    shape["head_dim"] = max(1, shape["hidden_size"] // heads)
    shape["max_position_embeddings"] = int(said.get("max_position_embeddings") or 2048)
    return dataclasses.replace(
        _llama({**shape, "model_type": model_type}, name),
        architecture=_architecture(config, model_type),
        native_dtype=_dtype(said),
    )


# What architectures call the fields that every one has.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "vocab_size": ("padded_vocab_size",),
}


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
    scaled = [spec for anchor in SIZE_ANCHORS for spec in _scaled(anchor, num_parameters, name)]

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
) -> list[ModelSpec]:
    """The anchor scaled in width to the wanted count, in several depths around the scaled one."""
    layers, hidden, intermediate, heads, kv_heads, vocab = anchor
    unscaled = _llama_shape(name, *anchor)
    factor = (num_parameters / unscaled.num_parameters) ** (1 / 3)
    head_dim, groups = hidden // heads, heads // kv_heads
    scaled_kv_heads = max(1, round(kv_heads * factor))
    scaled_heads = scaled_kv_heads * groups
    scaled_hidden = scaled_heads * head_dim
    scaled_intermediate = max(64, round(intermediate / hidden * scaled_hidden / 64) * 64)
    depth = max(3, round(layers * factor))
    return [
        _llama_shape(
            name, d, scaled_hidden, scaled_intermediate, scaled_heads, scaled_kv_heads, vocab
        )
        for d in range(depth - depth // 3, depth + depth // 3 + 1)
    ]


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
    return _llama(
        config,
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


class _FieldError(ValueError):
    """What is wrong with a field of a config.json, without the model's name."""


def _count(config: Config, field: str) -> int:
    """A field that counts something: a whole number of at least 1."""
    if field not in config:
        raise _FieldError(f"is incomplete: no `{field}`")
    value = config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _FieldError(f"has `{field}`: {value!r}, where a whole number from 1 up is needed")
    return value


def _optional_count(config: Config, field: str, default: int) -> int:
    """The same for a field that may be missing or null."""
    return default if config.get(field) is None else _count(config, field)


def _dtype(config: Config) -> str:
    dtype = config.get("torch_dtype") or config.get("dtype")
    return resolve_dtype(dtype) if isinstance(dtype, str) else "float32"


def _architecture(config: Config, default: str) -> str:
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else default


def _head_dim(config: Config, class_default: int | None) -> int:
    """`head_dim`; left out, what the configuration class has, or else the width over the heads."""
    if class_default is not None and "head_dim" not in config:
        return class_default
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    if heads > hidden:
        raise _FieldError(f"has `num_attention_heads`: {heads}, more than `hidden_size`: {hidden}")
    return _optional_count(config, "head_dim", hidden // heads)


def _key_value_heads(config: Config, class_default: int | None) -> int:
    """`num_key_value_heads`; left out, what the configuration class has; null: every head."""
    heads = _count(config, "num_attention_heads")
    if class_default is not None and "num_key_value_heads" not in config:
        kv_heads = class_default
    else:
        kv_heads = _optional_count(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise _FieldError(
            f"has `num_key_value_heads`: {kv_heads}, which does not divide the {heads} heads of "
            "`num_attention_heads`"
        )
    return kv_heads


def _rms(name: str, width: int, **more: bool) -> Norm:
    return Norm(name=name, width=width, **more)


def _layer_norm(name: str, width: int, *, bias: bool = True) -> Norm:
    return Norm(name=name, width=width, kind="layer", bias=bias)


def _gemma_norm(name: str, width: int) -> Norm:
    return _rms(name, width, scales_in_float32=True, offset=True)


_BEFORE_BLOCKS = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
_AROUND_BLOCKS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "post_feed_forward_norm": "post_feedforward_layernorm",
}


def _separate_attention(
    config: Config,
    *,
    input_bias: bool,
    output_bias: bool,
    output_name: str = "o_proj",
    head_norms: bool = False,
    default_head_dim: int | None = None,
    default_key_value_heads: int | None = None,
    **more: Any,
) -> Attention:
    """Attention with `q_proj`, `k_proj`, `v_proj` and an output projection.

    The defaults are those of transformers' configuration class (5.23) for fields left out.
    `more`: further fields of Attention.
    """
    hidden, head_dim = _count(config, "hidden_size"), _head_dim(config, default_head_dim)
    heads = _count(config, "num_attention_heads")
    kv_heads = _key_value_heads(config, default_key_value_heads)
    query, key_value = heads * head_dim, kv_heads * head_dim
    return Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        inputs=(
            Linear(name="q_proj", in_features=hidden, out_features=query, bias=input_bias),
            Linear(name="k_proj", in_features=hidden, out_features=key_value, bias=input_bias),
            Linear(name="v_proj", in_features=hidden, out_features=key_value, bias=input_bias),
        ),
        output=Linear(name=output_name, in_features=query, out_features=hidden, bias=output_bias),
        query_norm=_rms("q_norm", head_dim) if head_norms else None,
        key_norm=_rms("k_norm", head_dim) if head_norms else None,
        **{"rotary_dim": head_dim, **more},
    )


def _gated(config: Config, *, bias: bool = False, activation: str = "silu") -> FeedForward:
    hidden, intermediate = _count(config, "hidden_size"), _count(config, "intermediate_size")
    return FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(
            Linear(name="gate_proj", in_features=hidden, out_features=intermediate, bias=bias),
            Linear(name="up_proj", in_features=hidden, out_features=intermediate, bias=bias),
        ),
        output=Linear(name="down_proj", in_features=intermediate, out_features=hidden, bias=bias),
        activation=activation,
    )


def _mixture(config: Config, intermediate_field: str, experts_field: str) -> FeedForward:
    """Stacked gated experts (`gate_up_proj`, `down_proj` parameters) behind a router."""
    hidden, intermediate = _count(config, "hidden_size"), _count(config, intermediate_field)
    num_experts = _count(config, experts_field)
    return FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(Linear(name="gate_up_proj", in_features=hidden, out_features=2 * intermediate),),
        output=Linear(name="down_proj", in_features=intermediate, out_features=hidden),
        experts=Experts(
            num_experts=num_experts,
            num_experts_per_token=_count(config, "num_experts_per_tok"),
            router=Linear(name="gate", in_features=hidden, out_features=num_experts),
        ),
    )


def _plain(hidden: int, intermediate: int, names: tuple[str, str], activation: str) -> FeedForward:
    return FeedForward(
        intermediate_size=intermediate,
        gated=False,
        inputs=(Linear(name=names[0], in_features=hidden, out_features=intermediate, bias=True),),
        output=Linear(name=names[1], in_features=intermediate, out_features=hidden, bias=True),
        activation=activation,
    )


def _decoder(
    config: Config,
    name: str,
    architecture: str,
    layers: tuple[Layer, ...],
    *,
    tied_by_default: bool = False,
    **more: Any,
) -> ModelSpec:
    """The fields that most families share under the same names; `more`: further ones."""
    hidden = _count(config, "hidden_size")
    return ModelSpec(
        **{
            "name": name,
            "architecture": _architecture(config, architecture),
            "model_type": str(config["model_type"]),
            "hidden_size": hidden,
            "vocab_size": _count(config, "vocab_size"),
            "max_position_embeddings": _count(config, "max_position_embeddings"),
            "layers": layers,
            "final_norm": _rms("norm", hidden),
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", tied_by_default)),
            "native_dtype": _dtype(config),
            **more,
        }
    )


def _equal_layers(
    config: Config,
    attention: Attention,
    feed_forward: FeedForward,
    *,
    norms: Mapping[str, str] = _BEFORE_BLOCKS,
    norm: Callable[[str, int], Norm] = _rms,
    **more: bool,
) -> tuple[Layer, ...]:
    """`num_hidden_layers` times the same layer; `norms`: the name of each of its norms."""
    hidden = _count(config, "hidden_size")
    placed = {place: norm(name, hidden) for place, name in norms.items()}
    layer = Layer(attention=attention, feed_forward=feed_forward, **placed, **more)
    return (layer,) * _count(config, "num_hidden_layers")


def _llama(config: Config, name: str, approximate: str | None = None) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    attention = _separate_attention(config, input_bias=bias, output_bias=bias)
    feed_forward = _gated(config, bias=bool(config.get("mlp_bias", False)))
    layers = _equal_layers(config, attention, feed_forward)
    return _decoder(config, name, "LlamaForCausalLM", layers, approximate=approximate)


def _mistral(config: Config, name: str) -> ModelSpec:
    attention = _separate_attention(
        config, input_bias=False, output_bias=False, default_key_value_heads=8
    )
    layers = _equal_layers(config, attention, _gated(config))
    return _decoder(config, name, "MistralForCausalLM", layers)


def _qwen2(config: Config, name: str) -> ModelSpec:
    attention = _separate_attention(
        config, input_bias=True, output_bias=False, default_key_value_heads=32
    )
    layers = _equal_layers(config, attention, _gated(config))
    return _decoder(config, name, "Qwen2ForCausalLM", layers)


def _qwen3(config: Config, name: str) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    attention = _separate_attention(
        config,
        input_bias=bias,
        output_bias=bias,
        head_norms=True,
        default_head_dim=128,
        default_key_value_heads=32,
    )
    layers = _equal_layers(config, attention, _gated(config))
    return _decoder(config, name, "Qwen3ForCausalLM", layers)


def _qwen3_moe(config: Config, name: str) -> ModelSpec:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise InputError(f"model `{name}`: dense layers among the expert layers are not modelled")
    bias = bool(config.get("attention_bias", False))
    attention = _separate_attention(
        config,
        input_bias=bias,
        output_bias=bias,
        head_norms=True,
        default_key_value_heads=4,
    )
    experts = _mixture(config, "moe_intermediate_size", "num_experts")
    layers = _equal_layers(config, attention, experts)
    return _decoder(config, name, "Qwen3MoeForCausalLM", layers)


def _mixtral(config: Config, name: str) -> ModelSpec:
    attention = _separate_attention(
        config, input_bias=False, output_bias=False, default_key_value_heads=8
    )
    experts = _mixture(config, "intermediate_size", "num_local_experts")
    layers = _equal_layers(config, attention, experts)
    return _decoder(config, name, "MixtralForCausalLM", layers)


def _gemma2(config: Config, name: str) -> ModelSpec:
    bias = bool(config.get("attention_bias", False))
    attention = _separate_attention(
        config,
        input_bias=bias,
        output_bias=bias,
        default_head_dim=256,
        default_key_value_heads=4,
        softcapped=config.get("attn_logit_softcapping", 50.0) is not None,
    )
    hidden = _count(config, "hidden_size")
    feed_forward = _gated(config, activation="gelu_pytorch_tanh")
    layers = _equal_layers(config, attention, feed_forward, norms=_AROUND_BLOCKS, norm=_gemma_norm)
    return _decoder(
        config,
        name,
        "Gemma2ForCausalLM",
        layers,
        tied_by_default=True,
        final_norm=_gemma_norm("norm", hidden),
        scales_embeddings=True,
        supports_sdpa=False,
        final_logit_softcapping=config.get("final_logit_softcapping", 30.0) is not None,
    )


def _phi3(config: Config, name: str) -> ModelSpec:
    hidden, intermediate = _count(config, "hidden_size"), _count(config, "intermediate_size")
    heads, head_dim = _count(config, "num_attention_heads"), _head_dim(config, None)
    kv_heads = _key_value_heads(config, None)
    fused_width = (heads + 2 * kv_heads) * head_dim
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        inputs=(Linear(name="qkv_proj", in_features=hidden, out_features=fused_width),),
        output=Linear(name="o_proj", in_features=heads * head_dim, out_features=hidden),
        rotary_dim=int(head_dim * (config.get("partial_rotary_factor") or 1.0)),
        rotary_concatenates=True,
    )
    feed_forward = FeedForward(
        intermediate_size=intermediate,
        gated=True,
        inputs=(Linear(name="gate_up_proj", in_features=hidden, out_features=2 * intermediate),),
        output=Linear(name="down_proj", in_features=intermediate, out_features=hidden),
    )
    layers = _equal_layers(config, attention, feed_forward)
    return _decoder(config, name, "Phi3ForCausalLM", layers)


def _phi(config: Config, name: str) -> ModelSpec:
    if config.get("qk_layernorm"):
        raise InputError(f"model `{name}`: `qk_layernorm` is not modelled for phi")
    hidden, head_dim = _count(config, "hidden_size"), _head_dim(config, None)
    attention = _separate_attention(
        config,
        input_bias=True,
        output_bias=True,
        output_name="dense",
        rotary_dim=int(head_dim * (config.get("partial_rotary_factor") or 0.5)),
        rotary_concatenates=True,
    )
    intermediate = _count(config, "intermediate_size")
    feed_forward = _plain(hidden, intermediate, ("fc1", "fc2"), "gelu_new")
    layers = _equal_layers(
        config,
        attention,
        feed_forward,
        norms={"attention_norm": "input_layernorm"},
        norm=_layer_norm,
        parallel=True,
    )
    return _decoder(
        config,
        name,
        "PhiForCausalLM",
        layers,
        final_norm=_layer_norm("final_layernorm", hidden),
        lm_head_bias=True,
    )


def _gpt2(config: Config, name: str) -> ModelSpec:
    hidden, heads = _count(config, "n_embd"), _count(config, "n_head")
    positions = _count(config, "n_positions")
    intermediate = _optional_count(config, "n_inner", 4 * hidden)
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        inputs=(Linear(name="c_attn", in_features=hidden, out_features=3 * hidden, bias=True),),
        output=Linear(name="c_proj", in_features=hidden, out_features=hidden, bias=True),
    )
    layer = Layer(
        attention=attention,
        feed_forward=_plain(hidden, intermediate, ("c_fc", "c_proj"), "gelu_new"),
        attention_norm=_layer_norm("ln_1", hidden),
        feed_forward_norm=_layer_norm("ln_2", hidden),
    )
    return ModelSpec(
        name=name,
        architecture=_architecture(config, "GPT2LMHeadModel"),
        model_type="gpt2",
        hidden_size=hidden,
        vocab_size=_count(config, "vocab_size"),
        max_position_embeddings=positions,
        layers=(layer,) * _count(config, "n_layer"),
        final_norm=_layer_norm("ln_f", hidden),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", True)),
        positions=positions,
        native_dtype=_dtype(config),
    )


FAMILIES: dict[str, Callable[[Config, str], ModelSpec]] = {
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}
