"""Which rows are trained on and which are held out. By prompt: none stands on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from msgspec import Struct

from ftplan.planner.errors import InputError
from ftplan.planner.policy import EVAL_SHARE

# Held-out rows are evaluated twice, before and after training; a few hundred tell enough.
MAX_EVAL_ROWS = 500


class Split(Struct, frozen=True):
    """The prompts (`survey.group_of`) of rows that are not trained on: `held_out` ones are
    evaluated before and after training, `test` ones never seen by it."""

    held_out: frozenset[int] = frozenset()
    test: frozenset[int] = frozenset()

    def trains(self, group: int) -> bool:
        """Whether a row with this prompt is trained on."""
        return group not in self.held_out and group not in self.test


def split_groups(
    groups: Sequence[int],
    *,
    share: float = EVAL_SHARE,
    test_share: float = 0.0,
    labels: Sequence[str] | None = None,
) -> Split:
    """A split of rows with these prompts.

    No more rows than the share are held out; where every prompt has more, those of the rarest.
    `labels`: the rows' answers where these are labels; each has its part of what is held out, and
    one row at least where there is room for that.
    The same rows are always split alike, whatever their order. Raises InputError when there are
    too few different prompts to hold any out.
    """
    if _fewer_than(2 + (test_share > 0), groups):
        raise InputError(
            "at least two different rows are needed: one to train on and one to hold out",
            "add rows, or give held-out rows with `--eval-data FILE`",
        )
    wanted = min(share * len(groups), MAX_EVAL_ROWS)
    held_out = (labels and _of_each_label(groups, labels, wanted)) or _taken(groups, wanted)
    if not test_share:
        return Split(held_out)
    return Split(held_out, _taken(groups, test_share * len(groups), held_out))


def _of_each_label(groups: Sequence[int], labels: Sequence[str], wanted: float) -> frozenset[int]:
    """Prompts with about so many rows, of each label by its share (largest remainders). None, where
    each label's prompts have more rows than that."""
    strata = _strata(groups, labels)
    room = min(max(1, round(wanted)), len(groups) - 1)
    parts = {label: room * len(rows) / len(groups) for label, rows in strata.items()}
    rooms = {label: int(part) for label, part in parts.items()}
    # Labels that would have no row come first, the larger ones before.
    order = sorted(parts, key=lambda label: (rooms[label] > 0, rooms[label] - parts[label], label))
    for label in order[: room - sum(rooms.values())]:
        rooms[label] += 1
    return frozenset(
        group for label, rows in strata.items() for group in _fitting(rows, rooms[label])
    )


def _strata(groups: Sequence[int], labels: Sequence[str]) -> dict[str, list[int]]:
    """The prompts by label, one for each row; a prompt of several labels is of the first."""
    of_group: dict[int, str] = {}
    for group, label in zip(groups, labels, strict=True):
        of_group[group] = min(label, of_group.get(group, label))
    strata: dict[str, list[int]] = {label: [] for label in sorted(set(of_group.values()))}
    for group in groups:
        strata[of_group[group]].append(group)
    return strata


def _fitting(groups: Sequence[int], room: int) -> list[int]:
    """The smallest of the prompts for which there is room, not all of them."""
    counts = sorted(Counter(groups).items())
    taken: list[int] = []
    for group, count in counts:
        if count <= room and len(taken) < len(counts) - 1:
            taken.append(group)
            room -= count
    return taken


def _fewer_than(count: int, groups: Sequence[int]) -> bool:
    """Whether there are fewer different prompts than that."""
    different: set[int] = set()
    for group in groups:
        different.add(group)
        if len(different) == count:
            return False
    return True


def _taken(
    groups: Sequence[int], wanted: float, but: frozenset[int] = frozenset()
) -> frozenset[int]:
    """Prompts with about so many rows, not those of `but`. They are hashes: the smallest are a
    random choice."""
    room = min(max(1, round(wanted)), len(groups) - 1)
    taken: list[int] = []
    rarest, fewest = None, len(groups) + 1
    for group, count in _ascending(groups, room):
        if group in but:
            continue
        if count < fewest:
            rarest, fewest = group, count
        if count <= room:
            taken.append(group)
            room -= count
        if not room:
            break
    if not taken:
        assert rarest is not None, "there are more different prompts"
        taken = [rarest]
    return frozenset(taken)


def _ascending(groups: Sequence[int], wanted: int) -> Iterator[tuple[int, int]]:
    """Prompts from the smallest, and how many rows each has. Sorted in pieces, the first of some
    times as many rows as are wanted: of millions, hardly more are asked for."""
    begin, end = 0, _MOST_SORTED_AT_FIRST * wanted * _HASHES // len(groups)
    while begin < _HASHES:
        piece = sorted([group for group in groups if begin <= group < end])
        for group, same in groupby(piece):
            yield group, sum(1 for _ in same)
        begin, end = end, _HASHES


_HASHES = 1 << 64
_MOST_SORTED_AT_FIRST = 4


def rows_of(groups: Sequence[int], split: Split) -> tuple[int, int, int]:
    """How many rows are trained on, held out, and kept for a test."""
    held_out = sum(map(split.held_out.__contains__, groups))
    test = sum(map(split.test.__contains__, groups))
    return len(groups) - held_out - test, held_out, test
