"""The record of a deep model from that of a shallow one.

Equal decoder layers do equal things, so a few of them are traced and the others are copied into
the record. A *unit* is the shortest sequence of layers that repeats (one layer, or a pattern such
as five sliding-window layers and a global one). Of every run of equal units the first two and the
last two are traced; the third is the template: each of its stretches of events is followed (in
backward: preceded) by those of the left-out units. Nothing is assumed silently: the second unit
must have done exactly what the third did, or NotRepeating is raised and all layers are traced.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from msgspec import Struct

# Units traced of each run: the ends may differ, the two within must not.
_TRACED_UNITS = 4
_TEMPLATE = 2
_LONGEST_PATTERN = 16


class NotRepeating(Exception):
    """Layers that look equal did not behave equally."""


class Run(Struct, frozen=True, kw_only=True):
    """Equal units in a row. `first`: place of its first layer among the traced ones."""

    first: int
    layers_per_unit: int
    left_out: int
    """Units of the model that are not traced; 0: all of them are."""

    @property
    def template(self) -> range:
        """Places of the template's layers among the traced ones."""
        start = self.first + _TEMPLATE * self.layers_per_unit
        return range(start, start + self.layers_per_unit)

    def unit_of(self, layer: int) -> int | None:
        """Which of the run's traced units a traced layer lies in; None outside of the run."""
        unit = (layer - self.first) // self.layers_per_unit
        return unit if 0 <= unit < _TRACED_UNITS else None


class Selection(Struct, frozen=True, kw_only=True):
    """Which layers are traced (`kept`, places in the model) and what repeats among them."""

    kept: tuple[int, ...]
    runs: tuple[Run, ...]


def select_layers(signatures: Sequence[Hashable]) -> Selection:
    """The layers to trace of a model whose layers have these signatures (equal ones are equal)."""
    kept: list[int] = []
    runs: list[Run] = []
    place = 0
    while place < len(signatures):
        period, units = _longest_run(signatures, place)
        if units <= _TRACED_UNITS:
            kept.append(place)
            place += 1
            continue
        left_out = units - _TRACED_UNITS
        runs.append(Run(first=len(kept), layers_per_unit=period, left_out=left_out))
        head = (_TEMPLATE + 1) * period
        end = place + units * period
        kept += [*range(place, place + head), *range(end - period, end)]
        place = end
    return Selection(kept=tuple(kept), runs=tuple(runs))


def _longest_run(signatures: Sequence[Hashable], start: int) -> tuple[int, int]:
    """(layers of a unit, units) of the run from `start` that covers most layers."""
    best = (1, 1)
    for period in range(1, min(_LONGEST_PATTERN, len(signatures) - start) + 1):
        units = 1
        unit = signatures[start : start + period]
        while signatures[start + units * period : start + (units + 1) * period] == unit:
            units += 1
        if units > 1 and units * period > best[0] * best[1]:
            best = (period, units)
    return best


class TracedRecord(Struct, frozen=True, kw_only=True):
    """Births and deaths while the traced layers ran.

    `events`: `i >= 0` is the birth of storage i, `~i` its death. `event_layers`: the traced layer
    within which each event falls, -1 outside of layers. `kinds`: what is compared of each storage
    (its size above all). `marks`: positions in `events` where phases begin.
    """

    events: Sequence[int]
    event_layers: Sequence[int]
    kinds: Sequence[Hashable]
    marks: Sequence[int]


class RepeatedRecord(Struct, frozen=True, kw_only=True):
    """The whole record. `origin`: for each storage, the traced one that it copies, and by how many
    layers it lies further than that one's place among the model's layers."""

    events: list[int]
    origin: list[tuple[int, int]]
    marks: list[int]


def repeat_layers(traced: TracedRecord, runs: Sequence[Run]) -> RepeatedRecord:
    """The record with the left-out units put in; raises NotRepeating."""
    record = RepeatedRecord(
        events=list(traced.events),
        origin=[(i, 0) for i in range(len(traced.kinds))],
        marks=list(traced.marks),
    )
    layers = list(traced.event_layers)
    kinds = list(traced.kinds)
    # From the last: what is put in moves only the layers behind it.
    for run in reversed(runs):
        if run.left_out:
            record, layers, kinds = _Repeater(record, layers, kinds, run).repeated()
    return _in_order(record)


def _in_order(record: RepeatedRecord) -> RepeatedRecord:
    """Storages by birth; of deaths in a row those of the oldest first.

    Otherwise chance would order the copies that autocast lets go together: by address.
    """
    number = {event: n for n, event in enumerate(e for e in record.events if e >= 0)}
    origin = [record.origin[storage] for storage in number]
    events = [number[e] if e >= 0 else ~number[~e] for e in record.events]
    ordered: list[int] = []
    for start, end in pairwise(sorted({0, *record.marks, len(events)})):
        for are_births, row in groupby(events[start:end], key=lambda event: event >= 0):
            together = list(row)
            ordered += together if are_births else sorted(together, reverse=True)
    return RepeatedRecord(events=ordered, origin=origin, marks=record.marks)


class _Repeater:
    """Puts the left-out units of one run into a record."""

    def __init__(
        self, record: RepeatedRecord, layers: list[int], kinds: list[Hashable], run: Run
    ) -> None:
        self.record, self.layers, self.kinds, self.run = record, layers, kinds, run
        self.units = [run.unit_of(layer) if layer >= 0 else None for layer in layers]
        # Where each storage was born: (unit, phase, which birth of that unit in that phase).
        self.birthplace: dict[int, tuple[int, int, int]] = {}
        self.stretches = self._find_stretches()

    def _find_stretches(self) -> list[list[tuple[int, int]]]:
        """For each unit its stretches, as (first event, event after the last), in order of time.

        A stretch ends where the unit changes or a phase begins.
        """
        found: list[list[tuple[int, int]]] = [[] for _ in range(_TRACED_UNITS)]
        borders = set(self.record.marks)
        start = 0
        for position in range(1, len(self.units) + 1):
            ends = position == len(self.units) or position in borders
            if ends or self.units[position] != self.units[start]:
                unit = self.units[start]
                if unit is not None:
                    found[unit].append((start, position))
                start = position
        for unit, stretches in enumerate(found):
            ordinals = [0] * (len(self.record.marks) + 1)
            for first, end in stretches:
                phase = bisect_right(self.record.marks, first)
                for event in self.record.events[first:end]:
                    if event >= 0:
                        self.birthplace[event] = (unit, phase, ordinals[phase])
                        ordinals[phase] += 1
        return found

    def _check_between(self) -> None:
        """What happens outside of the run between two units would happen between all of them.

        Raises NotRepeating if anything does: it belongs to no unit, so it is not copied.
        """
        passes = [unit for unit, _ in groupby(self.units)]
        for before, between, after in zip(passes, passes[1:], passes[2:], strict=False):
            if between is None and {before, after} == {_TEMPLATE - 1, _TEMPLATE}:
                raise NotRepeating

    def _description(self, unit: int) -> list[list[tuple[Any, ...]]]:
        """What a unit did, in terms that do not depend on which unit it is."""
        return [
            [self._describe(event, unit) for event in self.record.events[first:end]]
            for first, end in self.stretches[unit]
        ]

    def _describe(self, event: int, unit: int) -> tuple[Any, ...]:
        if event >= 0:
            return ("born", self.kinds[event])
        place = self.birthplace.get(~event)
        if place is None:
            return ("died", ~event)
        return ("died", place[0] - unit, *place[1:])

    def repeated(self) -> tuple[RepeatedRecord, list[int], list[Hashable]]:
        if self._description(_TEMPLATE - 1) != self._description(_TEMPLATE):
            raise NotRepeating
        self._check_between()
        born = self._born_in_template()
        copies = self._copies(born)
        template = {first: (n, end) for n, (first, end) in enumerate(self.stretches[_TEMPLATE])}
        marks = {position: rank for rank, position in enumerate(self.record.marks)}
        new_marks = [0] * len(self.record.marks)
        events: list[int] = []
        layers: list[int] = []
        shift = self.run.left_out * self.run.layers_per_unit
        last = self.run.first + (_TRACED_UNITS - 1) * self.run.layers_per_unit
        position = 0
        while position < len(self.record.events):
            if position in marks:
                new_marks[marks[position]] = len(events)
            if position not in template:
                layer = self.layers[position]
                for event in self._rewired(self.record.events[position], position, copies):
                    events.append(event)
                    layers.append(layer + shift if layer >= last else layer)
                position += 1
                continue
            _number, end = template[position]
            order = range(self.run.left_out + 1)
            for copy in order if self._ascends(position, end) else reversed(order):
                for at in range(position, end):
                    events.append(self._in_copy(self.record.events[at], copy, copies))
                    layers.append(self.layers[at] + copy * self.run.layers_per_unit)
            position = end
        for rank, position in enumerate(self.record.marks):
            if position == len(self.record.events):
                new_marks[rank] = len(events)
        record = RepeatedRecord(events=events, origin=self.origin, marks=new_marks)
        return record, layers, self.all_kinds

    def _born_in_template(self) -> list[int]:
        return [s for s, place in self.birthplace.items() if place[0] == _TEMPLATE]

    def _copies(self, born: list[int]) -> list[Mapping[int, int]]:
        """For the template (0) and each copy: from the template's storages to that unit's."""
        self.origin = list(self.record.origin)
        self.all_kinds = list(self.kinds)
        copies: list[Mapping[int, int]] = [{s: s for s in born}]
        for copy in range(1, self.run.left_out + 1):
            further = copy * self.run.layers_per_unit
            first = len(self.origin)
            copies.append({s: first + n for n, s in enumerate(born)})
            self.origin += [(self.origin[s][0], self.origin[s][1] + further) for s in born]
            self.all_kinds += [self.kinds[s] for s in born]
        # Layers behind the copies move.
        shift = self.run.left_out * self.run.layers_per_unit
        last = self.run.first + (_TRACED_UNITS - 1) * self.run.layers_per_unit
        for event, layer in zip(self.record.events, self.layers, strict=True):
            if event >= 0 and layer >= last:
                source, offset = self.origin[event]
                self.origin[event] = (source, offset + shift)
        self.by_place = {place: storage for storage, place in self.birthplace.items()}
        return copies

    def _in_copy(self, event: int, copy: int, copies: list[Mapping[int, int]]) -> int:
        """An event of the template as it happens in that copy."""
        if event >= 0:
            return copies[copy][event]
        place = self.birthplace.get(~event)
        if place is None:
            raise NotRepeating  # something from outside of the layers dies in each of them
        unit, number, ordinal = place
        target = copy + unit - _TEMPLATE
        if abs(unit - _TEMPLATE) > 1:
            raise NotRepeating
        if target < 0 or target > self.run.left_out:
            return event  # of the unit before the template, or of the last unit
        twin = self.by_place.get((_TEMPLATE, number, ordinal))
        if twin is None:
            raise NotRepeating
        return ~copies[target][twin]

    def _rewired(self, event: int, position: int, copies: list[Mapping[int, int]]) -> list[int]:
        """An event outside of the template, in the whole record.

        The last unit's neighbour is now the last copy; what dies outside of layers dies there for
        each copy.
        """
        place = self.birthplace.get(~event) if event < 0 else None
        if place is None or place[0] != _TEMPLATE:
            return [event]
        unit = self.units[position]
        if unit is None:
            return [~copy[~event] for copy in copies]
        if unit == _TRACED_UNITS - 1:
            return [~copies[-1][~event]]
        if unit == _TEMPLATE - 1:
            return [event]
        raise NotRepeating

    def _ascends(self, first: int, end: int) -> bool:
        """Whether the units after the template come later in time than it, here."""
        for unit in self.units[end:]:
            if unit is not None and unit != _TEMPLATE:
                return unit > _TEMPLATE
        for unit in reversed(self.units[:first]):
            if unit is not None and unit != _TEMPLATE:
                return unit < _TEMPLATE
        return True
