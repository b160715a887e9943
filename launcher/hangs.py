"""A run that hangs: seen by the launcher, told with the stack of every rank.

Every training process writes its stack into a file of the run directory when it gets SIGUSR1. The
launcher asks all of them once nothing has moved for far longer than work takes (`planner.hangs`),
and goes on waiting: whether to end the run is for the person to say.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.ui import Ui
from ftplan.planner.hangs import patience_seconds
from ftplan.planner.units import format_seconds

# How often signs of life are looked for.
_LOOK_SECONDS = 2.0

# How long a process gets to write its stack.
_ANSWER_SECONDS = 3.0

_FRAMES_SHOWN = 4

_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.+)$')
_HEADING = re.compile(r"^rank (\d+), process (\d+)$")


class Frame(Struct, frozen=True):
    """One line of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


class RankStack(Struct, frozen=True):
    """What a rank's main thread is in, the innermost call first; no frames if it is silent."""

    rank: int
    pid: int
    frames: tuple[Frame, ...]

    def __str__(self) -> str:
        if not self.frames:
            return f"rank {self.rank} (process {self.pid}) does not answer"
        inner = " < ".join(map(str, self.frames[:_FRAMES_SHOWN]))
        return f"rank {self.rank} (process {self.pid}) is in {inner}"


def write_stack_when_asked(run: RunDir) -> None:
    """In a training process, before anything that may hang."""
    rank = os.environ.get("RANK", "0")
    run.stacks.mkdir(exist_ok=True)
    # Open for as long as the process lives.
    file = (run.stacks / f"rank-{rank}.txt").open("w", encoding="utf-8")
    file.write(f"rank {rank}, process {os.getpid()}\n")
    file.flush()
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def forget_stacks(run: RunDir) -> None:
    """Of an earlier attempt: its processes are gone, and others may have their numbers."""
    shutil.rmtree(run.stacks, ignore_errors=True)


def ask_for_stacks(run: RunDir, answer_seconds: float = _ANSWER_SECONDS) -> list[RankStack]:
    """The stacks of all ranks that live. Call it only while the run goes on."""
    asked = {}
    for path in sorted(run.stacks.glob("rank-*.txt")):
        heading = _HEADING.match(
            path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        )
        if heading and _signalled(int(heading[2])):
            asked[path] = (int(heading[1]), int(heading[2]), path.stat().st_size)
    deadline = time.monotonic() + answer_seconds
    while time.monotonic() < deadline and any(
        path.stat().st_size <= size for path, (_, _, size) in asked.items()
    ):
        time.sleep(0.05)
    time.sleep(0.05)  # a stack is written in several pieces
    return [
        RankStack(rank, pid, tuple(_frames(path, size)))
        for path, (rank, pid, size) in sorted(asked.items(), key=lambda one: one[1])
    ]


def _signalled(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGUSR1)
        return True
    return False


def _frames(path: Path, start: int) -> Iterator[Frame]:
    """Of the main thread, which stands last."""
    text = path.read_bytes()[start:].decode("utf-8", errors="replace")
    last = re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[-1]
    for line in last.splitlines():
        if found := _FRAME.match(line):
            yield Frame(found[1], int(found[2]), found[3])


class HangWatch:
    """Looks at a run as it goes on; `update` is called many times a second."""

    def __init__(
        self,
        ui: Ui,
        run: RunDir,
        predicted_step_seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ui = ui
        self._run = run
        self._predicted = predicted_step_seconds
        self._clock = clock
        self._signs: Any = None
        self._moved = clock()
        self._next_look = 0.0
        self._earlier_rows: int | None = None
        self._told_after = 0.0  # seconds of silence; 0 as long as nothing was told

    def update(self, status: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes in status and metric rows, and tells of a hang: again whenever the silence has
        doubled, and when it is over."""
        now = self._clock()
        if self._earlier_rows is None:
            self._earlier_rows = len(rows)
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        stage = str(status.get("stage", ""))
        signs = (len(rows), *self._written(status, stage))
        if signs != self._signs:
            if self._told_after:
                self._ui.say(f"the run goes on, after {format_seconds(now - self._moved)}")
            self._signs, self._moved, self._told_after = signs, now, 0.0
            return
        silent = now - self._moved
        measured = [row["seconds"] for row in rows[self._earlier_rows :] if "step" in row]
        if silent > max(patience_seconds(stage, self._predicted, measured), 2 * self._told_after):
            self._told_after = silent
            self._tell(stage, silent, measured)

    def _written(self, status: Mapping[str, Any], stage: str) -> tuple[Any, ...]:
        """What else shows that work goes on: the status and its time, bytes of checkpoints, and
        outside of training those that the process reads and writes. In training, threads of
        libraries that report to somebody read and write even where it hangs."""
        size = sum(_size(path) for path in self._run.checkpoints.rglob("*"))
        moved = 0 if stage == "training" else _bytes_moved(status.get("pid"))
        return dict(status), _time_of(self._run.status), size, moved

    def _tell(self, stage: str, silent: float, measured: Sequence[float]) -> None:
        usual = f"; a step takes {format_seconds(statistics.median(measured))}" if measured else ""
        doing = f" (`{stage}`)" if stage else ""
        self._ui.warn(f"the run seems to hang{doing}: nothing for {format_seconds(silent)}{usual}")
        for stack in ask_for_stacks(self._run):
            self._ui.warn(str(stack))
        self._ui.say(
            f"whole stacks: {self._run.stacks}. ftplan goes on waiting; Ctrl-C stops the run"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it has just been renamed
        return 0


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _bytes_moved(pid: Any) -> int:
    """Bytes that a process has read and written so far (Linux); 0 elsewhere."""
    try:
        lines = Path(f"/proc/{int(pid)}/io").read_text().splitlines()
    except (OSError, TypeError, ValueError):
        return 0
    counts = dict(line.split(": ") for line in lines)
    return int(counts["rchar"]) + int(counts["wchar"])
