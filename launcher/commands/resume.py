"""`ftplan resume RUN_DIR`: go on with an interrupted run from its last checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from ftplan.launcher.launch_elsewhere import (
    add_backend_arguments,
    is_elsewhere,
    resume_elsewhere,
)
from ftplan.launcher.launching import carry_out
from ftplan.launcher.other_num_gpus import add_num_gpus_argument, check_one_run
from ftplan.launcher.remote_code import add_trust_argument
from ftplan.launcher.run_dir import open_run
from ftplan.launcher.stage_commands import run_rest
from ftplan.launcher.stage_runs import check_whole
from ftplan.launcher.stages_dir import is_stages_dir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="an interrupted run")
    add_num_gpus_argument(parser)
    add_backend_arguments(parser)
    add_trust_argument(parser)


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    check_one_run(arguments.run_dir, arguments.num_gpus)
    if is_elsewhere(arguments):
        return resume_elsewhere(arguments, ui)
    if is_stages_dir(arguments.run_dir):
        return run_rest(arguments.run_dir, ui)
    check_whole(arguments.run_dir)
    run_dir = open_run(arguments.run_dir)
    if run_dir.finished:
        raise InputError(
            f"`{run_dir.root}` has finished", f"`ftplan launch {run_dir.quoted}` runs it again"
        )
    record = carry_out(ui, run_dir, resume=True, num_gpus=arguments.num_gpus)
    ui.json({"schema": 1, "run_dir": str(run_dir.root), "record": record})
    return 0
