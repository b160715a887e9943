"""From a plan to the job that an engine is asked to carry out: pure, but for the host's cores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ftplan.launcher import emit, remote_code
from ftplan.launcher.backends.job import (
    MACHINE_RANK,
    MAIN_ADDRESS,
    MAIN_PORT,
    Job,
)
from ftplan.launcher.host import usable_cores
from ftplan.launcher.run_dir import RunDir
from ftplan.planner.errors import InputError

# A checkpoint of a few GiB takes seconds, one of a large model minutes; batch systems allow more
# than half an hour between a warning and the end.
GRACE_SECONDS = 300

# A process of training computes on its GPU and keeps one core busy, its loaders and NCCL others.
CPUS_PER_GPU = 4

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def job_of(written: Mapping[str, Any], run: RunDir, options: Mapping[str, str]) -> Job:
    """`written`: what plan.yaml holds, or is going to. Raises InputError where it is damaged."""
    try:
        settings = written["plan"]
        num_machines = int(_value(settings, "num_machines", 1))
        num_gpus = int(_value(settings, "num_gpus", 1))
        device, needs, seconds = written["device"], written["needs"], written["predicted"]
        on_cpu = device["kind"] == "cpu"
        processes = num_gpus // num_machines
        cpus = usable_cores() if on_cpu else CPUS_PER_GPU * processes
        return Job(
            name=_NOT_IN_A_NAME.sub("-", run.root.name).strip("-.") or "run",
            run=RunDir(run.root.absolute()),
            num_machines=num_machines,
            gpus_per_machine=0 if on_cpu else processes,
            gpu=None if on_cpu else str(device["name"]),
            cpus_per_machine=cpus,
            host_ram_bytes=int(needs["host_ram_bytes"]),
            disk_bytes=int(needs["disk_bytes"]),
            seconds=seconds.get("train_seconds"),
            environment=emit.engine_environment(device["kind"], cpus // processes),
            command=machine_command(RunDir(run.root.absolute()), num_machines, num_gpus),
            grace_seconds=GRACE_SECONDS,
            options=options,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"`{run.plan}` does not say what the run needs ({type(error).__name__}: {error})",
            "plan again with `ftplan plan DATA --out FILE`",
        ) from error


def machine_command(run: RunDir, num_machines: int, num_processes: int) -> tuple[str, ...]:
    """What each machine carries out, and again after it was lost: the run goes on from its last
    whole checkpoint. `num_processes`: of all machines."""
    command = emit.launch_command(run, again=True, trusts_code=remote_code.is_allowed())
    if num_machines == 1:
        return tuple(command)
    together = [
        *("--num_machines", str(num_machines)),
        *("--num_processes", str(num_processes)),
        *("--machine_rank", f"${MACHINE_RANK}"),
        *("--main_process_ip", f"${MAIN_ADDRESS}"),
        *("--main_process_port", f"${MAIN_PORT}"),
    ]
    at = command.index(emit.TRAIN_MODULE) - 1
    return (*command[:at], *together, *command[at:])


def _value(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    return settings[name]["value"] if name in settings else default
