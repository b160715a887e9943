"""`ftplan auto DATA`: plan, show, launch, report."""

from __future__ import annotations

import argparse

from ftplan.launcher.commands.plan import (
    add_plan_arguments,
    check_no_replay,
    data_asked,
    planned_to_dict,
    show_plan,
    wanted,
)
from ftplan.launcher.confirm import confirm
from ftplan.launcher.launching import carry_out, write_run
from ftplan.launcher.packages import require_training
from ftplan.launcher.planning import make_plan
from ftplan.launcher.settings_flags import add_setting_flags, given_settings
from ftplan.launcher.trackers import require_trackers
from ftplan.launcher.training.config import checked_loss
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument("--name", metavar="NAME", help="the run's name (default: made from inputs)")
    add_setting_flags(parser)


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    if not arguments.yes and not ui.interactive:
        raise InputError(
            "nobody is there to be asked whether to start",
            "add `--yes`, or look first with `ftplan plan`",
        )
    require_training()
    given = given_settings(arguments)
    require_trackers(given.get("report_to", ()))
    defaults = TrainingPlan()
    checked_loss(given.get("loss", defaults.loss), given.get("trainer", defaults.trainer))
    if arguments.then:
        from ftplan.launcher.stage_commands import run_auto

        return run_auto(arguments, ui)
    check_no_replay(arguments)
    planned = make_plan(
        ui,
        asked=data_asked(arguments),
        model_name=arguments.model,
        named_device=None,
        given=given,
        wanted=wanted(arguments),
        runs_dir=arguments.runs_dir,
        for_launch=True,
        calibrate=arguments.calibration,
        on_processor=arguments.cpu,
    )
    planned = confirm(ui, planned)
    show_plan(ui, planned)
    if not arguments.yes and not ui.confirm("Start this run?"):
        ui.say("not started; nothing was written")
        return 0
    run_dir = write_run(planned, arguments.name, arguments.runs_dir)
    ui.say(f"run directory: {run_dir.root}")
    record = carry_out(ui, run_dir, planned)
    ui.json({**planned_to_dict(planned), "run_dir": str(run_dir.root), "record": record})
    return 0
