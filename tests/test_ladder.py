"""What to give up where nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from msgspec import structs

from ftplan.planner.concessions import SMALL_OPTIMIZER
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.families import spec_from_size
from ftplan.planner.hardware_spec import Device
from ftplan.planner.ladder import Rank, ladder
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.ranking import Ranking
from ftplan.planner.search import choose_plan
from ftplan.planner.units import GIB

Devices = dict[str, Device]


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return spec_from_size(8 * 10**9, "8B")


def rank_on(
    device: Device, model: ModelSpec, data: DataProfile, given: Mapping[str, Any]
) -> tuple[Rank, Ranking]:
    def rank(changed: Mapping[str, Any]) -> Ranking:
        return choose_plan(model, data, device, {**given, **changed})

    return rank, rank({})


@pytest.mark.parametrize(
    ("device", "given"),
    [
        ("RTX 4090", {"method": "full"}),
        ("RTX 4090", {"method": "lora", "loss": "stock", "per_device_train_batch_size": 16}),
        ("T4", {"method": "lora"}),
        ("T4", {"quantization": "none"}),
        ("A100", {"method": "full", "per_device_train_batch_size": 8}),
    ],
)
def test_the_last_rung_fits_and_its_flags_say_how(
    device: str,
    given: dict[str, Any],
    model: ModelSpec,
    devices: Devices,
    few_short_rows: DataProfile,
) -> None:
    rank, ranking = rank_on(devices[device], model, few_short_rows, given)
    assert ranking.best is None and ranking.nearest is not None
    rungs = ladder(rank, ranking.nearest, few_short_rows, given)
    *missing, last = rungs
    assert last.fits and last.seconds and last.needed_bytes <= devices[device].free_bytes
    assert not any(rung.fits or rung.seconds for rung in missing)
    assert all(rung.needed_bytes > devices[device].free_bytes for rung in missing)
    names = [flag.split()[0][2:].replace("-", "_") for flag in last.flags]
    plan = rank({name: value_of(flag) for name, flag in zip(names, last.flags, strict=True)}).best
    assert plan is not None
    for name in names:  # and it takes them all
        others = {n: value_of(f) for n, f in zip(names, last.flags, strict=True) if n != name}
        assert len(names) == 1 or rank(others).best is None or name == names[-1]


def value_of(flag: str) -> Any:
    value = flag.split()[1]
    return {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)


def test_where_no_step_is_enough_the_last_is_the_nearest(
    devices: Devices, few_short_rows: DataProfile
) -> None:
    huge = spec_from_size(70 * 10**9, "70B")
    rank, ranking = rank_on(devices["T4"], huge, few_short_rows, {"method": "full"})
    assert ranking.nearest is not None
    rungs = ladder(rank, ranking.nearest, few_short_rows, {"method": "full"})
    needs = [rung.needed_bytes for rung in rungs]
    assert len(rungs) >= 2 and not any(rung.fits for rung in rungs)
    assert needs == sorted(needs, reverse=True)


def test_a_given_optimizer_may_be_given_up(
    model: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    """One that nobody asked for has been given up by the search itself."""
    given = {"method": "lora", "optim": "adamw_torch"}
    rank, ranking = rank_on(devices["T4"], model, few_short_rows, given)
    assert ranking.nearest is not None
    first, *_ = ladder(rank, ranking.nearest, few_short_rows, given)
    assert first.flags == (f"--optim {SMALL_OPTIMIZER}",)
    rank, ranking = rank_on(devices["T4"], model, few_short_rows, {"method": "lora"})
    assert ranking.nearest is not None and ranking.nearest.plan.optim == SMALL_OPTIMIZER
    rungs = ladder(rank, ranking.nearest, few_short_rows, {"method": "lora"})
    assert not any("--optim" in flag for rung in rungs for flag in rung.flags)


def test_rows_are_cut_by_no_more_than_it_takes(
    model: ModelSpec, devices: Devices, make_data: Callable[[Iterable[int]], DataProfile]
) -> None:
    data = make_data(range(64, 8192, 64))
    given = {"method": "lora", "loss": "stock", "gradient_checkpointing": True}
    given |= {"per_device_train_batch_size": 1, "quantization": "none", "lora_rank": 8}
    device = structs.replace(devices["A100"], free_bytes=20 * GIB)
    rank, ranking = rank_on(device, model, data, given)
    assert ranking.nearest is not None
    *_, last = ladder(rank, ranking.nearest, data, {name: given[name] for name in ("lora_rank",)})
    assert last.fits and last.gives_up.startswith("the ends of ")
    (flag,) = last.flags
    length = value_of(flag)
    assert rank({"max_length": length}).best is not None
    assert rank({"max_length": 2 * length}).best is None


def test_no_row_is_cut_where_weights_alone_are_too_much(
    devices: Devices, make_data: Callable[[Iterable[int]], DataProfile]
) -> None:
    huge, data = spec_from_size(70 * 10**9, "70B"), make_data(range(64, 4096, 64))
    rank, ranking = rank_on(devices["T4"], huge, data, {})
    assert ranking.nearest is not None and ranking.nearest.plan.max_length >= 2048
    assert ladder(rank, ranking.nearest, data, {}) == []
