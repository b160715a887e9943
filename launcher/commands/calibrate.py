"""`ftplan calibrate`: learn the constants of machines from the runs that have finished on them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from ftplan.launcher.calibration_file import (
    FILE_NAME,
    Stored,
    forget_calibrations,
    keep_calibrations,
    read_calibrations,
)
from ftplan.launcher.ui import Ui
from ftplan.launcher.user_data import data_folder
from ftplan.launcher.version import version
from ftplan.planner.margin import LEAST_RUNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        default=[],
        help="first take in these run directories, or folders of them, made here or elsewhere",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="what plans are corrected by now")
    what.add_argument(
        "--reset", action="store_true", help="forget all corrections; the history of runs stays"
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    """Exit status 1 where too few runs are known of any machine."""
    if arguments.reset:
        return _reset(ui)
    if arguments.show:
        return _show(ui)
    from ftplan.launcher.calibrating import imported_runs, learned
    from ftplan.launcher.calibration_views import said_left_out, to_dict
    from ftplan.launcher.history import History

    history = History(data_folder(), ui.warn)
    if arguments.runs:
        runs = imported_runs(arguments.runs, ui.say)
        count = history.add(runs)
        ui.say(f"{count} of {len(runs)} runs are new in the history")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    found, left_out = learned(history.runs(), version(), today)
    stored = [one for of_stack in found if (one := of_stack.stored(version()))]
    if stored:
        keep_calibrations(data_folder(), stored)
    too_few = {str(one.stack): one.num_runs for one in found if one.fit is None}
    ui.json(to_dict(stored, too_few, left_out))
    _show_parts(ui, stored)
    for name, count in too_few.items():
        runs_of = "1 run is" if count == 1 else f"{count} runs are"
        ui.say(f"{name}: {runs_of} too few, {LEAST_RUNS} are needed")
    for line in said_left_out(left_out):
        ui.say(line)
    if not found:
        ui.say(
            f"the history {history.path} has no runs to learn from: `ftplan auto` adds each that "
            "finishes, and `--import RUN` those of elsewhere"
        )
    if any(one.calibration.in_force for one in stored):
        ui.say("plans on these machines use it; `--no-calibration` leaves it out of one")
    return 0 if stored else 1


def _show(ui: Ui) -> int:
    from ftplan.launcher.calibration_views import to_dict

    stored = list(read_calibrations(data_folder()).values())
    ui.json(to_dict(stored, {}, {}))
    _show_parts(ui, stored)
    if not stored:
        ui.say("nothing is corrected; `ftplan calibrate` learns from the runs that have finished")
    for one in stored:
        if one.ftplan != version():
            ui.warn(f"{one.stack}: of ftplan {one.ftplan}, and not used; `ftplan calibrate` anew")
    return 0


def _reset(ui: Ui) -> int:
    count = forget_calibrations(data_folder())
    ui.json({"schema": 1, "num_forgotten": count})
    ui.say(
        f"{count} forgotten: plans are the formulas' own again"
        if count
        else f"there was none in {data_folder() / FILE_NAME}"
    )
    return 0


def _show_parts(ui: Ui, stored: Sequence[Stored]) -> None:
    if ui.as_json or not stored:
        return
    from ftplan.launcher.calibration_views import stored_parts

    for number, one in enumerate(stored):
        ui.show(*([""] if number else []), *stored_parts(one))
