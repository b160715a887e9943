"""JSON lines in UTF-8: each line by itself where that works, which is the fastest way there is."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import chain
from typing import Any

import msgspec

from ftplan.launcher.data.json_rows import JsonRows
from ftplan.launcher.data.records import (
    MAX_ROW_CHARACTERS,
    MOST_NESTED,
    Notes,
    Record,
    nested_too_deeply,
)
from ftplan.launcher.data.streams import Damaged, Text

# So many rows in a line each, and lines are read by themselves once more.
_PLAIN_ROWS = 8

_FEWEST_BYTES_OF_DEEP_ROWS = 2 * MOST_NESTED


class JsonLines:
    """The rows of a file's blocks; what is no plain row in a line of its own goes to JsonRows."""

    def __init__(
        self, blocks: Iterator[bytes], notes: Notes, file: int = 0, first_line: int = 1
    ) -> None:
        self._blocks = blocks
        self._notes = notes
        self._file = file
        self._line = first_line
        self._rest = b""  # what is read and not yet looked at
        self._damage: Damaged | None = None
        self._ended = False

    def __iter__(self) -> Iterator[Record]:
        self._read()
        self._rest = self._rest.removeprefix(codecs.BOM_UTF8)
        while not self._ended:
            yield from self._plain_lines()
            yield from self._other_rows()

    def _read(self) -> bool:
        try:
            block = next(self._blocks, b"")
        except Damaged as damage:
            self._damage, block = damage, b""
        self._rest += block
        return bool(block)

    def _plain_lines(self) -> Iterator[Record]:
        """Rows up to a line that is not one of its own, or to the last line."""
        decode, file = msgspec.json.Decoder().decode, self._file
        while True:
            lines = self._rest.split(b"\n")
            self._rest = lines.pop()
            for index, row in enumerate(lines):
                try:
                    value = decode(row)
                    if len(row) > _FEWEST_BYTES_OF_DEEP_ROWS and _is_deep(row, value):
                        raise RecursionError
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    if row and not row.isspace():
                        self._rest = b"\n".join([*lines[index:], self._rest])
                        return
                else:
                    yield Record(self._line, value, "", file)
                self._line += 1
            if len(self._rest) > MAX_ROW_CHARACTERS or not self._read():
                return

    def _other_rows(self) -> Iterator[Record]:
        """Rows from there on, until plain ones have come again."""
        text = Text(chain([self._rest], self._left()), first_line=self._line)
        rows = JsonRows(text, self._notes, self._file)
        good = before = mended = 0
        for record in rows:
            yield record
            plain = not record.broken and record.number == before + 1 and rows.mended == mended
            good, before, mended = good + 1 if plain else 0, record.number, rows.mended
            if good >= _PLAIN_ROWS and not text.final and text.at_line_end:
                self._line = text.line(text.position)
                self._rest = text.rest()
                return
        self._ended = True

    def _left(self) -> Iterator[bytes]:
        return self._blocks if self._damage is None else _raised(self._damage)


def _is_deep(row: bytes, value: Any) -> bool:
    brackets = row.count(b"{") + row.count(b"[")
    return brackets > MOST_NESTED and nested_too_deeply(value)


def _raised(damage: Damaged) -> Iterator[bytes]:
    raise damage
    yield b""
