"""`ftplan launch`: the run of a run directory, again or for the first time, or of a plan file; of
one stage or several."""

from __future__ import annotations

import argparse
from pathlib import Path

from ftplan.launcher.commands.plan import (
    add_calibration_argument,
    add_cpu_argument,
    planned_to_dict,
    show_plan,
)
from ftplan.launcher.launch_elsewhere import (
    add_backend_arguments,
    is_elsewhere,
    launch_elsewhere,
    planned_of_file,
)
from ftplan.launcher.launching import carry_out, write_run
from ftplan.launcher.other_num_gpus import add_num_gpus_argument, check_one_run
from ftplan.launcher.plan_file import read_plan_file
from ftplan.launcher.remote_code import add_trust_argument
from ftplan.launcher.run_dir import open_run
from ftplan.launcher.stage_commands import run_again, run_stage_file
from ftplan.launcher.stage_file import is_stage_file
from ftplan.launcher.stage_runs import check_whole
from ftplan.launcher.stages_dir import is_stages_dir
from ftplan.launcher.ui import Ui


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a run directory, or a file of `ftplan plan --out`"
    )
    parser.add_argument("--name", metavar="NAME", help="of a plan file's run (made from inputs)")
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs go (runs)"
    )
    add_num_gpus_argument(parser)
    add_cpu_argument(parser)
    add_calibration_argument(parser)
    add_backend_arguments(parser)
    add_trust_argument(parser)


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    check_one_run(arguments.run, arguments.num_gpus)
    if is_elsewhere(arguments):
        return launch_elsewhere(arguments, ui)
    if arguments.run.is_file():
        if is_stage_file(arguments.run):
            return run_stage_file(arguments, ui)
        return _launch_plan_file(arguments, ui)
    if is_stages_dir(arguments.run):
        return run_again(arguments.run, ui)
    check_whole(arguments.run)
    run_dir = open_run(arguments.run)
    record = carry_out(ui, run_dir, anew=True, num_gpus=arguments.num_gpus)
    ui.json({"schema": 1, "run_dir": str(run_dir.root), "record": record})
    return 0


def _launch_plan_file(arguments: argparse.Namespace, ui: Ui) -> int:
    planned = planned_of_file(arguments, ui, read_plan_file(arguments.run))
    show_plan(ui, planned)
    run_dir = write_run(planned, arguments.name, arguments.runs_dir)
    ui.say(f"run directory: {run_dir.root}")
    record = carry_out(ui, run_dir, planned)
    ui.json({**planned_to_dict(planned), "run_dir": str(run_dir.root), "record": record})
    return 0
