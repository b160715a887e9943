"""What to give up where nothing fits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from msgspec import structs

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.families import spec_from_size
from ftplan.planner.hardware_spec import Device
from ftplan.planner.ladder import Rank, ladder, more_gpus
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.ranking import Ranking
from ftplan.planner.search import choose_plan

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
    assert len(rungs) >= 3 and not any(rung.fits for rung in rungs)
    assert needs == sorted(needs, reverse=True)


def test_more_of_the_gpus_hold_it_together(
    model: ModelSpec, devices: Devices, few_short_rows: DataProfile
) -> None:
    card = structs.replace(devices["RTX 4090"], link_bytes_per_second=2e10)
    given = {"method": "full"}
    rank = partial(_on_several, model, few_short_rows, card, given)
    rung = more_gpus(rank, card, few_short_rows, 1)
    assert rung is not None and rung.fits and rung.alone
    (flag,) = rung.flags
    number = int(flag.split()[1])
    assert number in (2, 4, 8) and f"{number} of" in rung.gives_up
    assert rank({"num_gpus": number // 2}).best is None or number == 2
    assert more_gpus(rank, structs.replace(card, free_bytes=10**9), few_short_rows, 8) is None


def _on_several(
    model: ModelSpec,
    data: DataProfile,
    card: Device,
    given: Mapping[str, Any],
    changed: Mapping[str, Any],
) -> Ranking:
    return choose_plan(model, data, card, {**given, **changed})
