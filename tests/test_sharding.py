"""Which ways of spreading state go together, and what is refused with a hint."""

from __future__ import annotations

from typing import Any

import pytest

from ftplan.launcher.emit import accelerate_config
from ftplan.launcher.model_source import find_source
from ftplan.launcher.planning import check_settings
from ftplan.planner.errors import InputError
from ftplan.planner.memory import estimate_memory
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.sharding import OFFLOADS, OFFLOADS_OF, SHARDINGS
from ftplan.profiles import find_gpu

QLORA: dict[str, Any] = {"method": "qlora", "quantization": "nf4"}


def test_every_sharding_says_what_it_can_offload() -> None:
    assert set(OFFLOADS_OF) == set(SHARDINGS)
    assert {name for offloads in OFFLOADS_OF.values() for name in offloads} == set(OFFLOADS)


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        ({"sharding": "fsdp"}, "there is one", "--num-gpus 2"),
        ({"offload": "optimizer"}, "is not for `--sharding none`", "--sharding zero2"),
        ({"sharding": "zero2", "offload": "parameters"}, "is not for", "--sharding fsdp"),
        ({"sharding": "fsdp", "num_gpus": 2, "trainer": "loop"}, "one GPU", "--trainer trl"),
        (
            {"sharding": "fsdp", "num_gpus": 2, "optim": "paged_adamw_8bit"},
            "cannot step on sharded",
            "adamw_torch_fused",
        ),
        (
            {"sharding": "fsdp", "num_gpus": 2, "method": "qlora", "quantization": "int8"},
            "cannot be divided",
            "--quantization nf4",
        ),
        (
            {"sharding": "zero3", "num_gpus": 4, "dp_replicate_size": 2},
            "is hybrid sharding, which is FSDP's",
            "--sharding fsdp",
        ),
        ({"num_gpus": 2, "dp_replicate_size": 2}, "is hybrid sharding", "--sharding fsdp"),
        (
            {"sharding": "fsdp", "num_gpus": 6, "dp_replicate_size": 4},
            "leaves no equal groups",
            "--num-gpus 8",
        ),
        (
            {"sharding": "fsdp", "num_gpus": 4, "dp_replicate_size": 4},
            "leaves no equal groups of 2 GPUs or more",
            "are DDP's",
        ),
        ({"sharding": "zero3", "num_gpus": 2, **QLORA}, "quantized base", "--sharding fsdp"),
        ({"sharding": "zero3", "num_gpus": 2}, "reentrant function", "--use-reentrant"),
        (
            {"sharding": "zero3", "num_gpus": 2, "method": "freeze"},
            "cannot be checkpointed",
            "--gradient-checkpointing false",
        ),
        (
            {"sharding": "zero2", "num_gpus": 2, "mixed_precision": "no"},
            "under mixed precision only",
            "--mixed-precision bf16",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(InputError, match=said) as raised:
        TrainingPlan(**settings)
    assert hint in str(raised.value.hint)


def test_one_gpu_may_offload() -> None:
    assert TrainingPlan(sharding="zero2", offload="optimizer").num_gpus == 1


@pytest.mark.parametrize(
    ("settings", "reentrant"),
    [
        ({"method": "lora"}, True),
        ({"method": "lora", "gradient_checkpointing": False}, False),
        ({"method": "full"}, False),
    ],
)
def test_adapters_under_zero3_are_checkpointed_as_by_trl(
    settings: dict[str, Any], reentrant: bool
) -> None:
    model = find_source("llama-3.1-8b").spec
    given = {"sharding": "zero3", "num_gpus": 2, **settings}
    assert estimate_recipe(model, None, given).plan.use_reentrant is reentrant


def test_the_closed_form_points_to_the_dry_run() -> None:
    plan = TrainingPlan(sharding="fsdp", num_gpus=2, method="dora")
    with pytest.raises(InputError, match="`--method dora` with `--sharding fsdp`") as raised:
        estimate_memory(find_source("llama-3.1-8b").spec, plan)
    assert "--exact" in str(raised.value.hint)


def test_what_is_planned_only_is_not_launched() -> None:
    with pytest.raises(InputError, match="does not launch runs with `--packing`"):
        check_settings({"packing": True})
    with pytest.raises(InputError, match="does not launch"):
        plan = TrainingPlan(loss="triton_ce", trainer="transformers")
        accelerate_config(plan, find_gpu("l4").device())
