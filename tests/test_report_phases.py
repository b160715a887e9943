"""Memory by phase, as a run measures it for its report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training import measure
from ftplan.launcher.training import phase_peaks as module
from ftplan.launcher.training.measure import CpuAllocationRecorder, rises_by_phase
from ftplan.launcher.training.phase_peaks import PhasePeaks
from ftplan.planner.units import MIB

pytestmark = pytest.mark.train


def test_levels_are_those_of_the_phase_that_they_fall_into() -> None:
    levels = [(10, 5), (20, 30), (35, 20), (40, 25), (60, 50), (90, 99)]
    marks = [(30, "passes"), (50, "step"), (70, "passes")]
    # Each begins with what the one before has left; what follows the last mark is of none.
    assert rises_by_phase(levels, marks) == {"passes": 50, "step": 30}
    assert rises_by_phase([], [(1, "passes")]) == {"passes": 0}


def phase_peaks(tmp_path: Path) -> PhasePeaks:
    return PhasePeaks(RunDir(tmp_path), CpuAllocationRecorder())


def test_a_phase_is_told_of_again_only_where_it_has_risen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = phase_peaks(tmp_path)
    for resident in (100, 100.5, 90, 200):
        monkeypatch.setattr(module, "_resident_peak", lambda size=resident: {"device_bytes": size})
        peaks.end("evaluation")
        peaks.tell()
    told = [row["device_bytes"] for row in RunDir(tmp_path).metric_rows()]
    assert told == [100, 200]
    assert peaks.highest() == {"device_bytes": 200}


def test_on_cuda_peaks_are_reset_with_each_phase_and_kept_for_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = {"allocated": 0, "reserved": 0}
    monkeypatch.setattr(measure, "on_cuda", lambda: True)
    monkeypatch.setattr(module, "on_cuda", lambda: True)
    monkeypatch.setattr(measure, "bytes_beside_cache", lambda: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: counters["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: counters["reserved"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: counters.update(allocated=3))
    peaks = phase_peaks(tmp_path)
    for phase, allocated in (("load", 10), ("forward and backward", 50), ("optimizer step", 20)):
        counters.update(allocated=allocated, reserved=allocated + 5)
        peaks.end(phase)
    assert [(p["name"], p["allocated_bytes"]) for p in peaks.to_list()] == [
        ("load", 10),
        ("forward and backward", 50),
        ("optimizer step", 20),
    ]
    memory = measure.measured_memory(CpuAllocationRecorder(), peaks.highest())
    assert memory == {"allocated_bytes": 50, "reserved_bytes": 55, "device_bytes": 62}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's own account")
def test_the_high_water_mark_of_the_process_is_that_of_the_phase(tmp_path: Path) -> None:
    peaks = phase_peaks(tmp_path)
    peaks.end("before")
    if "device_bytes" not in peaks.peaks["before"]:
        pytest.skip("this kernel does not let the mark be reset")
    ballast = bytearray(os.urandom(1)) * (256 * MIB)
    del ballast
    peaks.end("high")
    peaks.end("low")
    assert peaks.peaks["high"]["device_bytes"] > peaks.peaks["low"]["device_bytes"] + 128 * MIB
