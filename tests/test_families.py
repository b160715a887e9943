"""Model shapes from `config.json` and from a bare size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import (
    FAMILIES,
    MIN_SIZE_PARAMETERS,
    SIZE_ANCHORS,
    spec_from_config,
    spec_from_size,
)
from ftplan.planner.model_spec import ModelSpec

MakeConfig = Callable[..., dict[str, Any]]
MakeSpec = Callable[..., ModelSpec]


def transformers_count(config: dict[str, Any]) -> int:
    """Parameters of the model that transformers builds from `config`, tied ones once."""
    torch = pytest.importorskip("torch", reason="counts come from torch modules")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )
    return sum(parameter.numel() for parameter in model.parameters())


# --- bare sizes


@given(st.integers(min_value=MIN_SIZE_PARAMETERS, max_value=2 * 10**12))
def test_a_size_is_met_within_five_percent(num_parameters: int) -> None:
    """From 105M up; below, where embeddings weigh much, within 15 %."""
    count = spec_from_size(num_parameters, "x").num_parameters
    tolerance = 0.05 if num_parameters >= 105_000_000 else 0.15
    assert count == pytest.approx(num_parameters, rel=tolerance)


@pytest.mark.parametrize(
    ("size", "num_parameters"),
    [
        (7_000_000_000, 6_738_415_616),  # Llama-2-7B
        (8_000_000_000, 8_030_261_248),  # Llama-3.1-8B
        (13_000_000_000, 13_015_864_320),  # Llama-2-13B
        (70_000_000_000, 68_976_648_192),  # Llama-2-70B
    ],
)
def test_sizes_people_say_mean_the_released_models(size: int, num_parameters: int) -> None:
    assert spec_from_size(size, "x").num_parameters == num_parameters


@given(st.integers(min_value=MIN_SIZE_PARAMETERS, max_value=10**12))
def test_a_stand_in_is_a_possible_model_and_says_what_it_is(num_parameters: int) -> None:
    spec = spec_from_size(num_parameters, "x")
    assert spec.approximate
    assert f"{spec.num_hidden_layers} layers of width {spec.hidden_size}" in spec.approximate
    assert spec.attention.num_heads % spec.attention.num_key_value_heads == 0
    assert spec.attention.query_width == spec.hidden_size


def test_every_anchor_is_taken_as_it_is() -> None:
    for anchor in SIZE_ANCHORS:
        layers, hidden, *_ = anchor
        exact = FAMILIES["llama"](
            {
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": anchor[2],
                "num_hidden_layers": layers,
                "num_attention_heads": anchor[3],
                "num_key_value_heads": anchor[4],
                "vocab_size": anchor[5],
                "max_position_embeddings": 4096,
            },
            "anchor",
        )
        found = spec_from_size(exact.num_parameters, "x")
        assert (found.num_hidden_layers, found.hidden_size) == (layers, hidden)


@pytest.mark.parametrize("size", [0, 1, MIN_SIZE_PARAMETERS - 1])
def test_a_size_too_small_to_stand_for_a_model_is_refused(size: int) -> None:
    with pytest.raises(InputError, match="too small"):
        spec_from_size(size, "x")


# --- config.json


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_count_is_what_transformers_builds(family: str, tiny_config: MakeConfig) -> None:
    config = tiny_config(family)
    assert spec_from_config(config, "tiny").num_parameters == transformers_count(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tied_embeddings_count_once(family: str, tied: bool, tiny_config: MakeConfig) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    assert spec_from_config(config, "tiny").num_parameters == transformers_count(config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"head_dim": 40}),
        ("mistral", {"head_dim": 40}),
        ("mistral", {"sliding_window": 16}),
        ("mixtral", {"num_local_experts": 3}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3_moe", {"attention_bias": True}),
        ("gemma2", {"attention_bias": True}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("phi3", {"num_key_value_heads": 4}),
        ("gpt2", {"n_inner": 80}),
    ],
)
def test_variants_count_as_transformers_builds_them(
    family: str, changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    config = tiny_config(family, **changes)
    assert spec_from_config(config, "tiny").num_parameters == transformers_count(config)


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("llama", "num_key_value_heads"),
        ("phi", "num_key_value_heads"),
        ("phi3", "num_key_value_heads"),
        ("mistral", "num_key_value_heads"),
        ("mixtral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
        ("qwen3", "head_dim"),
        ("gemma2", "head_dim"),
    ],
)
def test_a_field_left_out_has_the_default_that_transformers_gives_it(
    family: str, field: str, tiny_config: MakeConfig
) -> None:
    config = tiny_config(family)
    del config[field]
    try:
        spec = spec_from_config(config, "tiny")
    except InputError as refused:
        assert field in refused.message  # as good: not counted rather than miscounted
    else:
        assert spec.num_parameters == transformers_count(config)


def test_parts_sum_to_the_whole(tiny_spec: MakeSpec) -> None:
    """64-wide Llama, 3 layers, 4 query and 2 key-value heads of 16, by hand."""
    spec = tiny_spec("llama")
    assert spec.embedding_parameters == 128 * 64
    assert sum(m.num_parameters for m in spec.attention.linears) == 2 * 64 * 64 + 2 * 64 * 32
    assert spec.layer_parameters == 12_288 + 3 * 64 * 96 + 2 * 64
    assert spec.num_parameters == 2 * 128 * 64 + 3 * spec.layer_parameters + 64
    assert spec.quantizable_weights == 3 * (12_288 + 3 * 64 * 96)


def test_a_token_passes_only_its_experts(tiny_spec: MakeSpec) -> None:
    """4 experts of 3 x 64 x 96 weights, 2 a token, and a router of 4 x 64."""
    spec = tiny_spec("mixtral")
    assert spec.active_layer_weights == 12_288 + 2 * 3 * 64 * 96 + 4 * 64
    assert spec.layer_matrix_parameters == 12_288 + 4 * 3 * 64 * 96
    assert {m.name for m in spec.layer_linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}


# --- configs that cannot be used


def test_an_unknown_architecture_is_told_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="`llama5`") as refused:
        spec_from_config({"model_type": "llama5"}, "x")
    assert "`llama`" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no `model_type`"),
        ({"model_type": 7}, "no `model_type`"),
        ([], "does not hold an object"),
        ("text", "does not hold an object"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_what_is_no_decoder_config_is_refused(config: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec_from_config(config, "x")


def test_what_is_not_modelled_is_refused_not_guessed(tiny_config: MakeConfig) -> None:
    with pytest.raises(InputError, match="qk_layernorm"):
        spec_from_config(tiny_config("phi", qk_layernorm=True), "x")
    with pytest.raises(InputError, match="dense layers"):
        spec_from_config(tiny_config("qwen3_moe", mlp_only_layers=[0]), "x")
    with pytest.raises(InputError, match="dense layers"):
        spec_from_config(tiny_config("qwen3_moe", decoder_sparse_step=2), "x")


REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str, tiny_config: MakeConfig) -> None:
    config = tiny_config("llama")
    del config[field]
    with pytest.raises(InputError, match=f"incomplete: no `{field}`"):
        spec_from_config(config, "x")


@pytest.mark.parametrize(
    "value", [None, "wide", 0, -4, math.nan, math.inf, [64], {"value": 64}], ids=repr
)
@pytest.mark.parametrize("field", REQUIRED)
def test_a_field_that_is_no_positive_number_is_refused(
    field: str, value: Any, tiny_config: MakeConfig
) -> None:
    with pytest.raises(InputError, match=f"`{field}`"):
        spec_from_config(tiny_config("llama", **{field: value}), "x")


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("gpt2", "n_embd"),
        ("gpt2", "n_inner"),
        ("llama", "head_dim"),
        ("llama", "num_key_value_heads"),
        ("mixtral", "num_local_experts"),
        ("qwen3_moe", "num_experts_per_tok"),
        ("qwen3_moe", "moe_intermediate_size"),
    ],
)
def test_other_fields_that_are_no_count_are_named_too(
    family: str, field: str, tiny_config: MakeConfig
) -> None:
    with pytest.raises(InputError, match=f"`{field}`: 'wide'"):
        spec_from_config(tiny_config(family, **{field: "wide"}), "x")


def test_heads_that_do_not_divide_are_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(InputError, match="`num_key_value_heads`: 3"):
        spec_from_config(tiny_config("llama", num_key_value_heads=3), "x")
    with pytest.raises(InputError, match="`num_attention_heads`: 128"):
        spec_from_config(tiny_config("llama", num_attention_heads=128), "x")
