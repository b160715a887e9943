"""Which rows are trained on and which are held out. By prompt: none stands on both sides."""

from __future__ import annotations

from collections.abc import Sequence
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
    groups: Sequence[int], *, share: float = EVAL_SHARE, test_share: float = 0.0
) -> Split:
    """A split of rows with these prompts.

    No more rows than the share are held out; where every prompt has more, those of the rarest.
    The same rows are always split alike, whatever their order. Raises InputError when there are
    too few different prompts to hold any out.
    """
    counts = [(group, sum(1 for _ in same)) for group, same in groupby(sorted(groups))]
    if len(counts) < 2 + (test_share > 0):
        raise InputError(
            "at least two different rows are needed: one to train on and one to hold out",
            "add rows, or give held-out rows with `--eval-data FILE`",
        )
    held_out = _taken(counts, min(share * len(groups), MAX_EVAL_ROWS), len(groups))
    if not test_share:
        return Split(held_out)
    left = [(group, count) for group, count in counts if group not in held_out]
    return Split(held_out, _taken(left, test_share * len(groups), len(groups)))


def _taken(counts: Sequence[tuple[int, int]], wanted: float, num_rows: int) -> frozenset[int]:
    """Prompts with about so many rows. They are hashes: the smallest are a random choice."""
    room = min(max(1, round(wanted)), num_rows - 1)
    taken: list[int] = []
    for group, count in counts:
        if count <= room:
            taken.append(group)
            room -= count
        if not room:
            break
    return frozenset(taken or [min(counts, key=lambda one: one[1])[0]])


def rows_of(groups: Sequence[int], split: Split) -> tuple[int, int, int]:
    """How many rows are trained on, held out, and kept for a test."""
    held_out = sum(group in split.held_out for group in groups)
    test = sum(group in split.test for group in groups)
    return len(groups) - held_out - test, held_out, test
