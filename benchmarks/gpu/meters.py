"""What a training run takes, phase by phase, and how long its steps are.

A meter is the observer of a trainer: it is told what comes next and looks at the allocator. On the
processor torch's profiler counts tensors during the first steps.
"""

from __future__ import annotations

import gc
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ftplan.launcher.dry_run.fakes import held_tensors, quantization_tensors
from ftplan.launcher.step_seconds import PROFILED_STEPS
from ftplan.launcher.training.measure import (
    bytes_beside_cache,
    process_peak_bytes,
    storage_sizes,
)
from ftplan.launcher.training.stacks import Observer

_MARK = "phase: "


class Meter(Observer, ABC):
    """Times steps; which memory it looks at, a device's own meter says.

    `begin` is called with the name of each phase: `forward`, `backward`, `optimizer step`. The
    seconds of a step lie between two ends of the optimizer's.
    """

    def __init__(self) -> None:
        self.ended_at: list[float] = []

    def begin(self, phase: str) -> None:
        """What comes next; what was before is over."""

    @abstractmethod
    def finish(self) -> dict[str, float | None]:
        """The memory that was measured, in bytes, by the names of a case's `measured`."""

    def forward_begins(self) -> None:
        self.begin("forward")

    def backward_begins(self) -> None:
        self.begin("backward")

    def backward_ended(self, *, steps_next: bool) -> None:
        if steps_next:
            self.begin("optimizer step")

    def optimizer_ended(self, model: nn.Module, optimizer: Any) -> None:
        self.synchronize()
        self.ended_at.append(time.perf_counter())

    def synchronize(self) -> None:
        """Wait until the device is done."""

    def step_seconds(self, warm_up: int) -> list[float]:
        """Of each step after so many."""
        ends = self.ended_at[max(0, warm_up - 1) :]
        return [end - start for start, end in itertools.pairwise(ends)]


# Phases as a case's `measured` calls their peaks.
_PEAKS = {
    "forward": "peak_forward_bytes",
    "backward": "peak_backward_bytes",
    "optimizer step": "peak_optimizer_bytes",
}


class CudaMeter(Meter):
    """The caching allocator's own counters."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        torch.cuda.empty_cache()  # of what making random weights took
        self.after_load_bytes = torch.cuda.memory_allocated()
        self.peaks: dict[str, int] = {}
        self.reserved_bytes = 0
        self._phase = "load"
        torch.cuda.reset_peak_memory_stats()

    def begin(self, phase: str) -> None:
        self._look()
        self._phase = phase
        torch.cuda.reset_peak_memory_stats()

    def _look(self) -> None:
        allocated = torch.cuda.max_memory_allocated()
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), allocated)
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved())

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def finish(self) -> dict[str, float | None]:
        self._look()
        return {
            "allocated_bytes": max(self.peaks.values()),
            "reserved_bytes": self.reserved_bytes,
            "device_bytes": bytes_beside_cache() + self.reserved_bytes,
            "after_load_bytes": self.after_load_bytes,
            **{name: self.peaks.get(phase) for phase, name in _PEAKS.items()},
        }


class CpuMeter(Meter):
    """Torch's profiler, during the first steps; the second one holds optimizer states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        gc.collect()  # what died before must not die in the profile
        self.after_load_bytes = held_bytes(model)
        self.peaks: dict[str, int] = {}
        self._profiler: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()

    def begin(self, phase: str) -> None:
        if self._profiler is not None:
            mark(phase)

    def optimizer_ended(self, model: nn.Module, optimizer: Any) -> None:
        if len(self.ended_at) == PROFILED_STEPS - 1:
            self._stop()  # before the clock is looked at: it takes its time
        super().optimizer_ended(model, optimizer)

    def _stop(self) -> None:
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        self.peaks = phase_peaks(self._profiler, self.after_load_bytes)
        self._profiler = None

    def finish(self) -> dict[str, float | None]:
        self._stop()
        return {
            "allocated_bytes": max(self.peaks.values()),
            "reserved_bytes": None,  # the processor's allocator keeps nothing back
            "device_bytes": process_peak_bytes(),
            "after_load_bytes": self.after_load_bytes,
            **{name: self.peaks.get(phase) for phase, name in _PEAKS.items()},
        }


def mark(phase: str) -> None:
    """Leave a phase's name in the profile."""
    with record_function(f"{_MARK}{phase}"):
        pass


def phase_peaks(profiler: Any, level: int) -> dict[str, int]:
    """The highest level of each phase in a profile that begins at `level`, in bytes."""
    phase = "load"
    peaks = {phase: level}
    results = profiler.profiler.kineto_results
    marks = [
        (event.start_ns(), event.name().removeprefix(_MARK))
        for event in results.events()
        if event.name().startswith(_MARK)
    ]
    for _, change in sorted([*_changes(results.experimental_event_tree()), *marks], key=_when):
        if isinstance(change, str):
            phase = change
        else:
            level += change
        peaks[phase] = max(peaks.get(phase, 0), level)
    return peaks


def _when(change: tuple[int, int | str]) -> int:
    return change[0]


def _changes(events: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """When so many bytes came or went. What goes without having come is not told of, unless an
    earlier profile saw something at its address come and not go: then with the size of that, which
    says nothing."""
    there: set[int] = set()
    found = [event for event in _all_of(events) if event.tag.name == "Allocation"]
    for event in sorted(found, key=lambda event: event.start_time_ns):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            there.add(fields.ptr)
        elif fields.ptr not in there:
            continue
        else:
            there.remove(fields.ptr)
        yield event.start_time_ns, fields.alloc_size


def _all_of(events: Sequence[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        yield event


def held_bytes(model: nn.Module) -> int:
    """Bytes of all that a model holds, what belongs to quantized weights included."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [*quantization_tensors(module), *held_tensors(module)]
        scales = getattr(getattr(module, "weight", None), "SCB", None)  # int8, before its first use
        tensors += [] if scales is None else [scales]
    return sum(storage_sizes(tensors).values())
