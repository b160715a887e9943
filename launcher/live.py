"""What is shown while a run goes on: a view that is replaced in a terminal, quiet lines
elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from ftplan.launcher.gpu_samples import Sample
from ftplan.launcher.live_view import (
    Watched,
    printable,
    said_events,
    said_rows,
    seconds_left,
    step_rows,
    view,
)
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.screen import Screen
from ftplan.launcher.ui import Ui
from ftplan.planner.units import format_bytes, format_seconds

T = TypeVar("T")

_QUIET_LINES = 10

# Work that is over sooner shows no progress.
_PATIENCE_SECONDS = 2


class LiveView(AbstractContextManager["LiveView"]):
    """Follows a run's status and metrics. Shows on stderr, so that stdout stays data.

    `name`, `predicted` and `run` are what a terminal shows besides: the run's name, the figures of
    its plan, and where its checkpoints are. `sampled` is told the step and gives the latest sample.
    `resumes`: what happened before it began has been told already.
    """

    def __init__(
        self,
        ui: Ui,
        total_steps: int,
        *,
        name: str = "",
        predicted: Mapping[str, Any] | None = None,
        run: RunDir | None = None,
        sampled: Callable[[int], Sample | None] = lambda step: None,
        elapsed_seconds: float = 0.0,
        resumes: bool = False,
    ) -> None:
        self.ui = ui
        self.total_steps = total_steps
        self.name, self.predicted, self.run = name, predicted or {}, run
        self.sampled = sampled
        self.stage = ""
        self.last_step = 0
        self.rows = 0  # a quiet line tells of more only
        self.resumes = resumes
        self.told: int | None = None  # events so far
        self.told_notices = 0
        self.began = time.monotonic() - elapsed_seconds
        self.screen = Screen(ui.err) if ui.err.is_terminal and not ui.err.is_dumb_terminal else None

    def __enter__(self) -> LiveView:
        if self.screen:
            self.screen.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.screen:
            self.screen.__exit__(kind, value, traceback)

    def update(self, status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Take in the latest status and metric rows."""
        self._tell_events(status, rows)
        steps = step_rows(rows)
        sample = self.sampled(steps[-1]["step"] if steps else 0)
        if self.screen:
            watched = self._watched(status, rows, sample)
            self.screen.paint(view(watched, *self.screen.size))
        else:
            self._tell(status, rows, steps)

    def _watched(
        self, status: dict[str, Any], rows: list[dict[str, Any]], sample: Sample | None
    ) -> Watched:
        return Watched(
            name=self.name,
            total_steps=self.total_steps,
            predicted=self.predicted,
            status=status,
            rows=rows,
            sample=sample,
            elapsed_seconds=time.monotonic() - self.began,
            checkpoint=newest_checkpoint(self.run) if self.run else None,
            ascii_only=self.ui.err.options.ascii_only,
        )

    def _tell(
        self,
        status: dict[str, Any],
        rows: list[dict[str, Any]],
        steps: Sequence[Mapping[str, Any]],
    ) -> None:
        """Quiet lines: every stage and event, and steps about ten times."""
        stage = str(status.get("stage", "starting"))
        latest = steps[-1] if steps else None
        if stage != self.stage:
            self.stage, self.rows = stage, 0
            self._line(stage)
        if status.get("rows", 0) > self.rows:
            self.rows = status["rows"] + status["of_rows"] // _QUIET_LINES
            self._line(f"{stage}: {said_rows(status)}")
        every = max(1, self.total_steps // _QUIET_LINES)
        if latest and latest["step"] >= self.last_step + every:
            self.last_step = latest["step"]
            self._line(f"step {latest['step']}/{self.total_steps}, {self._facts(steps)}")

    def _tell_events(self, status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """What happened, a line each: in a terminal above the view, where it stays."""
        events = said_events(rows)
        if self.told is None:
            self.told = len(events) if self.resumes else 0
        for event in events[self.told :]:
            self._line(event)
        self.told = len(events)
        notices = status.get("notices", [])
        for notice in notices[self.told_notices :]:
            self.ui.warn(printable(str(notice)))
        self.told_notices = len(notices)

    def _line(self, text: str) -> None:
        elapsed = format_seconds(time.monotonic() - self.began)
        self.ui.err.print(Text(f"[{elapsed:>9}] {text}", style="dim"), soft_wrap=True)

    def _facts(self, steps: Sequence[Mapping[str, Any]]) -> str:
        latest = steps[-1]
        facts = [f"loss {latest['loss']:.3f}"]
        if latest.get("tokens_per_second"):
            facts.append(f"{latest['tokens_per_second']:,.0f} tokens/s")
        if latest.get("allocated_bytes"):
            facts.append(format_bytes(latest["allocated_bytes"]))
        facts.append(f"{format_seconds(seconds_left(steps, self.total_steps))} left")
        return ", ".join(facts)


def newest_checkpoint(run: RunDir) -> str | None:
    """The name of the checkpoint of the highest step; None without any. Opens none of them."""
    steps = [
        int(step)
        for path in run.checkpoints.glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdecimal()
    ]
    return f"checkpoint-{max(steps)}" if steps else None


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
