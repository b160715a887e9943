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

# Of ASCII: letters lower-cased, what stands in no word as a blank.
_ASCII_WORDS = bytes(
    ord(chr(byte).lower() if _WORD.match(chr(byte)) else " ") if byte < 128 else byte
    for byte in range(256)
)


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
        fixed = _fixed([_shingles(self.rows[whole].text) for whole in self._some()])
        rows = sorted(self.rows.values(), key=lambda row: row.number)
        shingles: list[array[int]] = []
        buckets: dict[int, list[int]] = defaultdict(list)
        found = []
        for index, row in enumerate(rows):
            own = _shingles(row.text)
            if not own.isdisjoint(fixed):
                own -= fixed
            shingles.append(array("I", own))
            if len(own) < _FEWEST_SHINGLES:
                continue
            smallest = _smallest(own)
            others = {other for shingle in smallest for other in buckets.get(shingle, ())}
            if any(
                rows[other].near != row.near and _are_similar(own, shingles[other])
                for other in others
            ):
                found.append(row.number)
            for shingle in smallest:
                if len(buckets[shingle]) < _ROWS_A_BUCKET:
                    buckets[shingle].append(index)
        return found

    def _some(self) -> list[int]:
        """Keys of a few rows: a fair choice that every run makes alike."""
        return sorted(self.rows)[:_FIXED_SAMPLE]


def _shingles(text: str) -> set[int]:
    """Hashes of 32 bits."""
    if text.isascii():
        words = text.encode().translate(_ASCII_WORDS).split()
    else:
        words = [word.encode("utf-8", "replace") for word in _WORD.findall(text.lower())]
    if len(text) > _CHARACTERS_A_SHINGLE * 2 * len(words):
        joined = b"".join(words).decode()
        parts = [
            joined[start : start + _CHARACTERS_A_SHINGLE].encode()
            for start in range(len(joined) - _CHARACTERS_A_SHINGLE + 1)
        ]
        return set(map(crc32, parts))
    return set(map(crc32, map(b" ".join, zip(words, words[1:], words[2:], strict=False))))


def _fixed(shingles: list[set[int]]) -> set[int]:
    """Those that stand in many of the rows."""
    counts = Counter(shingle for own in shingles for shingle in own)
    most = max(_FIXED_ROWS, _FIXED_SHARE * len(shingles))
    return {shingle for shingle, count in counts.items() if count > most}


def _smallest(shingles: set[int]) -> list[int]:
    """The smallest of at least as many; among those below a bound that most are not."""
    bound = (_SMALLEST * 4 << 32) // len(shingles)
    few = [shingle for shingle in shingles if shingle < bound]
    return sorted(few if len(few) >= _SMALLEST else shingles)[:_SMALLEST]


def _are_similar(own: set[int], other: array[int]) -> bool:
    common = len(own.intersection(other))
    return common >= _LEAST_COMMON * (len(own) + len(other) - common)
