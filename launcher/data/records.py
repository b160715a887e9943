"""What readers of data files give: records, and notes on what they let pass."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from msgspec import Struct

MAX_ROW_CHARACTERS = 16_000_000
"""A longer row is broken: some four million tokens. It bounds what a reader holds in memory."""

TOO_LONG = "a row of more than 16 million characters"

MOST_NESTED = 200
"""Lists and objects in one another; a deeper row is broken. Python's own limit would be another one
wherever a reader is called from, and what renders templates has it too."""

TOO_DEEP = "JSON nested too deeply"

FIRST_NUMBERS = 5


NOT_UTF8 = (
    "bytes that are not UTF-8; of a file from Windows, `iconv -f CP1252 -t UTF-8` makes it so"
)


def nested_too_deeply(value: Any) -> bool:
    """Whether a value has more than MOST_NESTED lists and objects in one another."""
    level = [value]
    for _ in range(MOST_NESTED + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def decoded(text: str) -> Any:
    """The value of JSON that stands in a field as text. Raises ValueError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if text.count("[") + text.count("{") > MOST_NESTED and nested_too_deeply(value):
        raise ValueError(TOO_DEEP)
    return value


class Record(Struct, frozen=True):
    """One row as it stands in a file.

    `number`: the line that it begins at, or its ordinal where a format has no lines
    (`SourceFile.unit`), from 1. `broken`: why it could not be read, for people; `value` is None
    then. `file`: index into `Source.files`.
    """

    number: int
    value: Any
    broken: str = ""
    file: int = 0


class Note(Struct, frozen=True):
    """Something that a reader let pass, or left out, and where.

    `first_lines`: the first lines of the file where it stands, `count` how many there are; 0 where
    it concerns the whole file.
    """

    text: str
    file: int = 0
    count: int = 0
    first_lines: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.count:
            return self.text
        more = f", ... ({self.count:,} in all)" if self.count > len(self.first_lines) else ""
        lines = "line" if self.count == 1 else "lines"
        return f"{self.text}: {lines} {', '.join(map(str, self.first_lines))}{more}"


class Notes:
    """Collects the notes of one file while it is read."""

    def __init__(self, file: int = 0) -> None:
        self._file = file
        self._lines: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, int] = {}

    def add(self, text: str, line: int = 0) -> None:
        """A note on a line, or on the whole file; a line counts once if its notes come together."""
        lines = self._lines.setdefault(text, [])
        if line and line != self._last.get(text):
            self._last[text] = line
            self._counts[text] = self._counts.get(text, 0) + 1
            if len(lines) < FIRST_NUMBERS:
                lines.append(line)

    def collected(self) -> tuple[Note, ...]:
        return tuple(
            Note(text, self._file, self._counts.get(text, 0), tuple(lines))
            for text, lines in self._lines.items()
        )


def merged(notes: Iterable[Note]) -> tuple[Note, ...]:
    """The notes of all parts of a source as those of the whole; parts in their order."""
    whole: dict[tuple[int, str], Note] = {}
    for note in notes:
        known = whole.setdefault((note.file, note.text), note)
        if known is not note:
            lines = sorted({*known.first_lines, *note.first_lines})[:FIRST_NUMBERS]
            count = known.count + note.count
            whole[note.file, note.text] = Note(note.text, note.file, count, tuple(lines))
    return tuple(whole.values())
