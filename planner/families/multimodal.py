"""Readers for models that see images too: a decoder, and a vision tower that text never enters.

They describe what transformers 5 builds for training on text: Gemma 3 and Mistral Small 3.1 come
whole; of Llama 4, AutoModelForCausalLM builds the text model alone.
"""

from __future__ import annotations

from typing import Any

from msgspec import structs

from ftplan.planner.families.blocks import Reader
from ftplan.planner.families.defaults import with_defaults
from ftplan.planner.families.fields import (
    Config,
    FieldError,
    architecture,
    count,
    flag,
    native_dtype,
    require,
    section,
    text,
)
from ftplan.planner.families.gemma import gemma3_text
from ftplan.planner.families.llama_like import mistral
from ftplan.planner.families.mixtures import llama4_text
from ftplan.planner.model_spec import Linear, ModelSpec, Parameter


def _text_config(config: Config, model_type: str) -> Config:
    """The decoder's configuration with its class's defaults."""
    said = section(config, "text_config")
    found = said.get("model_type", model_type)
    if found != model_type:
        raise FieldError(f"has a `text_config` of `{found}`, where `{model_type}` is modelled")
    return with_defaults({**said, "model_type": model_type})


def gemma3(config: Config, name: str) -> ModelSpec:
    vision = {**_SIGLIP_DEFAULTS, **section(config, "vision_config")}
    if flag(vision, "vision_use_head"):
        raise FieldError("has `vision_use_head` in `vision_config`, which no Gemma 3 has")
    decoder = gemma3_text(_text_config(config, "gemma3_text"), name)
    layers, hidden = count(vision, "num_hidden_layers"), count(vision, "hidden_size")
    projection = Parameter(name="mm_input_projection_weight", shape=(hidden, decoder.hidden_size))
    return structs.replace(
        _whole(config, decoder, "Gemma3ForConditionalGeneration"),
        other_linears=_siglip_linears(vision) * layers,
        other_parameters=(
            *_siglip_parameters(vision),
            projection,
            Parameter(name="mm_soft_emb_norm.weight", shape=(hidden,)),
        ),
    )


# transformers' SiglipVisionConfig.
_SIGLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "vision_use_head": True,
}


def _siglip_linears(vision: Config) -> tuple[Linear, ...]:
    """The linear modules of one layer of the vision tower."""
    hidden, intermediate = count(vision, "hidden_size"), count(vision, "intermediate_size")
    attention = tuple(
        Linear(name=name, in_features=hidden, out_features=hidden, bias=True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    )
    return (
        *attention,
        Linear(name="fc1", in_features=hidden, out_features=intermediate, bias=True),
        Linear(name="fc2", in_features=intermediate, out_features=hidden, bias=True),
    )


def _siglip_parameters(vision: Config) -> tuple[Parameter, ...]:
    """Norms, positions and patches of the vision tower."""
    hidden, patch = count(vision, "hidden_size"), count(vision, "patch_size")
    patches = (count(vision, "image_size") // patch) ** 2
    pixels = (count(vision, "num_channels"), patch, patch)
    layers = count(vision, "num_hidden_layers")
    norms = {"layer_norm1": layers, "layer_norm2": layers, "post_layernorm": 1}
    return (
        Parameter(name="patch_embedding.weight", shape=(hidden, *pixels)),
        Parameter(name="patch_embedding.bias", shape=(hidden,)),
        Parameter(name="position_embedding.weight", shape=(patches, hidden)),
        *(
            Parameter(name=f"{norm}.{part}", shape=(hidden,), count=copies)
            for norm, copies in norms.items()
            for part in ("weight", "bias")
        ),
    )


def mistral3(config: Config, name: str) -> ModelSpec:
    if not isinstance(require(config, "vision_feature_layer"), int):
        raise FieldError("has `vision_feature_layer`: a list, where one layer is modelled")
    vision = {**_PIXTRAL_DEFAULTS, **section(config, "vision_config")}
    decoder = mistral(_text_config(config, "mistral"), name)
    layers, hidden = count(vision, "num_hidden_layers"), count(vision, "hidden_size")
    merged = hidden * count(config, "spatial_merge_size") ** 2
    bias, width = flag(config, "multimodal_projector_bias"), decoder.hidden_size
    projector = (
        Linear(name="merging_layer", in_features=merged, out_features=hidden),
        Linear(name="linear_1", in_features=hidden, out_features=width, bias=bias),
        Linear(name="linear_2", in_features=width, out_features=width, bias=bias),
    )
    patch = count(vision, "patch_size")
    patches = (hidden, count(vision, "num_channels"), patch, patch)
    return structs.replace(
        _whole(config, decoder, "Mistral3ForConditionalGeneration"),
        auto_class="AutoModelForImageTextToText",
        other_linears=_pixtral_linears(vision) * layers + projector,
        other_parameters=(
            Parameter(name="patch_conv.weight", shape=patches),
            Parameter(name="ln_pre.weight", shape=(hidden,)),
            Parameter(name="attention_norm.weight", shape=(hidden,), count=layers),
            Parameter(name="ffn_norm.weight", shape=(hidden,), count=layers),
            Parameter(name="norm.weight", shape=(hidden,)),
        ),
    )


# transformers' PixtralVisionConfig.
_PIXTRAL_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_channels": 3,
    "patch_size": 16,
}


def _pixtral_linears(vision: Config) -> tuple[Linear, ...]:
    """The linear modules of one layer of the vision tower."""
    hidden, intermediate = count(vision, "hidden_size"), count(vision, "intermediate_size")
    attention = tuple(
        Linear(name=name, in_features=hidden, out_features=hidden)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    return (
        *attention,
        Linear(name="gate_proj", in_features=hidden, out_features=intermediate),
        Linear(name="up_proj", in_features=hidden, out_features=intermediate),
        Linear(name="down_proj", in_features=intermediate, out_features=hidden),
    )


def _whole(config: Config, decoder: ModelSpec, default_class: str) -> ModelSpec:
    """The decoder under the name and with the tying of the model around it."""
    return structs.replace(
        decoder,
        architecture=architecture(config, default_class),
        model_type=text(config, "model_type"),
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        native_dtype=_dtype_of_either(config),
        nests_config=True,
    )


def _dtype_of_either(config: Config) -> str:
    says = "torch_dtype" in config or "dtype" in config
    return native_dtype(config if says else section(config, "text_config"))


def llama4(config: Config, name: str) -> ModelSpec:
    decoder = llama4_text(_text_config(config, "llama4_text"), name)
    return structs.replace(
        decoder, architecture="Llama4ForCausalLM", native_dtype=_dtype_of_either(config)
    )


MULTIMODAL: dict[str, Reader] = {"gemma3": gemma3, "llama4": llama4, "mistral3": mistral3}
