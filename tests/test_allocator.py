"""The caching allocator: each rule by hand, then against a slow model without lists or links."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftplan.planner.allocator import (
    Replay,
    _Allocator,
    _Block,
    _Driver,
    _ExpandableSegment,
    replay,
    required_bytes,
)

KIB = 1024
MIB = 1024**2

Record = tuple[list[int], list[int]]


def born(*sizes: int) -> Record:
    """Storages of `sizes`, born one after another."""
    return list(sizes), list(range(len(sizes)))


def reserved(*sizes: int, expandable: bool = False) -> int:
    return replay(*born(*sizes), expandable_segments=expandable).reserved_peak_bytes


# --- sizes ---------------------------------------------------------------------------------------


def test_nothing_happens_without_events() -> None:
    assert replay([], []) == Replay(
        allocated_peak_bytes=0,
        reserved_peak_bytes=0,
        allocated_end_bytes=0,
        reserved_end_bytes=0,
        num_releases=0,
        failed_event=None,
    )
    assert required_bytes([], []) == 0


@pytest.mark.parametrize("expandable", [False, True])
def test_an_empty_storage_takes_nothing(expandable: bool) -> None:
    result = replay([0], [0, ~0], capacity_bytes=0, expandable_segments=expandable)
    assert (result.allocated_peak_bytes, result.reserved_peak_bytes) == (0, 0)
    assert result.failed_event is None


@pytest.mark.parametrize(
    ("size", "allocated"), [(1, 512), (512, 512), (513, 1024), (1000, 1024), (1 * MIB, 1 * MIB)]
)
def test_sizes_are_rounded_up_to_512_bytes(size: int, allocated: int) -> None:
    assert replay(*born(size)).allocated_peak_bytes == allocated


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (1 * MIB, 2 * MIB),
        (1 * MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounded to 10 MiB, which has a segment of its own
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments_by_size_of_request(size: int, segment: int) -> None:
    assert reserved(size) == segment


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    assert reserved(*[512 * KIB] * 4) == 2 * MIB
    assert reserved(*[512 * KIB] * 5) == 4 * MIB


def test_middling_requests_share_20_mib() -> None:
    assert reserved(*[5 * MIB] * 4) == 20 * MIB
    assert reserved(*[6 * MIB] * 3) == 20 * MIB
    assert reserved(*[6 * MIB] * 4) == 40 * MIB


def test_small_and_large_requests_have_pools_of_their_own() -> None:
    # 15 MiB are left free in the large pool, 1 MiB in the small one.
    assert reserved(5 * MIB, 1 * MIB) == 22 * MIB
    assert reserved(1 * MIB, 1 * MIB + 512) == 22 * MIB


# --- splitting -----------------------------------------------------------------------------------


def test_a_large_block_keeps_a_remainder_of_one_mib() -> None:
    result = replay(*born(19 * MIB))
    assert (result.allocated_peak_bytes, result.reserved_peak_bytes) == (20 * MIB, 20 * MIB)


def test_a_large_block_is_split_when_more_is_left() -> None:
    # A fresh segment leaves less than 2 MiB over; a cached one may leave 1 MiB + 512 bytes.
    sizes = [20 * MIB, 19 * MIB - 512]
    result = replay(sizes, [0, ~0, 1])
    assert result.allocated_end_bytes == 19 * MIB - 512
    assert result.reserved_end_bytes == 20 * MIB


def test_the_remainder_is_freed_with_its_block() -> None:
    assert replay([19 * MIB], [0, ~0]).allocated_end_bytes == 0


def test_a_small_block_is_split_at_any_remainder() -> None:
    sizes = [1 * MIB, 1 * MIB - 512, 1 * MIB, 512]
    result = replay(sizes, [0, ~0, 1, 2, 3])
    assert result.allocated_end_bytes == 2 * MIB
    assert result.reserved_end_bytes == 2 * MIB


def test_an_expandable_segment_is_split_at_any_remainder() -> None:
    result = replay(*born(19 * MIB), expandable_segments=True)
    assert (result.allocated_peak_bytes, result.reserved_peak_bytes) == (19 * MIB, 20 * MIB)


# --- reuse ---------------------------------------------------------------------------------------


def test_freed_memory_stays_reserved() -> None:
    result = replay([30 * MIB], [0, ~0])
    assert (result.allocated_end_bytes, result.reserved_end_bytes) == (0, 30 * MIB)


def test_a_freed_block_is_used_again() -> None:
    assert replay([30 * MIB, 30 * MIB], [0, ~0, 1]).reserved_peak_bytes == 30 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_free_neighbours_merge(order: tuple[int, int, int]) -> None:
    # Three blocks of 6 MiB and 2 MiB left over make 20 MiB again, whichever is freed first.
    sizes = [6 * MIB] * 3 + [20 * MIB]
    deaths = [~storage for storage in order]
    assert replay(sizes, [0, 1, 2, *deaths, 3]).reserved_peak_bytes == 20 * MIB


def test_blocks_of_different_segments_do_not_merge() -> None:
    sizes = [10 * MIB, 10 * MIB, 20 * MIB]
    assert replay(sizes, [0, 1, ~0, ~1, 2]).reserved_peak_bytes == 40 * MIB


def test_best_fit_takes_the_smallest_block_that_does() -> None:
    sizes = [40 * MIB, 30 * MIB, 12 * MIB, 28 * MIB, 40 * MIB]
    # 28 MiB fit into 30; were they taken from the first, 40 MiB, the last would need a segment.
    assert replay(sizes, [0, 1, 2, ~0, ~1, ~2, 3, 4]).reserved_peak_bytes == 82 * MIB


def test_of_equal_blocks_the_lowest_is_taken() -> None:
    # Of 4, 4, 4, 4, 4 MiB the first and the fourth are free. If the first goes, the fourth and
    # the fifth merge into 8 MiB.
    sizes = [4 * MIB] * 6 + [8 * MIB]
    assert replay(sizes, [0, 1, 2, 3, 4, ~3, ~0, 5, ~4, 6]).reserved_peak_bytes == 20 * MIB


# --- capacity ------------------------------------------------------------------------------------


def test_capacity_limits_what_is_reserved() -> None:
    assert replay(*born(9 * MIB), capacity_bytes=20 * MIB).failed_event is None
    assert replay(*born(9 * MIB), capacity_bytes=20 * MIB - 1).failed_event == 0


def test_the_cache_is_given_back_before_failure() -> None:
    sizes, events = [30 * MIB, 40 * MIB], [0, ~0, 1]
    assert replay(sizes, events).reserved_peak_bytes == 70 * MIB
    result = replay(sizes, events, capacity_bytes=40 * MIB)
    assert result.failed_event is None
    assert result.num_releases == 1
    assert result.reserved_peak_bytes == result.reserved_end_bytes == 40 * MIB
    assert required_bytes(sizes, events) == 40 * MIB


def test_both_pools_are_given_back() -> None:
    sizes = [512, 30 * MIB, 30 * MIB + 512]
    result = replay(sizes, [0, ~0, 1, ~1, 2], capacity_bytes=32 * MIB)
    assert (result.failed_event, result.reserved_end_bytes) == (None, 32 * MIB)


def test_a_segment_partly_in_use_is_not_given_back() -> None:
    sizes, events = [6 * MIB, 6 * MIB, 30 * MIB], [0, 1, ~0, 2]
    assert replay(sizes, events, capacity_bytes=50 * MIB).num_releases == 0
    result = replay(sizes, events, capacity_bytes=50 * MIB - 1)
    assert (result.failed_event, result.num_releases) == (3, 1)


def test_the_replay_stops_at_the_event_that_fails() -> None:
    sizes = [10 * MIB, 10 * MIB, 10 * MIB]
    result = replay(sizes, [0, 1, 2, ~0, ~1, ~2], capacity_bytes=20 * MIB)
    assert result == Replay(
        allocated_peak_bytes=20 * MIB,
        reserved_peak_bytes=20 * MIB,
        allocated_end_bytes=20 * MIB,
        reserved_end_bytes=20 * MIB,
        num_releases=1,
        failed_event=2,
    )


# --- expandable segments -------------------------------------------------------------------------


def test_an_expandable_segment_grows_by_pages() -> None:
    assert reserved(512, expandable=True) == 2 * MIB
    assert reserved(*[1 * MIB] * 3, expandable=True) == 4 * MIB
    assert reserved(5 * MIB, expandable=True) == 20 * MIB
    assert reserved(21 * MIB, expandable=True) == 40 * MIB
    assert reserved(21 * MIB, 512, expandable=True) == 42 * MIB


def test_growth_begins_with_what_is_free_at_the_end() -> None:
    # 15 MiB are free at the end; one page more makes 35.
    assert reserved(5 * MIB, 35 * MIB, expandable=True) == 40 * MIB
    assert reserved(5 * MIB, 35 * MIB) == 56 * MIB


def test_requests_that_grow_leave_no_hole_in_an_expandable_segment() -> None:
    sizes = [20 * MIB, 40 * MIB, 60 * MIB]
    events = [0, ~0, 1, ~1, 2]
    assert replay(sizes, events).reserved_peak_bytes == 120 * MIB
    assert replay(sizes, events, expandable_segments=True).reserved_peak_bytes == 60 * MIB


def test_a_hole_is_preferred_to_the_end_that_can_grow() -> None:
    # Free: a hole of 20 MiB and 15 MiB at the end. Best fit alone would put 10 MiB into the
    # latter, but that can grow, so it counts as larger. Kept whole, it needs one page for 35 MiB.
    sizes = [20 * MIB, 25 * MIB, 10 * MIB, 35 * MIB]
    result = replay(sizes, [0, 1, ~0, 2, 3], expandable_segments=True)
    assert result.reserved_peak_bytes == 80 * MIB


def test_whole_free_pages_are_unmapped() -> None:
    # 41 MiB in three pages, then 2 MiB in use behind: of the pages two are wholly free.
    sizes = [41 * MIB, 2 * MIB, 512, 2 * MIB]
    at_once = replay(sizes, [0, 1, ~0, 2], capacity_bytes=60 * MIB, expandable_segments=True)
    assert at_once.failed_event is None
    assert at_once.num_releases == 1
    assert at_once.reserved_peak_bytes == 60 * MIB
    assert at_once.reserved_end_bytes == 22 * MIB


def test_an_unmapped_gap_is_mapped_again() -> None:
    sizes = [40 * MIB, 2 * MIB, 512, 35 * MIB]
    events = [0, 1, ~0, 2, ~2, 3]  # for 512 bytes in the small pool the 40 MiB are unmapped
    result = replay(sizes, events, capacity_bytes=60 * MIB, expandable_segments=True)
    assert (result.num_releases, result.failed_event) == (2, None)
    # Two pages in the gap. Behind the 2 MiB, where 18 are free, one would have done.
    assert result.reserved_end_bytes == 60 * MIB


def test_the_lowest_gap_is_tried_even_where_the_end_needs_less() -> None:
    sizes = [40 * MIB, 2 * MIB, 512, 35 * MIB]
    events = [0, 1, ~0, 2, 3]  # as above, but the small page stays
    result = replay(sizes, events, capacity_bytes=60 * MIB, expandable_segments=True)
    assert (result.num_releases, result.failed_event) == (2, 4)
    assert result.reserved_end_bytes == 22 * MIB


@pytest.mark.parametrize(("deaths", "size"), [([~0], 35), ([~0, ~2], 55), ([~2], 35)])
def test_growth_maps_only_the_gap_between_free_blocks(deaths: list[int], size: int) -> None:
    # Six pages in use, 1 and 4 die and are unmapped for 512 bytes of the small pool. Then 1 and
    # its free neighbours are large enough together: its page is all that is mapped.
    sizes = [20 * MIB] * 6 + [512, size * MIB]
    events = [0, 1, 2, 3, 4, 5, ~1, ~4, 6, *deaths, 7]
    result = replay(sizes, events, capacity_bytes=120 * MIB, expandable_segments=True)
    assert (result.num_releases, result.reserved_end_bytes) == (1, 102 * MIB)


def test_of_blocks_with_equal_room_the_smaller_is_taken() -> None:
    # Free: 20 MiB before a gap of 20, and 40. If 15 came from the 40, the last would not fit.
    sizes = [20 * MIB, 20 * MIB, 20 * MIB, 40 * MIB, 20 * MIB, 512, 15 * MIB, 40 * MIB]
    events = [0, 1, 2, 3, 4, ~1, 5, ~0, ~3, 6, 7]
    result = replay(sizes, events, capacity_bytes=120 * MIB, expandable_segments=True)
    assert (result.num_releases, result.reserved_end_bytes) == (1, 102 * MIB)


# --- required ------------------------------------------------------------------------------------


def test_required_is_found_to_the_byte_without_tolerance() -> None:
    sizes = [30 * MIB, 31 * MIB, 33 * MIB, 512, 35 * MIB]
    events = [0, ~0, 1, ~1, 2, ~2, 3, 4]
    assert replay(sizes, events).reserved_peak_bytes == (30 + 32 + 34 + 2 + 36) * MIB
    assert required_bytes(sizes, events, tolerance=0.0) == 38 * MIB


def test_required_counts_large_requests_in_steps_of_2_mib() -> None:
    assert replay([16 * MIB, 22 * MIB], [0, ~0, 1]).reserved_peak_bytes == 38 * MIB
    assert required_bytes([16 * MIB, 22 * MIB], [0, ~0, 1]) == 22 * MIB


def test_the_smallest_refused_request_is_remembered() -> None:
    # Up to it a replay with more memory would run the same, so the search may skip as far.
    driver = _Driver(100)
    assert [driver.reserve(size) for size in (90, 30, 20, 40, 10)] == [True, *[False] * 3, True]
    assert driver.refused_bytes == 110


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "events", "message"),
    [
        ([512], [~0], "event 0 is a death of storage 0 before its birth"),
        ([512], [0, 0], "event 1 is a second birth of storage 0"),
        ([512], [0, ~0, 0], "event 2 is a second birth of storage 0"),
        ([0], [0, 0], "event 1 is a second birth of storage 0"),
        ([512], [0, ~0, ~0], "event 2 is a death of storage 0 after its death"),
        ([512, -1], [0], "storage 1 has -1 bytes; a size cannot be negative"),
        ([512], [0, 1], "event 1 is of storage 1, but there are 1 sizes"),
        ([512], [0, ~3], "event 1 is of storage 3, but there are 1 sizes"),
        ([], [0], "event 0 is of storage 0, but there are 0 sizes"),
    ],
)
def test_bad_records_are_refused(sizes: list[int], events: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        replay(sizes, events)
    with pytest.raises(ValueError, match=f"^{message}$"):
        required_bytes(sizes, events)


def test_bad_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity_bytes is -1"):
        replay([], [], capacity_bytes=-1)
    with pytest.raises(ValueError, match=r"tolerance is -0\.5"):
        required_bytes([], [], tolerance=-0.5)


# --- properties ----------------------------------------------------------------------------------

_SIZES = st.one_of(
    st.sampled_from([0, 1, 512, 1 * MIB, 1 * MIB + 1, 10 * MIB, 19 * MIB, 20 * MIB, 40 * MIB]),
    st.integers(0, 2 * MIB),
    st.integers(1 * MIB, 12 * MIB),
    st.integers(10 * MIB, 70 * MIB),
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Births and deaths in any order; some storages never die."""
    sizes: list[int] = []
    events: list[int] = []
    living: list[int] = []
    for size, choice in draw(st.lists(st.tuples(_SIZES, st.integers(0, 999)), max_size=40)):
        for _ in range(choice % 3 if living else 0):
            if living:
                events.append(~living.pop(choice // 3 % len(living)))
        living.append(len(sizes))
        events.append(len(sizes))
        sizes.append(size)
    return sizes, events


def live_peak(record: Record) -> int:
    sizes, events = record
    live = peak = 0
    for event in events:
        live += _blocks(sizes[event]) if event >= 0 else -_blocks(sizes[~event])
        peak = max(peak, live)
    return peak


def _blocks(size: int) -> int:
    return math.ceil(size / 512) * 512


@given(record=records(), expandable=st.booleans())
@settings(max_examples=50)
def test_reserved_covers_allocated_covers_what_lives(record: Record, expandable: bool) -> None:
    result = replay(*record, expandable_segments=expandable)
    assert live_peak(record) <= result.allocated_peak_bytes <= result.reserved_peak_bytes
    assert result.allocated_end_bytes <= result.reserved_end_bytes == result.reserved_peak_bytes
    assert (result.num_releases, result.failed_event) == (0, None)
    if expandable:  # where every block is split
        assert result.allocated_peak_bytes == live_peak(record)


@given(record=records(), expandable=st.booleans())
@settings(max_examples=50)
def test_when_all_are_dead_nothing_is_allocated(record: Record, expandable: bool) -> None:
    sizes, events = record
    living = set(range(len(sizes))) - {~event for event in events if event < 0}
    result = replay(sizes, events + [~i for i in living], expandable_segments=expandable)
    assert result.allocated_end_bytes == 0


@given(record=records(), expandable=st.booleans())
@settings(max_examples=50)
def test_with_what_was_reserved_nothing_changes(record: Record, expandable: bool) -> None:
    free = replay(*record, expandable_segments=expandable)
    limit = free.reserved_peak_bytes
    assert replay(*record, capacity_bytes=limit, expandable_segments=expandable) == free


@given(record=records(), expandable=st.booleans(), tolerance=st.sampled_from([0.0, 0.002, 0.1]))
@settings(max_examples=50)
def test_required_succeeds_and_less_would_not(
    record: Record, expandable: bool, tolerance: float
) -> None:
    required = required_bytes(*record, expandable_segments=expandable, tolerance=tolerance)
    result = replay(*record, capacity_bytes=required, expandable_segments=expandable)
    assert result.failed_event is None
    without_limit = replay(*record, expandable_segments=expandable)
    assert live_peak(record) <= required <= without_limit.reserved_peak_bytes
    if required and not tolerance:
        less = replay(*record, capacity_bytes=required - 1, expandable_segments=expandable)
        assert less.failed_event is not None


# One page is unmapped, then the one after it.
@example(
    record=([20 * MIB] * 3 + [512, 40 * MIB], [0, 1, 2, ~0, 3, ~1, 4]), expandable=True, share=0.0
)
@given(record=records(), expandable=st.booleans(), share=st.floats(0, 1.1))
@settings(max_examples=120)
def test_agrees_with_a_slow_model(record: Record, expandable: bool, share: float) -> None:
    low, high = live_peak(record), replay(*record, expandable_segments=expandable)
    capacity = low + round(share * (high.reserved_peak_bytes - low))
    result = replay(*record, capacity_bytes=capacity, expandable_segments=expandable)
    assert result == SlowModel(capacity, expandable).replay(*record)


@given(record=records(), expandable=st.booleans(), share=st.floats(0, 1.1))
@settings(max_examples=50)
def test_alike_neighbours_are_merged(record: Record, expandable: bool, share: float) -> None:
    sizes, events = record
    allocator = _Allocator(_Driver(round(share * live_peak(record))), expandable)
    blocks: dict[int, _Block | None] = {}
    for event in events:
        if event >= 0 and sizes[event]:
            blocks[event] = allocator.allocate(_blocks(sizes[event]))
        elif block := blocks.pop(~event, None):
            allocator.free(block)
        for pool in (allocator.small, allocator.large):
            assert pool.keys == sorted(pool.blocks)
            unmapped = pool.unmapped if isinstance(pool, _ExpandableSegment) else []
            for block in (*pool.blocks.values(), *unmapped):
                assert bool(block.key) == block.mapped
                if after := block.following:
                    assert after.address == block.address + block.size
                    assert (after.mapped, bool(after.key)) != (block.mapped, bool(block.key))


class SlowModel:
    """The same rules, derived anew each time from what is in use and what is mapped.

    A pool is a set of mapped pages and a table of ranges in use. An expandable pool's pages are
    adjacent; a segment of cudaMalloc's is a page by itself, between pages that never are.
    """

    def __init__(self, capacity: int, expandable: bool) -> None:
        self.capacity, self.expandable = capacity, expandable
        self.pages: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self.used: dict[bool, dict[int, tuple[int, int]]] = {True: {}, False: {}}
        self.next_address = 0

    def replay(self, sizes: list[int], events: list[int]) -> Replay:
        allocated_peak = reserved_peak = releases = 0
        failed = None
        for place, event in enumerate(events):
            size = _blocks(sizes[max(event, ~event)])
            small = size <= 1 * MIB
            if event < 0:
                self.used[small].pop(~event, None)
            elif size:
                start = self.find(small, size)
                if start is None:
                    start = self.map(small, size)
                    reserved_peak = max(reserved_peak, self.reserved())
                if start is None:
                    releases += 1
                    self.release()
                    start = self.map(small, size)
                    reserved_peak = max(reserved_peak, self.reserved())
                if start is None:
                    failed = place
                    break
                left = next(end for begin, end in self.free(small) if begin == start) - start - size
                keeps = 0 if small or self.expandable or left > 1 * MIB else left
                self.used[small][event] = (start, start + size + keeps)
                allocated_peak = max(allocated_peak, self.allocated())
        return Replay(
            allocated_peak_bytes=allocated_peak,
            reserved_peak_bytes=reserved_peak,
            allocated_end_bytes=self.allocated(),
            reserved_end_bytes=self.reserved(),
            num_releases=releases,
            failed_event=failed,
        )

    def allocated(self) -> int:
        return sum(end - start for used in self.used.values() for start, end in used.values())

    def reserved(self) -> int:
        return sum(end - start for pages in self.pages.values() for start, end in pages)

    def mapped(self, small: bool) -> Iterator[tuple[int, int]]:
        """Pages that touch, as one range."""
        pages = sorted(self.pages[small])
        while pages:
            start, end = pages.pop(0)
            while self.expandable and pages and pages[0][0] == end:
                end = pages.pop(0)[1]
            yield start, end

    def free(self, small: bool) -> list[tuple[int, int]]:
        """Ranges that are mapped and not in use."""
        found = []
        for start, end in self.mapped(small):
            for first, last in sorted(self.used[small].values()):
                if start <= first < end:
                    found.append((start, first))
                    start = last
            found.append((start, end))
        return [(start, end) for start, end in found if start < end]

    def unmapped(self, small: bool) -> list[tuple[float, float]]:
        edges = [0.0, *(edge for both in self.mapped(small) for edge in both), math.inf]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def find(self, small: bool, size: int) -> int | None:
        fits = sorted((end - start, start) for start, end in self.free(small))
        fits = [fit for fit in fits if fit[0] >= size]
        if not fits:
            return None
        if self.expandable:
            gaps = dict(self.unmapped(small))
            rooms = [gaps.get(start + length, start + length) - start for length, start in fits]
            place = 0
            while place + 1 < len(fits) and rooms[place + 1] < rooms[place]:
                place += 1
            return fits[place][1]
        return fits[0][1]

    def map(self, small: bool, size: int) -> int | None:
        if self.expandable:
            return self.map_pages(small, size, 2 * MIB if small else 20 * MIB)
        segment = 2 * MIB if small else 20 * MIB
        if size >= 10 * MIB:
            segment = math.ceil(size / (2 * MIB)) * 2 * MIB
        if self.reserved() + segment > self.capacity:
            return None
        start, self.next_address = self.next_address, self.next_address + segment
        self.pages[small].append((start, start + segment))
        return start

    def map_pages(self, small: bool, size: int, page: int) -> int | None:
        for gap, _ in self.unmapped(small):
            start = next((s for s, end in self.free(small) if end == gap), int(gap))
            in_use = [first for first, _ in self.used[small].values() if first >= start]
            if start + size <= min(in_use, default=math.inf):
                break
        for gap, end in self.unmapped(small):
            if start <= gap < start + size:
                last = math.ceil(min(end, start + size) / page)
                pages = [(i * page, (i + 1) * page) for i in range(int(gap) // page, last)]
                if self.reserved() + page * len(pages) > self.capacity:
                    return None
                self.pages[small] += pages
        return start

    def release(self) -> None:
        for small, pages in self.pages.items():
            free = self.free(small)
            self.pages[small] = [
                (start, end)
                for start, end in pages
                if not any(first <= start and end <= last for first, last in free)
            ]
