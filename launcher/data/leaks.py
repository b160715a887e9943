"""Held-out rows that are trained on: their loss would say nothing."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from ftplan.launcher.data.findings import Finding, finding, tally_of
from ftplan.launcher.data.fingerprints import (
    FIELD_END,
    digest,
    encoded,
    hash_array,
    prompt_digest,
)

_COMPARED_AT_ONCE = 100_000


class LeakCheck:
    """Whether held-out rows, or their prompts, stand among the rows that are trained on.

    Holds 16 bytes for each row. States of several processes are merged.
    """

    def __init__(self) -> None:
        self._numbers = hash_array()
        self._held_out, self._trained = _Hashes(), _Hashes()

    def train(self, prompt: str, answer: str) -> None:
        """A row that is trained on; `prompt` is empty for plain text."""
        self._trained.add(prompt, answer)

    def hold_out(self, number: int, prompt: str, answer: str) -> None:
        """A held-out row; `number` as in TextChecks."""
        self._numbers.append(number)
        self._held_out.add(prompt, answer)

    def merge(self, other: LeakCheck, offset: int = 0) -> None:
        """Take in what another process has seen; `offset` is added to its numbers."""
        self._numbers.extend([number + offset for number in other._numbers])
        self._held_out.merge(other._held_out)
        self._trained.merge(other._trained)

    def findings(self) -> list[Finding]:
        """Held-out rows by their numbers, under the graver kind only."""
        rows = self._leaked(self._held_out.rows, self._trained.rows)
        prompts = self._leaked(self._held_out.prompts, self._trained.prompts) - rows
        return [
            finding(kind, tally_of(sorted(numbers)))
            for kind, numbers in (
                ("a held-out row that is trained on", rows),
                ("a held-out prompt that is trained on", prompts),
            )
            if numbers
        ]

    def _leaked(self, held_out: array[int], trained: Iterable[int]) -> set[int]:
        """Numbers of the held-out rows whose hash is a trained one's."""
        leaked: set[int] = set()
        for start in range(0, len(held_out), _COMPARED_AT_ONCE):
            some = held_out[start : start + _COMPARED_AT_ONCE]
            common = set(some).intersection(trained)
            leaked.update(
                number
                for number, value in zip(self._numbers[start:], some, strict=False)
                if value in common
            )
        return leaked


class _Hashes:
    def __init__(self) -> None:
        self.rows, self.prompts = hash_array(), hash_array()

    def add(self, prompt: str, answer: str) -> None:
        self.rows.frombytes(digest(encoded(prompt) + FIELD_END + encoded(answer)))
        self.prompts.frombytes(prompt_digest(prompt, answer))

    def merge(self, other: _Hashes) -> None:
        self.rows.extend(other.rows)
        self.prompts.extend(other.prompts)
