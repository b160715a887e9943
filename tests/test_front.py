"""The Pareto front of memory, time and method, beside all plans looked at one by one."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.families import spec_from_size
from ftplan.planner.front import front_of, thinned
from ftplan.planner.goals import Limits
from ftplan.planner.hardware_spec import Device, Host
from ftplan.planner.memory import fits
from ftplan.planner.methods import resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.run_time import RunTime
from ftplan.planner.search import choose_plan
from ftplan.planner.space import Space
from ftplan.planner.stack import OWN_STACK
from ftplan.planner.teams import teams_of
from ftplan.planner.units import GIB

ALIKE = 1.02

MODEL = spec_from_size(17 * 10**8, "1.7B")


def machine(devices: dict[str, Device], name: str, number: int) -> list[Device]:
    return [structs.replace(devices[name], index=index) for index in range(number)]


def quality(ranking: Ranking, one: Evaluated) -> int:
    return ranking.by_policy.index(one.plan.method)


def dominates(ranking: Ranking, one: Evaluated, other: Evaluated) -> bool:
    """As good in everything; of equal plans neither."""
    goods = [
        (e.memory.required_bytes, e.seconds_per_row, quality(ranking, e)) for e in (one, other)
    ]
    return goods[0] != goods[1] and all(a <= b for a, b in zip(*goods, strict=True))


def every_plan(
    model: ModelSpec, data: DataProfile, gpus: list[Device], given: dict[str, Any], ranking: Ranking
) -> list[Evaluated]:
    """All that fit, those that the search knows as it knows them."""
    known = [one for one in (ranking.best, *ranking.alternatives) if one]
    plans = [one.plan for one in known]
    found = list(known)
    for method in ranking.by_policy:
        space = Space(model, data, given, OWN_STACK)
        groups = space.groups(resolve_method(method), teams_of(gpus, None))
        for candidate in space.candidates(groups):
            try:
                evaluated = space.evaluate(candidate)
            except InputError:
                continue
            if evaluated.plan not in plans and fits(evaluated.memory, evaluated.device):
                found.append(evaluated)
    return found


def key(one: Evaluated) -> tuple[str, int, float]:
    return one.plan.method, one.memory.required_bytes, one.seconds_per_row


@pytest.mark.parametrize(
    ("name", "number", "given"),
    [
        ("T4", 1, {}),
        ("RTX 4090", 1, {}),
        ("RTX 4090", 2, {}),
        ("A100", 2, {"gradient_accumulation_steps": 2}),
        ("T4", 1, {"per_device_train_batch_size": 2, "gradient_checkpointing": True}),
    ],
)
def test_the_front_is_what_looking_at_every_plan_finds(
    name: str,
    number: int,
    given: dict[str, Any],
    devices: dict[str, Device],
    few_short_rows: DataProfile,
) -> None:
    gpus = machine(devices, name, number)
    ranking = choose_plan(MODEL, few_short_rows, gpus, given)
    front = front_of(ranking, MODEL, few_short_rows, gpus, given)
    plans = every_plan(MODEL, few_short_rows, gpus, given, ranking)
    undominated = {
        key(one) for one in plans if not any(dominates(ranking, other, one) for other in plans)
    }
    assert len(front) == len(undominated)
    assert {key(one) for one in front} == undominated
    for one in front:
        assert not any(dominates(ranking, other, one) for other in front)


@pytest.mark.parametrize("goal", ["quality", "fastest", "least-memory"])
@pytest.mark.parametrize("name", ["T4", "RTX 4090", "A100"])
def test_what_was_chosen_is_on_the_front_or_alike(
    name: str, goal: str, devices: dict[str, Device], few_short_rows: DataProfile
) -> None:
    gpus = machine(devices, name, 1)
    ranking = choose_plan(MODEL, few_short_rows, gpus, {}, goal=goal)
    best = ranking.best
    assert best is not None
    front = front_of(ranking, MODEL, few_short_rows, gpus, {})
    for one in front:
        if dominates(ranking, one, best):
            assert best.seconds_per_row <= ALIKE * one.seconds_per_row
            assert best.memory.required_bytes <= ALIKE * one.memory.required_bytes


def test_plans_beyond_the_limits_are_not_on_it(
    devices: dict[str, Device], few_short_rows: DataProfile
) -> None:
    gpu = devices["RTX 4090"]
    ranking = choose_plan(MODEL, few_short_rows, gpu, {})
    rows = few_short_rows.num_train_rows

    def seconds(one: Evaluated) -> float:
        return RunTime.of(one.plan, one.step, rows).seconds

    front = front_of(ranking, MODEL, few_short_rows, gpu, {})
    most = sorted(map(seconds, front))[len(front) // 2]
    limits = Limits(seconds=most)
    limited = choose_plan(MODEL, few_short_rows, gpu, {}, limits=limits)
    within = front_of(limited, MODEL, few_short_rows, gpu, {}, limits=limits)
    assert {key(one) for one in within} == {key(one) for one in front if seconds(one) <= most}


def test_without_the_hosts_ram_only_what_is_known_is_left(
    devices: dict[str, Device], few_short_rows: DataProfile
) -> None:
    gpu = devices["RTX 4090"]
    ranking = choose_plan(MODEL, few_short_rows, gpu, {})
    little = Host(
        cpu_name="a processor",
        num_cores=1,
        ram_total_bytes=GIB,
        ram_available_bytes=1,
        disk_path=".",
        disk_free_bytes=GIB,
    )
    front = front_of(ranking, MODEL, few_short_rows, gpu, {}, host=little)
    known = [one for one in (ranking.best, *ranking.alternatives) if one]
    assert front and all(one in known for one in front)


def test_nothing_fits_and_the_front_is_empty(
    devices: dict[str, Device], few_short_rows: DataProfile
) -> None:
    model = spec_from_size(70 * 10**9, "70B")
    ranking = choose_plan(model, few_short_rows, devices["T4"], {})
    assert ranking.best is None
    assert front_of(ranking, model, few_short_rows, devices["T4"], {}) == []


@pytest.mark.parametrize("most", [2, 3, 5, 12])
def test_thinning_keeps_the_ends_and_what_was_chosen(
    most: int, devices: dict[str, Device], few_short_rows: DataProfile
) -> None:
    ranking = choose_plan(MODEL, few_short_rows, devices["RTX 4090"], {})
    front = front_of(ranking, MODEL, few_short_rows, devices["RTX 4090"], {})
    assert len(front) > 5
    for keep in front if most > 2 else (front[0], front[-1]):
        shown = thinned(front, most, keep)
        assert len(shown) == min(most, len(front)) and keep in shown
        assert shown[0] is front[0] and shown[-1] is front[-1]
        places = [front.index(one) for one in shown]
        assert places == sorted(set(places))
