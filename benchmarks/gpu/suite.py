"""The suite: chooses runs, has each measured in a process of its own, and writes rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu import processes
from benchmarks.gpu.configurations import PACKAGES_OF, Run
from benchmarks.gpu.rows import Lines, row
from benchmarks.gpu.task import OUT_OF_MEMORY, WARM_UP_STEPS, Task
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device, Machine
from ftplan.planner.units import format_bytes, format_seconds

# What the card's ceilings take; runs end early enough for them.
CEILINGS_SECONDS = 150.0


class Suite:
    """One device's measurements, in a folder; what is there already is not measured again.

    `small`: tiny models on any device, to try the suite itself out.
    """

    def __init__(self, machine: Machine, device: Device, out: Path, ui: Ui, *, small: bool) -> None:
        self.machine, self.device, self.ui, self.small = machine, device, ui, small
        self.rows = Lines(out / "rows.jsonl")
        self.failures = Lines(out / "failures.jsonl")
        self.ceilings = Lines(out / "ceilings.jsonl")
        self.software = processes.software(machine.driver_version)
        self.gpu = "cpu" if device.kind == "cpu" else device.name

    def run(self, runs: Sequence[Run], minutes: float) -> None:
        """Carries out what fits into so many minutes, then measures the device's ceilings."""
        deadline = time.monotonic() + 60 * minutes
        done = {line["id"] for lines in (self.rows, self.failures) for line in lines}
        left = [run for run in runs if run.key not in done]
        measured_ceilings = any(True for _ in self.ceilings)
        kept = 0.0 if measured_ceilings else CEILINGS_SECONDS
        self.ui.say(f"{len(runs)} runs, {len(runs) - len(left)} of them there already")
        for number, run in enumerate(left, start=1):
            remaining = deadline - kept - time.monotonic()
            if remaining < run.candidate.seconds:
                continue  # a shorter one may fit
            said = self._measure(run)
            self.ui.say(f"{number}/{len(left)} {run.key}: {said}")
        if not measured_ceilings:
            self._measure_ceilings()

    def _measure(self, run: Run) -> str:
        """Measures one run and keeps it; what to say of it."""
        free = free_bytes(self.device) if self.device.kind == "cuda" else None
        ballast = 0
        if run.free_bytes is not None and free is not None:
            ballast = free - run.free_bytes
            if ballast < 0:
                return self._failed(run, {"failed": "other processes hold the memory it needs"})
        tight = run.tight_share is not None
        candidate = run.candidate
        task = Task(
            case=candidate.case,
            steps=WARM_UP_STEPS + 1 if tight else candidate.steps,
            ballast_bytes=ballast,
        )
        answer = processes.carry_out(
            task, self.device, self.machine.host.num_cores, candidate.seconds
        )
        line = row(run, answer, gpu=self.gpu, software=self.software, free_bytes=free)
        if line is None:
            return self._failed(run, answer)
        self.rows.append(line)
        self.ui.json_line(line)
        if tight or OUT_OF_MEMORY in answer:
            return "out of memory" if OUT_OF_MEMORY in answer else "survived"
        measured = line["measured"]
        said = f"{format_bytes(measured['allocated_bytes'])} allocated"
        if "step_seconds" in measured:
            said += f", {format_seconds(measured['step_seconds'])} a step"
        return said

    def _failed(self, run: Run, answer: Mapping[str, Any]) -> str:
        self.failures.append({"id": run.key, "gpu": self.gpu, **answer})
        return f"failed: {answer['failed']}"

    def _measure_ceilings(self) -> None:
        self.ui.say("what the device can do at most")
        for line in processes.ceilings(self.device, self.machine.host.num_cores, small=self.small):
            self.ceilings.append({"gpu": self.gpu, "software": self.software, **line})


def packages_at_hand() -> list[str]:
    """Of the packages that some runs need, those that can be imported."""
    return [package for package in PACKAGES_OF if find_spec(package) is not None]


def free_bytes(device: Device) -> int:
    """Of the device's memory, now."""
    for gpu in probe_machine().gpus:
        if gpu.index == device.index and gpu.uuid == device.uuid:
            return gpu.free_bytes
    raise InputError(f"{device.name} is gone", "see what `ftplan doctor` says")
