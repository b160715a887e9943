"""PyTorch's CUDA caching allocator, replayed over a record of storages' births and deaths.

The allocator reserves more than is allocated: it rounds sizes, asks the driver for whole segments,
keeps what is freed, and cannot use every hole. How much more depends on the order of births and
deaths, so it is replayed, not estimated.

Source of the rules: c10/core/AllocatorConfig.h of torch 2.13, and class DeviceCachingAllocator of
c10/cuda/CUDACachingAllocator.cpp, read at github.com/DustyL/pytorch 023bca6 (a fork no older than
large_segment_size; its additions are off by default). Its functions are named at each rule.
Modelled: default settings, one device, one stream, no CUDA graphs, no private pools.

Not exact: addresses, which decide between free blocks of equal size. Here a new segment lies above
all earlier ones; the driver may use the range of a released one again. An expandable segment has
no end here; torch gives it addresses for 9/8 of the GPU's memory, then starts another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

_MIB = 1024**2

# AllocatorConfig.h: kMinBlockSize, kSmallSize, kSmallBuffer, large_segment_size_, kMinLargeAlloc
# and kRoundLarge.
BLOCK_BYTES: Final = 512
SMALL_BYTES: Final = 1 * _MIB
SMALL_SEGMENT_BYTES: Final = 2 * _MIB
LARGE_SEGMENT_BYTES: Final = 20 * _MIB
OWN_SEGMENT_BYTES: Final = 10 * _MIB
ROUND_LARGE_BYTES: Final = 2 * _MIB

# Free blocks are ordered by size, then address (BlockComparatorSize). One integer holds both: it
# compares faster than a pair. No address has this many bits.
_ADDRESS_BITS: Final = 64

# More than any GPU holds, and than all addresses that a run can use up.
_ENDLESS_BYTES: Final = 1 << 60

# `required_bytes` tries this much (relative) above the lower bound first. Giving the cache back
# leaves few holes, so the answer is mostly near that bound, and what fails ends early.
_FIRST_STEP = 0.01


class Replay(Struct, frozen=True, kw_only=True):
    """What the allocator held over a record of events, as torch counts it."""

    allocated_peak_bytes: int
    """`allocated_bytes.all.peak`: blocks handed out, with remainders not worth a split."""
    reserved_peak_bytes: int
    """`reserved_bytes.all.peak`: what the driver gave."""
    allocated_end_bytes: int
    reserved_end_bytes: int
    num_releases: int
    """`num_alloc_retries`: how often the cache was given back to satisfy an allocation."""
    failed_event: int | None
    """The event that ran out of memory, where the replay stopped; `None`: none did."""


class AllocatorPeaks(Struct, frozen=True, kw_only=True):
    """What the caching allocator holds. `required`: the least free memory that suffices."""

    reserved_peak_bytes: int
    required_bytes: int


def replay(
    sizes: Sequence[int],
    events: Sequence[int],
    *,
    capacity_bytes: int | None = None,
    expandable_segments: bool = False,
) -> Replay:
    """Replay births and deaths of storages through the caching allocator.

    `sizes`: bytes of each storage; one of 0 bytes takes nothing. `events`, in order of time:
    `i` is the birth of storage i, `~i` its death. A storage is born once and dies at most once.
    `capacity_bytes`: what the driver can give, so it limits reserved bytes; `None`: no limit.

    About 2 microseconds an event. ValueError for a negative size or capacity, an event of a
    storage without a size, a death before birth, a second birth or death.
    """
    if capacity_bytes is not None and capacity_bytes < 0:
        raise ValueError(f"capacity_bytes is {capacity_bytes}; it cannot be negative")
    blocks = _block_sizes(sizes, events)
    return _replay(blocks, events, _Driver(capacity_bytes), expandable_segments)


def required_bytes(
    sizes: Sequence[int],
    events: Sequence[int],
    *,
    expandable_segments: bool = False,
    tolerance: float = 0.002,
) -> int:
    """The smallest capacity with which `replay` succeeds, at most `tolerance` (relative) too high.

    Always a capacity that succeeds. The search, bisection after growing steps from below, takes
    for granted that what fits into some memory fits into more. Best fit does not promise that: a
    release at another moment leaves other holes, so by luck less may do where more does not.

    Arguments and errors as of `replay`.
    """
    return allocator_peaks(
        sizes, events, expandable_segments=expandable_segments, tolerance=tolerance
    ).required_bytes


def allocator_peaks(
    sizes: Sequence[int],
    events: Sequence[int],
    *,
    expandable_segments: bool,
    tolerance: float,
) -> AllocatorPeaks:
    """What is reserved without a limit, and `required_bytes`."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it cannot be negative")
    blocks = _block_sizes(sizes, events)
    reserved = _replay(blocks, events, _Driver(None), expandable_segments).reserved_peak_bytes
    least = _least_reserved_bytes(blocks, events, expandable_segments)
    enough, step = reserved, round(least * _FIRST_STEP)
    while enough > least * (1 + tolerance):
        driver = _Driver(least + min(step, (enough - least) // 2))
        if _replay(blocks, events, driver, expandable_segments).failed_event is None:
            # With no more than was reserved, every request would be answered the same.
            enough = driver.reserved_peak_bytes
        else:
            # With anything below the smallest refused request, too.
            least = driver.refused_bytes
            step *= 2
    return AllocatorPeaks(reserved_peak_bytes=reserved, required_bytes=enough)


def pinned_bytes(num_bytes: int) -> int:
    """What torch's allocator of pinned memory takes for a tensor: a power of two
    (`ATen/core/CachingHostAllocator.h`)."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def _block_sizes(sizes: Sequence[int], events: Sequence[int]) -> list[int]:
    """Sizes rounded up to blocks (round_size), 0 kept; checks what can be checked at once."""
    if sizes and min(sizes) < 0:
        storage = next(i for i, size in enumerate(sizes) if size < 0)
        raise ValueError(f"storage {storage} has {sizes[storage]} bytes; a size cannot be negative")
    if events and not -len(sizes) <= min(events) <= max(events) < len(sizes):
        place = next(i for i, e in enumerate(events) if not -len(sizes) <= e < len(sizes))
        storage = max(events[place], ~events[place])
        raise ValueError(f"event {place} is of storage {storage}, but there are {len(sizes)} sizes")
    return [(size + BLOCK_BYTES - 1) & -BLOCK_BYTES for size in sizes]


def _least_reserved_bytes(blocks: Sequence[int], events: Sequence[int], expandable: bool) -> int:
    """A capacity below which every replay fails: live blocks of each pool in whole pages.

    The allocated peak of a replay is no such bound: it counts remainders that were not split off,
    and with less memory other blocks may be used.
    """
    large_page = LARGE_SEGMENT_BYTES if expandable else ROUND_LARGE_BYTES
    small = large = peak = least = 0
    for event in events:
        size = blocks[event] if event >= 0 else -blocks[~event]
        if -SMALL_BYTES <= size <= SMALL_BYTES:
            small += size
        else:
            large += size
        if small + large > peak:
            peak = small + large
            pages = _round_up(small, SMALL_SEGMENT_BYTES) + _round_up(large, large_page)
            least = max(least, pages)
    return least


def _replay(
    sizes: Sequence[int], events: Sequence[int], driver: _Driver, expandable: bool
) -> Replay:
    """`replay` of block sizes; in one loop, since each call per event costs a few percent."""
    allocator = _Allocator(driver, expandable)
    allocate, free = allocator.allocate, allocator.free
    blocks: list[_Block | None] = [None] * len(sizes)
    allocated = peak = 0
    failed_event = None
    for place, event in enumerate(events):
        if event >= 0:
            if blocks[event] is not None:
                raise ValueError(f"event {place} is a second birth of storage {event}")
            size = sizes[event]
            block = allocate(size) if size else _NOTHING
            if block is None:
                failed_event = place
                break
            blocks[event] = block
            allocated += block.size
            if allocated > peak:
                peak = allocated
        else:
            storage = ~event
            block = blocks[storage]
            if block is None or block is _DEAD:
                when = "before its birth" if block is None else "after its death"
                raise ValueError(f"event {place} is a death of storage {storage} {when}")
            blocks[storage] = _DEAD
            if block is not _NOTHING:
                allocated -= block.size
                free(block)
    return Replay(
        allocated_peak_bytes=peak,
        reserved_peak_bytes=driver.reserved_peak_bytes,
        allocated_end_bytes=allocated,
        reserved_end_bytes=driver.reserved_bytes,
        num_releases=allocator.num_releases,
        failed_event=failed_event,
    )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class _Driver:
    """The GPU's memory: gives until its capacity is used up."""

    def __init__(self, capacity_bytes: int | None) -> None:
        self.capacity_bytes = _ENDLESS_BYTES if capacity_bytes is None else capacity_bytes
        self.reserved_bytes = 0
        self.reserved_peak_bytes = 0
        self.refused_bytes = _ENDLESS_BYTES
        """The smallest capacity with which some refused request had been granted."""

    def reserve(self, size: int) -> bool:
        reserved = self.reserved_bytes + size
        if reserved > self.capacity_bytes:
            self.refused_bytes = min(self.refused_bytes, reserved)
            return False
        self.reserved_bytes = reserved
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, reserved)
        return True

    def release(self, size: int) -> None:
        self.reserved_bytes -= size


class _Block:
    """A range of addresses within a segment: in use, free, or without memory behind it."""

    __slots__ = ("address", "following", "key", "mapped", "preceding", "size")

    def __init__(
        self, address: int, size: int, preceding: _Block | None, following: _Block | None
    ) -> None:
        self.address = address
        self.size = size
        self.preceding = preceding
        self.following = following
        self.key = 0
        """Its place among the free blocks; 0 if it is not free."""
        self.mapped = True

    def cut(self, size: int) -> _Block:
        """Keep `size` bytes; returns the remainder."""
        following = self.following
        remainder = _Block(self.address + size, self.size - size, self, following)
        if following is not None:
            following.preceding = remainder
        self.following = remainder
        self.size = size
        return remainder

    def absorb(self, neighbour: _Block) -> None:
        """Take over the range of the preceding or following block."""
        self.size += neighbour.size
        if neighbour is self.preceding:
            self.address = neighbour.address
            self.preceding = before = neighbour.preceding
            if before is not None:
                before.following = self
        else:
            self.following = after = neighbour.following
            if after is not None:
                after.preceding = self


# Stand for the block of a storage that takes nothing, and of one that has died.
_NOTHING = _Block(0, 0, None, None)
_DEAD = _Block(0, 0, None, None)


class _Allocator:
    """Two pools, by size of request (get_pool), and the order in which memory is looked for."""

    def __init__(self, driver: _Driver, expandable: bool) -> None:
        make = _ExpandableSegment if expandable else _Segments
        self.small: _Pool = make(driver, small=True)
        self.large: _Pool = make(driver, small=False)
        self.num_releases = 0

    def allocate(self, size: int) -> _Block | None:
        """A block of at least `size` bytes (malloc); `None` if there is no memory for it."""
        pool = self.small if size <= SMALL_BYTES else self.large
        block = pool.take(size) or pool.grow(size) or self._grow_after_release(pool, size)
        if block is not None and block.size - size >= pool.least_remainder_bytes:
            pool.add(block.cut(size))
        return block

    def _grow_after_release(self, pool: _Pool, size: int) -> _Block | None:
        self.num_releases += 1
        self.large.release()
        self.small.release()
        return pool.grow(size)

    def free(self, block: _Block) -> None:
        # Blocks of the small pool are always split, so none in use is larger than a small request.
        (self.small if block.size <= SMALL_BYTES else self.large).give(block)


class _Pool(ABC):
    """Free blocks, ordered by size and address; how memory is had and given back differs."""

    def __init__(self, driver: _Driver, least_remainder_bytes: int) -> None:
        self.driver = driver
        self.least_remainder_bytes = least_remainder_bytes
        """From which size on the unused remainder of a block is split off (should_split)."""
        self.keys: list[int] = []
        self.blocks: dict[int, _Block] = {}

    @abstractmethod
    def grow(self, size: int) -> _Block | None:
        """A block of at least `size` bytes with new memory; `None` if the driver refuses."""

    @abstractmethod
    def release(self) -> None:
        """Give back to the driver what is wholly free (release_blocks)."""

    def add(self, block: _Block) -> None:
        block.key = key = block.size << _ADDRESS_BITS | block.address
        self.blocks[key] = block
        insort(self.keys, key)

    def remove(self, block: _Block) -> None:
        keys, key = self.keys, block.key
        del self.blocks[key]
        del keys[bisect_left(keys, key)]
        block.key = 0

    def take(self, size: int) -> _Block | None:
        """Best fit (get_free_block): the smallest block that does, the lowest of equals."""
        keys = self.keys
        place = bisect_left(keys, size << _ADDRESS_BITS)
        if place == len(keys):
            return None
        block = self.blocks.pop(keys.pop(place))
        block.key = 0
        return block

    def give(self, block: _Block) -> None:
        """Free a block; it merges with free neighbours (free_block, try_merge_blocks).

        `remove`, `absorb` and `add` are written out: half of all events come here, and calling
        them makes a replay a tenth slower.
        """
        keys, blocks = self.keys, self.blocks
        preceding, following = block.preceding, block.following
        size, address = block.size, block.address
        if preceding is not None and (key := preceding.key):
            del blocks[key]
            del keys[bisect_left(keys, key)]
            size += preceding.size
            block.address = address = preceding.address
            block.preceding = before = preceding.preceding
            if before is not None:
                before.following = block
        if following is not None and (key := following.key):
            del blocks[key]
            del keys[bisect_left(keys, key)]
            size += following.size
            block.following = after = following.following
            if after is not None:
                after.preceding = block
        block.size = size
        block.key = key = size << _ADDRESS_BITS | address
        blocks[key] = block
        insort(keys, key)


class _Segments(_Pool):
    """A pool whose segments come from cudaMalloc, each of a fixed size."""

    def __init__(self, driver: _Driver, *, small: bool) -> None:
        super().__init__(driver, BLOCK_BYTES if small else SMALL_BYTES + BLOCK_BYTES)
        self.next_address = 0

    def grow(self, size: int) -> _Block | None:
        segment_bytes = _segment_bytes(size)
        if not self.driver.reserve(segment_bytes):
            return None
        block = _Block(self.next_address, segment_bytes, None, None)
        self.next_address += segment_bytes
        return block

    def release(self) -> None:
        for block in list(self.blocks.values()):
            if block.preceding is None and block.following is None:
                self.remove(block)
                self.driver.release(block.size)


def _segment_bytes(size: int) -> int:
    """Bytes asked of cudaMalloc for a request of `size` bytes (get_allocation_size)."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return _round_up(size, ROUND_LARGE_BYTES)


class _ExpandableSegment(_Pool):
    """A pool that is one range of addresses, into which memory is mapped page by page."""

    def __init__(self, driver: _Driver, *, small: bool) -> None:
        super().__init__(driver, BLOCK_BYTES)
        self.page_bytes = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        whole = _Block(0, _ENDLESS_BYTES, None, None)
        whole.mapped = False
        self.unmapped = [whole]
        """By address; the last one has no end."""

    def take(self, size: int) -> _Block | None:
        """Best fit, where a block before an unmapped range counts as large as it can grow."""
        keys, blocks = self.keys, self.blocks
        place = bisect_left(keys, size << _ADDRESS_BITS)
        if place == len(keys):
            return None
        block = blocks[keys[place]]
        while _can_grow(block) and place + 1 < len(keys):
            larger = blocks[keys[place + 1]]
            if _room(larger) >= _room(block):
                break
            block = larger
            place += 1
        del blocks[keys.pop(place)]
        block.key = 0
        return block

    def grow(self, size: int) -> _Block | None:
        """Maps from the lowest possible address on (try_allocate_expandable_block).

        If the driver refuses midway, what was mapped until then stays, and is free.
        """
        block = self._lowest_room(size)
        if not block.mapped and not self._map(block, min(size, block.size)):
            return None
        while block.size < size:
            gap = block.following
            assert gap is not None and not gap.mapped
            if not self._map(gap, min(size - block.size, gap.size)):
                return None
            block = gap  # which has absorbed the free block before it
        self.remove(block)
        return block

    def release(self) -> None:
        page = self.page_bytes
        for block in list(self.blocks.values()):
            start = _round_up(block.address, page)
            end = (block.address + block.size) // page * page
            if start < end:
                self._unmap(block, start, end)

    def _lowest_room(self, size: int) -> _Block:
        """The first of blocks in a row, free or unmapped, with `size` bytes in all; the lowest
        such row that has something to map (find_expandable_block)."""
        for gap in self.unmapped:
            before = gap.preceding
            first = before if before is not None and before.key else gap
            room, block = 0, first
            while room < size and (block.key or not block.mapped):
                room += block.size
                block = block.following or block
            if room >= size:
                return first
        raise AssertionError("the last unmapped range has no end")

    def _map(self, block: _Block, size: int) -> bool:
        """Put memory behind the first pages of an unmapped block (map_block)."""
        mapped_bytes = _round_up(size, self.page_bytes)
        if not self.driver.reserve(mapped_bytes):
            return False
        self.unmapped.remove(block)
        if mapped_bytes < block.size:
            remainder = block.cut(mapped_bytes)
            remainder.mapped = False
            self._add_unmapped(remainder)
        block.mapped = True
        self.give(block)
        return True

    def _unmap(self, block: _Block, start: int, end: int) -> None:
        """Take the memory from behind a part of a free block (unmap_block)."""
        self.remove(block)
        if block.address < start:
            front, block = block, block.cut(start - block.address)
            self.add(front)
        if block.size > end - start:
            self.add(block.cut(end - start))
        block.mapped = False
        self.driver.release(end - start)
        for neighbour in (block.preceding, block.following):
            if neighbour is not None and not neighbour.mapped:
                self.unmapped.remove(neighbour)
                block.absorb(neighbour)
        self._add_unmapped(block)

    def _add_unmapped(self, block: _Block) -> None:
        insort(self.unmapped, block, key=lambda unmapped: unmapped.address)


def _can_grow(block: _Block) -> bool:
    return block.following is not None and not block.following.mapped


def _room(block: _Block) -> int:
    """Bytes of a free block and of the unmapped range after it."""
    following = block.following
    return block.size if following is None or following.mapped else block.size + following.size
