"""Lines at the bottom of a terminal that are replaced in place.

Only lines that have changed are written, all at once and as one synchronized update, so that
nothing flickers. What else is printed meanwhile goes above. The cursor waits, hidden, on the line
below, where a terminal shows the `^C` that is typed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import ControlType, Segment
from rich.text import Text

Line = list[Segment]

# Terminals that do not know of synchronized updates take no notice.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
_ERASE_BELOW = "\x1b[0J"


class Screen(AbstractContextManager["Screen"], RenderHook):
    """`paint` what is to stand there; it stays when the screen is left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lines: list[Line] = []
        self._texts: Sequence[Text] = ()
        self._width = 0
        self._painting = False

    @property
    def size(self) -> tuple[int, int]:
        """Columns, and rows above the cursor's."""
        width, height = self.console.size
        return width, max(1, height - 1)

    def __enter__(self) -> Screen:
        self.console.push_render_hook(self)
        self.console.show_cursor(False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.console.pop_render_hook()
        self.console.print(_Segments([_raw("\r\x1b[2K")]), end="")
        self.console.show_cursor(True)

    def paint(self, texts: Sequence[Text]) -> None:
        """Replace what stands there by these lines, each cut off at the right edge."""
        lines = [self._cut(text) for text in texts]
        width = self.console.width
        same_place = width == self._width and len(lines) == len(self._lines)
        if same_place and lines == self._lines:
            return
        written = list(self._changes(lines) if same_place else self._redrawn(lines))
        self._lines, self._texts, self._width = lines, texts, width
        self._painting = True
        try:
            self.console.print(_Segments([_raw(_BEGIN), *written, _raw(_END)]), end="")
        finally:
            self._painting = False

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What somebody else prints, with the lines below it instead of above."""
        if self._painting or not self._lines:
            return renderables
        erased = _Segments([_raw(_BEGIN), self._erasure()])
        return [erased, *renderables, _Segments([*_whole(self._lines), _raw(_END)])]

    def _cut(self, text: Text) -> Line:
        shown = text.copy()
        shown.truncate(self.console.width, overflow="crop")
        return list(shown.render(self.console, end=""))

    def _changes(self, lines: Sequence[Line]) -> Iterator[Segment]:
        """From below the last line over all of them and back, writing those that differ."""
        yield _raw(f"\r\x1b[{len(lines)}A" if lines else "\r")
        for line, before in zip(lines, self._lines, strict=True):
            if line != before:
                yield _raw("\x1b[2K")
                yield from line
            yield Segment.line()
        yield _raw(_ERASE_BELOW)

    def _redrawn(self, lines: Sequence[Line]) -> Iterator[Segment]:
        yield self._erasure()
        yield from _whole(lines)

    def _erasure(self) -> Segment:
        """Back to the first line, with everything from there on gone. Lines that no longer fit
        into the width have been broken by the terminal, each into several."""
        width = self.console.width
        rows = sum(max(1, -(-Segment.get_line_length(line) // width)) for line in self._lines)
        up = f"\x1b[{rows}A" if rows else ""
        return _raw(f"\r{up}{_ERASE_BELOW}")


def _whole(lines: Sequence[Line]) -> Iterator[Segment]:
    for line in lines:
        yield from line
        yield Segment.line()


def _raw(codes: str) -> Segment:
    """Text for the terminal itself, of no width."""
    return Segment(codes, None, [(ControlType.HOME,)])


class _Segments:
    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.segments
