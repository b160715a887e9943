"""A chat template, worked out once for each order of roles.

Rendering takes a tenth of a millisecond a row, and most rows of a file have the same roles. A
template that only puts the messages' texts between its own words gives the same words each time, so
those are kept. Rows whose text the template might look into are rendered one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from msgspec import Struct, structs

from ftplan.launcher.data.rows import Row

# Rows of each order of roles that are rendered both ways, to see that they agree.
_COMPARED = 3
# Orders of roles that are kept; conversations of many turns may each have one of their own.
_MOST_PATTERNS = 256
# Strings in a template's source. What it looks for in a text is one of them.
_LITERAL = re.compile(r"'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"")
_WORD = re.compile(r"\w*")


class Segment(Struct, frozen=True):
    """A stretch of text, and whether its tokens carry loss."""

    text: str
    trained: bool


Render = Callable[[Row], list[Segment]]


class _Pattern:
    """For one order of roles: of each segment the template's words, and between them the numbers
    of the messages whose texts stand there."""

    def __init__(self, segments: list[tuple[list[str], list[int], bool]]) -> None:
        self.segments = segments
        self.left_to_compare = _COMPARED

    def fill(self, texts: Sequence[str]) -> list[Segment]:
        filled = []
        for words, places, trained in self.segments:
            parts = [words[0]]
            for place, word in zip(places, words[1:], strict=True):
                parts += (texts[place], word)
            filled.append(Segment("".join(parts), trained))
        return filled


class Patterns:
    """What a template does with each order of roles that it met. `template`: its source; None for
    one that is not known, with which every row is rendered."""

    def __init__(self, template: str | None) -> None:
        self._known: dict[tuple[str, ...], _Pattern | None] = {}
        self._template = template
        self._looked_for = _marks(template or "")

    def segments(self, row: Row, render: Render) -> list[Segment]:
        """`render(row)`, by what was rendered before where that is the same."""
        texts = [message.content for message in row.messages]
        if self._template is None or not self._is_plain(row, texts):
            return render(row)
        roles = tuple(message.role for message in row.messages)
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
        if row.tools or any(message.tool_calls or message.name for message in row.messages):
            return False
        for text in texts:
            if not text or text[0].isspace() or text[-1].isspace():
                return False
            if any(mark in text for mark in self._looked_for):
                return False
        return True


def _marks(template: str) -> tuple[str, ...]:
    """Strings of a template that it may look for in a text: those with more than blanks and a
    word, such as `</think>`. Names of fields and roles are words."""
    found = {a or b for a, b in _LITERAL.findall(template)}
    stripped = {re.sub(r"\\[nrt]", "", literal).strip() for literal in found}
    return tuple(sorted(mark for mark in stripped if len(mark) > 2 and not _WORD.fullmatch(mark)))


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
    segments = []
    for segment in rendered:
        parts = re.split("\ue000(\\d+)\ue001", segment.text)
        segments.append((parts[::2], [int(place) for place in parts[1::2]], segment.trained))
    places = [place for _, found, _ in segments for place in found]
    return _Pattern(segments) if sorted(places) == list(range(len(marks))) else None
