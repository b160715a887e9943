"""The terminal: data on stdout, messages on stderr, colours only where they are wanted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ftplan.planner.errors import FtplanError

# Width of output that goes to a file or a pipe and has no terminal to ask.
_WIDTH_WITHOUT_TERMINAL = 100
_BAR_CELLS = 20


class Ui:
    """Output of one command. With `as_json` tables are left out and one object is printed."""

    def __init__(
        self,
        *,
        as_json: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        width: int | None = None,
    ) -> None:
        self.as_json = as_json
        self.stdout = stdout or sys.stdout
        self.out = _console(self.stdout, width)
        self.err = _console(stderr or sys.stderr, width)

    @property
    def interactive(self) -> bool:
        """Whether a person sits at the terminal."""
        return self.err.is_terminal and sys.stdin.isatty()

    def show(self, *renderables: RenderableType) -> None:
        """Print tables and lines for a person; nothing under --json."""
        if not self.as_json:
            for renderable in renderables:
                self.out.print(renderable)

    def say(self, message: str) -> None:
        """A message beside the data."""
        self.err.print(Text(message, style="dim"))

    def confirm(self, question: str) -> bool:
        """Ask on the terminal; the empty answer means yes, the end of input no."""
        try:
            answer = self.err.input(Text.assemble((question, "bold"), " [Y/n] "))
        except EOFError:
            return False
        return answer.strip().lower() in ("", "y", "yes")

    def warn(self, message: str) -> None:
        self.err.print(Text.assemble(("warning: ", "yellow"), message))

    def fail(self, error: FtplanError) -> None:
        """`error: ...` then `hint: ...`."""
        self.err.print(Text.assemble(("error: ", "bold red"), error.message))
        if error.hint:
            self.err.print(Text.assemble(("hint: ", "bold"), error.hint))

    def json(self, value: Any) -> None:
        """One JSON object on stdout, under --json only."""
        if self.as_json:
            self.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _console(stream: TextIO, width: int | None) -> Console:
    if width is None and not stream.isatty():
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdigit() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, width=width, highlight=False, emoji=False, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[RenderableType]]) -> Table:
    """A plain table. A column name that starts with `>` is right-aligned; the last one folds,
    the others keep to one line."""
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        header_style="dim",
    )
    for number, name in enumerate(columns):
        right = name.startswith(">")
        last = number == len(columns) - 1
        result.add_column(
            name.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=not last,
            overflow="fold" if last else "ellipsis",
        )
    for row in rows:
        result.add_row(*row)
    return result


def bar(share: float, style: str = "cyan") -> Text:
    """A bar of fixed width, filled to `share` of 1."""
    filled = min(_BAR_CELLS, max(0, round(share * _BAR_CELLS)))
    if share > 0 and filled == 0:
        return Text.assemble(("▏", style), (" " * (_BAR_CELLS - 1), ""))
    return Text.assemble(("█" * filled, style), ("·" * (_BAR_CELLS - filled), "dim"))
