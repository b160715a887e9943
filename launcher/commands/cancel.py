"""`ftplan cancel RUN`: a run that goes on is asked to end, by a signal or by the engine that has
it; what is left of it is told."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import structs

from ftplan.launcher import processes, runs_views
from ftplan.launcher.backends.job import ENDED_STATES
from ftplan.launcher.backends.jobs import HandedOver, backend_of, handed_over, job_state
from ftplan.launcher.live import newest_checkpoint
from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.launcher.run_states import find_run, summary_of
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError

# Of a run of this machine: a step and a checkpoint of the models that fit on one.
_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="its name or folder")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs are (runs)"
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    path = find_run(arguments.run, arguments.runs_dir)
    shown = summary_of(path)
    going = [part.path for part in shown.stages if part.state == "running"]
    run_dir = open_run(going[0] if going else path)
    if run_dir.finished:
        raise InputError(f"`{path}` has finished", "there is nothing to cancel")
    handed = handed_over(run_dir)
    if handed is not None and (state := job_state(handed)) not in ENDED_STATES:
        backend_of(handed.backend).cancel(handed.id)
        ended = _told_of_job(ui, handed, state)
    else:
        ended = _end_here(ui, run_dir, handed)
    checkpoint = newest_checkpoint(run_dir)
    ui.json(
        {
            "schema": 1,
            "run_dir": str(path),
            "job": handed.said if handed else None,
            "ended": ended,
            "checkpoint": checkpoint,
        }
    )
    again = runs_views.go_on(
        structs.replace(shown, job=handed and handed.said, checkpoint=checkpoint)
    )
    ui.show_lines([_left(checkpoint, ended=ended), *(f"{what}  {line}" for what, line in again)])
    return 0


def _left(checkpoint: str | None, *, ended: bool) -> str:
    so_far = "" if ended else " so far"
    return f"{checkpoint} is saved{so_far}" if checkpoint else f"there is no checkpoint{so_far}"


def _told_of_job(ui: Ui, handed: HandedOver, state: str) -> bool:
    """Whether nothing of it is left."""
    if state in ("pending", "requeued"):
        ui.say(f"{handed.said} was {state} and is cancelled")
        return True
    if backend_of(handed.backend).saves_on_cancel:
        ui.say(f"{handed.said} is asked to end; training saves a checkpoint first")
    else:
        ui.say(
            f"{handed.said} is asked to end; {handed.backend} does not wait for a checkpoint, what "
            "came after the last one is lost"
        )
    return False


def _end_here(ui: Ui, run: RunDir, handed: HandedOver | None) -> bool:
    """SIGTERM to the process that trains or is about to; returns whether it has gone."""
    status = run.read_status()
    told = status.get("process") or status.get("launcher")
    if not isinstance(told, Mapping):
        raise InputError(
            f"`{run.root}` does not go on", f"`ftplan runs show {run.quoted}` shows it"
        )
    if not processes.is_here(told):
        raise InputError(
            f"`{run.root}` is of another machine: process {told.get('pid')} on {told.get('host')}",
            f"if it still goes on, end it there with `kill {told.get('pid')}`",
        )
    if not processes.lives(told):
        ending = f", nor does {handed.said}" if handed else ""
        raise InputError(
            f"`{run.root}` does not go on{ending}", f"`ftplan runs show {run.quoted}` shows it"
        )
    os.kill(int(told["pid"]), signal.SIGTERM)
    ui.say("asked to end; training saves a checkpoint first")
    return _has_gone(told)


def _has_gone(told: Mapping[str, Any]) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while processes.lives(told) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return not processes.lives(told)
