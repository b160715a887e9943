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
from ftplan.planner.closed_form import CHECKPOINTED_FAMILIES, UNMODELLED_FAMILIES
from ftplan.planner.errors import InputError
from ftplan.planner.families import FAMILIES, spec_from_config
from ftplan.planner.memory import estimate_memory
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe

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
    if name not in UNMODELLED_FAMILIES | {"baichuan", "chatglm", "internlm2", "qwen", "mistral3"}
]

# Those that differ by more than 0.5 % in one of these settings, and by how much at most.
APART = {
    **{"deepseek_v2": 0.02, "gpt_oss": 0.01, "opt": 0.009, "phimoe": 0.009},
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


@pytest.mark.parametrize("family", [name for name in BUILT if name not in CHECKPOINTED_FAMILIES])
@pytest.mark.parametrize("settings", [MIXED, PURE], ids=["mixed", "pure"])
def test_full_tuning_takes_what_it_takes_dry(
    family: str, settings: dict[str, Any], tiny_config: MakeConfig
) -> None:
    assert_close(wide(tiny_config(family)), settings)


@pytest.mark.parametrize("family", BUILT)
def test_adapters_under_checkpointing_take_what_they_take_dry(
    family: str, tiny_config: MakeConfig
) -> None:
    targets = {"target_modules": ATTENTION_ONLY[family]} if family in ATTENTION_ONLY else {}
    assert_close(wide(tiny_config(family)), {**LORA, **targets})


@pytest.mark.parametrize("family", sorted(UNMODELLED_FAMILIES))
def test_a_family_that_is_not_modelled_is_refused(family: str, tiny_config: MakeConfig) -> None:
    spec = spec_from_config(tiny_config(family), family)
    plan = estimate_recipe(spec, None, BATCH).plan
    with pytest.raises(InputError, match=f"does not model `{family}`") as refused:
        estimate_memory(spec, plan)
    assert "--exact" in (refused.value.hint or "")


@pytest.mark.parametrize("family", sorted(CHECKPOINTED_FAMILIES))
def test_a_family_that_is_modelled_under_checkpointing_is_refused_without(
    family: str, tiny_config: MakeConfig
) -> None:
    spec = spec_from_config(tiny_config(family), family)
    plan = estimate_recipe(spec, None, {**BATCH, "gradient_checkpointing": False}).plan
    with pytest.raises(InputError, match="without gradient checkpointing"):
        estimate_memory(spec, plan)
