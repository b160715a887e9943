"""What the allocator holds by the closed form: its events against its own sums and dry runs."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
from msgspec import structs

from benchmarks.references import read
from benchmarks.reserved import ReservedErrors, compare_reserved
from ftplan.launcher.model_source import find_source
from ftplan.planner.allocator import replay, required_bytes
from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MemoryEstimate, context_bytes, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.replayed import replayed_memory, run_storages
from ftplan.planner.run_storages import RunStorages
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_settings import model_rows
from ftplan.profiles import find_gpu

SHARDED: dict[str, Any] = {"sharding": "fsdp", "num_gpus": 4}
PLANS: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "full", "optim": "adamw_torch", "gradient_checkpointing": False},
    {"method": "full", "optim": "lomo", "trainer": "transformers", "loss": "stock"},
    {"method": "full", "optim": "schedule_free_adamw"},
    {"method": "freeze", "gradient_accumulation_steps": 1},
    {"method": "lora", "num_gpus": 2},
    {"method": "lora", "gradient_checkpointing": False},
    {"method": "lora", "trainer": "loop", "loss": "stock"},
    {"method": "qlora", "per_device_train_batch_size": 4},
    {"method": "qlora", "quantization": "int8", "gradient_accumulation_steps": 4},
    {"method": "vera", "optim": "adafactor"},
    {"method": "prompt-tuning"},
    {"method": "prefix-tuning"},
    {"method": "lora", "objective": "dpo"},
    {"method": "full", "objective": "dpo"},
    {"method": "full", **SHARDED},
    {"method": "full", "gradient_checkpointing": False, **SHARDED},
    {"method": "lora", "offload": "parameters", **SHARDED},
    {"method": "full", "gradient_accumulation_steps": 4, **SHARDED},
    {"method": "full", "dp_replicate_size": 2, **SHARDED},
    {"method": "lora", "dp_replicate_size": 2, "offload": "parameters", **SHARDED},
]
MODELS = ("llama-3.2-1b", "qwen2.5-0.5b", "gpt2", "falcon-7b", "gemma-3-4b-it")


def plan_of(model: ModelSpec, given: dict[str, Any]) -> TrainingPlan:
    return estimate_recipe(model, None, {"max_length": 512, **given}).plan


def storages(model: ModelSpec, plan: TrainingPlan, stack: Stack = OWN_STACK) -> RunStorages:
    rows, length = model_rows(plan, plan.max_length)
    step = compiled_step(model, plan, rows, length, None, stack)
    return run_storages(model, plan, step, rows, length, stack)


def levels(run: RunStorages) -> list[int]:
    """Bytes alive after each event."""
    level, found = 0, []
    for event in run.events:
        level += run.sizes[event] if event >= 0 else -run.sizes[~event]
        found.append(level)
    return found


# --- the events ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", PLANS, ids=lambda given: "-".join(map(str, given.values())))
@pytest.mark.parametrize("fsdp_version", [1, 2])
def test_the_events_peak_where_the_sums_do(
    name: str, given: dict[str, Any], fsdp_version: int
) -> None:
    """Two ways to the same number: moments added up, and every storage written out."""
    if fsdp_version == 1 and "sharding" not in given:
        pytest.skip("no FSDP in this plan")
    model, stack = find_source(name).spec, Stack(fsdp_version=fsdp_version)
    plan = plan_of(model, given)
    memory = estimate_memory(model, plan, stack=stack)
    assert max(levels(storages(model, plan, stack))) == pytest.approx(
        memory.allocated_peak_bytes, rel=0.005
    )


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gpt2"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointed_layers_between_others_are_in_order(name: str, method: str) -> None:
    model = find_source(name).spec
    plan = plan_of(model, {"method": method, "every_n_layers": 3})
    memory = estimate_memory(model, plan)
    assert max(levels(storages(model, plan))) == pytest.approx(
        memory.allocated_peak_bytes, rel=0.005
    )


@pytest.mark.parametrize("given", PLANS, ids=lambda given: "-".join(map(str, given.values())))
def test_a_run_ends_with_no_more_than_it_keeps(given: dict[str, Any]) -> None:
    model = find_source("llama-3.2-1b").spec
    plan = plan_of(model, given)
    run = storages(model, plan)
    final = levels(run)[-1]
    saving = next(p for p in estimate_memory(model, plan).phases if p.name == "save")
    assert final == pytest.approx(saving.allocated_peak_bytes, rel=0.003)
    replay(run.sizes, run.events)  # raises for a second birth or death of one


def test_large_events_alone_reserve_the_same() -> None:
    model = find_source("qwen2.5-0.5b").spec
    run = storages(model, plan_of(model, {"method": "lora"}))
    events, small = run.large_events()
    assert len(events) < len(run.events)
    for expandable in (False, True):
        whole = replay(run.sizes, run.events, expandable_segments=expandable).reserved_peak_bytes
        large = replay(run.sizes, events, expandable_segments=expandable).reserved_peak_bytes
        assert small + large == pytest.approx(whole, rel=0.01)


# --- what is made of them ------------------------------------------------------------------------


def of_own_stack(**given: Any) -> MemoryEstimate:
    model = find_source("llama-3.2-1b").spec
    return replayed_memory(model, plan_of(model, given))


def test_reserved_is_between_allocated_and_what_fragments() -> None:
    memory = of_own_stack(method="lora")
    context = context_bytes(None)
    assert memory.allocated_peak_bytes < memory.reserved_peak_bytes
    assert memory.device_peak_bytes == memory.reserved_peak_bytes + context
    assert memory.allocated_peak_bytes < memory.required_bytes - context
    assert memory.required_bytes <= memory.device_peak_bytes


def test_expandable_segments_fragment_less() -> None:
    model = find_source("llama-3.2-1b").spec
    given = {"method": "lora", "loss": "stock", "gradient_checkpointing": False}
    own = replayed_memory(model, plan_of(model, given))
    others = replayed_memory(model, plan_of(model, {**given, "trainer": "transformers"}))
    share = others.reserved_peak_bytes / others.allocated_peak_bytes
    assert own.reserved_peak_bytes / own.allocated_peak_bytes < share


def test_no_more_is_reserved_than_the_card_has() -> None:
    model = find_source("llama-3.2-1b").spec
    given = {"method": "lora", "trainer": "transformers", "loss": "stock", "max_length": 2048}
    plan = plan_of(model, given)
    free = replayed_memory(model, plan)
    card = card_with(round(free.required_bytes * 1.02))
    bound = replayed_memory(model, plan, device=card)
    assert bound.device_peak_bytes <= card.free_bytes
    assert bound.required_bytes == pytest.approx(free.required_bytes, rel=0.01)


def card_with(num_bytes: int) -> Device:
    return structs.replace(find_gpu("a100-40gb-pcie").device(), free_bytes=num_bytes)


def test_where_the_order_is_not_known_a_share_is_taken() -> None:
    model = find_source("llama-3.2-1b").spec
    plan = plan_of(model, {"method": "full", "sharding": "zero2", "num_gpus": 2})
    assert replayed_memory(model, plan) == estimate_memory(model, plan)


# --- beside dry runs -----------------------------------------------------------------------------


EXPANDABLE = (False, True)

# All, and replays of more events, take too long here; `python -m benchmarks.accuracy reserved` has
# them.
EVERY, MOST_EVENTS = 5, 20_000


@pytest.fixture(scope="module")
def beside_dry_runs() -> dict[bool, list[ReservedErrors]]:
    references = read()[::EVERY]
    return {
        expandable: compare_reserved(references, expandable=expandable, most_events=MOST_EVENTS)
        for expandable in EXPANDABLE
    }


@pytest.mark.parametrize("expandable", EXPANDABLE)
def test_it_reserves_what_the_dry_run_does(
    beside_dry_runs: dict[bool, list[ReservedErrors]], expandable: bool
) -> None:
    sizes = sorted(abs(errors.replayed) for errors in beside_dry_runs[expandable])
    assert len(sizes) >= 20
    assert median(sizes) < 0.015
    assert sizes[int(0.9 * len(sizes))] < 0.08


@pytest.mark.parametrize("expandable", EXPANDABLE)
def test_a_replay_is_nearer_than_a_share(
    beside_dry_runs: dict[bool, list[ReservedErrors]], expandable: bool
) -> None:
    compared = beside_dry_runs[expandable]
    of_share = sum(abs(errors.share) for errors in compared)
    assert sum(abs(errors.replayed) for errors in compared) < 0.8 * of_share


def test_required_is_the_least_that_suffices() -> None:
    model = find_source("gpt2").spec
    plan = plan_of(model, {"method": "full"})
    run = storages(model, plan)
    events, small = run.large_events()
    least = required_bytes(run.sizes, events, expandable_segments=True, tolerance=0.001)
    memory = replayed_memory(model, plan)
    assert memory.required_bytes - context_bytes(None) == pytest.approx(least + small, rel=0.03)
