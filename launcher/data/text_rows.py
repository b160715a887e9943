"""Plain text as rows: passages of whole paragraphs, in the order of the text."""

from __future__ import annotations

import io
from collections.abc import Iterator

from ftplan.launcher.data.records import MAX_ROW_CHARACTERS, NOT_UTF8, TOO_LONG, Notes, Record
from ftplan.launcher.data.streams import Text

# A passage ends with the first paragraph behind so many characters, which are about a thousand
# tokens of English; where no blank line comes, with the first line behind twice as many.
PASSAGE_CHARACTERS = 4_000


def text_lines(text: Text) -> Iterator[str]:
    """Lines with their ends, in pieces that no line is longer than."""
    while True:
        window = text.text[text.position :]
        taken = 0
        for line in io.StringIO(window, newline=""):
            if line.endswith("\n") or (line.endswith("\r") and taken + len(line) < len(window)):
                yield line
                taken += len(line)
        if text.final or len(window) - taken > MAX_ROW_CHARACTERS:
            if taken < len(window):
                yield window[taken:]
            taken = len(window)
        text.position += taken
        if not text.more():
            return


class TextRows:
    """The passages of a text, each numbered by the line that it begins at."""

    def __init__(self, text: Text, notes: Notes, file: int) -> None:
        self._text, self._notes, self._file = text, notes, file

    def __iter__(self) -> Iterator[Record]:
        held: list[str] = []
        begin, size, number = 1, 0, 0
        for number, line in enumerate(text_lines(self._text), start=1):
            if not held and not line.strip():
                continue
            if not held:
                begin = number
            held.append(line)
            size += len(line)
            ends = not line.strip() or size >= 2 * PASSAGE_CHARACTERS
            if ends and size >= PASSAGE_CHARACTERS:
                yield self._record(begin, "".join(held))
                held, size = [], 0
        if held:
            yield self._record(begin, "".join(held))
        if self._text.damage:
            yield Record(max(number, 1), None, self._text.damage, self._file)

    def _record(self, number: int, passage: str) -> Record:
        if len(passage) > MAX_ROW_CHARACTERS:
            return Record(number, None, TOO_LONG, self._file)
        try:
            passage.encode()
        except UnicodeEncodeError as error:
            self._notes.add(NOT_UTF8, number)
            bad = ord(passage[error.start]) - 0xDC00
            return Record(number, None, f"not UTF-8 text (byte 0x{bad:02x})", self._file)
        return Record(number, {"text": passage.strip()}, "", self._file)
