"""Ray: a job of `ray job submit`, which starts one task a machine (docs/engines.md).

Ray Train's TorchTrainer would call the training function in a process that Ray has made, with the
process group set up already and Ray's own handlers of signals. ftplan's training process is a
program of its own: it heeds signals, holds the lock of its run, and is measured from its first
byte. So Ray brings the machines together, and each of them starts that program as every other
engine does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from ftplan.launcher.backends import client, needs
from ftplan.launcher.backends.job import Job, JobState
from ftplan.launcher.backends.on_ray import MODULE
from ftplan.launcher.backends.yaml_text import yaml_text
from ftplan.launcher.run_dir import write_text
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError

RUNTIME_ENV = "ray.yaml"
INSTALL = "`pip install 'ray[default]'`, of the cluster's version"

_RESTARTS = 3

# `ray job stop` waits 3 seconds for the entry point unless told otherwise; what it does after
# training has saved takes a moment.
_STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
_AFTER_TRAINING_SECONDS = 30

_SUBMITTED = re.compile(r"Job '([^']+)' submitted")
_STATES: tuple[tuple[str, JobState], ...] = (
    (r"Job '[^']+' succeeded", "finished"),
    (r"Job '[^']+' was stopped", "cancelled"),
    (r"Job '[^']+' failed", "failed"),
    (r"Status for job '[^']+': RUNNING", "running"),
    (r"Status for job '[^']+': PENDING", "pending"),
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Backend:
    """By `ray job submit`, `ray job status` and `ray job stop`."""

    name = "ray"
    saves_on_cancel = True
    options: Mapping[str, str] = {
        "address": "of the cluster, such as http://head:8265 (RAY_API_SERVER_ADDRESS)",
        "python": "of the cluster's machines, with ftplan (python)",
        "accelerator-type": "the GPU as Ray names it, such as H100",
        "restarts": f"of all machines together, after one was lost or has failed ({_RESTARTS})",
    }

    def files(self, job: Job) -> dict[str, str]:
        environment = needs.variables(job, client.plain_environment(job))
        wait = job.grace_seconds + _AFTER_TRAINING_SECONDS
        runtime = {"env_vars": {**environment, _STOP_VARIABLE: str(wait)}}
        return {RUNTIME_ENV: yaml_text(runtime, comment=shlex.join(_command(job)))}

    def submit(self, ui: Ui, job: Job) -> str:
        for name, text in self.files(job).items():
            write_text(job.run.root / name, text)
        found = _SUBMITTED.search(_plain(client.call(_command(job), install=INSTALL)))
        if found is None:
            raise InputError(
                "`ray job submit` did not say which job it made", "look at `ray job list`"
            )
        address = job.options.get("address")
        return f"{found[1]}@{address}" if address else found[1]

    def state(self, job_id: str) -> JobState:
        try:
            said = _plain(client.call(_of_job("status", job_id), install=INSTALL))
        except InputError:
            return "unknown"
        return next((state for told, state in _STATES if re.search(told, said)), "unknown")

    def cancel(self, job_id: str) -> None:
        """Ray goes on with it by itself: training has its grace after this has returned."""
        client.call([*_of_job("stop", job_id), "--no-wait"], install=INSTALL)


def _of_job(verb: str, job_id: str) -> list[str]:
    name, _, address = client.checked_id(job_id, r"\w[\w-]*(@\w.*)?").partition("@")
    return ["ray", "job", verb, *_address({"address": address} if address else {}), name]


def _address(options: Mapping[str, str]) -> list[str]:
    return ["--address", options["address"]] if "address" in options else []


def _command(job: Job) -> list[str]:
    path = str(job.run.root.absolute() / RUNTIME_ENV)
    return [
        *("ray", "job", "submit", "--no-wait", *_address(job.options)),
        *("--runtime-env", path, "--"),
        *_entry_point(job),
    ]


def _entry_point(job: Job) -> list[str]:
    restarts = client.whole_number(job, "restarts", _RESTARTS)
    kind = job.options.get("accelerator-type")
    return [
        *(job.options.get("python", "python"), "-m", MODULE, str(job.run.root)),
        *("--num-machines", str(job.num_machines)),
        *("--num-gpus", str(job.gpus_per_machine)),
        *("--num-cpus", str(job.cpus_per_machine or 0)),
        *("--memory", str(job.host_ram_bytes)),
        *("--restarts", str(restarts)),
        *(("--accelerator-type", kind) if kind else ()),
        *("--", *job.command[1:]),
    ]


def _plain(text: str) -> str:
    return _COLOUR.sub("", text)
