"""What would hold a method that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from msgspec import structs

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.families import spec_from_size
from ftplan.planner.hardware_spec import Device
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.remedies import (
    NUMBERS_OF_GPUS,
    Remedy,
    Wish,
    fewest_of,
    held_by,
    smallest_of,
)
from ftplan.planner.search import choose_plan
from ftplan.planner.units import GIB

Devices = dict[str, Device]


@pytest.fixture(scope="module")
def model() -> ModelSpec:
    return spec_from_size(8 * 10**9, "8B")


@pytest.fixture
def wish(model: ModelSpec, few_short_rows: DataProfile) -> Any:
    def of(given: Mapping[str, Any]) -> Wish:
        return Wish(model=model, data=few_short_rows, given=given)

    return of


def fits_on(wish: Wish, device: Device, **settings: Any) -> bool:
    """By the whole search."""
    return choose_plan(wish.model, wish.data, device, {**wish.given, **settings}).best is not None


def with_free(device: Device, gib: float) -> Device:
    return structs.replace(device, free_bytes=int(gib * GIB), total_bytes=int(gib * GIB))


@pytest.mark.parametrize("gib", [8, 12.5, 24])
@pytest.mark.parametrize("method", ["lora", "qlora", "freeze", "full"])
def test_the_fewest_gpus_hold_it_and_fewer_do_not(
    method: str, gib: float, wish: Any, devices: Devices
) -> None:
    device = structs.replace(with_free(devices["A100"], gib), link_bytes_per_second=2e10)
    wished = wish({"method": method})
    remedy = fewest_of(wished, device)
    assert remedy is not None and remedy.sharding == "fsdp"
    assert remedy.needed_bytes <= device.free_bytes
    assert fits_on(wished, device, num_gpus=remedy.num_gpus)
    fewer = [number for number in NUMBERS_OF_GPUS if number < remedy.num_gpus]
    # Dividing less, states in 8 bits fit on fewer where FSDP, which cannot divide those, does not.
    assert not fewer or not fits_on(wished, device, num_gpus=fewer[-1], sharding="fsdp")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_long_rows_of_a_step_that_few_gpus_accumulate_are_counted(
    method: str,
    model: ModelSpec,
    devices: Devices,
    make_data: Callable[[Iterable[int]], DataProfile],
) -> None:
    """Under FSDP accumulated gradients are whole on each GPU, and a step has rows for eight."""
    data = make_data(range(500, 6000, 10))
    device = structs.replace(with_free(devices["A100"], 16), link_bytes_per_second=2e10)
    wished = Wish(model=model, data=data, given={"method": method})
    remedy = fewest_of(wished, device)
    assert remedy is not None and fits_on(wished, device, num_gpus=remedy.num_gpus)
    fewer = [number for number in NUMBERS_OF_GPUS if number < remedy.num_gpus]
    assert not any(fits_on(wished, device, num_gpus=number) for number in fewer)


@pytest.mark.parametrize("gib", [39.0, 39.5, 40.0])
def test_close_to_a_whole_number_the_allocations_are_replayed(
    gib: float, wish: Any, devices: Devices
) -> None:
    """The closed form's share for the allocator alone would ask for one GPU more."""
    wished = wish({"method": "full"})
    for step in range(8):
        device = with_free(devices["A100"], gib + step / 16)
        remedy = fewest_of(wished, device)
        assert remedy is not None
        assert fits_on(wished, device, num_gpus=remedy.num_gpus)
        assert remedy.num_gpus == 2 or not fits_on(
            wished, device, num_gpus=NUMBERS_OF_GPUS[NUMBERS_OF_GPUS.index(remedy.num_gpus) - 1]
        )


def test_more_are_meant_than_there_are(wish: Any, devices: Devices) -> None:
    wished = wish({"method": "lora"})
    assert number_of(fewest_of(wished, devices["RTX 4090"], more_than=8)) == 16
    assert fewest_of(wished, devices["RTX 4090"], more_than=NUMBERS_OF_GPUS[-1]) is None


def number_of(remedy: Remedy | None) -> int | None:
    return remedy.num_gpus if remedy else None


@pytest.mark.parametrize(
    "given",
    [
        {"method": "full", "sharding": "none"},  # each holds everything
        {"method": "lora", "optim": "galore_adamw_layerwise", "quantization": "none"},
        {"method": "full", "optim": "galore_adamw_layerwise"},  # for one GPU
    ],
)
def test_where_gpus_cannot_divide_it_no_number_does(
    given: dict[str, Any], wish: Any, devices: Devices
) -> None:
    assert fewest_of(wish(given), with_free(devices["A100"], 12)) is None


def test_given_settings_are_kept(wish: Any, devices: Devices) -> None:
    given = {"method": "full", "sharding": "zero3"}
    remedy = fewest_of(wish(given), devices["RTX 4090"])
    assert remedy is not None and remedy.sharding == "zero3"
    longer = {**given, "max_length": 8192, "gradient_checkpointing": False}
    more = fewest_of(wish(longer), devices["RTX 4090"])
    assert more is None or more.num_gpus >= remedy.num_gpus


@pytest.mark.parametrize("method", ["lora", "qlora", "freeze", "full"])
def test_the_smallest_device_holds_it_and_smaller_ones_do_not(
    method: str, wish: Any, devices: Devices
) -> None:
    sizes = [with_free(devices["A100"], gib) for gib in (4, 6, 8, 12, 16, 20, 24, 32, 48, 80, 141)]
    wished = wish({"method": method})
    remedy = smallest_of(wished, sizes)
    assert remedy is not None and (remedy.num_gpus, remedy.sharding) == (1, "none")
    place = sizes.index(remedy.device)
    assert fits_on(wished, remedy.device)
    assert not fits_on(wished, sizes[place - 1])


def test_no_device_is_large_enough_for_everything(wish: Any, devices: Devices) -> None:
    assert smallest_of(wish({"method": "full"}), [devices["T4"], devices["RTX 4090"]]) is None
    assert smallest_of(wish({"method": "full"}), []) is None
    pascal = structs.replace(devices["A100"], compute_capability=(5, 2))
    assert smallest_of(wish({"method": "qlora"}), [pascal]) is None


def test_a_device_holds_what_the_search_finds_a_plan_for(wish: Any, devices: Devices) -> None:
    for method, device, number in (
        ("lora", "RTX 4090", 1),
        ("lora", "T4", 1),
        ("qlora", "T4", 1),
        ("full", "A100", 1),
        ("full", "A100", 2),
    ):
        wished = wish({"method": method})
        found = fits_on(wished, devices[device], num_gpus=number)
        assert held_by(wished, devices[device], number) == found
