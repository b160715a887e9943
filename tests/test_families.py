"""Model shapes from `config.json` and from a bare size."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import (
    FAMILIES,
    MIN_SIZE_PARAMETERS,
    SIZE_ANCHORS,
    spec_from_config,
    spec_from_size,
)
from ftplan.planner.families.defaults import CLASS_DEFAULTS, OTHER_NAMES
from ftplan.planner.families.remote import REMOTE
from ftplan.planner.model_spec import Layer, Linear, ModelSpec
from tests.meta_models import build, transformers_count

MakeConfig = Callable[..., dict[str, Any]]
MakeSpec = Callable[..., ModelSpec]


# --- bare sizes


@given(st.integers(min_value=MIN_SIZE_PARAMETERS, max_value=2 * 10**12))
def test_a_size_is_met_within_five_percent(num_parameters: int) -> None:
    """From 105M up; below, where embeddings weigh much, within 15 %."""
    count = spec_from_size(num_parameters, "x").num_parameters
    tolerance = 0.05 if num_parameters >= 105_000_000 else 0.15
    assert count == pytest.approx(num_parameters, rel=tolerance)


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """All that is read of a config; specifications themselves are equal to none but themselves."""
    spec = spec_from_config(config, "x")
    return {**structs.asdict(spec), "biased": spec.biased and structs.asdict(spec.biased)}


def same_facts(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return facts(one) == facts(other)


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
    attention = spec.layers[0].attention
    assert attention.num_heads % attention.num_key_value_heads == 0
    assert attention.query_width == spec.hidden_size


def test_every_anchor_is_taken_as_it_is() -> None:
    for anchor in SIZE_ANCHORS:
        layers, hidden, *_ = anchor
        exact = spec_from_config(
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


# --- config.json, against what transformers builds on the meta device

BUILT = sorted(set(FAMILIES) - set(REMOTE))
"""Families whose code transformers has."""


@cache
def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers: the list of modules in the language model that is longest."""
    import torch

    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and "vision" not in name and "norms" not in name
    ]
    return list(max(lists, key=len))


def shapes_of(parameters: Any) -> Counter[tuple[str, tuple[int, ...]]]:
    """Names from the last module on, without its number in a list, and shapes."""
    return Counter(
        (".".join(re.sub(r"\.\d+\b", "", name).split(".")[-2:]), tuple(parameter.shape))
        for name, parameter in parameters
    )


def expected_shapes(parameters: Any) -> Counter[tuple[str, tuple[int, ...]]]:
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for parameter in parameters:
        found[(parameter.name, parameter.shape)] += parameter.count
    return found


def without_container(shapes: Counter[tuple[str, Any]]) -> Counter[tuple[str, Any]]:
    """What is a parameter of a block (`experts.down_proj`) under its own name."""
    return Counter(
        {
            (name if name.endswith((".weight", ".bias")) else name.split(".")[-1], shape): times
            for (name, shape), times in shapes.items()
        }
    )


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in BUILT),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"head_dim": 40}),
    ("mistral", {"head_dim": 40}),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {"num_local_experts": 3}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("qwen2_moe", {"mlp_only_layers": [0, 2], "qkv_bias": False}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3_moe", {"attention_bias": True}),
    ("qwen3_moe", {"mlp_only_layers": [1]}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("gemma2", {"attention_bias": True}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 3}),
    ("glm", {"attention_bias": False}),
    ("stablelm", {"use_qkv_bias": True}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("cohere", {"use_qk_norm": True}),
    ("starcoder2", {"use_bias": False}),
    ("phi", {"qk_layernorm": True}),
    ("phi3", {"num_key_value_heads": 4}),
    ("phimoe", {"attention_bias": True, "lm_head_bias": True}),
    ("gpt2", {"n_inner": 80}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_bigcode", {"n_inner": 80}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True}),
    ("falcon", {"ffn_hidden_size": None}),
    ("deepseek_v2", {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v2", {"first_k_dense_replace": 0}),
    ("deepseek_v3", {"first_k_dense_replace": 3, "q_lora_rank": None}),
    ("llama4_text", {"moe_layers": [0], "use_qk_norm": False}),
    ("llama4_text", {"no_rope_layers": [1, 1, 0], "attention_bias": True}),
    ("gpt_oss", {"attention_bias": False}),
    ("mistral3", {"multimodal_projector_bias": True, "spatial_merge_size": 4}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_parameters_are_those_that_transformers_builds(
    family: str, changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    """Exact count; in each layer, every parameter's name and shape; outside, every shape."""
    config = tiny_config(family, **changes)
    model, spec = build(config), spec_from_config(config, "tiny")
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert spec.architecture == type(model).__name__
    layers = decoder_layers(model)
    assert len(layers) == len(spec.layers)
    inside: set[int] = set()
    for built, layer in zip(layers, spec.layers, strict=True):
        inside |= {id(parameter) for parameter in built.parameters()}
        found = without_container(shapes_of(built.named_parameters()))
        assert found == expected_shapes(layer.parameters())
    outside = Counter(tuple(p.shape) for p in model.parameters() if id(p) not in inside)
    expected: Counter[tuple[int, ...]] = Counter()
    for parameter in spec.outer_parameters:
        expected[parameter.shape] += parameter.count
    assert outside == expected


def by_shape(linears: Counter[Linear]) -> Counter[tuple[str, tuple[int, int], bool]]:
    found: Counter[tuple[str, tuple[int, int], bool]] = Counter()
    for linear, times in linears.items():
        found[(linear.name, linear.weight_shape, linear.bias)] += times
    return found


def described(name: str, module: Any) -> Linear:
    """A linear module of torch or Conv1D as the specification has it."""
    import torch

    transposed = not isinstance(module, torch.nn.Linear)
    shape = tuple(module.weight.shape)
    out_features, in_features = shape[::-1] if transposed else shape
    return Linear(
        name=name.split(".")[-1],
        in_features=in_features,
        out_features=out_features,
        bias=module.bias is not None,
        transposed=transposed,
        quantizable=transposed or type(module) is torch.nn.Linear,
    )


def linear_modules(part: Any) -> Counter[Linear]:
    """What LoRA can target: PEFT takes torch's Linear, classes derived from it, and Conv1D."""
    import torch
    from transformers.pytorch_utils import Conv1D

    return Counter(
        described(name, module)
        for name, module in part.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    )


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_linear_modules_are_those_that_transformers_builds(
    family: str, changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    config = tiny_config(family, **changes)
    model, spec = build(config), spec_from_config(config, "tiny")
    layers = decoder_layers(model)
    inside: Counter[Linear] = Counter()
    for built, layer in zip(layers, spec.layers, strict=True):
        assert by_shape(linear_modules(built)) == by_shape(Counter(layer.linears))
        inside += linear_modules(built)
    head = described("lm_head", model.get_output_embeddings())
    outside = linear_modules(model) - inside - Counter({head: 1})
    assert outside == Counter((*spec.embedding_linears, *spec.other_linears))


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_quantization_reaches_the_weights_that_transformers_converts(
    family: str, changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    """By the rules of its integration of bitsandbytes, which is not needed for them."""
    config = tiny_config(family, **changes)
    model, spec = build(config), spec_from_config(config, "tiny")
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    converted = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is torch.nn.Linear)
        and should_convert_module(name, kept)
    )
    assert spec.quantizable_weights == converted


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", BUILT)
def test_tied_embeddings_count_once(family: str, tied: bool, tiny_config: MakeConfig) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    if family == "llama4":  # built from its text_config alone
        config["text_config"] = {**config["text_config"], "tie_word_embeddings": tied}
    assert spec_from_config(config, "tiny").num_parameters == transformers_count(config)


@pytest.mark.parametrize("family", BUILT)
def test_a_config_that_transformers_saves_means_the_same(
    family: str, tiny_config: MakeConfig
) -> None:
    """Version 5 writes fields under its own names and fills in the class's defaults."""
    transformers = pytest.importorskip("transformers", reason="it writes the config.json")
    config = tiny_config(family)
    saved = transformers.AutoConfig.for_model(**config)
    for written in (saved.to_dict(), json.loads(saved.to_json_string())):
        assert facts(written) == facts(config)


def test_what_auto_model_for_causal_lm_cannot_load_is_told(tiny_config: MakeConfig) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for family in FAMILIES:
        spec = spec_from_config(tiny_config(family), "x")
        assert spec.loads_as_causal_lm == (family in known), family


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equal_layers_are_one_object(family: str, tiny_spec: MakeSpec) -> None:
    spec = tiny_spec(family)
    assert len({id(layer) for layer in spec.layers}) == len(spec.layer_counts)
    assert sum(spec.layer_counts.values()) == len(spec.layers)


def class_default(family: str, field: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    made = transformers.AutoConfig.for_model(family)
    if field == "partial_rotary_factor":  # moved into another field on the way
        return made.rope_parameters.get(field, 1.0)
    if field in ("sliding_window", "layer_types") and hasattr(type(made), field):
        return getattr(type(made), field)  # set to another where windows are not used
    return getattr(made, field)


@pytest.mark.parametrize(
    ("family", "field"),
    [(family, field) for family in sorted(CLASS_DEFAULTS) for field in CLASS_DEFAULTS[family]],
)
def test_a_field_left_out_has_the_default_of_its_class(family: str, field: str) -> None:
    assert CLASS_DEFAULTS[family][field] == class_default(family, field)


@pytest.mark.parametrize("family", sorted(OTHER_NAMES))
def test_a_field_under_its_other_name_is_read(family: str, tiny_config: MakeConfig) -> None:
    config = tiny_config(family)
    for other, own in OTHER_NAMES[family].items():
        if own in config:
            renamed = {other if field == own else field: config[field] for field in config}
            assert facts(renamed) == facts(config)
            assert spec_from_config(renamed, "x").num_parameters == transformers_count(renamed)


@pytest.mark.parametrize("family", BUILT)
def test_any_field_left_out_is_counted_as_transformers_does_or_named(
    family: str, tiny_config: MakeConfig
) -> None:
    whole = tiny_config(family)
    sections = {"text_config", "vision_config"}
    for field in whole:
        if field in sections or field == "model_type" or field.endswith("_token_id"):
            continue
        config = {key: value for key, value in whole.items() if key != field}
        try:
            spec = spec_from_config(config, "tiny")
        except InputError as refused:
            assert f"`{field}`" in refused.message or "num_key_value_heads" in refused.message
        else:
            assert spec.num_parameters == transformers_count(config), field


def test_parts_sum_to_the_whole(tiny_spec: MakeSpec) -> None:
    """64-wide Llama, 3 layers, 4 query and 2 key-value heads of 16, by hand."""
    spec = tiny_spec("llama")
    layer = spec.layers[0]
    assert spec.embedding_parameters == 128 * 64
    assert sum(m.num_parameters for m in layer.attention.linears) == 2 * 64 * 64 + 2 * 64 * 32
    assert layer.num_parameters == 12_288 + 3 * 64 * 96 + 2 * 64
    assert spec.num_parameters == 2 * 128 * 64 + 3 * layer.num_parameters + 64
    assert spec.quantizable_weights == 3 * (12_288 + 3 * 64 * 96)


def test_a_token_passes_only_its_experts(tiny_spec: MakeSpec) -> None:
    """4 experts, 2 a token; Llama 4's code sends every token through all of them."""
    mixture = tiny_spec("mixtral").layers[0].feed_forward
    assert mixture.active_copies == 2
    assert sum(m.num_weights for m in mixture.matrices) == 3 * 64 * 96
    assert tiny_spec("llama4_text").layers[1].feed_forward.active_copies == 4


# --- how blocks compute, as the modelling code of transformers says


def kinds_of(spec: ModelSpec, read: Callable[[Layer], Any]) -> list[Any]:
    return [read(layer) for layer in spec.layers]


def windows(spec: ModelSpec) -> list[int | None]:
    return kinds_of(spec, lambda layer: layer.attention.sliding_window)


def test_windows_alternate_where_the_architecture_says_so(tiny_spec: MakeSpec) -> None:
    assert windows(tiny_spec("gemma2")) == [4096, None, 4096]
    assert windows(tiny_spec("gemma3_text", sliding_window=8)) == [8, None, 8]
    assert windows(tiny_spec("gpt_oss")) == [128, None, 128]
    assert windows(tiny_spec("gpt_neo")) == [None, 256]
    assert windows(tiny_spec("mistral")) == [4096] * 3
    assert windows(tiny_spec("qwen2")) == [None] * 3
    assert windows(tiny_spec("qwen2", use_sliding_window=True, max_window_layers=1)) == [
        None,
        4096,
        4096,
    ]
    assert windows(tiny_spec("qwen2_moe", use_sliding_window=True)) == [4096, None, 4096]
    assert windows(tiny_spec("qwen3_moe", use_sliding_window=True)) == [4096] * 3
    listed = ["sliding_attention", "sliding_attention", "full_attention"]
    assert windows(tiny_spec("gemma2", layer_types=listed)) == [4096, 4096, None]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {}),
        ("gemma3_text", {"sliding_window": 8}),
        ("gpt_oss", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("qwen2_moe", {"use_sliding_window": True}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
        ("llama4_text", {}),
        ("smollm3", {}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    ],
)
def test_layer_types_are_those_of_the_configuration_class(
    family: str, changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    config = tiny_config(family, **changes)

    def kind(layer: Layer) -> str:
        if layer.attention.chunk_size:
            return "chunked_attention"
        return "sliding_attention" if layer.attention.sliding_window else "full_attention"

    listed = transformers.AutoConfig.for_model(**config).layer_types
    assert kinds_of(spec_from_config(config, "x"), kind) == listed


def test_some_layers_do_not_rotate(tiny_spec: MakeSpec) -> None:
    def rotated(layer: Layer) -> int:
        return layer.attention.rotary_dim

    assert kinds_of(tiny_spec("smollm3"), rotated) == [16, 0, 16]
    assert kinds_of(tiny_spec("llama4_text"), rotated) == [16, 16, 0]
    assert kinds_of(tiny_spec("llama4_text"), lambda layer: layer.attention.scales_query) == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("family", "changes", "rotary_dim"),
    [
        ("llama", {}, 16),
        ("phi", {}, 8),
        ("phi3", {"partial_rotary_factor": 0.75}, 12),
        ("glm", {}, 8),
        ("stablelm", {}, 4),
        ("stablelm", {"rope_parameters": {"partial_rotary_factor": 0.5}}, 8),
        ("gpt_neox", {}, 4),
        ("gpt_neox", {"rotary_pct": 1.0}, 16),
        ("gptj", {}, 8),
        ("gptj", {"rotary_dim": None}, 16),
        ("deepseek_v3", {}, 8),
        ("falcon", {}, 16),
        ("falcon", {"alibi": True}, 0),
        ("opt", {}, 0),
        ("gpt2", {}, 0),
    ],
)
def test_how_much_of_a_head_is_rotated(
    family: str, changes: dict[str, Any], rotary_dim: int, tiny_spec: MakeSpec
) -> None:
    assert tiny_spec(family, **changes).layers[0].attention.rotary_dim == rotary_dim


@pytest.mark.parametrize("family", BUILT)
def test_sdpa_is_there_where_transformers_has_it(family: str, tiny_config: MakeConfig) -> None:
    config = tiny_config(family)
    assert spec_from_config(config, "x").supports_sdpa == build(config)._supports_sdpa


def kernel_inputs(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Query, key and value of each layer, as a step on the CPU hands them to torch's kernel."""
    import torch

    kernel, seen = torch.nn.functional.scaled_dot_product_attention, []

    def recording(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        seen.append((query, key, value))
        return kernel(query, key, value, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    model = build(config).to_empty(device="cpu").train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model(input_ids=torch.arange(14).reshape(2, 7), use_cache=False)
    return seen


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in BUILT),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"multi_query": False}),
    ],
    ids=str,
)
def test_queries_and_keys_reach_the_kernel_as_described(
    family: str,
    changes: dict[str, Any],
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads and widths, and whether rotation wrote the queries head by head."""
    config = tiny_config(family, **changes)
    spec = spec_from_config(config, "x")
    if not spec.supports_sdpa:
        pytest.skip("transformers has no kernel of torch's for it")
    seen = kernel_inputs(config, monkeypatch)
    assert len(seen) == len(spec.layers)
    for (query, key, value), layer in zip(seen, spec.layers, strict=True):
        attention = layer.attention
        kv_heads = (
            attention.num_heads if attention.expands_key_value else attention.num_key_value_heads
        )
        assert query.shape[1::2] == (attention.num_heads, attention.head_dim)
        assert key.shape[1] == kv_heads
        assert key.shape[3] == attention.head_dim
        assert value.shape[3] == (attention.value_head_dim or attention.head_dim)
        if attention.rotary_dim:
            assert query.is_contiguous() == attention.rotary_concatenates


@pytest.mark.parametrize("family", BUILT)
def test_activations_are_those_of_the_built_model(family: str, tiny_config: MakeConfig) -> None:
    from transformers.activations import ACT2FN

    known = {type(ACT2FN[name]) for name in ("silu", "gelu", "gelu_new", "relu", "gelu_fast")}
    known |= {type(ACT2FN["gelu_pytorch_tanh"])}
    config = tiny_config(family)
    spec = spec_from_config(config, "x")
    for built, layer in zip(decoder_layers(build(config)), spec.layers, strict=True):
        name = layer.feed_forward.activation
        expected = set() if name in ("bloom_gelu", "gpt_oss_glu") else {type(ACT2FN[name])}
        assert {type(module) for module in built.modules()} & known == expected


def test_dropout_is_read_where_families_call_it_differently(tiny_spec: MakeSpec) -> None:
    gpt2 = tiny_spec("gpt2", attn_pdrop=0.2)
    assert gpt2.embedding_dropout == gpt2.layers[0].dropout == 0.1
    assert gpt2.layers[0].attention.dropout == 0.2
    assert tiny_spec("opt").layers[0].dropout == 0.1
    assert tiny_spec("granite", attention_dropout=0.1).layers[0].attention.dropout == 0.1
    assert tiny_spec("starcoder2", embedding_dropout=0.3).embedding_dropout == 0.3


def test_norms_stand_where_the_architecture_puts_them(tiny_spec: MakeSpec) -> None:
    places = {
        family: [
            place
            for place in (
                "attention_norm",
                "post_attention_norm",
                "feed_forward_norm",
                "post_feed_forward_norm",
            )
            if getattr(tiny_spec(family).layers[0], place) is not None
        ]
        for family in ("llama", "gemma3_text", "glm4", "olmo2", "phi", "falcon")
    }
    around = [
        "attention_norm",
        "post_attention_norm",
        "feed_forward_norm",
        "post_feed_forward_norm",
    ]
    assert places == {
        "llama": ["attention_norm", "feed_forward_norm"],
        "gemma3_text": around,
        "glm4": around,
        "olmo2": ["post_attention_norm", "post_feed_forward_norm"],
        "phi": ["attention_norm"],
        "falcon": ["attention_norm"],
    }
    last = tiny_spec("opt", do_layer_norm_before=False).layers[0]
    assert last.normalizes_sums and last.post_attention_norm and not last.attention_norm


def test_a_vision_tower_is_loaded_along(tiny_spec: MakeSpec) -> None:
    """2 layers of 4 x 32 x 32 and 2 x 32 x 48 weights, beside the decoder's own."""
    spec = tiny_spec("gemma3")
    assert sum(m.num_weights for m in spec.other_linears) == 2 * (4 * 32 * 32 + 2 * 32 * 48)
    layers = sum(layer.quantizable_weights for layer in spec.layers)
    assert spec.quantizable_weights == layers + 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert all("vision" not in linear.name for linear in spec.linears)


# --- configs that cannot be used


def test_an_unknown_architecture_is_told_the_nearest_and_the_way_out() -> None:
    with pytest.raises(UnknownNameError, match="`llama5`") as refused:
        spec_from_config({"model_type": "llama5"}, "x")
    assert "`llama`" in (refused.value.hint or "")
    with pytest.raises(UnknownNameError) as refused:
        spec_from_config({"model_type": "zzz"}, "x")
    assert "ftplan estimate --exact" in (refused.value.hint or "")


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


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmo", {"clip_qkv": 8.0}),
        ("olmoe", {"clip_qkv": 8.0}),
        ("stablelm", {"hidden_dropout": 0.1}),
        ("falcon", {"attention_dropout": 0.1}),
        ("falcon", {"parallel_attn": False, "new_decoder_architecture": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("bloom", {"slow_but_exact": True}),
        ("opt", {"layerdrop": 0.1}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"n_head": 3}),
        ("gemma3", {"vision_config": {"vision_use_head": True}}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("mistral3", {"text_config": {"model_type": "ministral3"}}),
        ("mistral3", {"vision_feature_layer": [-1, -2]}),
        ("chatglm", {"rmsnorm": False}),
        ("chatglm", {"add_bias_linear": True}),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}),
        ("gpt_neo", {"attention_types": 7}),
        ("gemma2", {"layer_types": ["full_attention"]}),
        ("smollm3", {"no_rope_layers": [1]}),
    ],
    ids=str,
)
def test_what_is_not_modelled_is_refused_not_guessed(
    family: str, changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    with pytest.raises(InputError) as refused:
        spec_from_config(tiny_config(family, **changes), "x")
    field = list(changes)[-1] if family != "gemma3" else "vision_use_head"
    assert f"`{field}`" in refused.value.message


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
        ("bloom", "n_head"),
        ("chatglm", "padded_vocab_size"),
        ("cohere", "use_qk_norm"),
        ("deepseek_v3", "kv_lora_rank"),
        ("falcon", "multi_query"),
        ("gemma2", "layer_types"),
        ("gemma2", "attn_logit_softcapping"),
        ("glm", "partial_rotary_factor"),
        ("gpt_neox", "hidden_dropout"),
        ("gptj", "rotary_dim"),
        ("internlm2", "bias"),
        ("llama4_text", "moe_layers"),
        ("mistral", "sliding_window"),
        ("mistral3", "text_config"),
        ("opt", "word_embed_proj_dim"),
        ("qwen", "kv_channels"),
        ("qwen3_moe", "mlp_only_layers"),
        ("starcoder2", "use_bias"),
    ],
)
def test_other_fields_of_the_wrong_type_are_named_too(
    family: str, field: str, tiny_config: MakeConfig
) -> None:
    with pytest.raises(InputError, match=f"`{field}`: 'wide'"):
        spec_from_config(tiny_config(family, **{field: "wide"}), "x")


def test_heads_that_do_not_divide_are_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(InputError, match="`num_key_value_heads`: 3"):
        spec_from_config(tiny_config("llama", num_key_value_heads=3), "x")
    with pytest.raises(InputError, match="`num_attention_heads`: 128"):
        spec_from_config(tiny_config("llama", num_attention_heads=128), "x")
