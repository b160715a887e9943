"""Starts the training process, watches it, and ends it well.

The child runs in a session of its own, so that Ctrl-C reaches the launcher only; the launcher
asks the training process to stop, which writes a checkpoint first. A second Ctrl-C kills. The
launcher never ends before the run does: a batch system's SIGTERM and a closed terminal's SIGHUP
count as Ctrl-C, and where watching fails, the run is asked to stop first.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from msgspec import Struct

from ftplan.launcher.hangs import forget_stacks
from ftplan.launcher.masking import mask_files, secrets_of
from ftplan.launcher.metrics_tail import MetricsTail
from ftplan.launcher.oom_kills import oom_kills
from ftplan.launcher.processes import descendants, named_process
from ftplan.launcher.run_dir import RunDir, write_json
from ftplan.planner.errors import InterruptedRunError, RunFailedError

_POLL_SECONDS = 0.25

_GO_ON, _STOP, _KILL = range(3)

# What torch writes before every line of a traceback on several GPUs.
_RANK = re.compile(r"^\[rank\d+\]: ")

# How accelerate and torchrun report the failure of a child, and its death by a signal.
_WRAPPERS = ("CalledProcessError", "ChildFailedError")
_DIED_BY = re.compile(r"(?:died with <Signals\.|Signal \d+ \()(SIG\w+)")

# torchrun's report of the process that failed first.
_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):\n.*?\n\s*rank\s*: (?P<rank>\d+) .*?\n"
    r"\s*exitcode\s*: -?\d+ \(pid: \d+\)(?:\s*\((?P<signal>SIG\w+)\))?",
    re.DOTALL,
)

Watch = Callable[[dict[str, Any], list[dict[str, Any]]], None]


def watched_by(*watches: Watch) -> Watch:
    """All of them, in turn."""

    def watch(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        for each in watches:
            each(status, rows)

    return watch


class _Request(Struct):
    """What the person wants of the run, and what the run has been told of it."""

    wanted: int = _GO_ON
    told: int = _GO_ON
    number: int | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Only Ctrl-C asks twice: a closed terminal may well send two SIGHUP."""
        self.number = self.number or number
        again = number == signal.SIGINT and self.wanted >= _STOP
        self.wanted = _KILL if again else max(self.wanted, _STOP)


def run_to_end(
    run: RunDir, command: list[str], environment: Mapping[str, str], watch: Watch
) -> None:
    """Run the command until it ends; `watch` sees status and metric rows as they change.

    Raises RunFailedError with the process's last words, InterruptedRunError after Ctrl-C. A run
    that was asked in its last moment and finished all the same is finished.
    """
    run.status.unlink(missing_ok=True)
    forget_stacks(run)
    kills_before = oom_kills()
    tell(run, stage="starting", launcher=named_process())
    log_start = run.stderr.stat().st_size if run.stderr.exists() else 0
    with _signals_as_request() as request, run.stdout.open("a") as out, run.stderr.open("a") as err:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            _until_exit(run, child, request, watch)
        except BaseException:
            request.wanted = max(request.wanted, _STOP)
            _until_exit(run, child, request, lambda status, rows: None)
            raise
    mask_files(run, secrets_of(environment))
    if child.returncode == 0 and run.finished:
        return
    if request.wanted or run.read_status().get("stage") == "interrupted":
        tell(run, stage="interrupted")
        raise interrupted(run, request.number)
    error = failed(run, child.returncode, log_start, kills_before)
    tell(run, stage="failed", error=error.message)
    raise error


def tell(run: RunDir, **told: Any) -> None:
    """Add to status.json, for those who watch from elsewhere; a full disk must not end the run."""
    with contextlib.suppress(OSError):
        write_json(run.status, {**run.read_status(), **told})


@contextlib.contextmanager
def _signals_as_request() -> Iterator[_Request]:
    """Note signals instead of raising KeyboardInterrupt, which could come at any line.

    What is ignored already, such as SIGHUP under nohup, stays so; and what is not Python's.
    """
    request = _Request()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    heeded = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
    for number in heeded:
        signal.signal(number, request.on_signal)
    try:
        yield request
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


def _until_exit(
    run: RunDir, child: subprocess.Popen[bytes], request: _Request, watch: Watch
) -> None:
    metrics = MetricsTail(run.metrics)
    while child.poll() is None or _outlives(run, child):
        if request.told < request.wanted:
            request.told = request.wanted
            _end(run, child, kill=request.wanted == _KILL)
        watch(run.read_status(), metrics.rows())
        time.sleep(_POLL_SECONDS)
    watch(run.read_status(), metrics.rows())


def _outlives(run: RunDir, child: subprocess.Popen[bytes]) -> bool:
    """Whether the training process goes on though what started it has been ended by a signal: a
    batch system sends SIGTERM to all, and only the training process has something to finish."""
    pid = run.read_status().get("pid")
    if child.returncode is None or child.returncode >= 0 or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, PermissionError):
        return False
    except OSError:
        return True  # no /proc, and it is there
    return state not in "ZX"


def _end(run: RunDir, child: subprocess.Popen[bytes], *, kill: bool) -> None:
    """SIGINT to the training process, to the whole session where that has not started yet; or
    SIGKILL to them all."""
    pid = run.read_status().get("pid")
    started = [pid] if isinstance(pid, int) else []
    if kill:
        for each in {child.pid, *started, *descendants(child.pid)}:
            _send(each, signal.SIGKILL)
    elif started:
        _send(started[0], signal.SIGINT)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.kill(pid, number)


def interrupted(run: RunDir, number: int | None = None) -> InterruptedRunError:
    """`number`: of the signal that the launcher got; None where training itself was stopped."""
    error = _interrupted(run)
    if number is not None:
        error.exit_status = 128 + number
    return error


def _interrupted(run: RunDir) -> InterruptedRunError:
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        return InterruptedRunError(
            "interrupted before the first checkpoint",
            f"start again with `ftplan launch {run.quoted}`",
        )
    return InterruptedRunError(
        f"interrupted; {checkpoint.name} is saved", f"go on with `ftplan resume {run.quoted}`"
    )


class _RootCause(Struct, frozen=True):
    """Which of several processes failed first, as torchrun reports it."""

    rank: int
    signal: str


def failed(
    run: RunDir, returncode: int, log_start: int = 0, kills_before: int | None = None
) -> RunFailedError:
    """The process's own error, and what to do about it. Its log begins at byte `log_start`.
    `kills_before`: for lack of memory, counted when it began."""
    log = _read_log(run.stderr, log_start)
    root = _root_cause(log)
    said = last_words(run.stderr, log_start, rank=root.rank if root else None)
    died_by = _DIED_BY.findall(log)
    hint = said_hint(run.stderr, log_start) or f"the whole output is in {run.stderr}"
    if root and root.signal:  # what the others say is that one has gone
        said = f"rank {root.rank} was ended by {root.signal}"
        resumable = run.last_checkpoint() is not None
        hint = f"go on with `ftplan resume {run.quoted}`" if resumable else hint
        if root.signal == "SIGKILL":
            hint = f"{_why_killed(kills_before)}; {hint}"
    elif not said and (returncode == -signal.SIGKILL or "SIGKILL" in died_by):
        said, hint = "the process was killed", _why_killed(kills_before)
    elif "out of memory" in said.lower():
        hint = "plan again with a shorter `--max-length`, a smaller model or a larger GPU"
    end = f"died by {died_by[0]}" if died_by else f"exit status {returncode}"
    return RunFailedError(f"training failed: {said or end}", hint)


def _why_killed(kills_before: int | None) -> str:
    kills = oom_kills()
    if kills is None or kills_before is None:
        return "the system does so most often for lack of RAM: try a smaller model or batch"
    if kills > kills_before:
        return "the system did so for lack of RAM, by its own count: try a smaller model or batch"
    return (
        "the system does so most often for lack of RAM, but its count of such kills has not risen: "
        "a person or a batch system may have done it"
    )


def _root_cause(log: str) -> _RootCause | None:
    found = _ROOT_CAUSE.search(log)
    return _RootCause(int(found["rank"]), found["signal"] or "") if found else None


def last_words(stderr: Path, log_start: int = 0, limit: int = 300, rank: int | None = None) -> str:
    """The last line of the log that looks like an error; the launchers' own wrapping left out. Of
    several ranks, where it said something, that of `rank`."""
    lines = _read_log(stderr, log_start).splitlines()
    own = [line for line in lines if line.startswith(f"[rank{rank}]: ")]
    for each in (own, lines):
        words = (_RANK.sub("", line) for line in each)
        if telling := [line.strip() for line in words if _tells_an_error(line)]:
            break
    return telling[-1].removeprefix("error: ")[:limit] if telling else ""


def said_hint(stderr: Path, log_start: int = 0) -> str:
    """What the training process itself advises beside its error; empty where it crashed."""
    lines = [_RANK.sub("", line) for line in _read_log(stderr, log_start).splitlines()]
    hints = [line for line in lines if line.startswith("hint: ")]
    return hints[-1].removeprefix("hint: ") if hints else ""


def _tells_an_error(line: str) -> bool:
    kind = line.split(":")[0]
    wrapper = kind.endswith(_WRAPPERS)
    return line.startswith("error: ") or (line[:1].isalpha() and "Error" in kind and not wrapper)


def _read_log(stderr: Path, start: int) -> str:
    try:
        return stderr.read_bytes()[start:].decode("utf-8", errors="replace")
    except OSError:
        return ""
