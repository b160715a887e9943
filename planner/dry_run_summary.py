"""What a dry run's record says: phases, the peak and what lives at it, what the allocator holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, to_builtins

from ftplan.planner.allocator import AllocatorPeaks, allocator_peaks
from ftplan.planner.memory_record import MemoryRecord
from ftplan.planner.phases import Phase

CURVE_POINTS = 2000
# How much too high, relatively, `required` may be: finer steps take a replay each.
_REQUIRED_TOLERANCE = 0.005
_TENSORS_SHOWN = 12
_MODULES_SHOWN = 12
_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class AliveTensors(Struct, frozen=True, kw_only=True):
    """Equal tensors alive at the peak. `module`: layer numbers are written `*`."""

    num_bytes: int
    count: int
    shape: tuple[int, ...]
    dtype: str
    operation: str
    component: str
    module: str


class DryRunSummary(Struct, frozen=True, kw_only=True):
    """A dry run's record in numbers.

    `curve`: (place in the record, allocated bytes), rising and falling with the run; `phase_starts`
    on the same axis, which has `num_events` places. `allocator` and `expandable`: the caching
    allocator as it is by default, and with `expandable_segments:True`.
    """

    num_parameters: int
    num_trainable_parameters: int
    trained_weight_bytes: int
    num_layers: int
    num_layers_traced: int
    phases: tuple[Phase, ...]
    allocator: AllocatorPeaks
    expandable: AllocatorPeaks
    peak_position: int
    modules: tuple[tuple[str, int], ...]
    tensors: tuple[AliveTensors, ...]
    num_events: int
    curve: tuple[tuple[int, int], ...]
    phase_starts: tuple[tuple[int, str], ...]

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.allocated_peak_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it."""
        return {
            **to_builtins(self),
            "phases": [phase.to_dict() for phase in self.phases],
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> DryRunSummary:
        return DryRunSummary(
            **{
                **raw,
                "phases": tuple(
                    Phase(name=phase["name"], components=phase["components"])
                    for phase in raw["phases"]
                ),
                "allocator": AllocatorPeaks(**raw["allocator"]),
                "expandable": AllocatorPeaks(**raw["expandable"]),
                "modules": tuple((module, size) for module, size in raw["modules"]),
                "tensors": tuple(
                    AliveTensors(**{**tensor, "shape": tuple(tensor["shape"])})
                    for tensor in raw["tensors"]
                ),
                "curve": tuple((place, level) for place, level in raw["curve"]),
                "phase_starts": tuple((place, name) for place, name in raw["phase_starts"]),
            }
        )


def summarize(
    record: MemoryRecord,
    *,
    num_parameters: int,
    num_trainable_parameters: int,
    trained_weight_bytes: int,
    num_layers: int,
    num_layers_traced: int,
) -> DryRunSummary:
    """The readings of a record."""
    peaks = record.phase_peaks()
    alive = record.alive_at(record.peak.position)
    return DryRunSummary(
        num_parameters=num_parameters,
        num_trainable_parameters=num_trainable_parameters,
        trained_weight_bytes=trained_weight_bytes,
        num_layers=num_layers,
        num_layers_traced=num_layers_traced,
        phases=tuple(
            Phase(name=name, components=record.components_at(peak.position))
            for name, peak in peaks.items()
        ),
        allocator=_allocator_peaks(record, expandable=False),
        expandable=_allocator_peaks(record, expandable=True),
        peak_position=record.peak.position,
        modules=_by_module(record, alive),
        tensors=_by_tensor(record, alive),
        num_events=len(record.events),
        curve=tuple(record.curve(CURVE_POINTS)),
        phase_starts=tuple(record.phases),
    )


def _allocator_peaks(record: MemoryRecord, *, expandable: bool) -> AllocatorPeaks:
    return allocator_peaks(
        record.sizes,
        record.events,
        expandable_segments=expandable,
        tolerance=_REQUIRED_TOLERANCE,
    )


def _by_module(record: MemoryRecord, alive: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """Bytes alive by module, equal modules of all layers together, the largest first."""
    sums: Counter[str] = Counter()
    for index in alive:
        storage = record.storages[index]
        sums[_without_layer(storage.module)] += storage.num_bytes
    return tuple(sums.most_common(_MODULES_SHOWN))


def _by_tensor(record: MemoryRecord, alive: Sequence[int]) -> tuple[AliveTensors, ...]:
    """The largest single tensors alive, equal ones together."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for index in alive:
        s = record.storages[index]
        module = _without_layer(s.module)
        counts[s.num_bytes, s.shape, s.dtype, s.operation, s.component, module] += 1
    largest = sorted(counts.items(), key=lambda item: -item[0][0] * item[1])
    return tuple(
        AliveTensors(
            num_bytes=size,
            count=count,
            shape=shape,
            dtype=dtype,
            operation=operation,
            component=component,
            module=module,
        )
        for (size, shape, dtype, operation, component, module), count in largest[:_TENSORS_SHOWN]
    )


def _without_layer(module: str) -> str:
    return _LAYER_NUMBER.sub(".*", module)
