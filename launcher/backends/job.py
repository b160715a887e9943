"""What an engine is asked to carry out, and what ftplan asks of an engine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from msgspec import Struct

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import UnknownNameError

JobState = Literal["pending", "running", "finished", "failed", "cancelled", "requeued", "unknown"]

# States in which there is nothing left to cancel or to wait for.
ENDED_STATES: tuple[JobState, ...] = ("finished", "failed", "cancelled")

# What the engine's shell sets in each machine's part of the job, and `Job.command` uses.
MACHINE_RANK = "FTPLAN_MACHINE_RANK"
NUM_MACHINES = "FTPLAN_NUM_MACHINES"
MAIN_ADDRESS = "FTPLAN_MAIN_ADDRESS"
MAIN_PORT = "FTPLAN_MAIN_PORT"

# How long training is left between SIGTERM and SIGKILL (docs/recovery.md).
GRACE_SECONDS = "FTPLAN_GRACE_SECONDS"

_OWN_VARIABLE = re.compile(r"(\$FTPLAN_[A-Z_]+)")


class Job(Struct, frozen=True, kw_only=True):
    """A run as an engine sees it: what it needs, and the command of each machine.

    `name`: of the run, safe as a file name. `run`: on a file system that all machines see.
    `gpus_per_machine`: 0 for processors. `gpu`: the catalog's name. `host_ram_bytes`: per machine.
    `seconds`: predicted, of the whole run. `environment`: what ftplan sets in each training
    process. `command`: of one machine; words with $FTPLAN_MACHINE_RANK, $FTPLAN_NUM_MACHINES,
    $FTPLAN_MAIN_ADDRESS and $FTPLAN_MAIN_PORT are filled in by the engine's shell (`shell_line`).
    `grace_seconds`: between SIGTERM and SIGKILL. `options`: of the engine, such as its partition.
    """

    name: str
    run: RunDir
    num_machines: int
    gpus_per_machine: int
    gpu: str | None
    cpus_per_machine: int | None
    host_ram_bytes: int
    disk_bytes: int
    seconds: float | None
    environment: Mapping[str, str]
    command: tuple[str, ...]
    grace_seconds: int
    options: Mapping[str, str]


class Backend(Protocol):
    """An engine. `options`: what `--backend-option NAME=VALUE` takes, and what each is.
    `saves_on_cancel`: it leaves training the time for a checkpoint.

    All raise InputError where the engine's client is missing or refuses.
    """

    name: str
    saves_on_cancel: bool
    options: Mapping[str, str]

    def files(self, job: Job) -> dict[str, str]:
        """Files of the run directory that the engine reads: name -> text. Touches nothing."""
        ...

    def submit(self, ui: Ui, job: Job) -> str:
        """Write the files and hand them to the engine's own client; returns the job's id."""
        ...

    def state(self, job_id: str) -> JobState:
        """What the engine says of it now; `unknown` where it has forgotten or cannot be asked."""
        ...

    def cancel(self, job_id: str) -> None:
        """End it. Training gets SIGTERM first, as the engine leaves it time."""
        ...


def check_options(backend: Backend, names: Iterable[str]) -> None:
    """Raises UnknownNameError for an option that the engine does not take."""
    for name in names:
        if name not in backend.options:
            known = ", ".join(f"`{known}`" for known in backend.options)
            said = f"`--backend {backend.name}` takes {known}."
            raise UnknownNameError("option", name, backend.options, said)


def shell_line(command: Iterable[str]) -> str:
    """The command for a shell: all is quoted, and only ftplan's own variables are filled in."""
    return " ".join(_shell_word(word) for word in command)


def _shell_word(word: str) -> str:
    parts = _OWN_VARIABLE.split(word)
    if len(parts) == 1:
        return shlex.quote(word)
    return "".join(_quoted_part(part) for part in parts if part)


def _quoted_part(part: str) -> str:
    return f'"{part}"' if _OWN_VARIABLE.fullmatch(part) else shlex.quote(part)
