"""Rows that share most of their words, in a sample of bounded size.

Words in threes (shingles) of the beginning of each row; rows with four fifths of them in common
(Jaccard's index) are similar. Rows are compared that share one of the four smallest hashes of
their threes, as min-hash does (Broder, 1997): of similar rows 99.8 % share one. Threes that stand
in many rows, such as a fixed system message, do not count.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from zlib import crc32

from msgspec import Struct

SAMPLE_ROWS = 8_000

_PROMPT_CHARACTERS, _ANSWER_CHARACTERS = 700, 1_300
_LEAST_COMMON = 0.8
_SMALLEST = 4
_FEWEST_SHINGLES = 12
_FIXED_SAMPLE, _FIXED_SHARE, _FIXED_ROWS = 500, 0.02, 10
_ROWS_A_BUCKET = 10
_WORD = re.compile(r"\w+")
_CHARACTERS_A_SHINGLE = 8  # for scripts that put no blanks between words


class SampledRow(Struct, frozen=True):
    number: int
    near: int  # the hash of its near-duplicates, which are counted elsewhere
    text: str


class RowSample:
    """The rows with the smallest hashes: the same ones in whatever order and parts they come."""

    def __init__(self) -> None:
        self.rows: dict[int, SampledRow] = {}
        self.below = 1 << 64

    def add(self, whole: int, near: int, number: int, prompt: str, answer: str) -> None:
        """Only where `whole` is less than `below`."""
        text = f"{prompt[:_PROMPT_CHARACTERS]}\n{answer[:_ANSWER_CHARACTERS]}"
        self._keep(whole, SampledRow(number, near, text))

    def merge(self, other: RowSample, offset: int) -> None:
        self.below = min(self.below, other.below)
        for whole, row in other.rows.items():
            self._keep(whole, SampledRow(row.number + offset, row.near, row.text))
        self._cut(SAMPLE_ROWS)

    def _keep(self, whole: int, row: SampledRow) -> None:
        known = self.rows.get(whole)
        if known is None or row.number < known.number:
            self.rows[whole] = row
        self._cut(2 * SAMPLE_ROWS)

    def _cut(self, most: int) -> None:
        if len(self.rows) > most:
            kept = sorted(self.rows)[:SAMPLE_ROWS]
            self.rows = {whole: self.rows[whole] for whole in kept}
            self.below = kept[-1] + 1

    def similar(self) -> list[int]:
        """Numbers of the rows that are similar to an earlier one."""
        self._cut(SAMPLE_ROWS)
        rows = sorted(self.rows.values(), key=lambda row: row.number)
        shingles = _without_fixed([_shingles(row.text) for row in rows], _order(self.rows, rows))
        buckets: dict[int, list[int]] = defaultdict(list)
        found = []
        for index, own in enumerate(shingles):
            if len(own) < _FEWEST_SHINGLES:
                continue
            smallest = own[:_SMALLEST]
            others = {other for shingle in smallest for other in buckets.get(shingle, ())}
            if any(
                rows[other].near != rows[index].near and _are_similar(own, shingles[other])
                for other in others
            ):
                found.append(rows[index].number)
            for shingle in smallest:
                if len(buckets[shingle]) < _ROWS_A_BUCKET:
                    buckets[shingle].append(index)
        return found


def _order(by_hash: dict[int, SampledRow], rows: list[SampledRow]) -> list[int]:
    """Indices of some rows by their hashes: a fair choice that every run makes alike."""
    position = {row.number: index for index, row in enumerate(rows)}
    return [position[by_hash[whole].number] for whole in sorted(by_hash)[:_FIXED_SAMPLE]]


def _shingles(text: str) -> array[int]:
    """Hashes of 32 bits, from the smallest."""
    words = _WORD.findall(text.lower())
    if len(text) > _CHARACTERS_A_SHINGLE * 2 * len(words):
        joined = "".join(words)
        parts = [
            joined[start : start + _CHARACTERS_A_SHINGLE]
            for start in range(len(joined) - _CHARACTERS_A_SHINGLE + 1)
        ]
    else:
        parts = [" ".join(three) for three in zip(words, words[1:], words[2:], strict=False)]
    return array("I", sorted({crc32(part.encode("utf-8", "replace")) for part in parts}))


def _without_fixed(shingles: list[array[int]], some: list[int]) -> list[array[int]]:
    counts = Counter(shingle for index in some for shingle in shingles[index])
    most = max(_FIXED_ROWS, _FIXED_SHARE * len(some))
    fixed = {shingle for shingle, count in counts.items() if count > most}
    if not fixed:
        return shingles
    return [array("I", (s for s in own if s not in fixed)) for own in shingles]


def _are_similar(own: array[int], other: array[int]) -> bool:
    common = len(set(own).intersection(other))
    return common >= _LEAST_COMMON * (len(own) + len(other) - common)
