"""Every family's forward pass in the closed form against the same step carried out dry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.exact import case_of
from ftplan.launcher.model_source import ModelSource
from ftplan.planner.families import FAMILIES, spec_from_config
from ftplan.planner.memory import estimate_memory
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from tests.sweeps import only_whole, swept

pytestmark = pytest.mark.usefixtures("on_the_processor")

MakeConfig = Callable[..., dict[str, Any]]

# Wide enough for activations to outweigh what is rounded up to 512 bytes.
WIDE: dict[str, int] = {
    **{"hidden_size": 256, "n_embd": 256, "intermediate_size": 640, "ffn_dim": 640},
    **{"intermediate_size_mlp": 640, "moe_intermediate_size": 192, "head_dim": 48},
    **{"shared_expert_intermediate_size": 320, "kv_lora_rank": 96, "q_lora_rank": 80},
    **{"max_position_embeddings": 256, "n_positions": 256, "vocab_size": 512},
}
BATCH: dict[str, Any] = {"per_device_train_batch_size": 2, "max_length": 128, "loss": "stock"}
MIXED: dict[str, Any] = {"method": "full", "gradient_checkpointing": False}
PURE: dict[str, Any] = {**MIXED, "dtype": "bfloat16", "mixed_precision": "no"}
LORA: dict[str, Any] = {"method": "lora", "gradient_checkpointing": True, "lora_dropout": 0.0}

# The closed form does not know adapters of stacked experts: here attention alone carries them.
ATTENTION_ONLY = {
    "deepseek_v2": ("q_a_proj", "kv_b_proj", "o_proj"),
    "deepseek_v3": ("q_a_proj", "kv_b_proj", "o_proj"),
}
BUILT = [
    name
    for name in sorted(FAMILIES)
    if name not in {"baichuan", "chatglm", "internlm2", "qwen", "mistral3"}
]

# Those that differ by more than 0.5 % in one of these settings, and by how much at most.
APART = {
    **{"deepseek_v2": 0.02, "opt": 0.009, "phimoe": 0.009},
}


def wide(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: wide(value) if name == "text_config" else WIDE.get(name, value)
        for name, value in config.items()
    }


def peaks(config: dict[str, Any], settings: dict[str, Any]) -> tuple[int, int]:
    """By the closed form, and carried out."""
    spec = spec_from_config(config, str(config["model_type"]))
    plan: TrainingPlan = estimate_recipe(spec, None, {**BATCH, **settings}).plan
    source = ModelSource(spec=spec, config=config, origin="test")
    case: DryRunCase = case_of(source, plan, None)
    return estimate_memory(spec, plan).allocated_peak_bytes, dry_run(
        case
    ).record.peak.allocated_bytes


def assert_close(config: dict[str, Any], settings: dict[str, Any]) -> None:
    closed, carried_out = peaks(config, settings)
    assert closed == pytest.approx(carried_out, rel=APART.get(config["model_type"], 0.005))


@pytest.mark.parametrize("family", BUILT)
def test_full_tuning_under_autocast_takes_what_it_takes_dry(
    family: str, tiny_config: MakeConfig
) -> None:
    assert_close(wide(tiny_config(family)), MIXED)


# One of each design of norms, positions, attention and experts.
UNLIKE = (
    *("llama", "gpt2", "bloom", "opt", "falcon", "phi", "gemma2", "gpt_oss", "mixtral"),
    *("qwen3_moe", "llama4_text", "deepseek_v3"),
)


@pytest.mark.parametrize("family", swept(BUILT, UNLIKE))
def test_full_tuning_in_16_bits_takes_what_it_takes_dry(
    family: str, tiny_config: MakeConfig
) -> None:
    assert_close(wide(tiny_config(family)), PURE)


@pytest.mark.parametrize("family", swept(BUILT, UNLIKE))
def test_adapters_under_checkpointing_take_what_they_take_dry(
    family: str, tiny_config: MakeConfig
) -> None:
    targets = {"target_modules": ATTENTION_ONLY[family]} if family in ATTENTION_ONLY else {}
    assert_close(wide(tiny_config(family)), {**LORA, **targets})


# Designs within a family, each with an attention of its own.
DESIGNS: dict[str, dict[str, Any]] = {
    "falcon-7b": {"model_type": "falcon", "multi_query": True, "parallel_attn": True},
    "falcon-40b": {
        **{"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
        "parallel_attn": True,
    },
    "falcon-rw": {
        **{"model_type": "falcon", "multi_query": False, "parallel_attn": False},
        **{"alibi": True, "bias": True},
    },
    "starcoder": {"model_type": "gpt_bigcode", "multi_query": True},
}
# Long enough for attention to outweigh the weights.
LONG: dict[str, Any] = {"per_device_train_batch_size": 4, "max_length": 256}


@pytest.mark.parametrize("design", sorted(DESIGNS))
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**MIXED, **LONG}, id="mixed"),
        only_whole({**PURE, **LONG}, "pure"),
        pytest.param(LORA, id="lora"),
    ],
)
def test_every_design_takes_what_it_takes_dry(
    design: str, settings: dict[str, Any], tiny_config: MakeConfig
) -> None:
    changes = dict(DESIGNS[design])
    assert_close(wide(tiny_config(changes.pop("model_type"), **changes)), settings)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flash_attention_2"])
def test_dropout_takes_what_it_takes_dry(attn_implementation: str, tiny_config: MakeConfig) -> None:
    shares = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    config = wide(tiny_config("gpt_bigcode", **shares))
    assert_close(config, {**PURE, **LONG, "attn_implementation": attn_implementation})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt_bigcode", "llama"])
def test_attention_weights_are_held_until_the_layer_ends(
    family: str, checkpointing: bool, tiny_config: MakeConfig
) -> None:
    shares = {"attn_pdrop": 0.1, "attention_dropout": 0.1}
    settings = {**MIXED, **LONG, "gradient_checkpointing": checkpointing}
    config = wide(tiny_config(family, **shares))
    assert_close(config, {**settings, "attn_implementation": "eager"})


def test_grouped_heads_in_float32_drop_weights_of_torchs_plain_attention(
    tiny_config: MakeConfig,
) -> None:
    config = wide(tiny_config("starcoder2", attention_dropout=0.1, num_key_value_heads=2))
    assert_close(config, {**LONG, "method": "full", "mixed_precision": "no", "dtype": "float32"})


@pytest.mark.parametrize("settings", [MIXED, PURE], ids=["mixed", "pure"])
def test_a_cross_entropy_that_writes_its_gradient_over_the_logits(
    settings: dict[str, Any], tiny_config: MakeConfig
) -> None:
    config = {**wide(tiny_config("llama")), "vocab_size": 8000}
    assert_close(config, {**settings, **LONG, "loss": "triton_ce", "trainer": "transformers"})


@pytest.mark.parametrize("trainer", ["trl", "transformers", "loop"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_cache_that_a_trainer_leaves_on_is_held_until_the_loss(
    trainer: str, checkpointing: bool, tiny_config: MakeConfig
) -> None:
    """Gemma 3's decoder has a config of its own."""
    settings = {**MIXED, **LONG, "gradient_checkpointing": checkpointing, "trainer": trainer}
    assert_close(wide(tiny_config("gemma3")), settings)


@pytest.mark.parametrize("design", ["falcon-7b", "falcon-40b"])
@pytest.mark.parametrize("settings", [{**PURE, **LONG}, LORA], ids=["pure", "lora"])
def test_an_attention_class_of_its_own_takes_what_it_takes_dry(
    design: str, settings: dict[str, Any], tiny_config: MakeConfig
) -> None:
    """transformers has one for Falcon's FlashAttention-2; eager scores would outweigh it."""
    changes = dict(DESIGNS[design])
    config = wide(tiny_config(changes.pop("model_type"), **changes))
    assert_close(config, {**settings, "attn_implementation": "flash_attention_2"})


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama4_text", {**MIXED, "loss": "liger", "trainer": "transformers"}),
        ("gpt_bigcode", {**PURE, "optim": "schedule_free_radam", "trainer": "loop"}),
        ("llama", {**MIXED, "method": "poly", "gradient_checkpointing": False}),
    ],
    ids=["misnamed decoder", "schedule-free loop", "poly"],
)
def test_what_once_failed_takes_what_it_takes_dry(
    family: str, settings: dict[str, Any], tiny_config: MakeConfig
) -> None:
    assert_close(wide(tiny_config(family)), {**settings, **LONG})


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        (
            "llama",
            {"vocab_size": 40000},
            {"dtype": "float32", "loss": "liger", "trainer": "transformers"},
        ),
        ("llama", {"vocab_size": 40000}, {**MIXED, "loss": "trl-fused"}),
        ("gpt2", {}, {**PURE, "trainer": "loop", "attn_implementation": "eager"}),
    ],
    ids=["liger casts the head", "tiles of a head", "softmax in 16 bits"],
)
def test_what_a_copy_takes_it_takes_dry(
    family: str, changes: dict[str, Any], settings: dict[str, Any], tiny_config: MakeConfig
) -> None:
    assert_close({**wide(tiny_config(family)), **changes}, {**LORA, **LONG, **settings})


@pytest.mark.parametrize("window", [64, 256])
@pytest.mark.parametrize(
    "settings",
    [pytest.param(MIXED, id="mixed"), only_whole(PURE, "pure"), pytest.param(LORA, id="lora")],
)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_the_one_head_of_all_queries_under_a_mask_takes_what_it_takes_dry(
    attn_implementation: str, settings: dict[str, Any], window: int, tiny_config: MakeConfig
) -> None:
    """A window as long as the row has a mask, too."""
    config = wide(tiny_config("mistral", num_key_value_heads=1, sliding_window=window))
    assert_close(config, {**settings, **LONG, "attn_implementation": attn_implementation})


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_loop_computes_4_bit_layers_as_bitsandbytes_is_told(
    mixed_precision: str, tiny_config: MakeConfig
) -> None:
    """It has no autocast."""
    quantized = {"quantization": "nf4", "dtype": "bfloat16", "mixed_precision": mixed_precision}
    settings = {"method": "prompt-tuning", "loss": "liger", "trainer": "loop", **LONG}
    assert_close(wide(tiny_config("llama")), {**settings, **quantized})


def test_a_prefix_reaches_the_model_under_ligers_loss(tiny_config: MakeConfig) -> None:
    """Scores are as wide as its keys and those of the rows together."""
    config = wide(tiny_config("llama"))
    spec = spec_from_config(config, "llama")
    source = ModelSource(spec=spec, config=config, origin="test")

    def peak(num_virtual_tokens: int) -> int:
        given = {"method": "prefix-tuning", "loss": "liger", "trainer": "transformers", **LONG}
        given["attn_implementation"] = "eager"
        given["peft_config"] = (f"num_virtual_tokens={num_virtual_tokens}",)
        plan = estimate_recipe(spec, None, given).plan
        peak: int = dry_run(case_of(source, plan, None)).record.peak.allocated_bytes
        return peak

    more_columns = 128
    rows, length = LONG["per_device_train_batch_size"], LONG["max_length"]
    scores_bytes = 2 * rows * config["num_attention_heads"] * length * more_columns
    assert peak(16 + more_columns) - peak(16) > config["num_hidden_layers"] * scores_bytes
