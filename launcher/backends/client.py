"""The engines' own clients, called as a person would call them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from ftplan.launcher.backends.job import Job
from ftplan.launcher.masking import names_a_secret
from ftplan.planner.errors import InputError

# A client that starts a server of its own first (SkyPilot) takes a minute; the upload of inputs
# with it may take longer.
_TIMEOUT_SECONDS = 1800.0

# Whole lines of a client's answer that are shown where it refuses.
_SHOWN_CHARACTERS = 400


def call(command: Sequence[str], *, install: str, advice: str = "") -> str:
    """What the client prints. Raises InputError where it is not installed, with how to `install`
    it, or refuses, with what it says and the `advice`."""
    if shutil.which(command[0]) is None:
        raise InputError(f"`{command[0]}` is not installed here", install)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"`{shlex.join(command)}` failed: {error}") from error
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise InputError(
            f"`{shlex.join(command[:3])}` failed: {said[-_SHOWN_CHARACTERS:] or done.returncode}",
            advice or f"try it yourself: `{shlex.join(command)}`",
        )
    return done.stdout


def checked_id(job_id: str, pattern: str) -> str:
    """The id, as the engine gives them; raises InputError for another: job.json may come from
    somebody else, and a client would take `--option` for one of its own."""
    if not re.fullmatch(pattern, job_id):
        raise InputError(
            f"`{job_id}` is not the id of a job", "job.json of the run directory is damaged"
        )
    return job_id


def plain_environment(job: Job) -> dict[str, str]:
    """What ftplan sets, which goes into files. Raises InputError for what looks like a secret."""
    for name in job.environment:
        if names_a_secret(name):
            raise InputError(
                f"`{name}` is not written into the engine's files, which others may read",
                "name it with `--backend-option secret-env=...`, where the engine keeps secrets",
            )
    return dict(job.environment)


def names(text: str) -> list[str]:
    """Of an option that names several things, as in `HF_TOKEN,WANDB_API_KEY`."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def variable_names(job: Job) -> list[str]:
    """Of the option `secret-env`. Raises InputError for what cannot be a variable's name."""
    found = names(job.options.get("secret-env", ""))
    for name in found:
        if not name.isidentifier() or not name.isascii():
            shown = name.split("=")[0]
            raise InputError(
                f"`secret-env` takes names of environment variables, not `{shown}...`",
                "for example `--backend-option secret-env=HF_TOKEN`; values stay where they are",
            )
    return found


def set_here(variables: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Raises InputError where one of the variables, whose values the client passes on, is not
    set."""
    for name in variables:
        if not environ.get(name):
            raise InputError(f"`{name}` is not set here", f"`export {name}=...`, then launch again")


def whole_number(job: Job, option: str, default: int | None = None) -> int | None:
    """The value of an option that is a number; raises InputError for another."""
    text = job.options.get(option)
    if text is None:
        return default
    if not text.isdecimal():
        raise InputError(f"`--backend-option {option}` takes a whole number, not `{text}`")
    return int(text)


def yes_or_no(job: Job, option: str, *, default: bool) -> bool:
    """The value of an option that is switched; raises InputError for another."""
    text = job.options.get(option, "yes" if default else "no").lower()
    if text not in ("yes", "no", "true", "false"):
        raise InputError(f"`--backend-option {option}` takes yes or no, not `{text}`")
    return text in ("yes", "true")
