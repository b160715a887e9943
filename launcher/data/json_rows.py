"""Rows of JSON text: one a line, one after the other over several lines, or in an array.

All are values with something between them, so one reader takes them as they come and needs no
more memory than a row. Strict JSON takes the fast path, the standard library's scanner in C. Where
it stops, comments and commas before a closing bracket are blanked out and it tries again.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from ftplan.launcher.data.records import (
    MAX_ROW_CHARACTERS,
    MOST_NESTED,
    NOT_UTF8,
    TOO_DEEP,
    TOO_LONG,
    Notes,
    Record,
)
from ftplan.launcher.data.streams import Text

COMMENTS = "comments (`//`, `/* */`), left out"
TRAILING_COMMAS = "commas before a closing bracket, left out"
COMMAS_AFTER_ROWS = "commas after rows, left out"
COMMAS_BETWEEN_ROWS = "commas between rows missing or doubled"
NOT_NUMBERS = "NaN or Infinity, read as null"
RAW_CONTROL = "tabs or line breaks as they are inside text, where JSON has `\\t` and `\\n`"
NOT_CLOSED = "the array has no closing `]`: the file may be cut off"

_BETWEEN = re.compile(r"[\s,]*")
_BLANK = re.compile(r"[ \t\r]*")
_STRING = r'"(?:[^"\\\n]|\\.)*+"'
_COMMENT = re.compile(_STRING + r'|(//[^\n]*|/\*.*?\*/)|(")', re.DOTALL)
_TRAILING = re.compile(_STRING + r'|(,)(?=\s*[}\]])|(")')
_BRACKET = re.compile(_STRING + r"|[\[\]{}]")
_NOT_NEWLINE = re.compile(r"[^\n]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\\n]|\\.)*")\s*:')

_REASONS = {
    "Expecting ',' delimiter": "expecting `,`",
    "Expecting ':' delimiter": "expecting `:`",
    "Expecting property name enclosed in double quotes": "expecting a name in double quotes",
    "Expecting value": "expecting a value",
    "Unterminated string starting at": "text without its closing quote",
    "Invalid control character at": "a control character inside text",
}

# A comment, or a closing bracket behind a comma; from Python 3.13 on, that comma.
_MENDABLE = ("/", "}", "]", ",")

# Text is mended by pieces of this length, not a whole window for each row; where rows cannot be
# mended, by short ones.
_MENDED_CHARACTERS = 2**15
_FEWEST_MENDED_CHARACTERS = 2**9

# The longest piece of JSON that an error may stand before the end of: `-Infinity`, `\ud83d\ude00`.
_LONGEST_PIECE = 12


class _Broken(Exception):
    """Why a row cannot be read, and where in the window that shows, if anywhere."""

    def __init__(self, reason: str, position: int | None = None) -> None:
        super().__init__(reason)
        self.position = position


class _Again(Exception):
    """The window changed: look at the row once more."""


class _Clean:
    """A piece of the window without comments and commas before brackets; the window keeps them, as
    what follows a broken row may have been taken for something else.
    """

    def __init__(self, begin: int = 0, text: str = "") -> None:
        self.begin = begin
        self.text = text
        self.left_out: list[tuple[int, str]] = []
        for pattern, note in ((_COMMENT, COMMENTS), (_TRAILING, TRAILING_COMMAS)):
            self._blank_out(pattern, note)

    @property
    def end(self) -> int:
        return self.begin + len(self.text)

    def _blank_out(self, pattern: re.Pattern[str], note: str) -> None:
        """A pattern's first group, up to a quote that is not closed in its line."""
        pieces, kept = [], 0
        for match in pattern.finditer(self.text):
            if match.lastindex == 2:
                break
            if match.lastindex == 1:
                pieces += [self.text[kept : match.start()], _NOT_NEWLINE.sub(" ", match.group())]
                self.left_out.append((self.begin + match.start(), note))
                kept = match.end()
        self.text = "".join([*pieces, self.text[kept:]])


class JsonRows:
    """The rows of a text. `array`: it is an array from its position on, rows are numbered by
    ordinal. `wrapper`: the key that holds the array, in an object around it.
    """

    def __init__(
        self, text: Text, notes: Notes, file: int = 0, *, array: bool = False, wrapper: str = ""
    ) -> None:
        self._text = text
        self._notes = notes
        self._file = file
        self._array = array
        self._wrapper = wrapper
        self._row = 0
        self._commas: int | None = 0  # that stand before the array's next row; None: not looked at
        self._clean = _Clean()
        self._clean_size = _MENDED_CHARACTERS
        self.mended = 0
        """How often a row was more than strict JSON, or looked so."""
        self._first_key = ""
        self._constants: list[str] = []
        self._decoder = json.JSONDecoder(parse_constant=self._constants.append)
        self._loose = json.JSONDecoder(parse_constant=self._constants.append, strict=False)

    def __iter__(self) -> Iterator[Record]:
        text, file = self._text, self._file
        while (begin := self._next()) is not None:
            try:
                value, end = self._value(begin)
            except _Again:
                continue
            except _Broken as broken:
                yield self._broken(begin, broken)
                continue
            self._row += 1
            line = text.advance(begin)
            number = self._row if self._array else line
            text.position = end
            self._commas = 1
            yield Record(number, value, "", file)
        if text.damage:
            self._row += 1
            number = self._row if self._array else text.advance(len(text.text))
            yield Record(number, None, text.damage, file)

    def _next(self) -> int | None:
        """Where the next row begins; None after the last."""
        begin, commas = self._mark()
        if not self._array:
            return begin
        if begin is None:
            if not self._text.damage:
                self._notes.add(NOT_CLOSED)
            return None
        closed = self._text.text[begin] == "]"
        if self._commas is not None and commas != (self._commas and not closed):
            note = TRAILING_COMMAS if closed else COMMAS_BETWEEN_ROWS
            self._notes.add(note, self._text.line(begin))
        self._commas = None
        if not closed:
            return begin
        self._text.advance(begin + 1)
        return self._after_array()

    def _after_array(self) -> int | None:
        """What stands behind an array: nothing, the wrapper's end, or one more array."""
        text = self._text
        at, _ = self._mark()
        if at is None:
            return None
        if self._wrapper:
            if text.text[at] != "}":
                self._notes.add(
                    f"only `{self._wrapper}` is read, not what the file holds behind it"
                )
            return None
        if text.text[at] == "[":
            self._notes.add("several arrays, one after the other", text.advance(at + 1))
            self._commas = 0
            return self._next()
        self._notes.add("text behind the array, left out", text.line(at))
        return None

    def _mark(self) -> tuple[int | None, int]:
        """The next character that is no blank, comma or comment, None at the end, and how many
        commas stand before it. The window moves there.
        """
        text, commas = self._text, 0
        while True:
            window, position = text.text, text.position
            begin = _BETWEEN.match(window, position).end()  # type: ignore[union-attr]
            if begin == len(window) and not text.final:
                if text.too_long:
                    text.position = begin
                self._more()
                continue
            if (comma := window.find(",", position, begin)) >= 0:
                commas += window.count(",", comma, begin)
                if not self._array:
                    self._notes.add(COMMAS_AFTER_ROWS, text.line(comma))
            text.advance(begin)
            if begin == len(window):
                return None, commas
            if window[begin] != "/" or not self._skip_comment(begin):
                return begin, commas

    def _skip_comment(self, begin: int) -> bool:
        """Move behind a comment, or read on for its end; False where there is none."""
        text = self._text
        window, found = text.text, -1
        if window.startswith("//", begin):
            found = window.find("\n", begin)
            end = found if found >= 0 or not text.final else len(window)
        elif window.startswith("/*", begin):
            found = window.find("*/", begin + 2)
            end = found + 2 if found >= 0 else -1
        else:
            end = -1 if begin + 1 == len(window) else -2
        if end == -1 and not text.final and not text.too_long:
            self._more()
            return True
        if end < 0:
            return False
        self._notes.add(COMMENTS, text.line(begin))
        text.advance(end)
        return True

    def _value(self, begin: int) -> tuple[Any, int]:
        """The value that begins there, and where it ends. Raises _Broken, _Again."""
        try:
            try:
                value, end = self._decoder.raw_decode(self._text.text, begin)
            except json.JSONDecodeError as error:
                if _nested_too_deeply(self._text.text, begin, error.pos):
                    raise _Broken(TOO_DEEP) from None
                value, end = self._mended(begin, error)
        except RecursionError:
            raise _Broken(TOO_DEEP) from None
        except ValueError:  # Python's limit on the digits of a number
            raise _Broken("a number with thousands of digits") from None
        if end - begin > MAX_ROW_CHARACTERS:
            raise _Broken(TOO_LONG)
        if _nested_too_deeply(self._text.text, begin, end):
            raise _Broken(TOO_DEEP)
        self._check_rest(begin, end)
        if self._constants:
            self._constants.clear()
            self._notes.add(NOT_NUMBERS, self._text.line(begin))
        self._check_text(value, begin, end)
        return value, end

    def _check_rest(self, begin: int, end: int) -> None:
        """Behind a row stands a line's end, a comma, a comment, another row: nothing else."""
        window = self._text.text
        if window.startswith("\n", end) or (window.startswith(",", end) and self._array):
            return
        at = _BLANK.match(window, end).end()  # type: ignore[union-attr]
        if not self._array and window.startswith(",", at):
            at = _BLANK.match(window, at + 1).end()  # type: ignore[union-attr]
        if at == len(window):
            if not self._text.final:
                self._more()
                raise _Again
        elif window[at] not in (",]\n{/" if self._array else "\n{/"):
            self._constants.clear()
            raise _Broken("broken JSON: extra text after the row", at)

    def _check_text(self, value: Any, begin: int, end: int) -> None:
        """Raises _Broken for text that no tokenizer takes and no file can hold."""
        window = self._text.text
        if self._text.escaped and (bad := _SURROGATE.search(window, begin, end)):
            byte = ord(bad.group()) - 0xDC00
            self._notes.add(NOT_UTF8, self._text.line(bad.start()))
            raise _Broken(f"not UTF-8 text (byte 0x{byte:02x})", bad.start())
        if window.find("\\u", begin, end) < 0:
            return
        if _ESCAPED_SURROGATE.search(window, begin, end):
            try:
                msgspec.json.encode(value)
            except UnicodeEncodeError:
                raise _Broken("half a character (a lone surrogate)") from None
            except (RecursionError, msgspec.MsgspecError, ValueError, OverflowError):
                raise _Broken(TOO_DEEP) from None

    def _mended(self, begin: int, error: json.JSONDecodeError) -> tuple[Any, int]:
        """The value once more, after the scanner has stopped at `error`."""
        text = self._text
        self.mended += 1
        self._constants.clear()
        reason, position = error.msg, error.pos
        self._read_on_if_cut(text.text, begin, reason, position)
        if position > begin and text.text[position : position + 1] in _MENDABLE:
            try:
                return self._clean_value(begin)
            except json.JSONDecodeError as later:
                reason, position = later.msg, self._clean.begin + later.pos
                self._constants.clear()
        if reason.startswith("Invalid control") and not text.text.startswith("\0", position):
            try:
                value, end = self._loose.raw_decode(text.text, begin)
            except json.JSONDecodeError as later:
                if not text.too_long and _cut_short(text.text, later.msg, later.pos):
                    self._read_on_if_cut(text.text, begin, later.msg, later.pos)
            else:
                self._notes.add(RAW_CONTROL, text.line(begin))
                return value, end
        if text.damage and _cut_short(text.text, reason, position):
            damage, text.damage = text.damage, ""  # said once
            raise _Broken(damage)
        if text.text.startswith("\n", position):
            reason = "Unterminated string starting at"
        reason = _REASONS.get(reason, reason[:1].lower() + reason[1:])
        raise _Broken(f"broken JSON: {reason}", position)

    def _clean_value(self, begin: int) -> tuple[Any, int]:
        """The value without comments and commas before brackets. Raises JSONDecodeError, with
        positions in what was cleaned.
        """
        window, size = self._text.text, self._clean_size
        if self._clean.begin <= begin < self._clean.end:
            with contextlib.suppress(json.JSONDecodeError):
                value, end = self._decoder.raw_decode(self._clean.text, begin - self._clean.begin)
                return self._note_left_out(value, begin, self._clean.begin + end)
        while True:
            self._constants.clear()
            upto = window.find("\n", begin + size) + 1 or len(window)
            self._clean = _Clean(begin, window[begin:upto])
            try:
                value, end = self._decoder.raw_decode(self._clean.text)
                self._clean_size = min(2 * self._clean_size, _MENDED_CHARACTERS)
                return self._note_left_out(value, begin, begin + end)
            except json.JSONDecodeError as error:
                self._clean_size = _FEWEST_MENDED_CHARACTERS
                if upto == len(window) or not _cut_short(self._clean.text, error.msg, error.pos):
                    self._read_on_if_cut(self._clean.text, begin, error.msg, error.pos, begin)
                    raise
            size *= 4  # the row is longer than the piece

    def _note_left_out(self, value: Any, begin: int, end: int) -> tuple[Any, int]:
        for position, note in sorted(self._clean.left_out):
            if begin <= position < end:
                self._notes.add(note, self._text.line(position))
        return value, end

    def _read_on_if_cut(
        self, window: str, begin: int, reason: str, position: int, offset: int = 0
    ) -> None:
        """Read on where the scanner stopped because the window ends, or in a last line of a row of
        several lines, which may not be read whole. Raises _Again, or _Broken for a row too long.
        """
        text = self._text
        if text.final:
            return
        last_line = begin <= text.text.rfind("\n", begin) < position + offset
        if last_line or _cut_short(window, reason, position):
            text.position = begin
            if text.too_long:
                raise _Broken(TOO_LONG)
            self._more()
            raise _Again

    def _more(self) -> None:
        self._text.more()
        self._clean = _Clean()

    def _broken(self, begin: int, broken: _Broken) -> Record:
        """The record of a broken row; the window moves to where the next may begin."""
        text = self._text
        self._row += 1
        self._constants.clear()
        line = text.advance(begin)
        reason = str(broken)
        if broken.position is not None:
            reason += f", {self._place(line, begin, broken.position)}"
        if self._array:
            self._skip_to_row_of_array(begin)
        else:
            self._skip_to_line(begin, broken.position or begin)
        return Record(self._row if self._array else line, None, reason, self._file)

    def _place(self, first_line: int, begin: int, position: int) -> str:
        line = self._text.line(position)
        if line == first_line and self._array:  # the line may have begun before the window
            return f"character {position - begin + 1:,} of the row"
        column = f"column {self._text.column(position)}"
        return column if line == first_line else f"line {line}, {column}"

    def _skip_to_line(self, begin: int, position: int) -> None:
        """Behind a row that broke off in its own line: the next line. Behind one of several lines:
        the next `{` that is no further indented.
        """
        window = self._text.text
        line_begin = window.rfind("\n", 0, begin) + 1
        line_end = window.find("\n", begin)
        if line_end < 0 or line_end >= position:
            return self._skip(re.compile(r"\n()"), begin)
        indent = _BLANK.match(window, line_begin).end() - line_begin  # type: ignore[union-attr]
        self._skip(re.compile(rf"\n()[ \t]{{0,{min(indent, 1000)}}}\{{"), begin)

    def _skip_to_row_of_array(self, begin: int) -> None:
        """To the next object that begins with the key that this one, or one before, begins with."""
        window = self._text.text
        first_key = _FIRST_KEY.match(window, begin)
        self._first_key = first_key.group(1) if first_key else self._first_key
        if first_key is None and window[begin] not in "{[":
            return self._skip(re.compile(r"()[\n,\]{]"), begin)
        key = rf"\s*{re.escape(self._first_key)}\s*:" if self._first_key else ""
        self._skip(re.compile(rf"()\{{{key}"), begin)

    def _skip(self, pattern: re.Pattern[str], begin: int) -> None:
        """Move to the first group of a pattern's next match after `begin`, or to the end."""
        text, begin = self._text, begin + 1
        while (match := pattern.search(text.text, begin)) is None and not text.final:
            # A match may lie across the window's end.
            text.position = max(begin, len(text.text) - 4096)
            begin = 0
            self._more()
        text.advance(match.start(1) if match else len(text.text))


def _nested_too_deeply(window: str, begin: int, end: int) -> bool:
    """Whether more than MOST_NESTED brackets stand open somewhere there."""
    if window.count("{", begin, end) + window.count("[", begin, end) <= MOST_NESTED:
        return False
    depth = 0
    for found in _BRACKET.finditer(window, begin, end):
        if found[0] in "{[":
            depth += 1
            if depth > MOST_NESTED:
                return True
        elif found[0] in "}]":
            depth -= 1
    return False


def _cut_short(window: str, reason: str, position: int) -> bool:
    """The scanner stopped there because the window ends."""
    if reason.startswith("Unterminated string"):
        return window.find("\n", position) < 0
    if window.startswith("//", position):
        return window.find("\n", position) < 0
    if window.startswith("/*", position):
        return window.find("*/", position) < 0
    return (
        position >= len(window) - _LONGEST_PIECE
        or _BETWEEN.match(window, position).end() == len(window)  # type: ignore[union-attr]
    )
