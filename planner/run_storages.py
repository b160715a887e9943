"""All storages of a run in order of birth and death, put together from its segments' records.

What the caching allocator reserves depends on that order (`allocator.py`). A segment's record is
written out once for each place that the segment has in the model; what several segments know of,
such as a layer's input, is one storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ftplan.planner.allocator import BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES
from ftplan.planner.step_trace import Parts, Segment, SegmentRecord, StepTrace
from ftplan.planner.tape import ZERO, Form, added, value


class RunStorages:
    """`sizes`: bytes of each storage; `events`: `i` is the birth of storage i, `~i` its death.

    `trace`: of the step that is written out for a micro-batch of `rows` x `length` tokens.
    `hands_on`: what backward leaves, gradients and buffers aside, the next segment's record has
    again.
    """

    def __init__(self, trace: StepTrace, rows: int, length: int, *, hands_on: bool) -> None:
        self.trace, self.rows, self.length, self.hands_on = trace, rows, length, hands_on
        self.sizes: list[int] = []
        self.events: list[int] = []
        self._sizes_of_record: dict[int, list[int]] = {}

    def born(self, sizes: Iterable[int]) -> list[int]:
        """The numbers of new storages."""
        first = len(self.sizes)
        self.sizes.extend(sizes)
        numbers = list(range(first, len(self.sizes)))
        self.events += numbers
        return numbers

    def died(self, numbers: Iterable[int]) -> None:
        self.events += [~number for number in numbers]

    def micro_batch(self, throughout: Iterable[int] = (), *, carries: bool = False) -> list[int]:
        """Forward and backward; the gradients that are left. `throughout`: bytes of what is there
        all the while, or until a segment takes it over; `carries`: gradients of the micro-batch
        before wait until then, too."""
        trace = self.trace
        around = self.born(throughout)
        carried = [
            self._parts({"gradients": segment.taken_over.get("gradients", ZERO)}) if carries else []
            for segment in trace.segments
        ]
        inputs, kept_mask = self._parts(trace.inputs), self._parts(trace.kept_mask)
        mask, tables = self._parts(trace.passing_mask), self._parts(trace.tables)
        places = self._forward(trace.segments)
        self.died(mask)
        for segments in trace.further:
            self.forward_only(segments)
        gradients = self._backward(places, around, carried)
        self.died([*kept_mask, *tables, *inputs, *around])
        return gradients

    def _backward(
        self, places: list[_Place], around: list[int], carried: list[list[int]]
    ) -> list[int]:
        trace = self.trace
        gradients: dict[int, list[int]] = {}
        left: list[int] = []
        of_result: int | None = None  # the gradient of what the segment at hand gave
        for index in reversed(range(len(places))):
            place, taken_over = places[index], trace.segments[index].taken_over
            if any(taken_over.get("communication", ZERO)):
                self.died(around)
                around.clear()
            ties = index == 0 and trace.ties_gradients
            self.died(carried[index])
            takes = any(taken_over.get("gradients", ZERO)) and not carried[index]
            if takes or (ties and trace.updates):
                self.died(gradients.pop(len(places) - 1, []))  # what the loss leaves
            self.events += place.backward(of_result)
            if place.record.gradient != place.record.incoming:  # else it was summed in place
                of_result = place.number(place.record.gradient)
            own = [number + place.base for number in place.record.gradients]
            if ties and own:
                own.remove(max(own, key=self.sizes.__getitem__))
            gradients[index] = own
            behind = set(place.left()).difference(own)
            stays = behind.intersection(place.buffers()) if self.hands_on else behind
            self.died(behind - stays)
            left += stays
        self.died(left)
        return [number for own in gradients.values() for number in own]

    def forward_only(self, segments: Sequence[Segment]) -> None:
        """A pass without gradients, nothing of which stays."""
        trace = self.trace
        around = [*self._parts(trace.inputs), *self._parts(trace.tables), *self._parts(trace.mask)]
        self._let_go(self._forward(segments))
        self.died(around)

    def _let_go(self, places: Sequence[_Place]) -> None:
        """Of all that a pass leaves."""
        for place in places:
            self.died(place.left())
        if not places[-1].record.keeps_result:
            self.died([places[-1].record.result + places[-1].base])

    def generation(self, prompts: Sequence[Segment], last: Sequence[Segment]) -> None:
        """The pass over the prompts, and the step for the last token: what layers cache stays
        until the end of each, and is there before the second."""
        self._let_go(self._forward(prompts))
        cached = [self._parts(segment.given) for segment in last]
        self._let_go(self._forward(last, cached))

    def step(self, storages: tuple[list[int], list[int], int]) -> None:
        """The optimizer's step, gradients not counted (`Optimizer.step_storages`)."""
        sizes, events, first = storages
        base = len(self.sizes) - first
        self.sizes += sizes[first:]
        alive: set[int] = set()
        for event in events:
            if event >= first:
                alive.add(event)
                self.events.append(event + base)
            elif ~event in alive:
                alive.discard(~event)
                self.events.append(event - base)
        self.died(number + base for number in alive)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are alive at once."""
        sizes, level, peak = self.sizes, 0, 0
        for event in self.events:
            level += sizes[event] if event >= 0 else -sizes[~event]
            peak = max(peak, level)
        return peak

    def large_events(self) -> tuple[list[int], int]:
        """The events of storages that the allocator's pool of large blocks serves, and the most
        bytes that the small ones need."""
        sizes = self.sizes
        small = [size <= SMALL_BYTES for size in sizes]
        events: list[int] = []
        live = most = 0
        for event in self.events:
            storage = event if event >= 0 else ~event
            if not small[storage]:
                events.append(event)
                continue
            size = (sizes[storage] + BLOCK_BYTES - 1) & -BLOCK_BYTES
            if event >= 0:
                live += size
                most = max(most, live)
            else:
                live -= size
        return events, -(-most // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES

    def _forward(
        self, segments: Sequence[Segment], cached: Sequence[Sequence[int]] | None = None
    ) -> list[_Place]:
        """`cached`: what each segment counts itself, and is there before."""
        places: list[_Place] = []
        given: int | None = None
        for number, segment in enumerate(segments):
            if cached is not None:
                self.died(cached[number])
            place = _Place(segment.record, len(self.sizes), given)
            self.sizes += self._sizes(segment.record)
            self.events += place.written(segment.record.forward)
            places.append(place)
            given = None if segment.record.keeps_result else place.number(segment.record.result)
        for place in places:
            self.events += place.written(place.record.held)
        for place in places:
            self.events += place.written(place.record.autocast)
        return places

    def _sizes(self, record: SegmentRecord) -> list[int]:
        """Bytes of a segment's own storages; its neighbours' are 0."""
        known = self._sizes_of_record.get(id(record))
        if known is None:
            known = self._sizes_of_record[id(record)] = list(map(self._bytes, record.sizes))
            for number in (record.given, record.incoming):
                if number is not None:
                    known[number] = 0
        return known

    def _parts(self, parts: Parts) -> list[int]:
        return self.born([self._bytes(added(parts.values()))])

    def _bytes(self, form: Form) -> int:
        return value(form, self.rows, self.length)


class _Place:
    """A segment's record in one place of the model: its first storage is number `base`.

    `given`: the storage of its input, as long as it has not died.
    """

    def __init__(self, record: SegmentRecord, base: int, given: int | None) -> None:
        self.record, self.base, self.given = record, base, given

    def number(self, of: int | None) -> int | None:
        return None if of is None else of + self.base

    def written(self, events: Sequence[int]) -> list[int]:
        """Events of the record; where its input dies, the neighbour's storage does."""
        base = self.base
        written = [event + base if event >= 0 else event - base for event in events]
        own = self.number(self.record.given)
        if self.given is not None and own is not None and ~own in written:
            written[written.index(~own)] = ~self.given
            self.given = None
        return written

    def backward(self, incoming: int | None) -> list[int]:
        """`incoming`: the storage of its result's gradient."""
        written = self.written(self.record.backward)
        own = self.number(self.record.incoming)
        if incoming is not None and own is not None and ~own in written:
            written[written.index(~own)] = ~incoming
        return written

    def left(self) -> list[int]:
        """What is alive behind it and not handed on."""
        record = self.record
        left = [number + self.base for number in record.left]
        return left if self.given is None else [*left, self.given]

    def buffers(self) -> list[int]:
        """Of these, what other GPUs are sent."""
        record = self.record
        return [n + self.base for n in record.left if record.labels[n] == "communication"]
