"""Choosing a plan on synthetic devices: given settings, feasibility, ranking."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from msgspec import structs
from rich.console import Console

from ftplan.launcher.estimate_json import estimate_to_dict
from ftplan.launcher.views import totals_table
from ftplan.planner.concessions import SMALL_OPTIMIZER
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import FAMILIES, spec_from_size
from ftplan.planner.goals import USEFUL_TIMES, Limits, why_not
from ftplan.planner.hardware_spec import QUANTIZATION_CAPABILITY, Device, Host, Machine
from ftplan.planner.memory import MemoryEstimate, fits, needed_bytes
from ftplan.planner.methods import COMPARED_METHODS, METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import QUANTIZATIONS, TrainingPlan
from ftplan.planner.ranking import Evaluated
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.run_time import RunTime, limit_to_time_budget, optimizer_steps
from ftplan.planner.search import choose_plan
from ftplan.planner.space import Candidate, Pricing, Space
from ftplan.planner.stack import OWN_STACK
from ftplan.planner.teams import teams_of
from ftplan.planner.units import GIB

MakeData = Callable[[Iterable[int]], DataProfile]
MakeConfig = Callable[..., dict[str, Any]]
MakeSpec = Callable[..., ModelSpec]
Devices = dict[str, Device]

SIZES = ("135M", "1.7B", "8B", "70B")
DEVICES = ("T4", "RTX 4090", "A100", "CPU")


@pytest.fixture(scope="module")
def sized() -> dict[str, ModelSpec]:
    counts = (135 * 10**6, 17 * 10**8, 8 * 10**9, 70 * 10**9)
    return {size: spec_from_size(count, size) for size, count in zip(SIZES, counts, strict=True)}


def render(table: Any) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return cast(io.StringIO, console.file).getvalue()


def with_free(device: Device, free_bytes: int) -> Device:
    return structs.replace(device, free_bytes=free_bytes)


def chosen(
    model: ModelSpec, data: DataProfile, device: Device, given: dict[str, Any] | None = None
) -> Evaluated:
    best = choose_plan(model, data, device, given or {}).best
    assert best is not None
    return best


def space_of(
    model: ModelSpec,
    data: DataProfile,
    device: Device | Sequence[Device],
    given: dict[str, Any],
) -> tuple[Space, list[Candidate]]:
    """The space of a given method, and every plan in it that gives up nothing."""
    space = Space(model, data, given, OWN_STACK)
    teams = teams_of(device, given.get("num_gpus"))
    groups = space.groups(resolve_method(given["method"]), teams)
    return space, list(space.candidates(groups))


def replayed_of(model: ModelSpec, data: DataProfile, evaluated: Evaluated) -> MemoryEstimate:
    plan, stack = evaluated.plan, data.on(OWN_STACK, evaluated.plan)
    return replayed_memory(
        model, plan, device=evaluated.device, longest_row=data.longest, stack=stack
    )


def cheapest_that_fit(
    model: ModelSpec,
    data: DataProfile,
    evaluated: Iterable[Evaluated],
    cost: Callable[[Evaluated], float],
) -> list[Evaluated]:
    """Of all that fit by a replay, those within 2 % of the least cost, cheapest first."""
    found: list[Evaluated] = []
    for one in sorted(evaluated, key=cost):
        if found and cost(one) > 1.02 * cost(found[0]):
            break  # whether it fits does not matter: a replay takes half a second
        if fits(replayed_of(model, data, one), one.device):
            found.append(one)
    return found


# --- feasibility


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_chosen_fits_and_what_is_rejected_does_not(
    size: str,
    device: str,
    sized: dict[str, ModelSpec],
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    ranking = choose_plan(sized[size], few_short_rows, devices[device], {})
    plans = [*([ranking.best] if ranking.best else []), *ranking.alternatives]
    for evaluated in plans:
        assert fits(evaluated.memory, devices[device])
        assert needed_bytes(evaluated.memory) <= devices[device].free_bytes
    for rejection in ranking.rejected:
        assert rejection.reason
        if rejection.needs_bytes is not None:
            assert rejection.needs_bytes > devices[device].free_bytes
    named = [*(e.plan.method for e in plans), *(r.method for r in ranking.rejected)]
    assert sorted(named) == sorted(
        COMPARED_METHODS
    )  # each method once: taken or left out with a reason


@pytest.mark.parametrize(
    ("size", "device", "method"),
    [
        ("135M", "T4", "lora"),
        ("8B", "T4", "qlora"),
        ("8B", "A100", "lora"),
        ("70B", "A100", "qlora"),
        ("1.7B", "CPU", "lora"),
        ("8B", "CPU", None),
        ("70B", "RTX 4090", None),
    ],
)
def test_the_usual_cases(
    size: str,
    device: str,
    method: str | None,
    sized: dict[str, ModelSpec],
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    best = choose_plan(sized[size], few_short_rows, devices[device], {}).best
    assert (best.plan.method if best else None) == method


def test_when_nothing_fits_the_nearest_is_named(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    ranking = choose_plan(sized["70B"], few_short_rows, devices["RTX 4090"], {})
    assert ranking.best is None and ranking.alternatives == ()
    assert ranking.nearest is not None
    assert {r.method for r in ranking.rejected} == set(COMPARED_METHODS)
    needs = {r.method: r.needs_bytes or math.inf for r in ranking.rejected}
    least = needs[ranking.nearest.plan.method]
    assert needed_bytes(ranking.nearest.memory) == least > devices["RTX 4090"].free_bytes
    assert least <= 1.01 * min(needs.values())


def test_when_something_fits_there_is_no_nearest_miss(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    ranking = choose_plan(sized["8B"], few_short_rows, devices["A100"], {})
    assert ranking.best is not None and ranking.rejected  # full training does not fit
    assert ranking.nearest is None


@pytest.mark.parametrize("method", sorted(COMPARED_METHODS))
def test_needed_memory_is_enough_and_much_less_is_not(
    method: str, sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    """`needs_bytes` of a rejection, taken at its word. It is of the plan that by the closed form is
    the smallest; what the allocator makes of another may be a little less."""
    model, given = sized["1.7B"], {"method": method}
    needs = None
    for free in (0.0, 0.95):
        device = with_free(devices["A100"], round(free * (needs or 0)))
        missing = choose_plan(model, few_short_rows, device, given)
        needs = missing.rejected[0].needs_bytes
    assert needs is not None
    enough = choose_plan(model, few_short_rows, with_free(devices["A100"], needs), given)
    assert enough.best is not None
    less = round(0.97 * needs)
    short = choose_plan(model, few_short_rows, with_free(devices["A100"], less), given)
    assert short.best is None


@pytest.mark.parametrize(("every", "tried"), [(1, {False, True}), (2, {True})])
def test_which_layers_are_checkpointed_is_kept(
    every: int,
    tried: set[bool],
    small_llama: ModelSpec,
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    given = {"method": "lora", "every_n_layers": every}
    _, candidates = space_of(small_llama, few_short_rows, devices["A100"], given)
    found = [candidate.reasoned.plan for candidate in candidates]
    assert {plan.every_n_layers for plan in found if plan.gradient_checkpointing} == {every}
    assert {plan.gradient_checkpointing for plan in found} == tried


def test_estimate_says_that_it_fits_where_plan_does(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    """Both keep the margin free; `margin_bytes` is what is left then."""
    given = {
        "method": "lora",
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "loss": "trl-fused",
        "lora_rank": 16,
        "optim": "adamw_torch_fused",
    }
    best = chosen(small_llama, few_short_rows, devices["A100"], given)
    for short in (0, 1):
        device = with_free(devices["A100"], needed_bytes(best.memory) - short)
        ranking = choose_plan(small_llama, few_short_rows, device, given)
        told = estimate_to_dict(small_llama, best.reasoned, best.memory, device, [])["fits"]
        assert told["margin_bytes"] == -short
        assert told["verdict"] == ("fits" if ranking.best else "does not fit")
        printed = render(totals_table(best.memory, device))
        assert "5 % of that, for the estimate's own error" in printed
        assert ("left over" in printed) == bool(ranking.best)


# --- ranking


@settings(max_examples=40)
@for_all(
    method=st.sampled_from(sorted(COMPARED_METHODS)),
    size=st.sampled_from(["135M", "1.7B", "8B"]),
    free_gib=st.floats(0.5, 40),
    more_gib=st.floats(0, 40),
)
def test_more_free_memory_never_gives_a_slower_plan(
    method: str,
    size: str,
    free_gib: float,
    more_gib: float,
    sized: dict[str, ModelSpec],
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    """Of one method and optimizer; what is preferred for its quality may be slower than what is
    given up for it, such as states in 8 bits."""
    model, given = sized[size], {"method": method}
    less, more = (
        choose_plan(model, few_short_rows, with_free(devices["A100"], round(gib * GIB)), given).best
        for gib in (free_gib, free_gib + more_gib)
    )
    if less is not None:
        assert more is not None
        if more.plan.optim == less.plan.optim:
            assert more.step.step_seconds <= less.step.step_seconds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", ["135M", "1.7B", "8B"])
def test_the_least_memory_is_taken_among_plans_within_2_percent_of_the_fastest(
    size: str,
    device: str,
    sized: dict[str, ModelSpec],
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    best = choose_plan(sized[size], few_short_rows, devices[device], {}).best
    if best is None:
        return
    given = {"method": best.plan.method}
    model = sized[size]
    space, candidates = space_of(model, few_short_rows, devices[device], given)
    evaluated = map(space.evaluate, candidates)
    alike = cheapest_that_fit(model, few_short_rows, evaluated, lambda one: one.step.step_seconds)
    assert best.step.step_seconds <= 1.02 * alike[0].step.step_seconds
    for one in alike:
        assert best.memory.allocated_peak_bytes <= one.memory.allocated_peak_bytes


def test_the_same_input_gives_the_same_ranking(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    rankings = [
        choose_plan(sized["8B"], few_short_rows, devices["RTX 4090"], {"lora_rank": 8})
        for _ in range(2)
    ]
    assert rankings[0] == rankings[1]


def test_an_effective_batch_is_the_recipes_however_it_is_split(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    """Under 1,000 rows: 8 rows a step."""
    for device in devices.values():
        best = choose_plan(sized["1.7B"], few_short_rows, device, {}).best
        assert best is not None and best.plan.effective_batch_size == 8


def test_a_given_accumulation_does_not_reward_small_batches(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    """Steps of 2 x 1 rows are shorter than steps of 2 x 4, but there are four times as many."""
    free = chosen(small_llama, few_short_rows, devices["A100"])
    assert free.plan.per_device_train_batch_size > 1
    accumulation = free.plan.gradient_accumulation_steps
    fixed = chosen(
        small_llama,
        few_short_rows,
        devices["A100"],
        {"gradient_accumulation_steps": accumulation},
    )
    assert fixed.step.tokens_per_second_per_gpu >= 0.97 * free.step.tokens_per_second_per_gpu
    assert fixed.plan.effective_batch_size == free.plan.effective_batch_size


@pytest.mark.parametrize(
    ("names", "free_gib", "size", "method"),
    [
        (["T4"], 15, "1.7B", "lora"),
        (["T4"], 5, "1.7B", "qlora"),
        (["RTX 4090"], 23, "8B", "lora"),
        (["RTX 4090"], 12, "8B", "qlora"),
        (["RTX 4090"], 20, "1.7B", "full"),
        (["RTX 4090", "RTX 4090"], 14, "8B", "lora"),
        (["RTX 4090", "A100"], 23, "8B", "lora"),
        (["A100", "A100", "A100", "A100"], 70, "8B", "full"),
        (["A100", "A100", "A100", "A100"], 40, "70B", "qlora"),
        (["CPU"], 60, "1.7B", "lora"),
    ],
)
def test_the_search_finds_what_looking_at_every_plan_finds(
    names: list[str],
    free_gib: int,
    size: str,
    method: str,
    sized: dict[str, ModelSpec],
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    model, given = sized[size], {"method": method}
    gpus = [
        structs.replace(with_free(devices[name], free_gib * GIB), index=number)
        for number, name in enumerate(names)
    ]
    space = Space(model, few_short_rows, given, OWN_STACK)
    teams = teams_of(gpus, None)

    def price(one: Evaluated) -> float:
        return Pricing().of(one.plan, one.step)

    alike: list[Evaluated] = []
    for conceded in space.concessions(METHODS[method], teams):
        groups = space.groups(METHODS[method], teams, conceded)
        evaluated = map(space.evaluate, space.candidates(groups))
        alike = cheapest_that_fit(model, few_short_rows, evaluated, price)
        if alike:
            break
    best = choose_plan(model, few_short_rows, gpus, given).best
    assert (best is None) == (not alike)
    if best is None:
        return
    least = min(alike, key=lambda one: (one.memory.required_bytes, price(one)))
    assert best.plan == least.plan


@pytest.mark.parametrize("given", [{"method": "full"}, {"sharding": "fsdp"}])
def test_another_gpu_never_makes_a_run_slower(
    given: dict[str, Any],
    sized: dict[str, ModelSpec],
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    gpus = [structs.replace(devices["RTX 4090"], index=number) for number in range(8)]
    before = None
    for number in range(2 if "sharding" in given else 1, 9):
        best = choose_plan(sized["1.7B"], few_short_rows, gpus[:number], given).best
        if before is not None and best is not None and best.plan.method == before.plan.method:
            assert best.seconds_per_row <= 1.02 * before.seconds_per_row
        assert best is not None or before is None
        before = best


# --- goals and limits


def figures(evaluated: Evaluated) -> dict[str, float]:
    return {
        "fastest": evaluated.seconds_per_row,
        "cheapest": evaluated.gpu_seconds_per_row,
        "least-memory": evaluated.memory.required_bytes,
    }


@pytest.mark.parametrize("goal", ["fastest", "cheapest", "least-memory"])
def test_what_is_preferred_is_best_at_that(
    goal: str, sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    gpus = [structs.replace(devices["A100"], index=number) for number in range(4)]
    rankings = {
        name: choose_plan(sized["1.7B"], few_short_rows, gpus, {}, goal=name)
        for name in ("quality", "fastest", "cheapest", "least-memory")
    }
    best = {name: ranking.best for name, ranking in rankings.items()}
    mine = best[goal]
    assert mine is not None
    for name, other in best.items():
        assert other is not None
        slack = 1.0 if goal == "least-memory" else 1.02
        assert figures(mine)[goal] <= slack * figures(other)[goal], name
    assert f"--prefer {goal}" in mine.reasoned.reasons["method"].why
    for other in rankings[goal].alternatives:
        assert figures(mine)[goal] <= figures(other)[goal]
        assert why_not(other, mine, goal)


def test_one_gpu_is_cheaper_than_several_that_wait_for_each_other(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    slow = structs.replace(devices["A100"], link_bytes_per_second=1e9)
    gpus = [structs.replace(slow, index=number) for number in range(4)]
    given = {"method": "full"}
    cheapest, fastest = (
        choose_plan(sized["1.7B"], few_short_rows, gpus, given, goal=goal).best
        for goal in ("cheapest", "fastest")
    )
    assert cheapest is not None and fastest is not None
    assert cheapest.plan.num_gpus == 1
    assert cheapest.gpu_seconds_per_row < 0.5 * 4 * fastest.seconds_per_row


def test_a_goal_leaves_a_given_method_its_reason(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    given = {"method": "lora"}
    best = choose_plan(small_llama, few_short_rows, devices["A100"], given, goal="fastest").best
    assert best is not None and best.reasoned.reasons["method"].origin == "given"


def test_plans_beyond_the_limits_are_not_taken(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    model, device, rows = sized["8B"], devices["RTX 4090"], few_short_rows.num_train_rows
    free = choose_plan(model, few_short_rows, device, {})
    assert free.best is not None
    taken = RunTime.of(free.best.plan, free.best.step, rows).seconds
    usd = 2.0 * taken / 3600
    for most in (
        Limits(seconds=1.001 * taken),
        Limits(usd=1.001 * usd, usd_per_gpu_hour=2.0),
        Limits(usd=0.0),  # nobody knows what the card costs
    ):
        assert choose_plan(model, few_short_rows, device, {}, limits=most).best == free.best
    for least in (Limits(seconds=0.01 * taken), Limits(usd=0.01 * usd, usd_per_gpu_hour=2.0)):
        ranking = choose_plan(model, few_short_rows, device, {}, limits=least)
        assert ranking.best is None
        assert any(", over " in rejection.reason for rejection in ranking.rejected)


def test_an_unquantized_base_that_takes_far_longer_is_passed_over(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    """Divided among GPUs with slow links its weights are sent in every micro-batch."""
    slow = structs.replace(devices["RTX 4090"], link_bytes_per_second=2e9)
    gpus = [structs.replace(slow, index=number) for number in range(8)]
    ranking = choose_plan(sized["8B"], few_short_rows, with_each(gpus, 14), {})
    assert ranking.best is not None and ranking.best.plan.method == "qlora"
    (lora,) = (e for e in ranking.alternatives if e.plan.method == "lora")
    assert lora.seconds_per_row > USEFUL_TIMES * ranking.best.seconds_per_row
    assert "times as long" in why_not(lora, ranking.best, ranking.goal)


def with_each(gpus: list[Device], free_gib: int) -> list[Device]:
    return [with_free(gpu, free_gib * GIB) for gpu in gpus]


# --- given settings


@pytest.mark.parametrize(
    "given",
    [
        {"method": "freeze"},
        {"method": "full", "optim": "sgd"},
        {"quantization": "int8"},
        {"quantization": "nf4", "double_quant": False},
        {"method": "lora", "quantization": "nf4"},
        {"lora_rank": 4, "lora_alpha": 5, "target_modules": ("q_proj", "v_proj")},
        {"max_length": 128, "per_device_train_batch_size": 3},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 5},
        {"dtype": "float32", "mixed_precision": "no", "loss": "stock"},
        {"num_gpus": 2, "learning_rate": 1e-3, "num_train_epochs": 1.5, "seed": 7},
        {"max_steps": 11, "attn_implementation": "eager", "trainer": "transformers"},
    ],
    ids=lambda given: "-".join(given),
)
def test_given_settings_are_kept_in_every_plan_and_marked_as_given(
    given: dict[str, Any], small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    ranking = choose_plan(small_llama, few_short_rows, devices["A100"], given)
    assert ranking.best is not None
    for evaluated in (ranking.best, *ranking.alternatives):
        for name, value in given.items():
            assert getattr(evaluated.plan, name) == value
            assert evaluated.reasoned.reasons[name].origin == "given"


def test_what_is_chosen_is_not_marked_as_given(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    best = chosen(small_llama, few_short_rows, devices["A100"], {"lora_rank": 4})
    origins = {name: reason.origin for name, reason in best.reasoned.reasons.items()}
    assert [name for name, origin in origins.items() if origin == "given"] == ["lora_rank"]
    assert all(reason.why for reason in best.reasoned.reasons.values())


def test_alpha_follows_a_given_rank(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    best = chosen(small_llama, few_short_rows, devices["A100"], {"lora_rank": 64})
    assert best.plan.lora_alpha == 128
    assert best.reasoned.reasons["lora_alpha"].why == "twice the rank"


@pytest.mark.parametrize("device", ["A100", "CPU"])
def test_an_unquantized_base_may_be_asked_for(
    device: str, small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    best = chosen(small_llama, few_short_rows, devices[device], {"quantization": "none"})
    assert (best.plan.method, best.plan.quantization) == ("lora", "none")


def test_an_unquantized_base_asked_for_leaves_qlora_out(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    ranking = choose_plan(small_llama, few_short_rows, devices["A100"], {"quantization": "none"})
    methods = {e.plan.method for e in ranking.alternatives} | {r.method for r in ranking.rejected}
    assert methods == {"freeze", "full"}


def test_a_setting_that_rules_out_some_methods_leaves_the_others(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    """Weights in fp16 cannot be trained under fp16 autocast, adapters beside them can."""
    given = {"dtype": "float16"}
    ranking = choose_plan(small_llama, few_short_rows, devices["T4"], given)
    assert ranking.best is not None and ranking.best.plan.method == "lora"
    reasons = {r.method: r.reason for r in ranking.rejected}
    assert "float16 weights" in reasons["full"] and "float16 weights" in reasons["freeze"]
    with pytest.raises(InputError, match="float16 weights"):
        choose_plan(small_llama, few_short_rows, devices["T4"], {**given, "method": "full"})
    with pytest.raises(UnknownNameError, match="`qproj`"):
        choose_plan(small_llama, few_short_rows, devices["T4"], {"target_modules": ("qproj",)})


def test_a_model_of_one_layer_has_a_plan(
    tiny_spec: MakeSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    """Though `freeze` would train two layers by default."""
    model = tiny_spec("llama", num_hidden_layers=1, max_position_embeddings=512)
    assert chosen(model, few_short_rows, devices["A100"]).plan.method == "lora"
    freeze = chosen(model, few_short_rows, devices["A100"], {"method": "freeze"})
    assert freeze.plan.num_trainable_layers == 1
    assert freeze.reasoned.reasons["num_trainable_layers"].origin == "derived"


@pytest.mark.parametrize("given", [{"method": "qlora"}, {"quantization": "nf4"}])
def test_a_processor_has_a_quantized_base_where_it_is_asked_for(
    given: dict[str, Any], small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    asked = choose_plan(small_llama, few_short_rows, devices["CPU"], given)
    assert asked.best is not None and asked.best.plan.quantization == "nf4"
    unasked = choose_plan(small_llama, few_short_rows, devices["CPU"], {})
    assert "for GPUs" in {r.method: r.reason for r in unasked.rejected}["qlora"]


def test_settings_that_contradict_each_other_are_refused(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    with pytest.raises(InputError, match="cannot train a base quantized"):
        choose_plan(
            small_llama, few_short_rows, devices["A100"], {"method": "full", "quantization": "nf4"}
        )


def test_an_unknown_method_is_told_the_nearest(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    with pytest.raises(UnknownNameError, match="`lorra`"):
        choose_plan(small_llama, few_short_rows, devices["A100"], {"method": "lorra"})


def test_an_old_card_takes_no_quantized_base(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    old = structs.replace(devices["T4"], compute_capability=(5, 2))
    ranking = choose_plan(small_llama, few_short_rows, old, {})
    reasons = {r.method: r.reason for r in ranking.rejected}
    assert "compute capability 6.0" in reasons["qlora"]
    assert ranking.best is not None and ranking.best.plan.method == "lora"


# --- the recipe around it


@pytest.mark.parametrize(
    ("device", "method", "dtype", "mixed_precision"),
    [
        ("A100", "lora", "bfloat16", "bf16"),
        ("A100", "full", "float32", "bf16"),
        ("T4", "lora", "float16", "fp16"),
        ("T4", "full", "float32", "fp16"),
        ("CPU", "lora", "float32", "no"),
        ("CPU", "full", "float32", "no"),
    ],
)
def test_precision_follows_the_device(
    device: str,
    method: str,
    dtype: str,
    mixed_precision: str,
    small_llama: ModelSpec,
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    plan = chosen(small_llama, few_short_rows, devices[device], {"method": method}).plan
    assert (plan.dtype, plan.mixed_precision) == (dtype, mixed_precision)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_attention_kernel_is_one_that_the_model_has(
    family: str,
    tiny_config: MakeConfig,
    tiny_spec: MakeSpec,
    devices: Devices,
    make_data: MakeData,
) -> None:
    """transformers refuses to build a model with a kernel it lacks (Gemma 2 has no SDPA)."""
    torch = pytest.importorskip("torch", reason="models are torch modules")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    model = tiny_spec(family)
    if model.code != "transformers" or not model.loads_as_causal_lm:
        pytest.skip("AutoModelForCausalLM does not build it")
    data = make_data([40] * 50)
    plan = chosen(model, data, devices["A100"], {"method": "lora"}).plan
    with torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**tiny_config(family)),
            attn_implementation=plan.attn_implementation,
        )


def test_a_kernel_that_the_model_lacks_is_refused(
    tiny_spec: MakeSpec, devices: Devices, make_data: MakeData
) -> None:
    given = {"attn_implementation": "sdpa"}
    with pytest.raises(InputError, match="no `sdpa` attention for gemma2"):
        choose_plan(tiny_spec("gemma2"), make_data([40] * 50), devices["A100"], given)
    with pytest.raises(InputError, match="no `sdpa` attention for gemma2"):
        estimate_recipe(tiny_spec("gemma2"), None, given)
    assert estimate_recipe(tiny_spec("gemma2"), None, {}).plan.attn_implementation == "eager"


# --- candidates that are refused


def test_plans_that_are_not_modelled_are_left_out(
    tiny_spec: MakeSpec, devices: Devices, make_data: MakeData
) -> None:
    """Under checkpointing PEFT loses the tasks of Poly's rows."""
    given = {"method": "poly"}
    ranking = choose_plan(tiny_spec("llama"), make_data([40] * 50), devices["A100"], given)
    assert ranking.best is not None and not ranking.best.plan.gradient_checkpointing
    (left,) = ranking.left_out
    assert "computed again" in left.reason and "--gradient-checkpointing" in left.hint
    assert left.count == 16  # 1, 2, 4 and 8 rows; every layer or one of two; two losses


def test_where_all_plans_are_refused_the_refusal_is_shown(
    tiny_spec: MakeSpec, devices: Devices, make_data: MakeData
) -> None:
    model, data = tiny_spec("llama"), make_data([40] * 50)
    given = {"method": "poly", "gradient_checkpointing": True}
    with pytest.raises(InputError, match="computed again") as refused:
        choose_plan(model, data, devices["A100"], given)
    assert "--gradient-checkpointing" in (refused.value.hint or "")


def test_plans_that_cannot_be_are_left_out(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    """A layerwise optimizer does not accumulate: only the micro-batch of all rows remains, of
    three smaller ones in six ways of checkpointing with two losses none."""
    given = {"method": "lora", "optim": "galore_adamw_layerwise"}
    ranking = choose_plan(small_llama, few_short_rows, devices["A100"], given)
    assert ranking.best is not None and ranking.best.plan.gradient_accumulation_steps == 1
    (left,) = ranking.left_out
    assert left.count == 36 and "cannot accumulate" in left.reason


def test_nothing_is_left_out_of_a_usual_search(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    assert choose_plan(small_llama, few_short_rows, devices["A100"], {}).left_out == ()


def test_the_loss_is_one_that_the_trainer_has(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    for trainer, loss in (("trl", "trl-fused"), ("transformers", "stock")):
        given = {"trainer": trainer}
        assert chosen(small_llama, few_short_rows, devices["A100"], given).plan.loss == loss
        assert estimate_recipe(small_llama, None, given).plan.loss == loss


@pytest.mark.parametrize(
    ("longest", "max_length"), [(1, 64), (64, 64), (65, 128), (449, 512), (100_000, 8192)]
)
def test_max_length_is_the_longest_row_rounded_up_within_the_models_positions(
    longest: int,
    max_length: int,
    small_llama: ModelSpec,
    devices: Devices,
    make_data: MakeData,
) -> None:
    data = make_data([longest, *[1] * 50])
    assert chosen(small_llama, data, devices["A100"]).plan.max_length == max_length


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"),
    [(999, 3.0, 8), (1_000, 3.0, 16), (2_000, 2.0, 16), (20_000, 1.0, 32)],
)
def test_the_recipe_follows_the_number_of_rows(
    rows: int,
    epochs: float,
    batch: int,
    small_llama: ModelSpec,
    devices: Devices,
    make_data: MakeData,
) -> None:
    plan = chosen(small_llama, make_data([100] * rows), devices["A100"]).plan
    assert (plan.num_train_epochs, plan.effective_batch_size) == (epochs, batch)


# --- steps and the time budget


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "gpus", "epochs", "steps"),
    [
        (480, 4, 2, 1, 1.0, 60),
        (480, 4, 2, 2, 1.0, 30),
        (481, 4, 2, 1, 1.0, 61),  # 121 micro-batches, the last step has one
        (10, 1, 4, 1, 2.0, 6),
        (10, 1, 4, 1, 1.5, 5),  # 3 a pass, 4.5 in all, which the Trainer rounds up
        (10, 1, 4, 1, 0.5, 2),
        (1, 8, 4, 1, 1.0, 1),
    ],
)
def test_optimizer_steps_as_the_trainer_counts_them(
    rows: int, batch: int, accumulation: int, gpus: int, epochs: float, steps: int
) -> None:
    plan = TrainingPlan(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_gpus=gpus,
        num_train_epochs=epochs,
    )
    assert optimizer_steps(plan, rows) == steps
    assert optimizer_steps(plan.replace(max_steps=7), rows) == 7


@for_all(
    rows=st.integers(1, 5000),
    batch=st.integers(1, 32),
    accumulation=st.integers(1, 16),
    epochs=st.sampled_from([0.1, 0.5, 1.0, 1.25, 2.5, 3.0]),
)
def test_optimizer_steps_by_transformers_formula(
    rows: int, batch: int, accumulation: int, epochs: float
) -> None:
    """`Trainer.set_initial_training_values`: ceil(epochs x steps of an epoch)."""
    micro_batches = math.ceil(rows / batch)
    per_epoch = max(micro_batches // accumulation + int(micro_batches % accumulation > 0), 1)
    plan = TrainingPlan(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
    )
    assert optimizer_steps(plan, rows) == math.ceil(epochs * per_epoch)


def test_a_run_longer_than_the_budget_is_cut_to_it(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    whole = chosen(small_llama, few_short_rows, devices["CPU"])
    seconds = whole.step.step_seconds
    cut = limit_to_time_budget(whole, few_short_rows, {}, 10.5 * seconds)
    assert cut.plan.max_steps == 10
    reason = cut.reasoned.reasons["max_steps"]
    assert reason.origin == "derived" and "--num-train-epochs" in reason.why
    assert cut.memory == whole.memory and cut.step == whole.step
    assert optimizer_steps(cut.plan, few_short_rows.num_train_rows) * seconds <= 10.5 * seconds


def test_a_cut_run_still_makes_two_steps(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    whole = chosen(small_llama, few_short_rows, devices["CPU"])
    assert limit_to_time_budget(whole, few_short_rows, {}, 0.0).plan.max_steps == 2


def test_a_run_within_the_budget_stays_whole(
    small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    whole = chosen(small_llama, few_short_rows, devices["CPU"])
    assert limit_to_time_budget(whole, few_short_rows, {}, 1e9) == whole


@pytest.mark.parametrize("given", [{"max_steps": 500}, {"num_train_epochs": 3.0}])
def test_an_amount_of_training_that_was_given_is_not_cut(
    given: dict[str, Any], small_llama: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    whole = chosen(small_llama, few_short_rows, devices["CPU"], given)
    assert limit_to_time_budget(whole, few_short_rows, given, 1.0) == whole


# --- devices


def test_what_devices_support(devices: Devices) -> None:
    supports = {
        name: (device.supports_bfloat16, device.supports_quantization("nf4"))
        for name, device in devices.items()
    }
    assert supports == {
        "T4": (False, True),
        "RTX 4090": (True, True),
        "A100": (True, True),
        "CPU": (True, False),
    }


@pytest.mark.parametrize(
    ("capability", "four_bits", "eight_bits"),
    [((5, 2), False, False), ((6, 0), True, False), ((7, 0), True, False), ((7, 5), True, True)],
)
def test_eight_bits_need_a_newer_card_than_four(
    capability: tuple[int, int],
    four_bits: bool,
    eight_bits: bool,
    small_llama: ModelSpec,
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    """LLM.int8 on Turing and later, NF4 and FP4 on Pascal and later (bitsandbytes' guide)."""
    assert {*QUANTIZATION_CAPABILITY, "none"} == set(QUANTIZATIONS)
    card = structs.replace(devices["T4"], compute_capability=capability)
    assert card.supports_quantization("nf4") == card.supports_quantization("fp4") == four_bits
    assert card.supports_quantization("int8") == eight_bits
    given = {"quantization": "int8"}
    if eight_bits:
        assert chosen(small_llama, few_short_rows, card, given).plan.quantization == "int8"
        return
    with pytest.raises(InputError, match=r"compute capability 7\.5, which int8") as refused:
        choose_plan(small_llama, few_short_rows, card, given)
    assert ("`--quantization nf4`" in (refused.value.hint or "")) == four_bits


def test_the_best_device_is_the_gpu_with_most_free_memory_else_the_processor(
    devices: Devices,
) -> None:
    host = Host(
        cpu_name="a processor",
        num_cores=2,
        ram_total_bytes=32 * GIB,
        ram_available_bytes=30 * GIB,
        disk_free_bytes=100 * GIB,
        disk_path="/",
    )
    cpu = devices["CPU"]
    busy = with_free(devices["A100"], 2 * GIB)
    assert Machine(gpus=(busy, devices["T4"]), cpu=cpu, host=host).best_device.name == "T4"
    assert Machine(gpus=(), cpu=cpu, host=host).best_device is cpu


def test_a_sharding_asked_for_is_kept(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    """What a sharding cannot be combined with is rejected with its reason."""
    given = {"sharding": "zero3", "num_gpus": 4}
    ranking = choose_plan(sized["8B"], few_short_rows, devices["RTX 4090"], given)
    assert ranking.best is not None
    assert (ranking.best.plan.sharding, ranking.best.plan.method) == ("zero3", "lora")
    (quantized,) = (r for r in ranking.rejected if r.method == "qlora")
    assert "quantized base" in quantized.reason


@pytest.mark.parametrize("method", sorted(COMPARED_METHODS))
@pytest.mark.parametrize("number", [1, 4])
def test_what_is_held_whatever_the_batch_is_a_bound(
    method: str,
    number: int,
    sized: dict[str, ModelSpec],
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    gpus = [structs.replace(devices["A100"], index=index) for index in range(number)]
    space = Space(sized["1.7B"], few_short_rows, {}, OWN_STACK)
    teams = teams_of(gpus, None)
    for conceded in space.concessions(METHODS[method], teams):
        for group in space.groups(METHODS[method], teams, conceded):
            evaluated = space.evaluate(space.candidate(group, group.sizes[0]))
            assert space.least_bytes(group) <= evaluated.memory.allocated_peak_bytes


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("gpu", ["T4", "A100"])
def test_no_plan_is_faster_than_its_groups_bound(
    method: str,
    gpu: str,
    sized: dict[str, ModelSpec],
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    gpus = [structs.replace(devices[gpu], index=index) for index in range(4)]
    space = Space(sized["1.7B"], few_short_rows, {}, OWN_STACK)
    groups = space.groups(METHODS[method], teams_of(gpus, None))
    keeping = {
        (id(group.team), group.base.plan.loss, group.base.plan.sharding): space.kept(group)
        for group in groups
        if not group.base.plan.gradient_checkpointing
    }
    for group in groups:
        plan = group.base.plan
        kept = keeping[id(group.team), plan.loss, plan.sharding]
        bound = space.least_price(group, kept, Pricing())
        for size in group.sizes:
            made = space.candidate(group, size)
            assert Pricing().of(made.reasoned.plan, made.step) >= bound > 0


def needs_least(model: ModelSpec, data: DataProfile, device: Device, given: dict[str, Any]) -> int:
    """Bytes of the plan that needs least."""
    nearest = choose_plan(model, data, with_free(device, 0), given).nearest
    assert nearest is not None
    return needed_bytes(nearest.memory)


def test_the_least_is_given_up_that_makes_room(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    """Full tuning that fits with the optimizer's states in 8 bits alone."""
    model, given = sized["1.7B"], {"method": "full"}
    whole = chosen(model, few_short_rows, devices["A100"], given)
    assert whole.plan.optim == "adamw_torch_fused"
    fixed = {**given, "optim": whole.plan.optim}
    least = needs_least(model, few_short_rows, devices["A100"], fixed)
    conceding = chosen(model, few_short_rows, with_free(devices["A100"], least - GIB), given)
    assert conceding.plan.optim == SMALL_OPTIMIZER
    assert conceding.reasoned.reasons["optim"].origin == "derived"


def test_what_is_given_stays_even_where_giving_it_up_would_make_room(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    given = {"method": "full", "optim": "adamw_torch_fused"}
    ranking = choose_plan(
        sized["1.7B"], few_short_rows, with_free(devices["A100"], 20 * GIB), given
    )
    assert ranking.best is None and ranking.nearest is not None
    assert ranking.nearest.plan.optim == "adamw_torch_fused"


def test_a_step_that_does_not_accumulate_may_be_the_smallest(
    sized: dict[str, ModelSpec], devices: Devices, few_short_rows: DataProfile
) -> None:
    """Gradients that accumulate are there in forward and backward, too."""
    model, given = sized["1.7B"], {"method": "full", "optim": SMALL_OPTIMIZER}
    needs = {
        size: needs_least(
            model, few_short_rows, devices["A100"], {**given, "per_device_train_batch_size": size}
        )
        for size in (1, 8)
    }
    assert needs[8] < needs[1]
    ranking = choose_plan(model, few_short_rows, with_free(devices["A100"], needs[8]), given)
    assert ranking.best is not None and ranking.best.plan.per_device_train_batch_size == 8
