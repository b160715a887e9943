"""The checks of single rows, and which rows of a batch need which.

A search of the rows' joined bytes tells in one pass that none of them can have a defect, which is
how most searches end.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from msgspec import Struct

from ftplan.launcher.data import odd_text, private_text
from ftplan.launcher.data.fingerprints import FIELD_END, NOT_LETTERS, ROW_END, encoded


class RowCheck(Struct, frozen=True):
    """A check of rows in which a gate stands: one of some words, or what a pattern finds.

    Sought in the lower-cased bytes of the rows, digits written as 0, control characters as 01. A
    pattern begins with `opener`, which is rare and sought first: ten times as fast.
    """

    gates: tuple[bytes, ...] | re.Pattern[bytes]
    kinds: Callable[[str, str], Iterator[str]]
    opener: bytes = b""


def _of_text(
    name: str, kinds: Callable[[str], Iterator[str]]
) -> Callable[[str, str], Iterator[str]]:
    """A check of prompt and answer together; `name` goes before what it finds."""

    def look(prompt: str, answer: str) -> Iterator[str]:
        for kind in kinds(f"{prompt}\n{answer}"):
            yield f"{name} ({kind})" if name else kind

    return look


def _if(name: str, holds: Callable[[str, str], bool]) -> Callable[[str, str], Iterator[str]]:
    def look(prompt: str, answer: str) -> Iterator[str]:
        if holds(prompt, answer):
            yield name

    return look


_passwords = _of_text("likely secret", private_text.passwords_in_urls)
_emails = _of_text("personal data", private_text.emails_in)
_keys = _of_text("likely secret", private_text.keys_in)
_assigned = _of_text("likely secret", private_text.assigned_in)
_chat_tokens = _of_text("chat tokens", odd_text.chat_tokens_in)
_odd_characters = _of_text("", odd_text.odd_characters_in)
_html = _if("remains of HTML", lambda prompt, answer: odd_text.html_in(f"{prompt}\n{answer}"))


def _numbers_of_money(text: str) -> Iterator[str]:
    yield from private_text.cards_in(text)
    yield from private_text.ibans_in(text)


# Behind the sign of an assignment: a value of some length with a digit, as all secrets have that
# are sought by their names. Both are rarer than the names, which are words of any text.
_ASSIGNED_VALUE = (
    rb">?[ \t]*[\"']?(?=[a-z0+/=_\-!@#$%^&*~\x80-\xfd]{12})"
    rb"[a-z+/=_\-!@#$%^&*~\x80-\xfd]*0"
)

_KEY_CHECK = RowCheck((b"-----begin",), _keys)
_CHECKS = (
    RowCheck((b"@",), _emails),
    RowCheck((b"@",), _passwords),
    RowCheck(re.compile(rb"\+(?:0|\(0)"), _of_text("personal data", private_text.phones_in), b"+"),
    RowCheck(re.compile(rb"0000[ -]?0000"), _of_text("personal data", _numbers_of_money)),
    RowCheck(
        re.compile(rb"<(?:\||\xef\xbd\x9c|(?:start|end)_of_turn>|<sys>>|/s>)"), _chat_tokens, b"<"
    ),
    RowCheck(re.compile(rb"\[/?inst\]"), _chat_tokens, b"["),
    RowCheck(re.compile(rb"#[#]{2} "), _chat_tokens, b"#"),
    RowCheck((b"assistant:",), _chat_tokens),
    RowCheck(
        re.compile(rb"<think>"),
        _if("thoughts in <think> tags", lambda _, answer: odd_text.thoughts_in(answer)),
        b"<",
    ),
    RowCheck(re.compile(rb"<(?:/|[a-z]+[ />])"), _html, b"<"),
    RowCheck(re.compile(rb"&(?:[a-z]+|#[0x][0-9a-f]+);"), _html, b"&"),
    RowCheck(
        (b" an ai", b"language model"),
        _if("an AI model speaks of itself", lambda _, answer: odd_text.refusal_in(answer)),
    ),
    RowCheck((b"\x01",), _odd_characters),
    _KEY_CHECK,
    *(RowCheck(re.compile(sign + _ASSIGNED_VALUE), _assigned, sign) for sign in (b":", b"=")),
)
# C1 controls; Ã, Â and â€; direction, joiners; the replacement character and the byte-order mark.
_BEYOND_ASCII = tuple(
    RowCheck(re.compile(pattern), _odd_characters, pattern[:1])
    for pattern in (
        b"\xc2" rb"[\x80-\x9f]",
        b"\xc3" rb"(?:[\x82\x83]|\xa2\xe2\x82\xac)",
        b"\xe2" rb"(?:\x80[\x8b-\x8d\xad\xae]|\x81\xa0)",
        b"\xef" rb"(?:\xbf\xbd|\xbb\xbf)",
    )
)
# Nearly every key has so many letters and digits in a row, hardly a word does; what opens the key
# stands before or within them.
_LONG_RUN = b"a" * 16
_RUN = re.compile(rb"a+")
_BEFORE_RUN = 80

_CONTROLS = bytes([*range(9), 11, 12, *range(14, 32), 127])
_DIGITS = b"0123456789"
_CAPITALS = bytes(range(ord("A"), ord("Z") + 1))
_LOWERED = bytes.maketrans(
    _CAPITALS + _DIGITS + _CONTROLS,
    _CAPITALS.lower() + b"0" * len(_DIGITS) + b"\x01" * len(_CONTROLS),
)
_LETTERS_AND_DIGITS = _CAPITALS + _CAPITALS.lower() + _DIGITS
_RUNS = bytes.maketrans(_LETTERS_AND_DIGITS, b"a" * len(_LETTERS_AND_DIGITS))


class Batch:
    """Rows as bytes, joined for searches that look at all of them at once."""

    def __init__(self, rows: Sequence[tuple[int, str, str]]) -> None:
        self.rows = rows
        self.ascii = [prompt.isascii() and answer.isascii() for _, prompt, answer in rows]
        self.prompts, answers = _encoded(rows)
        self.parts = [
            prompt + FIELD_END + answer
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        self.joined = ROW_END.join(self.parts)
        self.lowered = self.joined.translate(_LOWERED)
        self.letters = self.lowered.translate(None, NOT_LETTERS).split(ROW_END)
        *self.starts, _ = accumulate((len(part) + 1 for part in self.parts), initial=0)
        self.ends = [start + len(part) for start, part in zip(self.starts, self.parts, strict=True)]

    def kinds(self) -> dict[int, list[str]]:
        """What the checks of single rows find, by a row's place; each kind once a row."""
        found: dict[int, dict[str, None]] = {}
        done: set[tuple[int, int]] = set()
        for check, place in self._suspected():
            key = (place, id(check.kinds))
            if key not in done:  # several gates may lead to one check
                done.add(key)
                _, prompt, answer = self.rows[place]
                for kind in check.kinds(prompt, answer):
                    found.setdefault(place, {})[kind] = None
        return {place: list(kinds) for place, kinds in found.items()}

    def _suspected(self) -> Iterator[tuple[RowCheck, int]]:
        checks = _CHECKS if all(self.ascii) else (*_CHECKS, *_BEYOND_ASCII)
        for check in checks:
            for place in self._behind(check, self.lowered):
                yield check, place
        for place in self._with_keys():
            yield _KEY_CHECK, place

    def _behind(self, check: RowCheck, content: bytes) -> Iterator[int]:
        """Places of the rows in which a check's gate stands."""
        for find in _searches(check, content):
            at = find(0)
            while at >= 0:
                place = bisect_right(self.starts, at) - 1
                yield place
                at = find(self.ends[place])

    def _with_keys(self) -> Iterator[int]:
        runs, opening = self.joined.translate(_RUNS), private_text.openings_of_keys()
        start = runs.find(_LONG_RUN)
        while start >= 0:
            run = _RUN.match(runs, start)
            assert run is not None
            if opening.search(self.joined, max(0, start - _BEFORE_RUN), run.end()):
                place = bisect_right(self.starts, start) - 1
                yield place
                start = runs.find(_LONG_RUN, self.ends[place])
            else:
                start = runs.find(_LONG_RUN, run.end())


def _encoded(rows: Sequence[tuple[int, str, str]]) -> tuple[list[bytes], list[bytes]]:
    """Prompts and answers; hardly ever is there one with half a character."""
    prompts, answers = [prompt for _, prompt, _ in rows], [answer for _, _, answer in rows]
    try:
        return [text.encode() for text in prompts], [text.encode() for text in answers]
    except UnicodeEncodeError:
        return list(map(encoded, prompts)), list(map(encoded, answers))


def _searches(check: RowCheck, content: bytes) -> Iterator[Callable[[int], int]]:
    """For each gate: where it stands next, from a place on; -1 where it does not."""
    if isinstance(check.gates, tuple):
        for gate in check.gates:
            yield partial(content.find, gate)
    else:
        search, opener = check.gates.search, check.opener

        def find(start: int) -> int:
            start = content.find(opener, start)
            found = search(content, start) if start >= 0 else None
            return found.start() if found else -1

        yield find
