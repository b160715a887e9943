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

from ftplan.launcher.metrics_tail import MetricsTail
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

Watch = Callable[[dict[str, Any], list[dict[str, Any]]], None]


class _Request(Struct):
    """What the person wants of the run, and what the run has been told of it."""

    wanted: int = _GO_ON
    told: int = _GO_ON

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Only Ctrl-C asks twice: a closed terminal may well send two SIGHUP."""
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
    _tell(run, stage="starting", launcher=named_process())
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
    if child.returncode == 0 and run.finished:
        return
    if request.wanted or run.read_status().get("stage") == "interrupted":
        _tell(run, stage="interrupted")
        raise interrupted(run)
    error = failed(run, child.returncode, log_start)
    _tell(run, stage="failed", error=error.message)
    raise error


def _tell(run: RunDir, **told: Any) -> None:
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
    while child.poll() is None:
        if request.told < request.wanted:
            request.told = request.wanted
            _end(run, child, kill=request.wanted == _KILL)
        watch(run.read_status(), metrics.rows())
        time.sleep(_POLL_SECONDS)
    watch(run.read_status(), metrics.rows())


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


def interrupted(run: RunDir) -> InterruptedRunError:
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        return InterruptedRunError(
            "interrupted before the first checkpoint",
            f"start again with `ftplan launch {run.root}`",
        )
    return InterruptedRunError(
        f"interrupted; {checkpoint.name} is saved", f"go on with `ftplan resume {run.root}`"
    )


def failed(run: RunDir, returncode: int, log_start: int = 0) -> RunFailedError:
    """The process's own error, and what to do about it. Its log begins at byte `log_start`."""
    said = last_words(run.stderr, log_start)
    died_by = _DIED_BY.findall(_read_log(run.stderr, log_start))
    hint = f"the whole output is in {run.stderr}"
    if not said and (returncode == -signal.SIGKILL or "SIGKILL" in died_by):
        said = "the process was killed"
        hint = "the system does so most often for lack of RAM: try a smaller model or batch"
    elif "out of memory" in said.lower():
        hint = (
            "plan again with `--per-device-train-batch-size 1 --gradient-checkpointing yes`, "
            "or a shorter `--max-length`"
        )
    end = f"died by {died_by[0]}" if died_by else f"exit status {returncode}"
    return RunFailedError(f"training failed: {said or end}", hint)


def last_words(stderr: Path, log_start: int = 0, limit: int = 300) -> str:
    """The last line of the log that looks like an error; the launchers' own wrapping left out."""
    lines = (_RANK.sub("", line) for line in _read_log(stderr, log_start).splitlines())
    telling = [line.strip() for line in lines if _tells_an_error(line)]
    return telling[-1].removeprefix("error: ")[:limit] if telling else ""


def _tells_an_error(line: str) -> bool:
    kind = line.split(":")[0]
    wrapper = kind.endswith(_WRAPPERS)
    return line.startswith("error: ") or (line[:1].isalpha() and "Error" in kind and not wrapper)


def _read_log(stderr: Path, start: int) -> str:
    try:
        return stderr.read_bytes()[start:].decode("utf-8", errors="replace")
    except OSError:
        return ""
