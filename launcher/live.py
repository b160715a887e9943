"""What is shown while a run goes on: a progress bar in a terminal, quiet lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from ftplan.launcher.ui import Ui
from ftplan.planner.units import format_bytes, format_seconds

T = TypeVar("T")

_QUIET_LINES = 10

# Work that is over sooner shows no progress.
_PATIENCE_SECONDS = 2


class LiveView(AbstractContextManager["LiveView"]):
    """Follows a run's status and metrics. Shows on stderr, so that stdout stays data."""

    def __init__(self, ui: Ui, total_steps: int) -> None:
        self.ui = ui
        self.total_steps = total_steps
        self.stage = ""
        self.last_step = 0
        self.num_notices = 0
        self.rows = 0  # a quiet line tells of more only
        self.told = 0
        self.began = time.monotonic()
        self.progress: Progress | None = None
        if ui.err.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}", style="dim"),
                console=ui.err,
            )
            self.task = self.progress.add_task("starting", total=total_steps, facts="")

    def __enter__(self) -> LiveView:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.progress:
            self.progress.stop()

    def update(self, status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Take in the latest status and metric rows."""
        for text in status.get("notices", [])[self.num_notices :]:
            self.num_notices += 1
            self.ui.warn(text)
        said = [row["said"] for row in rows if "said" in row]
        for line in said[self.told :]:
            self._line(line)
        self.told = len(said)
        stage = str(status.get("stage", "starting"))
        steps = [row for row in rows if "step" in row]
        latest = steps[-1] if steps else None
        if self.progress:
            facts = self._facts(steps) if latest and stage == "training" else _said_rows(status)
            done = latest["step"] if latest else 0
            self.progress.update(self.task, description=stage, completed=done, facts=facts)
            return
        if stage != self.stage:
            self.stage, self.rows = stage, 0
            self._line(stage)
        if status.get("rows", 0) > self.rows:
            self.rows = status["rows"] + status["of_rows"] // _QUIET_LINES
            self._line(f"{stage}: {_said_rows(status)}")
        every = max(1, self.total_steps // _QUIET_LINES)
        if latest and latest["step"] >= self.last_step + every:
            self.last_step = latest["step"]
            self._line(f"step {latest['step']}/{self.total_steps}, {self._facts(steps)}")

    def _line(self, text: str) -> None:
        elapsed = format_seconds(time.monotonic() - self.began)
        self.ui.err.print(Text(f"[{elapsed:>9}] {text}", style="dim"), soft_wrap=True)

    def _facts(self, steps: list[dict[str, Any]]) -> str:
        latest = steps[-1]
        recent = [row["seconds"] for row in steps[-8:]]
        left = (self.total_steps - latest["step"]) * sum(recent) / len(recent)
        facts = [f"loss {latest['loss']:.3f}"]
        if latest.get("tokens_per_second"):
            facts.append(f"{latest['tokens_per_second']:,.0f} tokens/s")
        if latest.get("allocated_bytes"):
            facts.append(format_bytes(latest["allocated_bytes"]))
        facts.append(f"{format_seconds(left)} left")
        return ", ".join(facts)


def _said_rows(status: dict[str, Any]) -> str:
    """How far the reading of the data is, where that takes long."""
    return f"{status['rows']:,} of {status['of_rows']:,} rows" if "rows" in status else ""


def with_progress(
    ui: Ui,
    items: Iterator[T],
    count: int,
    what: str,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """The items as they come. On stderr, once it takes long: a bar in a terminal, else lines."""
    began, next_line = clock(), 0
    bar: Progress | None = None
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if done == count or clock() - began < _PATIENCE_SECONDS:
                continue
            if ui.err.is_terminal:
                bar = bar or _started_bar(ui, count, what)
                bar.update(TaskID(0), completed=done)
            elif done >= next_line:
                next_line = done + max(1, count // _QUIET_LINES)
                ui.say(f"{done} of {count} {what}")
    finally:
        if bar:
            bar.stop()


def _started_bar(ui: Ui, count: int, what: str) -> Progress:
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn(what))
    bar = Progress(*columns, console=ui.err, transient=True)
    bar.add_task(what, total=count)
    bar.start()
    return bar
