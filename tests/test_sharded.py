"""State that several GPUs divide, in closed form: beside dry runs, and what holds of any model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ftplan.planner import coordinator, held, zero3
from ftplan.planner.errors import InputError
from ftplan.planner.families import spec_from_config
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.sharded import NO_UNIT, units_of
from ftplan.planner.stack import DEFAULT_CAPABILITY, Stack, cublas_workspace_bytes
from ftplan.planner.step_settings import Workload, step_settings
from ftplan.planner.zero import REDUCE_BUCKET_SIZE

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
}
LLAMA = {"model_type": "llama", **SHAPE}
TIED = {"model_type": "qwen2", **SHAPE, "tie_word_embeddings": True}
# What waits for the end of backward is its peak where layers are many and rows short.
DEEP = {**LLAMA, "num_hidden_layers": 12, "vocab_size": 256}
FULL: dict[str, Any] = {"method": "full"}
PLAIN: dict[str, Any] = {"gradient_checkpointing": False}
FREEZE: dict[str, Any] = {"method": "freeze", "num_trainable_layers": 2}
ZERO1: dict[str, Any] = {"sharding": "zero1"}
ZERO2: dict[str, Any] = {"sharding": "zero2"}
WAITING: dict[str, Any] = {"gradient_accumulation_steps": 2, "offload": "parameters"}
OWN: dict[str, Any] = {"trainer": "transformers"}
HYBRID: dict[str, Any] = {"num_gpus": 4, "dp_replicate_size": 2}
SHORT: dict[str, Any] = {"max_length": 32, "per_device_train_batch_size": 1}

# Storages are rounded up to 512 bytes, which counts in models this small; the buffers of a constant
# size, which nothing here could get wrong, are taken off both numbers.
TOLERANCE = 0.005
OF_ANY_SIZE = 2 * cublas_workspace_bytes(DEFAULT_CAPABILITY)
BUCKET_BYTES = 2 * REDUCE_BUCKET_SIZE


def sharded_plan(**changes: Any) -> TrainingPlan:
    if changes.get("sharding") == "zero3":  # what it can be trained with
        checkpointed = changes.get("gradient_checkpointing", True)
        method = changes.get("method", "lora")
        changes["gradient_checkpointing"] = checkpointed and method != "freeze"
        changes["use_reentrant"] = changes["gradient_checkpointing"] and method == "lora"
    return TrainingPlan(
        **{
            "sharding": "fsdp",
            "num_gpus": 2,
            "max_length": 128,
            "per_device_train_batch_size": 2,
            "loss": "stock",
            **changes,
        }
    )


def estimate(model: ModelSpec, plan: TrainingPlan, **stack: Any) -> MemoryEstimate:
    return estimate_memory(model, plan, stack=Stack(**stack))


# --- beside dry runs -----------------------------------------------------------------------------


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize(
    ("config", "changes", "stack"),
    [
        pytest.param(LLAMA, FULL, {}, id="FSDP2, full"),
        pytest.param(LLAMA, {**FULL, **PLAIN, "num_gpus": 4}, {}, id="FSDP2, 4 GPUs"),
        pytest.param(TIED, {**FULL, "loss": "trl-fused"}, {}, id="FSDP2, tied"),
        pytest.param(LLAMA, {"loss": "trl-fused"}, {}, id="FSDP2, lora, fused loss"),
        pytest.param(LLAMA, FREEZE, {}, id="FSDP2, freeze"),
        pytest.param(LLAMA, {**FULL, "gradient_accumulation_steps": 2}, {}, id="FSDP2, accumulate"),
        pytest.param(LLAMA, {**FULL, "offload": "parameters"}, {}, id="FSDP2, offload"),
        pytest.param(
            LLAMA, {**FULL, **WAITING, "num_gpus": 1}, {}, id="FSDP2, offload, accumulate, 1 GPU"
        ),
        pytest.param(LLAMA, {**FREEZE, **WAITING}, {}, id="FSDP2, offload, accumulate"),
        pytest.param(DEEP, {**FULL, **HYBRID, **SHORT}, {}, id="FSDP2, hybrid"),
        pytest.param(
            DEEP,
            {**FULL, **HYBRID, **SHORT, "mixed_precision": "no"},
            {},
            id="FSDP2, hybrid, sent as it is held",
        ),
        pytest.param(LLAMA, {**HYBRID, "loss": "trl-fused"}, {}, id="FSDP2, hybrid, lora"),
        pytest.param(DEEP, {**FULL, **HYBRID, **WAITING}, {}, id="FSDP2, hybrid, offload"),
        pytest.param(
            DEEP,
            {**FULL, **HYBRID, **WAITING, "mixed_precision": "no"},
            {},
            id="FSDP2, hybrid, offload, sent as it is held",
        ),
        pytest.param(
            DEEP, {**FULL, **HYBRID, **SHORT, **OWN}, {"fsdp_version": 1}, id="FSDP1, hybrid"
        ),
        pytest.param(LLAMA, {**FULL, **OWN}, {"fsdp_version": 1}, id="FSDP1, full"),
        pytest.param(
            LLAMA,
            {**FULL, **OWN, "gradient_accumulation_steps": 2},
            {"fsdp_version": 1},
            id="FSDP1, accumulate",
        ),
        pytest.param(LLAMA, {**PLAIN, **OWN}, {"fsdp_version": 1}, id="FSDP1, lora"),
        pytest.param(
            LLAMA,
            {**OWN, "use_reentrant": True},
            {"fsdp_version": 1, "transformers_version": (4, 48)},
            id="FSDP1, checkpointing around it",
        ),
        pytest.param(LLAMA, {**FULL, **ZERO1}, {}, id="ZeRO-1"),
        pytest.param(TIED, {**FULL, **ZERO2}, {}, id="ZeRO-2, tied"),
        pytest.param(
            LLAMA, {**FULL, **ZERO2, "gradient_accumulation_steps": 2}, {}, id="ZeRO-2, accumulate"
        ),
        pytest.param(LLAMA, {**FULL, **ZERO2, "offload": "optimizer"}, {}, id="ZeRO-2, offload"),
    ],
)
def test_the_closed_form_equals_the_dry_run(
    config: Mapping[str, Any], changes: dict[str, Any], stack: dict[str, Any]
) -> None:
    pytest.importorskip("trl", reason="needs the `train` extra")
    from ftplan.launcher.dry_run.case import DryRunCase
    from ftplan.launcher.dry_run.step import dry_run

    plan = sharded_plan(**changes)
    case = DryRunCase(config=config, plan=plan, kind="cuda", row_length=plan.max_length, **stack)
    peaks = dry_run(case).record.phase_peaks().values()
    constant = OF_ANY_SIZE + (BUCKET_BYTES if plan.sharding != "fsdp" else 0)
    expected = max(peak.allocated_bytes for peak in peaks) - constant
    found = estimate(spec_from_config(config, "tiny"), plan, **stack).allocated_peak_bytes
    assert found - constant == pytest.approx(expected, rel=TOLERANCE)


SMALL = {
    "PREFETCH_BUCKET_SIZE": 100_000,
    "PARAM_PERSISTENCE_THRESHOLD": 300,
    "MAX_LIVE_PARAMETERS": 700_000,
    "MAX_REUSE_DISTANCE": 700_000,
}
SMALL_BUCKET = 600_000


@pytest.fixture
def small_buckets() -> Iterator[None]:
    """DeepSpeed's settings as small as the model is, so that parameters come and go."""
    pytest.importorskip("trl", reason="needs the `train` extra")
    from ftplan.launcher.dry_run import zero3 as dry_zero3

    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(coordinator, **SMALL))
        stack.enter_context(mock.patch.object(zero3, "SUB_GROUP_SIZE", 400_000))
        for module in (zero3, held, dry_zero3):
            stack.enter_context(mock.patch.object(module, "REDUCE_BUCKET_SIZE", SMALL_BUCKET))
        yield


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor", "small_buckets")
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        pytest.param(LLAMA, FULL, id="full"),
        pytest.param(LLAMA, {**FULL, **PLAIN, "offload": "parameters"}, id="offload of all"),
        pytest.param(
            LLAMA, {**FULL, "offload": "optimizer", "num_gpus": 3}, id="offload of states"
        ),
        pytest.param(TIED, {**FULL, "loss": "trl-fused"}, id="tied, fused loss"),
        pytest.param(TIED, {**FULL, "gradient_accumulation_steps": 2}, id="tied, accumulate"),
        pytest.param(LLAMA, {"gradient_accumulation_steps": 2}, id="lora"),
        pytest.param(LLAMA, {**PLAIN, "loss": "trl-fused"}, id="lora, not checkpointed"),
        pytest.param(LLAMA, {**FREEZE, **PLAIN, "loss": "liger"}, id="freeze"),
    ],
)
def test_zero3_in_closed_form_equals_the_dry_run(
    config: Mapping[str, Any], changes: dict[str, Any]
) -> None:
    from ftplan.launcher.dry_run.case import DryRunCase
    from ftplan.launcher.dry_run.step import dry_run

    plan = sharded_plan(sharding="zero3", **changes)
    case = DryRunCase(config=config, plan=plan, kind="cuda", row_length=plan.max_length)
    peaks = dry_run(case).record.phase_peaks()
    found = estimate(spec_from_config(config, "tiny"), plan)
    expected = max(peak.allocated_bytes for peak in peaks.values()) - OF_ANY_SIZE
    assert found.allocated_peak_bytes - OF_ANY_SIZE == pytest.approx(expected, rel=TOLERANCE)
    gathered = {phase.name: phase.components["communication"] for phase in found.phases}
    assert gathered["forward"] > 2 * SMALL_BUCKET


# --- what must hold of any model -----------------------------------------------------------------

SHARDINGS = ("fsdp", "zero1", "zero2", "zero3")
plans = st.fixed_dictionaries(
    {
        "sharding": st.sampled_from(SHARDINGS),
        "method": st.sampled_from(("full", "lora", "freeze")),
        "gradient_checkpointing": st.booleans(),
        "gradient_accumulation_steps": st.sampled_from((1, 2)),
        "optim": st.sampled_from(("adamw_torch", "adamw_torch_fused")),
        "loss": st.sampled_from(("stock", "trl-fused")),
        "per_device_train_batch_size": st.integers(1, 4),
        "max_length": st.integers(8, 256),
        "num_trainable_layers": st.just(1),
    }
)
models = st.sampled_from([spec_from_config(config, "tiny") for config in (LLAMA, TIED)])
versions = st.sampled_from((1, 2))


@given(models, plans, versions, st.sampled_from((2, 4, 8)))
@settings(max_examples=60, deadline=None)
def test_more_gpus_never_take_more_memory(
    model: ModelSpec, changes: dict[str, Any], version: int, num_gpus: int
) -> None:
    few, many = (
        estimate(model, sharded_plan(**changes, num_gpus=n), fsdp_version=version)
        for n in (num_gpus, 2 * num_gpus)
    )
    assert many.allocated_peak_bytes <= few.allocated_peak_bytes
    assert many.peak_phase.components["weights"] <= few.peak_phase.components["weights"]


hybrid_plans = plans.map(lambda changes: {**changes, "sharding": "fsdp"})


@given(models, hybrid_plans, versions, st.sampled_from((2, 4)), st.sampled_from((2, 3)))
@settings(max_examples=60, deadline=None)
def test_copies_save_nothing(
    model: ModelSpec, changes: dict[str, Any], version: int, num_shards: int, copies: int
) -> None:
    """A copy's GPUs hold what they do alone, and FSDP2 what it sums over copies. More GPUs for each
    copy never take more."""

    def allocated(num_gpus: int, copies: int) -> int:
        plan = sharded_plan(**changes, num_gpus=num_gpus, dp_replicate_size=copies)
        return estimate(model, plan, fsdp_version=version).allocated_peak_bytes

    alone, hybrid = allocated(num_shards, 1), allocated(copies * num_shards, copies)
    assert alone <= hybrid <= alone + 2 * model.num_parameters
    assert hybrid == alone or version == 2
    assert allocated(2 * copies * num_shards, copies) <= hybrid


def test_one_more_copy_holds_as_much() -> None:
    model = spec_from_config(DEEP, "tiny")
    few, many = (
        estimate(model, sharded_plan(**FULL, num_gpus=2 * copies, dp_replicate_size=copies))
        for copies in (2, 4)
    )
    assert many.to_dict() == few.to_dict()
    assert many.disk == few.disk


@given(models, plans, versions)
@settings(max_examples=60, deadline=None)
def test_components_are_of_some_size_and_sum_up(
    model: ModelSpec, changes: dict[str, Any], version: int
) -> None:
    memory = estimate(model, sharded_plan(**changes), fsdp_version=version)
    for phase in memory.phases:
        assert all(size >= 0 for size in phase.components.values()), phase.name
        assert sum(phase.components.values()) == phase.allocated_peak_bytes
    assert memory.allocated_peak_bytes == max(p.allocated_peak_bytes for p in memory.phases)


@pytest.mark.parametrize("num_gpus", [2, 3, 8])
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_shares_are_shares_of_all_parameters(config: dict[str, Any], num_gpus: int) -> None:
    """Of weights in 16 bits, and of none more than one more row for each parameter."""
    model = spec_from_config(config, "tiny")
    plan = sharded_plan(method="full", num_gpus=num_gpus, mixed_precision="no")
    counted = plan.resolved_method.count(model, plan.method_settings)
    workload = Workload.of(model, plan, 1, 8)
    step = step_settings(model, plan, workload, "cuda", DEFAULT_CAPABILITY, Stack(), counted)
    assert step.spread is not None
    numerics = step.numerics_of_layers(model)
    units = units_of(model, step.spread, numerics, step.trained_outside)
    flat = structs.replace(step.spread, kind="fsdp1")
    for whole in (units.whole, units_of(model, flat, numerics, step.trained_outside).whole):
        assert whole.weights * num_gpus >= 2 * model.num_parameters
        assert whole.weights * num_gpus <= 2 * model.num_parameters * 1.02
        assert whole.gathered == whole.gradients == whole.weights * num_gpus
    assert (units.embedding == NO_UNIT) == model.tie_word_embeddings


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    model = spec_from_config(LLAMA, "tiny")
    for changes in (
        {"offload": "parameters"},
        {"sharding": "zero2", "offload": "optimizer"},
        {"sharding": "zero3", "offload": "optimizer"},
    ):
        memory = estimate(model, sharded_plan(method="full", **changes))
        (step,) = (phase for phase in memory.phases if phase.name == "optimizer step")
        assert step.components["optimizer_states"] == step.components["gradients"] == 0


def test_zero3_of_a_mixture_is_left_to_the_dry_run() -> None:
    mixture = {"model_type": "mixtral", **SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(InputError, match="does not model `--sharding zero3` with experts"):
        estimate(spec_from_config(mixture, "tiny"), sharded_plan(method="full", sharding="zero3"))
