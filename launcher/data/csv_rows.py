"""Rows of CSV and TSV text, as objects by the names in its first line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from ftplan.launcher.data.records import MAX_ROW_CHARACTERS, NOT_UTF8, TOO_LONG, Notes, Record
from ftplan.launcher.data.streams import Text
from ftplan.launcher.data.text_rows import text_lines

DELIMITERS = (",", "\t", ";", "|")

DELIMITER_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}

_LONGEST_NAME = 60

# Each reads up to the end of the file at worst: an open quote goes on to the next one.
_MOST_OPEN_QUOTES = 20


def parse(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_ROW_CHARACTERS)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def likely_delimiter(head: str, hint: str = "") -> str | None:
    """What separates the fields of a text's first rows; None where nothing does so throughout."""
    best, most = None, 1
    for delimiter in dict.fromkeys((hint or ",", *DELIMITERS)):
        counts = []
        try:
            for row in parse(iter(io.StringIO(head, newline="")), delimiter):
                if row:
                    counts.append(len(row))
        except csv.Error:  # the head ends within quotes, at best
            pass
        counts = counts[:20]
        if len(counts) > 1 and min(counts) == max(counts) > most:
            best, most = delimiter, counts[0]
    return best


def missing_header(names: list[str]) -> str:
    """Why a first row names no columns; empty where it does."""
    if surrogate("".join(names)):
        return "it is not UTF-8 text (`iconv -f CP1252 -t UTF-8` makes it so)"
    for name in names:
        if len(name) > _LONGEST_NAME or "\n" in name or name.endswith((".", "?", "!")):
            return f"`{_shortened(name)}` is no column's name"
        if name.replace(".", "").replace("-", "").isdecimal():
            return f"`{name}` is no column's name"
    if len(set(names)) < len(names):
        return "a name stands there twice"
    return "" if any(names) else "it is blank"


def _shortened(text: str) -> str:
    text = text.replace("\n", " ")
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."


class CsvRows:
    """The rows of a text, each numbered by the line that it begins at."""

    def __init__(self, text: Text, notes: Notes, file: int, *, delimiter: str) -> None:
        self._text = text
        self._notes = notes
        self._file = file
        self._delimiter = delimiter
        self._held: list[str] = []  # the lines of the row at hand
        self._waiting: list[str] = []  # lines to be read once more
        self._lines = text_lines(text)
        self._open_quotes = 0

    def __iter__(self) -> Iterator[Record]:
        names: list[str] = []
        rows, line, number = self._parser(), 1, 0
        while True:
            begin = line
            self._held.clear()
            try:
                fields = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                line += self._again_after(str(error))
                rows = self._parser()
                yield Record(begin, None, _reason(error), self._file)
                continue
            line += len(self._held)
            number = begin
            if not names:
                names = [name.strip() for name in fields]
            elif fields:
                yield self._record(begin, names, fields)
        if self._text.damage:
            yield Record(max(number, line - 1, 1), None, self._text.damage, self._file)

    def _record(self, number: int, names: list[str], fields: list[str]) -> Record:
        if len(fields) > len(names):
            reason = f"{len(fields)} fields where the first line names {len(names)}"
            return Record(number, None, reason, self._file)
        if self._text.escaped and (bad := surrogate("".join(fields))):
            self._notes.add(NOT_UTF8, number)
            return Record(number, None, f"not UTF-8 text (byte 0x{bad:02x})", self._file)
        value: dict[str, Any] = dict(zip(names, fields, strict=False))
        return Record(number, value, "", self._file)

    def _parser(self) -> Iterator[list[str]]:
        return parse(self._next_lines(), self._delimiter)

    def _next_lines(self) -> Iterator[str]:
        while True:
            line = self._waiting.pop() if self._waiting else next(self._lines, "")
            if not line:
                return
            self._held.append(line)
            yield line

    def _again_after(self, error: str) -> int:
        """Go on behind the row at hand, or behind its first line where a quote in it has swallowed
        what follows; returns how many lines are done with.
        """
        if len(self._held) > 1 and self._open_quotes < _MOST_OPEN_QUOTES:
            self._open_quotes += 1
            self._waiting += reversed(self._held[1:])
            return 1
        return len(self._held)


def _reason(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return "broken CSV: a quote is opened and not closed"
    if "field larger" in text:
        return f"{TOO_LONG}, or a quote that is not closed"
    if "expected after" in text:
        return "broken CSV: text behind the closing quote of a field"
    return f"broken CSV: {text}"


def surrogate(text: str) -> int:
    """A byte that is not UTF-8, where one stands in a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return ord(text[error.start]) - 0xDC00
    return 0
