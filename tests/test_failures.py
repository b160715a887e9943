"""What failing machines cost: checkpoint intervals, lost time, and the same drawn at random."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling import drawn_share
from ftplan.planner.failures import (
    GPU_SECONDS_BETWEEN_FAILURES,
    daly_seconds,
    failures_of,
    lost_share,
    young_seconds,
)

HOUR = 3600.0


def test_a_gpu_fails_as_often_as_llama_3s_did() -> None:
    """419 times in 54 days on 16,384: once in three hours there."""
    assert pytest.approx(54 * 24 / 419 * HOUR) == GPU_SECONDS_BETWEEN_FAILURES / 16_384
    assert pytest.approx(50_677, abs=1) == GPU_SECONDS_BETWEEN_FAILURES / HOUR


def test_the_intervals_of_young_and_daly() -> None:
    """A minute to save and a day between failures: 120 x 86,400 under the root."""
    young = young_seconds(60, 86_400)
    assert young == pytest.approx(math.sqrt(2 * 60 * 86_400))
    share = 60 / (2 * 86_400)
    daly = young * (1 + math.sqrt(share) / 3 + share / 9) - 60
    assert daly_seconds(60, 86_400) == pytest.approx(daly)
    assert daly_seconds(10, 5) == 5


@given(save=st.floats(1, 600), between=st.floats(1e4, 1e7))
def test_dalys_interval_loses_least(save: float, between: float) -> None:
    """Others near it lose as much or more, to the order of his series."""
    best = daly_seconds(save, between)
    least = lost_share(best, save, 300, between)
    for times in (0.5, 0.8, 1.25, 2):
        assert lost_share(times * best, save, 300, between) >= least - 1e-4


def test_what_is_lost_agrees_with_failures_drawn_at_random() -> None:
    for between in (2 * HOUR, 12 * HOUR, 200 * HOUR):
        failures = failures_of(between, 800e9, 10e9)
        drawn = drawn_share(failures, number=20_000)
        assert drawn == pytest.approx(failures.lost_share, rel=0.05)


def test_where_machines_fail_faster_than_they_save_all_is_lost() -> None:
    assert failures_of(1.0, 1e12, 1e9).lost_share == pytest.approx(1)


def test_a_large_run_loses_more_than_a_small_one() -> None:
    few, many = (failures_of(GPU_SECONDS_BETWEEN_FAILURES / n, 1e12, 80e6 * n) for n in (8, 16_384))
    assert few.lost_share < many.lost_share < 0.1
    assert many.daly_seconds < few.daly_seconds
