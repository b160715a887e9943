"""SkyPilot: a managed job, which is brought up anew wherever its machines are taken away
(docs/engines.md).

The task names the run directory by the path that it has here. There a bucket or a volume holds it:
what a lost machine had on its own disk is gone. The inputs go along as a mount of files and are
copied to where they are missing, so that a recovered job finds its checkpoints beside them.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftplan.launcher.backends import client, needs
from ftplan.launcher.backends.job import (
    MACHINE_RANK,
    MAIN_ADDRESS,
    MAIN_PORT,
    NUM_MACHINES,
    Job,
    JobState,
)
from ftplan.launcher.backends.yaml_text import yaml_text
from ftplan.launcher.run_dir import write_text
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.units import GIB
from ftplan.profiles import find_gpu, sky_accelerators

TASK = "sky.yaml"
INSTALL = "`pip install 'skypilot[aws]'` (or another cloud), then `sky check`"

_INPUTS = "~/ftplan-inputs"
_PACKAGE = "~/ftplan-package"
_VENV = "~/ftplan-venv"
_PORT = 29500

# A GB of SkyPilot's `disk_size` is what clouds sell; half of this goes to the system and packages.
_GB = 10**9
_SYSTEM_DISK_GB = 100

# torch's errors, a machine that went bad: tried again this often, from the last checkpoint.
_RESTARTS = 3

# 128 + SIGKILL and SIGTERM: what training ends with on a machine that is being taken away.
_TAKEN_AWAY = (137, 143)

# What the run directory names is known once it is written.
_NOT_YET_KNOWN = (
    "file_mounts also gets the model's folder and data files above 64 MiB, by their paths here"
)

_NAME = re.compile(r"[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?")
_SUBMITTED = re.compile(r"(?:Job submitted, ID|Managed Job ID): (\d+)")

_STATES: dict[str, JobState] = {
    "PENDING": "pending",
    "SUBMITTED": "pending",
    "STARTING": "pending",
    "RUNNING": "running",
    "WINDING_DOWN": "running",
    "RECOVERING": "requeued",
    "CANCELLING": "cancelled",
    "CANCELLED": "cancelled",
    "SUCCEEDED": "finished",
}


class Backend:
    """By `sky jobs launch`, `sky jobs queue` and `sky jobs cancel`."""

    name = "sky"
    saves_on_cancel = False
    options: Mapping[str, str] = {
        "bucket": "where the run is kept, such as s3://my-bucket/runs; for one machine",
        "volume": "the SkyPilot volume where the run is kept; for several machines",
        "infra": "where to look for machines, such as aws, gcp/us-central1 or k8s",
        "spot": "yes or no: machines that may be taken away, for less (yes)",
        "accelerators": "the GPU by another of SkyPilot's names, such as H100-MEGA",
        "restarts": f"after errors of training itself, besides lost machines ({_RESTARTS})",
        "image": "a machine image or docker:IMAGE",
        "package": "where pip gets ftplan there (as it was installed here)",
        "secret-env": "variables of yours that training gets as secrets, such as HF_TOKEN",
    }

    def files(self, job: Job) -> dict[str, str]:
        comments = [shlex.join(_command(job))]
        if not job.run.train.is_file():
            comments.append(_NOT_YET_KNOWN)
        return {TASK: yaml_text(task(job), comment="\n# ".join(comments))}

    def submit(self, ui: Ui, job: Job) -> str:
        client.set_here(client.variable_names(job))
        for name, text in self.files(job).items():
            write_text(job.run.root / name, text)
        said = client.call(_command(job), install=INSTALL)
        found = _SUBMITTED.search(_plain(said))
        if found is None:
            raise InputError(
                "`sky jobs launch` did not say which job it made",
                "look at `sky jobs queue`; the run directory is as it was",
            )
        return found[1]

    def state(self, job_id: str) -> JobState:
        try:
            said = client.call(["sky", "jobs", "queue", "--all", "-o", "json"], install=INSTALL)
            jobs = json.loads(said[said.index("[") :])
        except (InputError, ValueError):
            return "unknown"
        told = [str(job.get("status")) for job in jobs if str(job.get("job_id")) == job_id]
        if not told:
            return "unknown"
        status = told[0].rpartition(".")[2]
        return "failed" if status.startswith("FAILED") else _STATES.get(status, "unknown")

    def cancel(self, job_id: str) -> None:
        """What is in the bucket's cache is uploaded before the machines go; a checkpoint that takes
        more than seconds is not waited for."""
        number = client.checked_id(job_id, r"\d+")
        client.call(["sky", "jobs", "cancel", "--yes", "--graceful", number], install=INSTALL)


def _command(job: Job) -> list[str]:
    secrets = [word for name in client.variable_names(job) for word in ("--secret", name)]
    path = str(job.run.root.absolute() / TASK)
    return ["sky", "jobs", "launch", "--yes", "--detach-run", *secrets, path]


def task(job: Job) -> dict[str, Any]:
    """The task as SkyPilot's YAML has it. Raises InputError for options that cannot be."""
    if not _NAME.fullmatch(job.name):
        raise InputError(
            f"SkyPilot does not take `{job.name}` as a name",
            "it begins with a letter and holds letters, digits, `-`, `_` and `.` only: `--name`",
        )
    package = needs.ftplan_package()
    mounts, volumes = _mounts(job, package)
    return {
        "name": job.name,
        "num_nodes": job.num_machines,
        "resources": _resources(job),
        "envs": needs.variables(job, client.plain_environment(job)),
        # Without values: those come with the command line, from the environment here.
        **_given("secrets", dict.fromkeys(client.variable_names(job))),
        "file_mounts": mounts,
        **_given("volumes", volumes),
        "setup": _setup(job, package),
        "run": _run(job),
    }


def _given(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dict(value)} if value else {}


def _resources(job: Job) -> dict[str, Any]:
    found = {
        "infra": job.options.get("infra"),
        "cpus": f"{job.cpus_per_machine}+" if job.cpus_per_machine else None,
        "memory": f"{math.ceil(job.host_ram_bytes / GIB)}+",
        "disk_size": math.ceil(job.disk_bytes / _GB) + _SYSTEM_DISK_GB,
        "use_spot": client.yes_or_no(job, "spot", default=True),
        "job_recovery": {
            "max_restarts_on_errors": client.whole_number(job, "restarts", _RESTARTS),
            "recover_on_exit_codes": list(_TAKEN_AWAY),
        },
        "image_id": job.options.get("image"),
        # InfiniBand and the like where the cloud has it.
        "network_tier": "best" if job.num_machines > 1 else None,
        **_accelerators(job),
    }
    return {name: value for name, value in found.items() if value is not None}


def _accelerators(job: Job) -> dict[str, Any]:
    """Any of the names that the planned GPU goes by."""
    if not job.gpus_per_machine:
        return {}
    given = job.options.get("accelerators")
    names = client.names(given) if given else _sky_names(job.gpu)
    wanted = [f"{name}:{job.gpus_per_machine}" for name in names]
    if len(wanted) == 1:
        return {"accelerators": wanted[0]}
    return {"any_of": [{"accelerators": each} for each in wanted]}


def _sky_names(gpu: str | None) -> list[str]:
    found = sky_accelerators(find_gpu(gpu).key) if gpu else ()
    if not found:
        raise InputError(
            f"none of SkyPilot's clouds has a GPU that ftplan knows as `{gpu}`",
            "name one of `sky gpus list` with `--backend-option accelerators=NAME`, or plan for "
            "another GPU",
        )
    return list(found)


def _mounts(job: Job, package: needs.Package) -> tuple[dict[str, Any], dict[str, str]]:
    """Files that go along, and the volume."""
    mounts: dict[str, Any] = {_INPUTS: str(job.run.root.absolute())}
    if package.local and "package" not in job.options:
        mounts[_remote_package(package.local)] = str(package.local)
    models = [path for path in needs.model_folders(job.run) if needs.hub_snapshot(path) is None]
    mounts |= {str(path): str(path) for path in (*models, *needs.data_files(job.run))}
    kept_at = str(job.run.root.absolute().parent)
    bucket, volume = job.options.get("bucket"), job.options.get("volume")
    if bool(bucket) == bool(volume):
        raise InputError(
            "SkyPilot needs one place where the run outlives its machines",
            "`--backend-option bucket=s3://NAME/FOLDER` for one machine, or "
            "`--backend-option volume=NAME` for any number (`sky volumes apply`)",
        )
    if volume:
        return mounts, {kept_at: volume}
    assert bucket
    _check_bucket(job, bucket)
    # Writes go to the machine's disk and from there to the bucket: checkpoints are renamed when
    # they are whole, which a bucket that is mounted directly cannot do.
    return {**mounts, kept_at: {"source": bucket.rstrip("/"), "mode": "MOUNT_CACHED"}}, {}


def _check_bucket(job: Job, bucket: str) -> None:
    if not re.match(r"[a-z0-9]+://[^/]+", bucket):
        raise InputError(
            f"`{bucket}` is not a bucket", "write it as s3://NAME/FOLDER, gs://NAME/FOLDER, ..."
        )
    if job.num_machines > 1:
        raise InputError(
            "several machines cannot train in a bucket: each sees what it has written itself",
            "give a volume that all of them mount, with `--backend-option volume=NAME`",
        )


def _remote_package(local: Path) -> str:
    return f"{_PACKAGE}/{local.name}" if local.suffix == ".whl" else _PACKAGE


def _setup(job: Job, package: needs.Package) -> str:
    """Packages as they are here, in an environment of their own."""
    if given := job.options.get("package"):
        ftplan = shlex.quote(given)
    elif package.local:
        ftplan = f'"$(eval echo {_remote_package(package.local)})[train]"'
    else:
        ftplan = shlex.quote(package.requirement)
    pinned = " ".join(map(shlex.quote, needs.pinned_packages()))
    return "\n".join(
        [
            "set -e",
            'export PATH="$HOME/.local/bin:$PATH"',
            "command -v uv >/dev/null || python3 -m pip install --user uv",
            f"[ -x {_VENV}/bin/python ] || uv venv --python {needs.python_version()} {_VENV}",
            f"uv pip install --python {_VENV} {ftplan} {pinned}",
            "",
        ]
    )


def _run(job: Job) -> str:
    """One machine's part; SkyPilot runs it on each, with its number and the addresses of all."""
    return "\n".join(
        [
            f'export {MACHINE_RANK}="$SKYPILOT_NODE_RANK"',
            f'export {NUM_MACHINES}="$SKYPILOT_NUM_NODES"',
            f'export {MAIN_ADDRESS}="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"',
            f"export {MAIN_PORT}={_PORT}",
            'inputs="$HOME/ftplan-inputs"',
            f"exec {_training_line(job)}",
            "",
        ]
    )


def _training_line(job: Job) -> str:
    words = needs.training_words(job)
    at = words.index("--")
    own, rest = shlex.join(words[:at]), shlex.join(words[at:])
    return f'{_VENV}/bin/python {own} --inputs "$inputs" {rest}'


def _plain(text: str) -> str:
    """Without the colours of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
