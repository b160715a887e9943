"""A chat template, worked out once for each order of roles.

Rendering takes a tenth of a millisecond a row, and most rows of a file have the same roles. A
template that only puts the messages' texts between its own words gives the same words each time, so
those are kept. Rows whose text the template might look into are rendered one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property

from msgspec import Struct, structs

from ftplan.launcher.data.rows import Row

# Rows of each order of roles that are rendered both ways, to see that they agree.
_COMPARED = 3
# Orders of roles that are kept; conversations of many turns may each have one of their own.
_MOST_PATTERNS = 256
# Characters of marks that hardly stand in texts, the rarest first.
_RARE = "|<>{}[]"
_WORD = re.compile(r"\w*")


class Segment(Struct, frozen=True):
    """A stretch of text, and whether its tokens carry loss."""

    text: str
    trained: bool


Render = Callable[[Row], list[Segment]]


class _Pattern:
    """For one order of roles: of each segment the template's words, how many messages stand
    between them, and whether it is trained. Messages come once, in order."""

    def __init__(self, segments: list[tuple[list[str], int, bool]]) -> None:
        self.segments = segments
        self.left_to_compare = _COMPARED

    def fill(self, texts: Sequence[str]) -> list[Segment]:
        filled, begin = [], 0
        for words, count, trained in self.segments:
            if count == 1:
                text = f"{words[0]}{texts[begin]}{words[1]}"
            else:
                parts = [""] * (2 * count + 1)
                parts[::2] = words
                parts[1::2] = texts[begin : begin + count]
                text = "".join(parts)
            filled.append(Segment(text, trained))
            begin += count
        return filled


class Patterns:
    """What a template does with each order of roles that it met. `template`: its source; None for
    one that is not known, with which every row is rendered."""

    def __init__(self, template: str | None) -> None:
        self._known: dict[tuple[str, ...], _Pattern | None] = {}
        self._template = template

    @cached_property
    def _looked_for(self) -> tuple[str, ...] | None:
        return None if self._template is None else _marks(self._template)

    @cached_property
    def _hints(self) -> tuple[str, ...]:
        """Of each mark what is sought first."""
        marks = self._looked_for or ()
        return tuple({next((c for c in _RARE if c in mark), mark) for mark in marks})

    def segments(self, row: Row, render: Render) -> list[Segment]:
        """`render(row)`, by what was rendered before where that is the same."""
        messages = row.messages
        texts = [message.content for message in messages]
        if self._looked_for is None or not self._is_plain(row, texts):
            return render(row)
        roles = tuple([message.role for message in messages])
        if roles not in self._known:
            if len(self._known) >= _MOST_PATTERNS:
                return render(row)
            self._known[roles] = _pattern(row, render)
        pattern = self._known[roles]
        if pattern is None:
            return render(row)
        filled = pattern.fill(texts)
        if pattern.left_to_compare:
            pattern.left_to_compare -= 1
            rendered = render(row)
            if rendered != filled:
                self._known[roles] = None
            return rendered
        return filled

    def _is_plain(self, row: Row, texts: Sequence[str]) -> bool:
        """Whether the template has no reason to look into the texts: nothing to strip, none of the
        marks that it looks for, no tools."""
        if row.tools:
            return False
        for message in row.messages:
            if message.tool_calls or message.name:
                return False
        hints = self._hints
        for text in texts:
            if not text or text[0].isspace() or text[-1].isspace():
                return False
            for hint in hints:
                if hint in text and any(mark in text for mark in self._looked_for or ()):
                    return False
        return True


def _marks(template: str) -> tuple[str, ...] | None:
    """Strings of a template that it may look for in a text: those with more than blanks and a
    word, such as `</think>`. Names of fields and roles are words. None for what is no template.

    Of two of which one holds the other, the shorter is enough.
    """
    from jinja2 import Environment, TemplateError  # comes with what renders templates

    try:
        tokens = list(Environment(autoescape=False).lex(template))
        found = {_literal(value).strip() for _, kind, value in tokens if kind == "string"}
    except (TemplateError, UnicodeDecodeError):
        return None
    marks = {mark for mark in found if len(mark) > 2 and not _WORD.fullmatch(mark)}
    return tuple(sorted(mark for mark in marks if not any(m in mark for m in marks if m != mark)))


def _literal(quoted: str) -> str:
    """What a string of a template says, its escapes read as Jinja does."""
    escaped = quoted[1:-1].encode("ascii", "backslashreplace")
    return escaped.decode("unicode-escape")


def _pattern(row: Row, render: Render) -> _Pattern | None:
    """How rows with these roles are rendered; None where texts do not come out once, in order."""
    marks = [f"\ue000{number}\ue001" for number in range(len(row.messages))]
    messages = tuple(
        structs.replace(message, content=mark)
        for message, mark in zip(row.messages, marks, strict=True)
    )
    try:
        rendered = render(structs.replace(row, messages=messages))
    except Exception:  # the row itself will say what is wrong
        return None
    segments: list[tuple[list[str], int, bool]] = []
    places: list[int] = []
    for segment in rendered:
        parts = re.split("\ue000(\\d+)\ue001", segment.text)
        segments.append((parts[::2], len(parts) // 2, segment.trained))
        places += map(int, parts[1::2])
    return _Pattern(segments) if places == list(range(len(marks))) else None
