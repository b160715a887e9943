"""Where texts fall apart into chunks that count alone, found for many texts at once.

What a place is follows from the kinds of the two characters before it and the one behind it
(`_KINDS`), so that one table answers for every place. Its rules are those that `cuts.py` proves of
a tokenizer; a place that no rule names is not cut, which is never wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ftplan.launcher.data.cuts import Cuts

# Stands before, between and behind texts; they hold none themselves.
EDGE = "\x00"

_KINDS = ("edge", "odd", "blank", "feed", "space", "letter", "digit", "sign", "slash", "other")
"""odd: nothing is known of its borders. space: other whitespace. digit, sign: ASCII's, without the
apostrophe, which contractions begin with; that is one of the others. slash: where that goes on
after a line feed."""
_NUMBER = {kind: number for number, kind in enumerate(_KINDS)}
_NOT_LOOKED_AT = 255
_DENSE = ("letter", "digit", "sign", "slash", "other")  # what is known to be no whitespace

_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")
_NUM_CHARACTERS = 0x110000


Codes = NDArray[np.uint8] | NDArray[np.uint32]
"""Characters of a text by their numbers."""


class Borders:
    """Borders for one tokenizer."""

    def __init__(self, cuts: Cuts, added: list[str]) -> None:
        """`added`: what the tokenizer's added tokens are; none is cut inside."""
        self._cuts = cuts
        self._kinds = np.full(_NUM_CHARACTERS, _NOT_LOOKED_AT, np.uint8)
        self._kinds[:128] = [_NUMBER[self._kind(chr(code))] for code in range(128)]
        self._is_border = _table(cuts)
        guarded = [token for token in added if self._may_cut(token)]
        self._guarded = _by_first_character(guarded)
        firsts = {token[0] for token in guarded}
        # Where none begins within another, one after the other are all.
        self._apart = not any(firsts.intersection(token[1:]) for token in guarded)

    def chunks(self, text: str) -> tuple[bytes, NDArray[np.int64]]:
        """Texts between edges, as UTF-8, and the bytes at which chunks begin, its end included.

        An edge is a chunk of its own.
        """
        wide = not text.isascii()
        data = text.encode()
        codes = _codes(text) if wide else np.frombuffer(data, np.uint8)
        kinds = self._kinds_of(codes)
        step = len(_KINDS)
        pairs = kinds[:-1] * np.uint16(step) + kinds[1:]
        is_border = np.ones(len(codes) + 1, np.bool_)
        is_border[2:-1] = self._is_border[pairs[:-1] * np.uint16(step) + kinds[2:]]
        for start, end in self._spared(text):
            is_border[start + 1 : end] = False
        starts = np.flatnonzero(is_border)
        return data, _byte_offsets(codes)[starts] if wide else starts

    def _kinds_of(self, codes: Codes) -> NDArray[np.uint8]:
        kinds = self._kinds[codes]
        new = codes[kinds == _NOT_LOOKED_AT]
        for code in set(new.tolist()):
            self._kinds[code] = _NUMBER[self._kind(chr(code))]
        return self._kinds[codes] if len(new) else kinds

    def _kind(self, character: str) -> str:
        if character == EDGE:
            return "edge"
        if character.isascii():
            return self._kind_of_ascii(character)
        if self._is_odd(character):
            return "odd"
        if character.isspace():
            return "space"
        return "letter" if self._cuts.letters_beyond_ascii and is_letter(character) else "other"

    def _kind_of_ascii(self, character: str) -> str:
        if character in " \n":
            return "blank" if character == " " else "feed"
        if character in "\t\r\v\f":
            return "space"
        if not character.isprintable():
            return "odd" if character.isspace() or self._cuts.strips else "other"
        if character.isalnum():
            return "letter" if character.isalpha() else "digit"
        if character == "/" and self._cuts.slash_continues:
            return "slash"
        return "other" if character == "'" else "sign"

    def _is_odd(self, character: str) -> bool:
        """Whether a normalizer may leave nothing of it, or whitespace at one of its ends."""
        if self._cuts.strips and unicodedata.category(character)[0] in "CM":
            return True
        forms = [unicodedata.normalize(form, character) for form in _FORMS]
        ends = [form[at] for form in [*forms, character.lower()] for at in (0, -1)]
        return not character.isspace() and any(
            end.isspace() or end in self._cuts.blanks for end in ends
        )

    def _may_cut(self, token: str) -> bool:
        """Whether a border may stand inside a text, whatever stands around it."""
        kinds = [self._kinds[ord(c)] if c.isascii() else _NUMBER[self._kind(c)] for c in token]
        cube = self._is_border.reshape((len(_KINDS),) * 3)
        return any(cube[:, left, right].any() for left, right in pairwise(kinds))

    def _spared(self, text: str) -> Iterator[tuple[int, int]]:
        """Where added tokens stand that a border may fall into."""
        for first, tokens in self._guarded:
            if self._apart:
                yield from (match.span() for match in tokens.finditer(text))
                continue
            at = text.find(first)
            while at >= 0:
                match = tokens.match(text, at)
                if match:
                    yield match.span()
                at = text.find(first, at + 1)


def _table(cuts: Cuts) -> NDArray[np.bool_]:
    """Of each three kinds in a row, whether a border stands before the last."""
    return np.array([_is_border(cuts, *kinds) for kinds in product(_KINDS, repeat=3)])


def _is_border(cuts: Cuts, before: str, left: str, right: str) -> bool:
    """The rules: see `cuts.py` for their proof."""
    if "edge" in (left, right):
        return True
    if "odd" in (left, right):
        return False
    if right == "blank":
        if left == "feed" and cuts.lines == "merges":
            return True
        return cuts.every_blank or left in _DENSE
    if left == "feed":
        if cuts.lines == "single":
            return before in _DENSE and right in _DENSE
        if cuts.lines == "runs":
            return right in _DENSE and right != "slash"
        return cuts.lines == "merges" and right != "feed"
    if cuts.words_end and left in ("letter", "digit"):
        if right == "letter":
            return cuts.words_begin and left == "digit"
        return right in ("sign", "slash", "feed", "space") or (left, right) == ("letter", "digit")
    if cuts.words_begin and (left, right) == ("sign", "letter"):
        return True
    return cuts.lines == "single" and left in _DENSE and right == "feed"


@cache
def is_letter(character: str) -> bool:
    """Whether every pattern sees a letter: one since Unicode 3.2, that no normal form changes."""
    return (
        unicodedata.ucd_3_2_0.category(character)[0] == "L"
        and unicodedata.category(character)[0] == "L"
        and unicodedata.normalize("NFKC", character) == character
    )


def _by_first_character(tokens: list[str]) -> list[tuple[str, re.Pattern[str]]]:
    """Patterns of the tokens that begin alike, the longest of them first."""
    firsts = sorted({token[0] for token in tokens})
    return [
        (
            first,
            re.compile(
                "|".join(
                    re.escape(token)
                    for token in sorted(tokens, key=len, reverse=True)
                    if token[0] == first
                )
            ),
        )
        for first in firsts
    ]


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _byte_offsets(codes: Codes) -> NDArray[np.int64]:
    """At which byte of UTF-8 each character begins, and the last ends."""
    widths = np.ones(len(codes), np.uint8)
    for first in (0x80, 0x800, 0x10000):
        widths += codes >= first
    offsets = np.zeros(len(codes) + 1, np.int64)
    np.cumsum(widths, out=offsets[1:])
    return offsets
