"""`--backend`: a run that is handed to an engine instead of being carried out here; and what would
be done, for `--dry-run`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from msgspec import structs

from ftplan.launcher.backends import BACKENDS
from ftplan.launcher.backends.job import Job
from ftplan.launcher.backends.jobs import (
    LOCAL,
    backend_of,
    check_no_job,
    hand_over,
    options_before,
    options_of,
)
from ftplan.launcher.backends.making import job_of
from ftplan.launcher.launching import command_text, default_name, plan_to_dict, write_run
from ftplan.launcher.lock import held
from ftplan.launcher.packages import require_training
from ftplan.launcher.plan_file import PlanFile, read_plan_file
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.launcher.stage_file import is_stage_file
from ftplan.launcher.stage_runs import check_whole
from ftplan.launcher.stages_dir import is_stages_dir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.hardware_spec import Device


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        metavar="NAME",
        default=LOCAL,
        help=f"where: {', '.join((LOCAL, *BACKENDS))} ({LOCAL})",
    )
    parser.add_argument(
        "--backend-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="of the engine, such as partition=gpu (may be given again)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command and the files, write nothing"
    )


def is_elsewhere(arguments: argparse.Namespace) -> bool:
    """Whether the run is handed over, or nothing but shown. Raises InputError for what no engine
    takes."""
    if arguments.backend != LOCAL:
        return True
    if arguments.backend_option:
        raise InputError(
            "`--backend-option` is for an engine, and the run is carried out here",
            f"name it with `--backend`: {', '.join(BACKENDS)}",
        )
    return bool(arguments.dry_run)


def launch_elsewhere(arguments: argparse.Namespace, ui: Ui) -> int:
    """`ftplan launch` of a run directory or a plan file, by an engine."""
    check_backend(arguments)
    path: Path = arguments.run
    if is_stages_dir(path) or (path.is_file() and is_stage_file(path)):
        raise _no_stages(path, "launch", arguments.backend)
    if not path.is_file():
        check_whole(path)
        run = open_run(path)
        if arguments.dry_run:
            return _show(arguments, ui, run, run.read_plan(), run.command.read_text())
        check_no_job(run)
        job = _job(arguments, run, run.read_plan())  # refused, if at all, before anything is moved
        with held(run.root):
            begun = run.status.exists() or run.metrics.exists()
            kept = run.set_results_aside() if begun else None
        if kept is not None:
            ui.say(f"results of the earlier attempt are kept in {kept}")
        return _submit(arguments, ui, run, job)
    planned = planned_of_file(arguments, ui, read_plan_file(path))
    if arguments.dry_run:
        run = RunDir(arguments.runs_dir / (arguments.name or default_name(planned)))
        return _show(arguments, ui, run, plan_to_dict(planned), command_text(run, planned))
    run = write_run(planned, arguments.name, arguments.runs_dir)
    ui.say(f"run directory: {run.root}")
    return _submit(arguments, ui, run, _job(arguments, run, run.read_plan()))


def resume_elsewhere(arguments: argparse.Namespace, ui: Ui) -> int:
    """`ftplan resume` of a run directory, by an engine."""
    check_backend(arguments)
    if is_stages_dir(arguments.run_dir):
        raise _no_stages(arguments.run_dir, "resume", arguments.backend)
    check_whole(arguments.run_dir)
    run = open_run(arguments.run_dir)
    if run.finished:
        raise InputError(
            f"`{run.root}` has finished", f"`ftplan launch {run.quoted}` runs it again"
        )
    if arguments.dry_run:
        return _show(arguments, ui, run, run.read_plan(), run.command.read_text())
    check_no_job(run)
    job = _job(arguments, run, run.read_plan())
    with held(run.root):
        pass
    return _submit(arguments, ui, run, job)


def planned_of_file(arguments: argparse.Namespace, ui: Ui, file: PlanFile) -> Planned:
    """A run as the file says, planned again: for this machine where it is carried out here, for the
    GPU that the file names where an engine has it. Settings are the file's."""
    require_training()
    planned = make_plan(
        ui,
        asked=file.asked,
        model_name=file.model,
        named_device=None if arguments.backend == LOCAL else named_device(ui, file),
        given=file.settings,
        runs_dir=arguments.runs_dir,
        for_launch=True,
        calibrate=arguments.calibration,
        on_processor=arguments.cpu,
    )
    if file.sha256 and planned.data.sha256 != file.sha256:
        raise InputError(
            f"the data of `{arguments.run}` has changed since it was planned",
            "plan again with `ftplan plan DATA --out FILE`, or take `sha256` out of the file",
        )
    return file.with_reasons(planned)


def named_device(ui: Ui, file: PlanFile) -> Device | None:
    """The catalogued GPU that was planned for, of unlike ones what each does at least; None for a
    processor, which is planned for here."""
    from ftplan.planner.teams import least_of, names_of
    from ftplan.profiles import find_gpu

    try:
        device = reduce(least_of, [find_gpu(name).device() for name in names_of(file.device)])
    except UnknownNameError:
        return None
    device = structs.replace(device, free_bytes=file.free_bytes or device.free_bytes)
    machines = file.settings.get("num_machines", 1)
    if machines == 1:
        return device
    if file.network is not None:
        return structs.replace(device, network=file.network)
    from ftplan.launcher.cluster_flags import cluster_of

    per_machine = file.settings.get("num_gpus", machines) // machines
    return cluster_of(ui, file.device, device, file.interconnect, machines, per_machine).device


def _no_stages(path: Path, verb: str, backend: str) -> InputError:
    """What an engine is handed is one training command, which it may begin again at any time;
    between stages ftplan itself passes on what each made."""
    command = f"ftplan {verb} {shlex.quote(str(path))}"
    how = {"slurm": f"as a job of one machine: `srun --nodes=1 --gpus=N {command}`"}
    return InputError(
        f"`{path}` has several stages, of which no engine carries out more than one",
        how.get(backend, f"on one machine with GPUs, without `--backend`: `{command}`"),
    )


def check_backend(arguments: argparse.Namespace) -> None:
    """Raises InputError for an engine or an option of it that is not known, at once."""
    if arguments.backend != LOCAL:
        options_of(backend_of(arguments.backend), arguments.backend_option)


def _job(arguments: argparse.Namespace, run: RunDir, written: Mapping[str, Any]) -> Job:
    """The job, which its engine can make files of; with the options of the last time where they are
    not given anew."""
    backend = backend_of(arguments.backend)
    given = options_of(backend, arguments.backend_option)
    job = job_of(written, run, {**options_before(run, backend), **given})
    backend.files(job)
    return job


def _submit(arguments: argparse.Namespace, ui: Ui, run: RunDir, job: Job) -> int:
    handed = hand_over(ui, backend_of(arguments.backend), job)
    ui.json({"schema": 1, "run_dir": str(run.root), "job": structs.asdict(handed)})
    ui.show(f"submitted as {handed.said}")
    ui.show_lines(
        [f"its state  ftplan runs show {run.quoted}", f"end it     ftplan cancel {run.quoted}"],
    )
    return 0


def _show(
    arguments: argparse.Namespace, ui: Ui, run: RunDir, written: Mapping[str, Any], here: str
) -> int:
    """What would be done. `here`: the command of this machine, as a line."""
    if arguments.backend == LOCAL:
        command, files = here.strip(), {}
    else:
        job = _job(arguments, run, written)
        command, files = shlex.join(job.command), backend_of(arguments.backend).files(job)
    ui.json(
        {
            "schema": 1,
            "run_dir": str(run.root),
            "backend": arguments.backend,
            "command": command,
            "files": files,
        }
    )
    for name, text in files.items():
        ui.say(f"{run.root / name}:")
        ui.show_lines(text.splitlines())
    if not files:
        ui.show_lines([command])
    ui.say("nothing was written or started")
    return 0
