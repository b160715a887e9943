"""The terminal: data on stdout, messages on stderr, colours only where they are wanted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ftplan.launcher.escaped import escaped
from ftplan.planner.errors import FtplanError

# Width of output that goes to a file or a pipe and has no terminal to ask.
_WIDTH_WITHOUT_TERMINAL = 100
_BAR_CELLS = 20


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would exit with status 1, which means that something does not fit."""
        raise BrokenPipeError

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """All that is printed comes by here, as text and styles: what of the text a terminal would
        obey has come from data, files or models."""
        return super()._render_buffer(
            one if one.control else one._replace(text=escaped(one.text)) for one in buffer
        )


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
        self._unbroken = not (self.err.is_terminal or width or _columns())

    @property
    def interactive(self) -> bool:
        """Whether a person sits at the terminal."""
        return self.err.is_terminal and sys.stdin.isatty()

    @property
    def asks(self) -> bool:
        """Whether a question on the way to a result is in order: somebody sits there, and nothing
        else is fed with the output."""
        return self.interactive and self.out.is_terminal and not self.as_json

    def show(self, *renderables: RenderableType) -> None:
        """Print tables and lines for a person; nothing under --json."""
        if not self.as_json:
            for renderable in renderables:
                self.out.print(renderable)

    def show_lines(self, lines: Sequence[str]) -> None:
        """Lines to be copied: never broken, however narrow the terminal."""
        if not self.as_json:
            for line in lines:
                self.out.print(line, soft_wrap=True)

    def say(self, message: str) -> None:
        """A message beside the data."""
        self._tell(Text(message, style="dim"))

    @contextlib.contextmanager
    def progress(self, what: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        """A bar on stderr, where that is a terminal; call what it gives with each further number of
        bytes. None shows nothing."""
        if total_bytes is None or not self.err.is_terminal:
            yield lambda num_bytes: None
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), DownloadColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.err, transient=True) as shown:
            task = shown.add_task(what, total=total_bytes)
            yield lambda num_bytes: shown.advance(task, num_bytes)

    def confirm(self, question: str) -> bool:
        """Ask on the terminal; the empty answer means yes, the end of input no."""
        try:
            answer = self.err.input(Text.assemble((question, "bold"), " [Y/n] "))
        except EOFError:
            return False
        return answer.strip().lower() in ("", "y", "yes")

    def choose(self, question: str, choices: Sequence[object]) -> int:
        """Ask on the terminal which of several it shall be; the empty answer and the end of input
        mean the first."""
        self.err.print(Text(question, style="bold"))
        for number, choice in enumerate(choices, start=1):
            self.err.print(Text(f"  {number}  {choice}"))
        while True:
            try:
                answer = self.err.input(Text("Which one? [1] ")).strip()
            except EOFError:
                return 0
            if not answer:
                return 0
            if answer.isdecimal() and 1 <= int(answer) <= len(choices):
                return int(answer) - 1
            self.err.print(Text(f"a number from 1 to {len(choices)}, please"))

    def warn(self, message: str) -> None:
        self._tell(Text.assemble(("warning: ", "yellow"), message))

    def fail(self, error: FtplanError) -> None:
        """`error: ...` then `hint: ...`."""
        self._tell(Text.assemble(("error: ", "bold red"), error.message))
        if error.hint:
            self._tell(Text.assemble(("hint: ", "bold"), error.hint))

    def _tell(self, message: Text) -> None:
        """A message. Where nobody has a width, as in a log, it keeps to one line: its paths and
        commands can be searched for and copied."""
        self.err.print(message, soft_wrap=self._unbroken)

    def json(self, value: Any) -> None:
        """One JSON object on stdout, under --json only. It is ASCII: valid in any encoding."""
        if self.as_json:
            # A reader that has gone has not seen the exit status, which is still to come.
            with contextlib.suppress(BrokenPipeError):
                self.stdout.write(json.dumps(value, indent=1) + "\n")

    def json_line(self, value: Any) -> None:
        """Like `json`, where a command prints many objects: each on a line of its own, at once."""
        if self.as_json:
            self.stdout.write(json.dumps(value) + "\n")
            self.stdout.flush()


def _console(stream: TextIO, width: int | None) -> Console:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal without UTF-8 has no box characters
    return _Console(
        file=stream, width=width or _width(stream), highlight=False, emoji=False, markup=False
    )


def _width(stream: TextIO) -> int | None:
    """Columns of the output; None where rich asks the terminal, again whenever it is resized."""
    if not stream.isatty():
        return _columns() or _WIDTH_WITHOUT_TERMINAL
    # Some editors' shells say 0, which rich believes.
    return shutil.get_terminal_size().columns if _columns() == 0 else None


def _columns() -> int | None:
    """The width that the environment asks for."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() else None


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[RenderableType]],
    *,
    folds: bool = False,
) -> Table:
    """A plain table. A column name that starts with `>` is right-aligned; the last one folds,
    the others keep to one line unless `folds`."""
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
        folding = folds or number == len(columns) - 1
        result.add_column(
            name.removeprefix(">"),
            justify="right" if right else "left",
            no_wrap=not folding,
            overflow="fold" if folding else "ellipsis",
        )
    for row in rows:
        result.add_row(*row)
    return result


def facts(rows: Sequence[tuple[str, str]]) -> Table:
    """Lines with a label each; what does not go into one is folded beside its label."""
    result = Table.grid(padding=(0, 2, 0, 0))
    result.add_column(style="dim", no_wrap=True)
    result.add_column(overflow="fold")
    for label, text in rows:
        result.add_row(label, text)
    return result


class StackedBar:
    """A bar as wide as there is room, divided in the ratio of `sizes`; the last part is what is
    left over. Each part has a colour and a pattern, which tell them apart without colours too."""

    _PARTS = (
        ("█", "cyan"), ("▓", "magenta"), ("▒", "yellow"), ("░", "green"),
        ("▚", "blue"), ("▤", "white"), ("+", "red"),
    )  # fmt: skip
    _LEFT = ("·", "dim")

    def __init__(self, sizes: Sequence[float]) -> None:
        self._sizes = sizes

    def key(self, number: int) -> Text:
        """The cell that stands for a part, for a legend."""
        is_last = number == len(self._sizes) - 1
        return Text(*(self._LEFT if is_last else self._PARTS[number]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, total = options.max_width, sum(self._sizes)
        line, done, filled = Text(), 0.0, 0
        for number, size in enumerate(self._sizes):
            done += size
            cells = round(width * done / total) - filled
            filled += cells
            cell = self.key(number)
            line.append(cell.plain * cells, cell.style)
        yield line


def bar(share: float, style: str = "cyan") -> Text:
    """A bar of fixed width, filled to `share` of 1."""
    filled = min(_BAR_CELLS, max(0, round(share * _BAR_CELLS)))
    if share > 0 and filled == 0:
        return Text.assemble(("▏", style), (" " * (_BAR_CELLS - 1), ""))
    return Text.assemble(("█" * filled, style), ("·" * (_BAR_CELLS - filled), "dim"))
