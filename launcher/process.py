"""Starts the training process, watches it, and ends it well.

The child runs in a session of its own, so that Ctrl-C reaches the launcher only; the launcher
asks the training process to stop, which writes a checkpoint first. A second Ctrl-C kills.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftplan.launcher.run_dir import RunDir
from ftplan.planner.errors import InterruptedRunError, RunFailedError

_POLL_SECONDS = 0.25

Watch = Callable[[dict[str, Any], list[dict[str, Any]]], None]


@dataclass(frozen=True, slots=True)
class _Asked:
    """How often the run was asked to stop."""

    times: int = 0


def run_to_end(
    run: RunDir, command: list[str], environment: Mapping[str, str], watch: Watch
) -> None:
    """Run the command until it ends; `watch` sees status and metric rows as they change.

    Raises RunFailedError with the process's last words, InterruptedRunError after Ctrl-C.
    """
    run.status.unlink(missing_ok=True)
    with run.stdout.open("a") as out, run.stderr.open("a") as err:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=dict(environment),
            start_new_session=True,
        )
        asked = _Asked()
        while True:
            try:
                _watch_until_exit(run, child, watch)
                break
            except KeyboardInterrupt:
                asked = _Asked(asked.times + 1)
                _ask_to_stop(run, child, kill=asked.times > 1)
        watch(run.read_status(), list(run.metric_rows()))
    if asked.times:
        raise interrupted(run)
    if child.returncode != 0 or not run.finished:
        raise failed(run, child.returncode)


def _watch_until_exit(run: RunDir, child: subprocess.Popen[bytes], watch: Watch) -> None:
    while child.poll() is None:
        watch(run.read_status(), list(run.metric_rows()))
        time.sleep(_POLL_SECONDS)


def _ask_to_stop(run: RunDir, child: subprocess.Popen[bytes], *, kill: bool) -> None:
    """SIGINT to the training process; to the whole session where it has not started yet."""
    try:
        if kill:
            os.killpg(child.pid, signal.SIGKILL)
            return
        pid = run.read_status().get("pid")
        if isinstance(pid, int):
            os.kill(pid, signal.SIGINT)
        else:
            os.killpg(child.pid, signal.SIGTERM)
    except ProcessLookupError:
        return  # it ended by itself in the meantime


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


def failed(run: RunDir, returncode: int) -> RunFailedError:
    """The process's own error, and what to do about it."""
    said = last_words(run.stderr)
    if returncode < 0 or "SIGKILL" in said:
        hint = "the system killed it, most often for lack of RAM: try a smaller model or batch"
    elif "out of memory" in said.lower():
        hint = (
            "plan again with `--per-device-train-batch-size 1 --gradient-checkpointing yes`, "
            "or a shorter `--max-length`"
        )
    else:
        hint = f"the whole output is in {run.stderr}"
    return RunFailedError(f"training failed: {said or f'exit status {returncode}'}", hint)


def last_words(stderr: Path, limit: int = 300) -> str:
    """The last line of the log that looks like an error; accelerate's own wrapping left out."""
    try:
        lines = stderr.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    telling = [
        line.strip()
        for line in lines
        if line.startswith("error: ")
        or (line[:1].isalpha() and "Error" in line.split(":")[0] and "CalledProcess" not in line)
    ]
    return telling[-1].removeprefix("error: ")[:limit] if telling else ""
