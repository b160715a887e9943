"""What a run allocates, storage by storage, in order: the record of a dry run and its readings.

A record says when each storage is born and when it dies. From it follow the curve of allocated
bytes, the moment of the peak and what was alive then. `allocator.py` replays the same record
through a model of the caching allocator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from msgspec import Struct

from ftplan.planner.phases import COMPONENTS


class Storage(Struct, frozen=True, kw_only=True):
    """One allocation: its size, and where it comes from."""

    num_bytes: int
    component: str
    """A key of `planner.memory.COMPONENTS`."""
    module: str
    """Path of the module whose forward or backward made it; empty outside of modules."""
    operation: str
    """The operation that made it, as torch names it (`aten.mm`)."""
    shape: tuple[int, ...]
    dtype: str


class MemoryRecord(Struct, frozen=True, kw_only=True, dict=True):
    """Births and deaths in order of time.

    `events`: `i >= 0` is the birth of `storages[i]`, `~i` its death.
    `phases`: (position in `events`, name), in order; the first is at 0.
    """

    storages: Sequence[Storage]
    events: Sequence[int]
    phases: Sequence[tuple[int, str]]

    @cached_property
    def sizes(self) -> list[int]:
        return [storage.num_bytes for storage in self.storages]

    @cached_property
    def peak(self) -> Peak:
        """The highest moment of the whole record."""
        return self._peak_between(0, len(self.events))

    @cached_property
    def levels(self) -> list[int]:
        """Allocated bytes after each event."""
        level, sizes, levels = 0, self.sizes, []
        for event in self.events:
            level += sizes[event] if event >= 0 else -sizes[~event]
            levels.append(level)
        return levels

    def phase_ranges(self) -> list[tuple[str, int, int]]:
        """(name, first event, event after the last) of each phase, in order."""
        ends = [start for start, _ in self.phases[1:]] + [len(self.events)]
        return [(name, start, end) for (start, name), end in zip(self.phases, ends, strict=True)]

    def phase_peaks(self) -> dict[str, Peak]:
        """The highest moment of each phase; of a name that comes again, the higher one."""
        highest: dict[str, Peak] = {}
        for name, peak in self._range_peaks():
            if name not in highest or peak.allocated_bytes > highest[name].allocated_bytes:
                highest[name] = peak
        return highest

    def phase_at(self, position: int) -> str:
        """The phase in which the event at `position` falls."""
        return next(name for start, name in reversed(self.phases) if start <= position)

    def alive_at(self, position: int) -> list[int]:
        """Indices of the storages alive just after the event at `position`."""
        alive: set[int] = set()
        for event in self.events[: position + 1]:
            if event >= 0:
                alive.add(event)
            else:
                alive.discard(~event)
        return sorted(alive)

    def components_at(self, position: int) -> dict[str, int]:
        """Bytes alive just after the event at `position`, by component; every component."""
        sums = dict.fromkeys(COMPONENTS, 0)
        for index in self.alive_at(position):
            storage = self.storages[index]
            sums[storage.component] += storage.num_bytes
        return sums

    def curve(self, points: int) -> list[tuple[int, int]]:
        """(event position, allocated bytes), at most `points` of them.

        Each point is the highest of its stretch, so the peak is always among them.
        """
        levels = self.levels
        width = max(1, -(-len(levels) // points))
        best = []
        for start in range(0, len(levels), width):
            stretch = levels[start : start + width]
            offset = max(range(len(stretch)), key=stretch.__getitem__)
            best.append((start + offset, stretch[offset]))
        return best

    def _range_peaks(self) -> Iterator[tuple[str, Peak]]:
        levels = self.levels
        for name, start, end in self.phase_ranges():
            # A phase in which nothing happens stands where the one before it ended.
            first = min(max(start - 1, 0), len(levels) - 1)
            stretch = range(first, max(end, first + 1))
            position = max(stretch, key=levels.__getitem__)
            yield name, Peak(position=position, allocated_bytes=levels[position])

    def _peak_between(self, start: int, end: int) -> Peak:
        levels = self.levels
        position = max(range(start, end), key=levels.__getitem__, default=0)
        return Peak(position=position, allocated_bytes=levels[position] if levels else 0)


class Peak(Struct, frozen=True, kw_only=True):
    """A moment of a record: just after the event at `position`."""

    position: int
    allocated_bytes: int
