"""Slurm: a batch script with one `srun` of `accelerate launch` a machine (docs/clusters.md).

The script is made to be started again: after a preemption, a lost machine or its time limit Slurm
runs it once more, and training goes on from the last whole checkpoint.
"""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping

from ftplan.launcher.backends.client import checked_id
from ftplan.launcher.backends.job import (
    GRACE_SECONDS,
    MACHINE_RANK,
    MAIN_ADDRESS,
    MAIN_PORT,
    NUM_MACHINES,
    Job,
    JobState,
    shell_line,
)
from ftplan.launcher.run_dir import write_text
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.units import MIB

SCRIPT = "slurm.sh"

# Options that stand in the script as they are given.
_PASSED = {
    "partition": "where it queues",
    "account": "who pays",
    "qos": "the quality of service",
    "time": "the limit, such as 12:00:00 (the prediction, and room)",
    "mem": "host memory of each machine, such as 64G (the prediction, and room)",
    "cpus-per-task": "cores of each machine",
    "gpus-per-node": "GPUs of each machine as the cluster names them, such as h100:8",
    "gres": "other resources of each machine",
    "constraint": "features that machines must have",
    "nodelist": "machines that must be among them",
    "exclude": "machines that must not",
    "reservation": "what is reserved",
    "licenses": "licences that it holds",
    "nice": "how far it lets others pass",
    "begin": "not before",
    "dependency": "what comes first, such as afterok:1234",
    "mail-type": "when to write to you",
    "mail-user": "your address",
    "comment": "what you like to note",
}
_SETUP = "setup"

# What the first and the last minutes of a run take: loading, evaluation, saving.
_ROOM = 1.5
_ROOM_SECONDS = 30 * 60
_MEMORY_ROOM = 1.25

# Between the end of training and the end of the job: Slurm is asked to start it again.
_REQUEUE_SECONDS = 60

# The first machine to end waits for the others: one of them saves. A machine that died takes the
# others with it only then, where NCCL has not noticed before.
_WAIT_SECONDS = 600

# Below what Linux gives to connections by itself (net.ipv4.ip_local_port_range, 32768).
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000

# Of one job, also of an array or of a heterogeneous one.
_ID = r"[0-9]+([_+][0-9]+)?"

# The longest time that a client is left: a controller under load answers slowly.
_PATIENCE_SECONDS = 60

_STATES: dict[str, JobState] = {
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "SPECIAL_EXIT": "pending",
    "REQUEUE_HOLD": "requeued",
    "REQUEUE_FED": "requeued",
    "REQUEUED": "requeued",
    "RUNNING": "running",
    "COMPLETING": "running",
    "RESIZING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "STOPPED": "running",
    "SUSPENDED": "running",
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "BOOT_FAIL": "failed",
    "DEADLINE": "failed",
    "FAILED": "failed",
    "NODE_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "PREEMPTED": "failed",
    "TIMEOUT": "failed",
}


class Backend:
    """By `sbatch`, `squeue`, `sacct`, `scontrol` and `scancel`. `once`: options that are not meant
    for the next time, too."""

    name = "slurm"
    saves_on_cancel = True
    once = ("begin", "dependency")
    options: Mapping[str, str] = {
        **_PASSED,
        _SETUP: "a line of shell before training, such as `module load cuda`",
    }

    def files(self, job: Job) -> dict[str, str]:
        return {SCRIPT: script(job)}

    def submit(self, ui: Ui, job: Job) -> str:
        for name, text in self.files(job).items():
            write_text(job.run.root / name, text)
        said = _client("sbatch", "--parsable", str(job.run.root / SCRIPT))
        job_id = said.split(";")[0].strip()  # `ID;CLUSTER` where there are several
        if not re.fullmatch(_ID, job_id):
            raise InputError("`sbatch` did not say which job it made", "look at `squeue --me`")
        return job_id

    def state(self, job_id: str) -> JobState:
        try:
            number = checked_id(job_id, _ID)
            told = _queued(number) or _accounted(number)
        except InputError:
            return "unknown"
        state, restarts = told or ("", "0")
        known = _STATES.get(state, "unknown")
        return "requeued" if known == "pending" and restarts.strip("0") else known

    def cancel(self, job_id: str) -> None:
        """A job that runs is not to be started again, and its script asks training to stop:
        `scancel` alone leaves no more than `KillWait`, whatever a checkpoint takes. Raises
        InputError for what is no number of one job: `scancel` takes lists, and options."""
        checked_id(job_id, _ID)
        if self.state(job_id) != "running":
            _client("scancel", job_id)
            return
        _client("scontrol", "update", f"JobId={job_id}", "Requeue=0")
        _client("scancel", "--batch", "--signal=TERM", job_id)


def _queued(job_id: str) -> tuple[str, str] | None:
    """The state and the number of restarts, of a job that the controller still knows."""
    try:
        columns = "--Format=State:.30,RestartCnt:.12"
        said = _client("squeue", "--noheader", "--states=all", f"--jobs={job_id}", columns)
    except _RefusedError:
        return None
    words = said.split()
    return (words[0], words[1]) if len(words) == 2 else None


def _accounted(job_id: str) -> tuple[str, str] | None:
    """The same of one that has ended a while ago, where the cluster keeps accounts."""
    try:
        said = _client("sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State").split()
    except _RefusedError:
        return None
    return (said[0], "0") if said else None  # `CANCELLED by 1000`


class _RefusedError(InputError):
    """What a client refused, in its own words."""


def _client(*command: str) -> str:
    """What a program of Slurm's prints; raises InputError where it is missing or refuses."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
    except FileNotFoundError:
        raise InputError(
            f"Slurm's `{command[0]}` is not here",
            "log in to a machine of the cluster that jobs are submitted from; "
            "`--dry-run` shows the script without it",
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"Slurm's `{command[0]}` has not answered for {_PATIENCE_SECONDS} seconds",
            "look at `scontrol ping`, and try again",
        ) from None
    if done.returncode:
        own = f"{command[0]}: error: "
        words = [line.removeprefix(own).strip() for line in done.stderr.splitlines()]
        said = "; ".join(filter(None, words)) or f"exit status {done.returncode}"
        raise _RefusedError(
            f"`{command[0]}` refused: {said}",
            "options of the cluster are given with `--backend-option NAME=VALUE`, such as "
            "`partition=gpu` or `account=project`",
        )
    return done.stdout


def script(job: Job) -> str:
    """The batch script; it runs on the first machine. Pure."""
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}{_given(value)}" for name, value in _directives(job).items()),
        "",
        *_environment_lines(job),
        "",
        _BODY.format(
            run=shlex.quote(str(job.run.root)),
            record=job.run.record.name,
            status=job.run.status.name,
            stderr=job.run.stderr.name,
            checkpoints=job.run.checkpoints.name,
            wait=_WAIT_SECONDS,
            rank=MACHINE_RANK,
            command=shlex.quote(_machine_script(job)),
            python=shlex.quote(sys.executable),
        ).strip("\n"),
    ]
    return "\n".join(lines) + "\n"


def _given(value: str | None) -> str:
    return "" if value is None else f"={shlex.quote(value)}"


def _directives(job: Job) -> dict[str, str | None]:
    """Options of `sbatch`; None: one without a value."""
    own: dict[str, str | None] = {
        "job-name": f"ftplan-{job.name}",
        "nodes": str(job.num_machines),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(job.gpus_per_machine)} if job.gpus_per_machine else {}),
        **({"cpus-per-task": str(job.cpus_per_machine)} if job.cpus_per_machine else {}),
        "mem": f"{math.ceil(job.host_ram_bytes * _MEMORY_ROOM / MIB)}M",
        **({"time": time_limit(job.seconds, _notice(job))} if job.seconds is not None else {}),
        "requeue": None,
        "signal": f"B:TERM@{_notice(job)}",
        "open-mode": "append",
        # A per cent sign would begin a pattern.
        "output": str(job.run.stdout).replace("%", "%%"),
        "error": str(job.run.stderr).replace("%", "%%"),
    }
    passed = {name: value for name, value in job.options.items() if name in _PASSED}
    for name, value in passed.items():
        if not value or not value.isprintable():
            raise InputError(
                f"`--backend-option {name}=` needs a value of one line",
                f"such as `--backend-option {name}=VALUE`: {_PASSED[name]}",
            )
    return own | passed


def _notice(job: Job) -> int:
    """Seconds before the time limit at which training is asked to end, of which it has all but what
    Slurm needs to start the job again; of a short limit that was given, a quarter."""
    notice = job.grace_seconds + _REQUEUE_SECONDS
    limit = seconds_of(job.options["time"]) if "time" in job.options else None
    return notice if limit is None else max(1, min(notice, limit // 4))


def _grace(job: Job) -> int:
    """What training has of it."""
    whole = job.grace_seconds + _REQUEUE_SECONDS
    return max(1, _notice(job) * job.grace_seconds // whole)


def seconds_of(limit: str) -> int | None:
    """Of a limit as `sbatch --time` takes it: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M` or `D-H:M:S`;
    None where it is none of them, as of `UNLIMITED`."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in (*parts, days or "0")) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) < 3:
        numbers = [0, *numbers, 0][:3] if len(numbers) == 1 else [0, *numbers]
    hours, minutes, seconds = numbers
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def time_limit(seconds: float, notice_seconds: int) -> str:
    """`D-HH:MM:00`: what is predicted, half as much again, and half an hour for what is not
    training. A run that takes longer is started again and goes on."""
    minutes = math.ceil((seconds * _ROOM + _ROOM_SECONDS + notice_seconds) / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:00"


def _environment_lines(job: Job) -> list[str]:
    """torch's launcher kills what it has started half a minute after SIGTERM unless told
    otherwise (torch 2.13 `LaunchConfig.shutdown_timeout`)."""
    grace = str(_grace(job))
    variables = {
        **job.environment,
        GRACE_SECONDS: grace,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if job.num_machines > 1:
        lines += [
            f"export {NUM_MACHINES}=$SLURM_JOB_NUM_NODES",
            f"export {MAIN_PORT}=$(({_FIRST_PORT} + SLURM_JOB_ID % {_NUM_PORTS}))",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "# Where Slurm itself reaches the first machine: most often its name.",
            'address=$(scontrol --oneliner show node "$first" |'
            " sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')",
            f'export {MAIN_ADDRESS}="${{address:-$first}}"',
        ]
    if setup := job.options.get(_SETUP):
        lines.append(setup)
    return lines


def _machine_script(job: Job) -> str:
    """SIGTERM reaches all processes of a step. accelerate would die of it before the training
    process has saved, and what is ignored stays so in it; training itself listens."""
    return f'trap "" TERM; export {MACHINE_RANK}=$SLURM_NODEID; exec {shell_line(job.command)}'


_BODY = r"""
run={run}
asked=0
step=

running() {{
    case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) in
    RUNNING | SIGNALING) ;; # the second while the warning of the time limit is on its way
    *) false ;;
    esac
}}
finished() {{ [ -f "$run/{record}" ]; }}
saved() {{ ls "$run/{checkpoints}" 2>/dev/null; }}

# A time limit or a preemption is near, or `ftplan cancel` asks: training saves a checkpoint. Where
# the job is being cancelled or requeued, Slurm has told it already.
trap 'asked=1; [ -n "$step" ] && running && scancel --signal=TERM "$SLURM_JOB_ID"' TERM

train() {{
    srun --kill-on-bad-exit=0 --wait={wait} \
        ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \
        bash -c {command} &
    step=$!
    wait "$step"
    status=$?
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        status=$?
    done
    step=
}}

finished && exit 0
before=$(saved)
log_start=$(stat --format=%s "$run/{stderr}" 2>/dev/null || echo 0)
train
# Memory ran out on one of several GPUs: again, with what it has given up.
while ! finished && [ $asked = 0 ] && grep -qs '"again": true' "$run/{status}"; do
    train
done

# Again after the time limit, if this time something was saved.
if ! finished && [ $asked = 1 ] && [ "$(saved)" != "$before" ] && running &&
    scontrol requeue "$SLURM_JOB_ID" 2>/dev/null; then
    sleep 60 # Slurm ends this script
fi
{python} -m ftplan.launcher.backends.ended "$run" --status $status --log-start "$log_start" \
    $([ $asked = 1 ] && echo --asked)
finished
"""
