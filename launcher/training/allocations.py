"""How high tensors on the processor rise while torch's profiler looks on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from msgspec import Struct

# Ranges of torch's profiler: a collective operation, what gloo does below it, and the copy after
# which FSDP2 needs no more what it has gathered.
_EXCHANGES = ("c10d::", "gloo:")
_GATHERS = "FSDP::all_gather"
_GATHERED = "FSDP::all_gather_copy_out"


class Change(Struct, frozen=True, kw_only=True):
    """An allocation, or a release, of which `num_bytes` is negative. `within`: the profiler's
    ranges about it, the innermost first."""

    nanoseconds: int  # since 1970
    address: int
    num_bytes: int
    within: tuple[str, ...] = ()

    @property
    def exchanges(self) -> bool:
        return any(name.startswith(_EXCHANGES) for name in self.within)

    @property
    def gathered_in(self) -> str | None:
        """The range that ends when this is needed no more; None where it is not for a gather."""
        found = (name for name in self.within if name.startswith(_GATHERS))
        name = next(found, None)
        return None if name is None or self.exchanges else name.replace(_GATHERS, _GATHERED)


class RangeEnd(Struct, frozen=True, kw_only=True):
    nanoseconds: int
    name: str


def highest_rise(profiler: Any) -> int:
    """How far allocations rose above the start of the profile, in bytes."""
    return max([0, *(level for _, level in levels(profiler))])


def levels(profiler: Any) -> list[tuple[int, int]]:
    """After each allocation and release: nanoseconds since 1970, and bytes above the start of the
    profile."""
    changes, ends = [], []
    for event in _events(profiler):
        if event.name == "[memory]":
            changes.append(_change(event))
        elif event.name.startswith(_GATHERED):
            ends.append(RangeEnd(nanoseconds=event.end_time_ns, name=event.name))
    level, found = 0, []
    for change in with_unseen_releases(without_exchanges(changes), ends):
        level += change.num_bytes
        found.append((change.nanoseconds, level))
    return found


def without_exchanges(changes: Iterable[Change]) -> list[Change]:
    """In their order, without the copies that processors exchange tensors by (gloo's; between GPUs
    there are none)."""
    exchanged: set[int] = set()  # addresses
    found = []
    for change in sorted(changes, key=lambda change: change.nanoseconds):
        if change.num_bytes > 0:
            if change.exchanges:
                exchanged.add(change.address)
                continue
            exchanged.discard(change.address)
        elif change.address in exchanged:
            exchanged.remove(change.address)
            continue
        found.append(change)
    return found


def with_unseen_releases(changes: Iterable[Change], ends: Sequence[RangeEnd]) -> list[Change]:
    """With the releases that the profiler has not seen: where a thread of gloo is the last to let
    go of a tensor. They are dated at the end of what the tensor was gathered for, others when
    their address is used again."""
    held: dict[int, Change] = {}
    found, unseen = list(changes), []
    for change in found:
        if change.num_bytes < 0:
            held.pop(change.address, None)
            continue
        if before := held.pop(change.address, None):
            unseen.append(_release(before, [*_needed_until(before, ends), change.nanoseconds]))
        held[change.address] = change
    for left in held.values():
        if until := _needed_until(left, ends):
            unseen.append(_release(left, until))
    return sorted([*unseen, *found], key=lambda change: change.nanoseconds)


def _needed_until(held: Change, ends: Sequence[RangeEnd]) -> list[int]:
    """Nanoseconds; empty where it is not known."""
    later = (end for end in ends if end.nanoseconds > held.nanoseconds)
    return [end.nanoseconds for end in later if end.name == held.gathered_in]


def _release(held: Change, at: Sequence[int]) -> Change:
    return Change(nanoseconds=min(at), address=held.address, num_bytes=-held.num_bytes)


def _events(profiler: Any) -> Iterator[Any]:
    left = list(profiler.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        yield event


def _change(event: Any) -> Change:
    within, above = [], event.parent
    while above is not None:
        within.append(above.name)
        above = above.parent
    fields = event.extra_fields
    return Change(
        nanoseconds=event.start_time_ns,
        address=fields.ptr,
        num_bytes=fields.alloc_size,
        within=tuple(within),
    )
