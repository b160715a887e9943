"""Readers for Gemma's text models: norms around both blocks, windows, scaled embeddings."""

from __future__ import annotations

from typing import Any

from ftplan.planner.families.blocks import (
    AROUND_BLOCKS,
    Reader,
    decoder,
    equal_layers,
    gated,
    gemma_rms,
    layers_of_kinds,
    placed,
    separate_attention,
    window,
)
from ftplan.planner.families.fields import (
    Config,
    FieldError,
    count,
    flag,
    layer_types,
    number,
    text,
)
from ftplan.planner.model_spec import Layer, ModelSpec


def gemma(config: Config, name: str) -> ModelSpec:
    bias = flag(config, "attention_bias")
    # The first releases say `gelu` and mean its approximation, which transformers puts there.
    said = text(config, "hidden_act")
    config = {**config, "hidden_act": "gelu_pytorch_tanh" if said == "gelu" else said}
    layer = Layer(
        attention=separate_attention(config, input_bias=bias, output_bias=bias),
        feed_forward=gated(config),
        **placed(config, norm=gemma_rms),
    )
    return _gemma_decoder(config, name, "GemmaForCausalLM", equal_layers(config, layer))


def gemma2(config: Config, name: str) -> ModelSpec:
    kinds = layer_types(
        config, lambda index: "full_attention" if index % 2 else "sliding_attention"
    )
    layers = _gemma_layers(config, kinds)
    return _gemma_decoder(
        config,
        name,
        "Gemma2ForCausalLM",
        layers,
        supports_sdpa=False,
        final_logit_softcapping=_is_softcapped(config, "final_logit_softcapping"),
    )


def gemma3_text(config: Config, name: str) -> ModelSpec:
    if flag(config, "use_bidirectional_attention"):
        raise FieldError("has `use_bidirectional_attention`: an encoder, not a language model")
    pattern = count({"sliding_window_pattern": 6, **config}, "sliding_window_pattern")
    kinds = layer_types(
        config, lambda index: "sliding_attention" if (index + 1) % pattern else "full_attention"
    )
    return _gemma_decoder(
        config,
        name,
        "Gemma3ForCausalLM",
        _gemma_layers(config, kinds, norm=gemma_rms),
        rotates_by_kind=True,
        final_logit_softcapping=_is_softcapped(config, "final_logit_softcapping"),
    )


def _gemma_layers(config: Config, kinds: list[str], **more: Any) -> tuple[Layer, ...]:
    """Layers with norms around both blocks; `more`: further arguments of the attention."""
    bias = flag(config, "attention_bias")

    def build(kind: str) -> Layer:
        attention = separate_attention(
            config,
            input_bias=bias,
            output_bias=bias,
            softcapped=_is_softcapped(config, "attn_logit_softcapping"),
            sliding_window=window(config, kind),
            **more,
        )
        return Layer(
            attention=attention,
            feed_forward=gated(config, activation="hidden_activation"),
            **placed(config, AROUND_BLOCKS, gemma_rms),
        )

    return layers_of_kinds(kinds, build)


def _is_softcapped(config: Config, field: str) -> bool:
    return config[field] is not None and number(config, field) > 0


def _gemma_decoder(
    config: Config, name: str, default_class: str, layers: tuple[Layer, ...], **more: Any
) -> ModelSpec:
    final_norm = gemma_rms("norm", count(config, "hidden_size"))
    return decoder(
        config,
        name,
        default_class,
        layers,
        final_norm=final_norm,
        scales_embeddings=True,
        **more,
    )


GEMMA: dict[str, Reader] = {"gemma": gemma, "gemma2": gemma2, "gemma3_text": gemma3_text}
