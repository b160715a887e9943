"""`--num-gpus` of what is launched again: another number of GPUs than was planned."""

from __future__ import annotations

import argparse
from pathlib import Path

from ftplan.launcher.stages_dir import is_stages_dir
from ftplan.planner.errors import InputError


def add_num_gpus_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-gpus",
        metavar="N",
        type=int,
        help="another number of GPUs than planned, with the same rows in each step",
    )


def check_one_run(run: Path, num_gpus: int | None) -> None:
    """Raises InputError where the number is given for something else than one run's directory."""
    if num_gpus is None or (run.is_dir() and not is_stages_dir(run)):
        return
    raise InputError(
        "`--num-gpus` is for the directory of one run here",
        "in a plan file change `num_gpus` among its settings",
    )
