"""`ftplan launch RUN_DIR`: start the run of a run directory, or repeat it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ftplan.launcher.launching import carry_out
from ftplan.launcher.run_dir import open_run
from ftplan.launcher.ui import Ui


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="made by `ftplan auto`")


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    run_dir = open_run(arguments.run_dir)
    kept = run_dir.set_results_aside()
    if kept is not None:
        ui.say(f"results of the earlier attempt are kept in {kept}")
    record = carry_out(ui, run_dir)
    ui.json({"schema": 1, "run_dir": str(run_dir.root), "record": record})
    return 0
