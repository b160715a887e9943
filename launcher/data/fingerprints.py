"""Rows as hashes of 8 bytes: which are equal, word for word or nearly, in bounded memory.

SHA-1 shortened to 64 bits: the same in every process, and among two million rows two different
ones have the same hash with a chance of one in ten million.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Sequence

HASH_BYTES = 8
NO_HASH = bytes(HASH_BYTES)

# Between a prompt and its answer, and between rows: bytes that UTF-8 never has.
FIELD_END, ROW_END = b"\xff", b"\xfe"

_CAPITALS = bytes(range(ord("A"), ord("Z") + 1))
_DIGITS = b"0123456789"
_LETTERS = _CAPITALS + _CAPITALS.lower()
_LOWER = bytes.maketrans(_CAPITALS, _CAPITALS.lower())
NOT_LETTERS = bytes(byte for byte in range(128) if byte not in _LETTERS)
_NEITHER = bytes(byte for byte in NOT_LETTERS if byte not in _DIGITS)

# Rows of fewer letters say something else with another digit or sign; below the first bound they
# are not compared nearly, below the second their digits count.
_FEWEST_LETTERS = 20
_DIGITS_COUNT_BELOW = 200

# Signs and blanks of Unicode by their bytes: C2 A0-BF, E2 80-81, E3 80 80-91, EF BC 81-8F. The
# first byte of each is sought alone, which is faster by far.
_SIGNS = (
    (b"\xc2", re.compile(rb"\xc2[\xa0-\xbf]")),
    (b"\xe2", re.compile(rb"\xe2\x80[\x80-\xbf]")),
    (b"\xe3", re.compile(rb"\xe3\x80[\x80-\x91]")),
    (b"\xef", re.compile(rb"\xef\xbc[\x81-\x8f\x9a-\xa0]")),
)


def digest(content: bytes) -> bytes:
    return hashlib.sha1(content, usedforsecurity=False).digest()[:HASH_BYTES]


def encoded(text: str) -> bytes:
    """UTF-8; half a character, which UTF-8 has no bytes for, is kept as it is."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def near_digest(text: bytes, letters: bytes, ascii_only: bool) -> bytes:
    """The hash of a text without case, punctuation and blanks, of a long one without digits too.

    `letters`: the text lower-cased, without what is ASCII and no letter. NO_HASH where too little
    is left to compare.
    """
    if len(letters) < _FEWEST_LETTERS:
        return NO_HASH
    if len(letters) < _DIGITS_COUNT_BELOW:
        letters = text.translate(_LOWER, _NEITHER)
    if not ascii_only:
        letters = _without_signs(letters)
        if len(letters) < _FEWEST_LETTERS:
            return NO_HASH
    return digest(letters)


def _without_signs(letters: bytes) -> bytes:
    for lead, signs in _SIGNS:
        if lead in letters:
            letters = signs.sub(b"", letters)
    if b"\xd0" in letters or b"\xce" in letters or b"\xc3" in letters:
        # Cyrillic, Greek and Latin letters with accents have capitals too
        return letters.decode("utf-8", "surrogateescape").lower().encode("utf-8", "surrogateescape")
    return letters


def prompt_digest(prompt: str, answer: str) -> bytes:
    """What a question is, nearly: the same for the same prompt in other capitals or blanks.

    A text without a prompt is its own.
    """
    text = encoded(prompt or answer)
    near = near_digest(text, text.translate(_LOWER, NOT_LETTERS), text.isascii())
    return near if near != NO_HASH else digest(text)


def hash_array() -> array[int]:
    return array("Q")


def groups(hashes: Sequence[int]) -> Iterator[list[int]]:
    """Indices of equal hashes, where there are several; zeros are not compared.

    In parts of some 100,000 hashes, so that no dictionary of all is needed.
    """
    num_parts = 1
    while num_parts * 100_000 < len(hashes):
        num_parts *= 2
    parts = [array("L") for _ in range(num_parts)]
    for index, value in enumerate(hashes):
        parts[value & (num_parts - 1)].append(index)
    for part in parts:
        first: dict[int, int] = {}
        repeated: dict[int, list[int]] = {}
        for index in part:
            value = hashes[index]
            earlier = first.setdefault(value, index)
            if earlier != index and value:
                repeated.setdefault(value, [earlier]).append(index)
        yield from repeated.values()


class Repeats:
    """The hashes of all rows: 32 bytes a row."""

    def __init__(self) -> None:
        self.numbers, self.whole = hash_array(), hash_array()
        self.near, self.prompts = hash_array(), hash_array()

    def merge(self, other: Repeats, offset: int) -> None:
        self.numbers.extend(array("Q", (number + offset for number in other.numbers)))
        self.whole.extend(other.whole)
        self.near.extend(other.near)
        self.prompts.extend(other.prompts)

    def again(self) -> list[int]:
        """Rows that repeat an earlier one word for word."""
        found: list[int] = []
        for group in groups(self.whole):
            found += sorted(self.numbers[index] for index in group)[1:]
        return sorted(found)

    def nearly_again(self) -> list[int]:
        """Rows that are an earlier one but for case, punctuation, blanks, and digits in long ones.

        Not those that repeat it word for word.
        """
        return self._differing(self.near)

    def answered_again(self) -> list[int]:
        """Rows that give an earlier row's prompt another answer."""
        return self._differing(self.prompts)

    def _differing(self, hashes: array[int]) -> list[int]:
        found: list[int] = []
        for group in groups(hashes):
            earliest: dict[int, int] = {}
            for number, whole in sorted((self.numbers[i], self.whole[i]) for i in group):
                earliest.setdefault(whole, number)
            found += sorted(earliest.values())[1:]
        return sorted(found)
