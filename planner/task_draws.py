"""Which rows of several tasks come next, and how weights follow the tasks' losses."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ftplan.planner.tasks import allotted

# Of its weight at the start, what a task keeps whatever its loss: a task that is learned already
# is not forgotten. Assumed.
_KEPT_SHARE = 0.1

# Of a task's recent loss, what is kept at each step that has rows of it: the last ten or so count.
_LOSS_DECAY = 0.9


class TaskDraws:
    """Which rows come next, by task. Shares are kept exactly: what rounding takes from a task is
    given back later. Every row of a task comes before one comes again, across epochs; its longest
    comes first, so that what does not fit fails at once.

    `tasks`: each row's, numbers from 0; `lengths`: each row's tokens.
    """

    def __init__(self, tasks: Sequence[int], lengths: Sequence[int], seed: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(max(tasks) + 1)]
        for row, task in enumerate(tasks):
            self._rows[task].append(row)
        self._lengths, self._seed = lengths, seed
        self._taken = [0] * len(self._rows)
        self._owed = [0.0] * len(self._rows)
        self._passes: dict[int, tuple[int, list[int]]] = {}
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        self._first = tasks[longest]

    def take(self, shares: Sequence[float], count: int) -> list[int]:
        """The next rows, one task after the other."""
        begin = list(self._taken)
        self.skip(shares, count)
        return [
            self._row(task, place)
            for task in range(len(self._rows))
            for place in range(begin[task], self._taken[task])
        ]

    def skip(self, shares: Sequence[float], count: int) -> None:
        """What `take` does, for rows that nobody asks for."""
        wanted = [owed + share * count for owed, share in zip(self._owed, shares, strict=True)]
        asked = list(wanted)
        if not any(self._taken) and shares[self._first] > 0:
            asked[self._first] = max(asked[self._first], 1.0)
        for task, quota in enumerate(allotted(asked, count)):
            self._taken[task] += quota
            self._owed[task] = wanted[task] - quota

    def _row(self, task: int, place: int) -> int:
        number, within = divmod(place, len(self._rows[task]))
        if self._passes.get(task, (-1, []))[0] != number:
            self._passes[task] = number, self._shuffled(task, number)
        return self._passes[task][1][within]

    def _shuffled(self, task: int, number: int) -> list[int]:
        rows = list(self._rows[task])
        random.Random(f"{self._seed}/task {task}/{number}").shuffle(rows)
        if number == 0:
            longest = max(range(len(rows)), key=lambda place: self._lengths[rows[place]])
            rows[0], rows[longest] = rows[longest], rows[0]
        return rows


class RecentLosses:
    """Each task's loss now, relative to its own at the start, and the weights that follow.

    The start is the mean over the first round that has rows of the task; now, a mean over its
    last steps that fades. Their ratio is GradNorm's loss ratio; the ratios of dynamic weight
    average are of one epoch to the one before, for which a run has too few.
    """

    def __init__(self, num_tasks: int) -> None:
        self.start: list[float | None] = [None] * num_tasks
        self.now: list[float | None] = [None] * num_tasks
        self.first_sums = [0.0] * num_tasks
        self.first_tokens = [0.0] * num_tasks

    def state(self) -> dict[str, list[Any]]:
        """All that is known, for a checkpoint."""
        return {name: list(values) for name, values in vars(self).items()}

    def restore(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Know what `state` gave."""
        for name in vars(self):
            setattr(self, name, list(state[name]))

    def observe(self, sums: Sequence[float], tokens: Sequence[float]) -> None:
        """A step's losses: their sum over each task's tokens, and how many those are."""
        for task, (total, count) in enumerate(zip(sums, tokens, strict=True)):
            if not count:
                continue
            mean, before = total / count, self.now[task]
            self.now[task] = (
                mean if before is None else _LOSS_DECAY * before + (1 - _LOSS_DECAY) * mean
            )
            if self.start[task] is None:
                self.first_sums[task] += total
                self.first_tokens[task] += count

    def end_round(self) -> None:
        """What was seen until now is the start of tasks that had none."""
        for task, count in enumerate(self.first_tokens):
            if self.start[task] is None and count:
                self.start[task] = self.first_sums[task] / count

    def shares(self, base: Sequence[float]) -> list[float]:
        """Shares of the rows to come: `base` times the ratio of each task's loss to its start, a
        tenth of `base` kept. A task of which nothing has been seen has the mean ratio."""
        ratios = [
            now / start if now is not None and start else None
            for now, start in zip(self.now, self.start, strict=True)
        ]
        known = [ratio for ratio in ratios if ratio is not None]
        if not known or not sum(known):
            return list(base)
        mean = sum(known) / len(known)
        weighted = [
            share * (mean if ratio is None else ratio)
            for share, ratio in zip(base, ratios, strict=True)
        ]
        total = sum(weighted)
        return [
            _KEPT_SHARE * share + (1 - _KEPT_SHARE) * weight / total if total else share
            for share, weight in zip(base, weighted, strict=True)
        ]
