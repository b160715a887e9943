"""The job that a run was handed over as: kept in its `job.json`, and asked for its state."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any, cast

from msgspec import Struct, ValidationError, convert, structs

from ftplan.launcher import processes
from ftplan.launcher.backends import BACKENDS
from ftplan.launcher.backends.job import ENDED_STATES, Backend, Job, JobState, check_options
from ftplan.launcher.run_dir import RunDir, read_mapping, write_json
from ftplan.launcher.run_states import RunSummary
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError, UnknownNameError

LOCAL = "local"


class HandedOver(Struct, frozen=True, kw_only=True):
    """What job.json says. `backend`: a name of BACKENDS. `files`: those that the engine reads.
    `options`: of the engine, as given."""

    backend: str
    id: str
    submitted_at: str
    files: tuple[str, ...] = ()
    options: dict[str, str] = {}

    @property
    def said(self) -> str:
        return f"{self.backend} job {self.id}"


def backend_of(name: str) -> Backend:
    """Raises UnknownNameError for an engine that is not known."""
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, [LOCAL, *BACKENDS])
    return cast(Backend, importlib.import_module(BACKENDS[name]).Backend())


def options_of(backend: Backend, given: list[str]) -> dict[str, str]:
    """`--backend-option NAME=VALUE`, as often as given. Raises InputError."""
    options = {}
    for word in given:
        name, separator, value = word.partition("=")
        if not separator:
            raise InputError(
                f"`--backend-option {word}` has no value", f"write it `{name or 'NAME'}=VALUE`"
            )
        options[name] = value
    check_options(backend, options)
    return options


def options_before(run: RunDir, backend: Backend) -> dict[str, str]:
    """With which the run was handed to this engine the last time, but for those of that time."""
    handed = handed_over(run)
    if handed is None or handed.backend != backend.name:
        return {}
    once = getattr(backend, "once", ())
    return {name: value for name, value in handed.options.items() if name not in once}


def hand_over(ui: Ui, backend: Backend, job: Job) -> HandedOver:
    """Submit the job and remember it in the run directory. Raises InputError where the engine's
    client is missing or refuses."""
    job_id = backend.submit(ui, job)
    handed = HandedOver(
        backend=backend.name,
        id=job_id,
        submitted_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        files=tuple(backend.files(job)),
        options=dict(job.options),
    )
    write_json(job.run.job, {"schema": 1, **structs.asdict(handed)})
    return handed


def handed_over(run: RunDir) -> HandedOver | None:
    """None of a run that was not handed over. Raises InputError where job.json is damaged, or is
    of an engine that is not known here."""
    if not run.job.is_file():
        return None
    told = read_mapping(run.job)
    try:
        handed = convert(told, HandedOver)
    except ValidationError as error:
        raise InputError(f"`{run.job}` is damaged: {error}", "remove it") from error
    if handed.backend not in BACKENDS:
        raise InputError(
            f"`{run.job}` is of an engine that is not known here: `{handed.backend}`",
            "update ftplan, or remove it",
        )
    return handed


def job_state(handed: HandedOver) -> JobState:
    """What the engine says now; `unknown` where it cannot be asked from here."""
    return backend_of(handed.backend).state(handed.id)


def check_no_job(run: RunDir) -> None:
    """Raises InputError where an engine still has the run: two would train in one directory."""
    if run.finished or (handed := handed_over(run)) is None:
        return
    state = job_state(handed)
    if state not in (*ENDED_STATES, "unknown"):
        raise InputError(
            f"`{run.root}` was handed over as {handed.said}, which is {state}",
            f"`ftplan cancel {run.quoted}` ends it; `ftplan runs show {run.quoted}` shows it",
        )


def with_job(summary: RunSummary) -> RunSummary:
    """What the engine says of a run that has not begun, or whose machine is another one; others
    are told from here, as are finished ones."""
    run = RunDir(summary.path)
    try:
        handed = handed_over(run)
    except InputError:
        handed = None
    if handed is None:
        return summary
    summary = structs.replace(summary, job=handed.said)
    if run.finished or _is_seen_here(run.read_status()):
        return summary
    state = job_state(handed)
    if state in ("pending", "requeued"):
        return structs.replace(summary, state="pending")
    if state == "running":
        return structs.replace(summary, state="running", stage=summary.stage or "starting")
    begun = summary.state in ("running", "stale")
    if state == "finished" and (begun or summary.state == "not started"):
        where = _kept_at(handed, run)
        why = f"{handed.said} has finished" + (f"; its results are in {where}" if where else "")
        return structs.replace(summary, state="finished", why=why)
    if state == "failed" and (begun or summary.state == "not started"):
        why = f"{handed.said} has failed: see {run.stderr}"
        return structs.replace(summary, state="failed", why=why)
    return (
        structs.replace(summary, state="interrupted")
        if begun and state in ENDED_STATES
        else summary
    )


def _kept_at(handed: HandedOver, run: RunDir) -> str | None:
    """Where an engine keeps a run that is not in this file system; None where it does not say."""
    if bucket := handed.options.get("bucket"):
        return f"{bucket.rstrip('/')}/{run.root.name}"
    volume = handed.options.get("volume")
    return f"the volume {volume}" if volume else None


def _is_seen_here(status: Mapping[str, Any]) -> bool:
    """Whether the process that a status names runs on this machine."""
    told = status.get("process")
    return isinstance(told, Mapping) and processes.is_here(told) and processes.lives(told)
