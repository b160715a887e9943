"""Corrections of a machine's constants: how they are fitted, bounded, refused and applied."""

from __future__ import annotations

import re
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ftplan.planner.calibration import (
    CONSTANTS,
    UNCALIBRATED,
    Calibration,
    out_of_bounds,
)
from ftplan.planner.calibration_fit import DEVICE_MEMORY, Fit, HeldOut, PastRun, fit
from ftplan.planner.families import spec_from_size
from ftplan.planner.hardware_spec import Device
from ftplan.planner.margin import ASSUMED_MARGIN, LEAST_RUNS, Margin, raised_margin
from ftplan.planner.memory import MEMORY_MARGIN, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.step_time import (
    StepParts,
    corrected,
    estimate_step_time,
    step_parts,
    step_work,
)
from ftplan.planner.teams import roomiest
from tests.past_runs import CONTEXT_BYTES, parts_of, past_runs

TRUTH = Calibration(context=0.3, reserved=1.03, arithmetic=0.8, traffic=1.25, launching=1.6)


def held_out(found: Fit, quantity: str) -> HeldOut:
    return next(one for one in found.held_out if one.quantity == quantity)


# --- the fit


def test_the_constants_of_a_machine_are_found() -> None:
    found = fit(past_runs(TRUTH, 48), "2026-11-23").calibration
    assert found.context == pytest.approx(0.3, rel=0.03)
    assert found.reserved == pytest.approx(1.03, rel=0.005)
    for name in ("arithmetic", "traffic", "launching"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.1), name
    assert (found.num_runs, found.fitted_on) == (48, "2026-11-23")


def test_what_is_predicted_of_runs_that_were_not_fitted_comes_nearer() -> None:
    found = fit(past_runs(TRUTH, 24))
    assert found.by_configuration and not found.refused
    for quantity, before, after in (
        ("context", 2.0, 0.05),
        ("reserved over allocated", 0.025, 0.01),
        ("seconds a step", 0.08, 0.05),
        (DEVICE_MEMORY, 0.01, 0.01),
    ):
        one = held_out(found, quantity)
        assert one.num_runs == 24
        assert one.median_before > before and one.median_after < after, one
        assert one.num_closer > 16


def test_few_runs_move_a_constant_less_than_many() -> None:
    few, many = (
        fit(past_runs(Calibration(reserved=1.04), count, memory_noise=0.0)).calibration.reserved
        for count in (3, 30)
    )
    assert 1.03 < few < many < 1.04
    assert many == pytest.approx(1.04, abs=0.001)


def test_the_fit_is_the_most_probable_one() -> None:
    """Of the context alone, by hand: without outliers the mean of the logarithms, drawn to 0."""
    runs = past_runs(Calibration(context=0.8), 5, noise=0.0, memory_noise=0.0)
    constant = CONSTANTS["context"]
    logs = [
        log((r.measured_device_bytes - r.measured_reserved_bytes) / CONTEXT_BYTES)
        for r in runs
        if r.measured_device_bytes and r.measured_reserved_bytes
    ]
    of_runs, of_one = 5 / constant.noise**2, 1 / constant.spread**2
    expected = exp(sum(logs) / 5 * of_runs / (of_runs + of_one))
    assert fit(runs).calibration.context == pytest.approx(expected, rel=1e-4)


def test_outliers_do_not_move_it() -> None:
    """One run in eight beside another program, which takes its memory and its time."""
    runs = past_runs(TRUTH, 48)
    spoilt = [
        structs.replace(
            run,
            measured_device_bytes=(run.measured_device_bytes or 0) + 9 * CONTEXT_BYTES,
            step_seconds=4 * (run.step_seconds or 0),
        )
        if number % 8 == 3
        else run
        for number, run in enumerate(runs)
    ]
    found = fit(spoilt).calibration
    assert found.context == pytest.approx(0.3, rel=0.1)
    for name in ("arithmetic", "traffic", "launching"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.2), name


def test_a_correction_that_brings_other_runs_no_nearer_is_refused() -> None:
    """Each configuration is off in a way of its own, which says nothing about the others."""
    runs = [
        structs.replace(run, parts=parts_of(0), step_seconds=3.0 if number % 2 else 1.0)
        for number, run in enumerate(past_runs(UNCALIBRATED, 16))
    ]
    found = fit(runs)
    assert {"arithmetic", "traffic", "launching"} <= set(found.refused)
    assert found.calibration.arithmetic == found.calibration.traffic == 1.0
    assert not held_out(found, "seconds a step").improves


def test_where_the_formulas_are_right_nothing_is_corrected() -> None:
    found = fit(past_runs(UNCALIBRATED, 48, noise=0.1)).calibration
    assert all(value == 1.0 for value in found.factors.values())


def test_runs_that_were_told_the_same_are_held_out_together() -> None:
    """A configuration that ran twenty times would else vouch for itself."""
    few = past_runs(TRUTH, 6, configurations=2)
    assert not fit(few).by_configuration
    assert fit(past_runs(TRUTH, 6, configurations=3)).by_configuration


@pytest.mark.parametrize("count", range(LEAST_RUNS))
def test_fewer_runs_than_three_correct_nothing(count: int) -> None:
    found = fit(past_runs(TRUTH, count))
    assert all(value == 1.0 for value in found.calibration.factors.values())
    assert found.calibration.margin is None and not found.calibration.in_force
    assert found.margin == ASSUMED_MARGIN


def test_a_formulas_own_error_is_not_fitted() -> None:
    """Tensors that take a fifth more than predicted are no fragmentation: reserved over allocated
    is as predicted, and stays."""
    runs = [
        structs.replace(
            run,
            measured_allocated_bytes=round(1.2 * run.allocated_bytes),
            measured_reserved_bytes=round(1.2 * run.reserved_bytes),
        )
        for run in past_runs(UNCALIBRATED, 12)
    ]
    assert fit(runs).calibration.reserved == pytest.approx(1.0, abs=1e-3)


def test_a_processors_memory_is_not_fitted() -> None:
    runs = [structs.replace(run, kind="cpu") for run in past_runs(TRUTH, 12)]
    found = fit(runs)
    assert [one.quantity for one in found.held_out] == ["seconds a step"]
    assert found.calibration.context == found.calibration.reserved == 1.0
    assert found.calibration.margin is None


_BYTES = st.integers(1, 10**12)
_SECONDS = st.floats(1e-6, 1e6)
_PARTS = st.builds(
    StepParts,
    arithmetic=_SECONDS,
    traffic=_SECONDS,
    optimizer=st.floats(0, 1e3),
    sending=st.floats(0, 1e3),
    copying=st.floats(0, 1e3),
    on_host=st.floats(0, 1e3),
    launching=st.floats(0, 1e3),
)
_RUNS = st.lists(
    st.builds(
        PastRun,
        configuration=st.sampled_from("abcd"),
        kind=st.sampled_from(("cuda", "cpu")),
        allocated_bytes=_BYTES,
        reserved_bytes=_BYTES,
        least_reserved_bytes=_BYTES,
        context_bytes=_BYTES,
        measured_allocated_bytes=st.none() | _BYTES,
        measured_reserved_bytes=st.none() | _BYTES,
        measured_device_bytes=st.none() | _BYTES,
        parts=st.none() | _PARTS,
        step_seconds=st.none() | _SECONDS,
    ),
    max_size=8,
)


@given(_RUNS)
def test_whatever_was_measured_factors_stay_within_their_bounds(runs: list[PastRun]) -> None:
    found = fit(runs)
    assert not out_of_bounds(found.calibration.factors)
    assert not out_of_bounds({name: value for name, value in found.refused.items()})
    margin = found.calibration.margin
    assert margin is None or 0.01 <= margin <= MEMORY_MARGIN


# --- the margin


def test_the_margin_follows_the_calibrated_predictions_and_falls() -> None:
    """Uncalibrated, a GPU whose allocator reserves 3 % more would keep 4 % free and more."""
    truth = Calibration(reserved=1.03)
    found = fit(past_runs(truth, 24, memory_noise=0.001))
    assert found.margin.num_runs == 24
    assert 0.01 <= found.margin.share < 0.018
    assert found.calibration.margin == found.margin.share


def test_the_margin_never_falls_below_one_percent() -> None:
    assert fit(past_runs(TRUTH, 24, memory_noise=0.0)).margin.share >= 0.01


def test_a_run_that_needed_more_since_raises_the_margin() -> None:
    margin = Margin(share=0.012, num_runs=9)
    assert raised_margin(margin, []) == margin
    assert raised_margin(margin, [-0.1, 0.001]) == Margin(share=0.012, num_runs=11)
    assert raised_margin(margin, [0.02]).share == pytest.approx(0.03)
    assert raised_margin(margin, [0.5]).share == MEMORY_MARGIN


# --- what it changes


MODEL = spec_from_size(10**9, "1B")
PLAN = TrainingPlan(method="lora", max_length=512, per_device_train_batch_size=2)


def on(device: Device, **factors: Any) -> Device:
    return structs.replace(device, calibration=Calibration(**factors))


def test_without_a_calibration_predictions_are_the_formulas(devices: dict[str, Device]) -> None:
    for device in devices.values():
        assert device.calibration is UNCALIBRATED
        plain = replayed_memory(MODEL, PLAN, device=device)
        assert plain == replayed_memory(MODEL, PLAN, device=on(device, num_runs=9, margin=0.02))


def test_context_and_reserved_bytes_are_multiplied(devices: dict[str, Device]) -> None:
    gpu = devices["RTX 4090"]
    for estimate in (estimate_memory, replayed_memory):
        plain = estimate(MODEL, PLAN, device=gpu)
        more = estimate(MODEL, PLAN, device=on(gpu, context=0.5, reserved=1.05))
        assert more.allocated_peak_bytes == plain.allocated_peak_bytes
        assert more.reserved_peak_bytes == round(1.05 * plain.reserved_peak_bytes)
        context = more.device_peak_bytes - more.reserved_peak_bytes
        assert context == gpu.context_bytes // 2
        required = 1.05 * (plain.required_bytes - gpu.context_bytes) + context
        assert more.required_bytes == pytest.approx(required, abs=1)
        assert more.uncalibrated_reserved_bytes == plain.reserved_peak_bytes


def test_less_reserved_does_not_lower_what_is_required(devices: dict[str, Device]) -> None:
    gpu = devices["RTX 4090"]
    plain, less = (
        replayed_memory(MODEL, PLAN, device=device) for device in (gpu, on(gpu, reserved=0.95))
    )
    assert less.reserved_peak_bytes < plain.reserved_peak_bytes
    assert less.reserved_peak_bytes >= less.allocated_peak_bytes
    assert less.required_bytes == plain.required_bytes


@pytest.mark.parametrize("name", ["RTX 4090", "CPU"])
def test_the_parts_of_a_step_follow_the_rates(name: str, devices: dict[str, Device]) -> None:
    """What the fit takes a corrected step to be is what a calibrated device takes for it."""
    device, learned = devices[name], Calibration(arithmetic=0.8, traffic=1.25, launching=1.6)
    work = step_work(MODEL, PLAN, device, tokens_per_micro_batch=1024, mean_length=512)
    there = step_parts(work, structs.replace(device, calibration=learned))
    expected = corrected(step_parts(work, device), learned)
    for part, seconds in structs.asdict(there).items():
        assert seconds == pytest.approx(structs.asdict(expected)[part]), part


def test_the_bounds_of_a_steps_time_move_with_it(devices: dict[str, Device]) -> None:
    slower = dict(arithmetic=0.5, traffic=0.5, launching=2.0)
    plain, calibrated = (
        estimate_step_time(MODEL, PLAN, device, tokens_per_micro_batch=1024, mean_length=512)
        for device in (devices["A100"], on(devices["A100"], **slower))
    )
    for name in ("step_seconds", "least_step_seconds", "most_step_seconds"):
        assert getattr(calibrated, name) == pytest.approx(2 * getattr(plain, name)), name


def test_unlike_gpus_together_are_as_without_a_calibration(devices: dict[str, Device]) -> None:
    one, other = on(devices["A100"], traffic=1.2), devices["RTX 4090"]
    assert roomiest([one, one], 2).device.calibration.traffic == 1.2
    assert roomiest([one, other], 2).device.calibration is UNCALIBRATED


def test_a_calibration_names_its_constants(small_llama: ModelSpec) -> None:
    assert set(UNCALIBRATED.factors) == set(CONSTANTS)
    for constant in CONSTANTS.values():
        assert constant.least < 1 < constant.most


def test_the_page_states_the_bounds() -> None:
    page = (Path(__file__).parents[1] / "docs" / "calibration.md").read_text(encoding="utf-8")
    for name, constant in CONSTANTS.items():
        row = re.search(rf"^\| `{name}` \|.*\| ([\d.]+) \| ([\d.]+) \| ", page, re.MULTILINE)
        assert row, name
        assert (float(row[1]), float(row[2])) == (round(constant.least, 3), constant.most)
        said = "rates" if name in ("arithmetic", "traffic", "launching") else f"`{name}`"
        row = re.search(rf"^\| {said} \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
        assert row, said
        assert float(row[1]) == pytest.approx(constant.spread, rel=0.02)
        assert float(row[2]) == pytest.approx(constant.noise, rel=0.02)
