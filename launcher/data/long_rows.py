"""Rows that stand out by their length."""

from __future__ import annotations

from collections.abc import Iterator
from math import log2

from ftplan.launcher.data.findings import Finding, Tally, finding


class Lengths:
    """How many rows have which length, in steps of an eighth of a doubling."""

    _STEPS = 8
    _FEWEST_ROWS = 100

    def __init__(self) -> None:
        self.steps: dict[int, Tally] = {}

    def add(self, number: int, characters: int) -> None:
        step = int(self._STEPS * log2(characters + 1))
        tally = self.steps.get(step)
        if tally is None:
            tally = self.steps[step] = Tally()
        tally.add(number)

    def merge(self, other: Lengths, offset: int) -> None:
        for step, tally in other.steps.items():
            self.steps.setdefault(step, Tally()).merge(tally, offset)

    def findings(self) -> Iterator[Finding]:
        """Rows beyond Tukey's outer fence of the lengths' logarithms, and ten times the median.

        The fence is three times the distance of the quartiles above the third one (Tukey, 1977):
        of log-normal lengths, however wide, one in a million is beyond.
        """
        if sum(tally.count for tally in self.steps.values()) < self._FEWEST_ROWS:
            return
        first, median, third = (self._quantile(share) for share in (0.25, 0.5, 0.75))
        fence = max(third + 3 * (third - first + 1), median + self._STEPS * log2(10))
        beyond = Tally()
        for step, tally in self.steps.items():
            if step > fence:
                beyond.merge(tally, 0)
        if beyond.count:
            times = 2 ** ((max(self.steps) - median) / self._STEPS)
            detail = f"up to {times:,.0f} times the median"
            yield finding("far longer than the others", beyond, detail)

    def _quantile(self, share: float) -> int:
        left = share * sum(tally.count for tally in self.steps.values())
        for step in sorted(self.steps):
            left -= self.steps[step].count
            if left <= 0:
                return step
        return max(self.steps)


class Cuts:
    """Whether many answers have exactly the greatest length and end within a sentence."""

    _FEWEST_ANSWERS = 5
    _FEWEST_CHARACTERS = 200
    _UNFINISHED_SHARE = 0.8

    def __init__(self) -> None:
        self.characters, self.unfinished = 0, 0
        self.tally = Tally()

    def add(self, number: int, answer: str) -> None:
        """Only where an answer is as long as `characters`, at least."""
        if len(answer) > self.characters:
            self.characters, self.unfinished, self.tally = len(answer), 0, Tally()
        self.tally.add(number)
        self.unfinished += answer[-1:].isalnum() or answer[-1:] in (" ", ",")

    def merge(self, other: Cuts, offset: int) -> None:
        if other.characters > self.characters:
            self.characters, self.unfinished, self.tally = other.characters, 0, Tally()
        if other.characters == self.characters:
            self.unfinished += other.unfinished
            self.tally.merge(other.tally, offset)

    def findings(self) -> Iterator[Finding]:
        many = self.tally.count >= self._FEWEST_ANSWERS
        unfinished = self.unfinished >= self._UNFINISHED_SHARE * self.tally.count
        if many and unfinished and self.characters >= self._FEWEST_CHARACTERS:
            detail = f"at {self.characters:,} characters, within a sentence"
            yield finding("cut off at the same length", self.tally, detail)
