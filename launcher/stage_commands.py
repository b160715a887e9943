"""What `plan`, `auto`, `launch` and `resume` do where there are several stages."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ftplan.launcher.commands.estimate import named_device
from ftplan.launcher.commands.plan import data_asked, planned_to_dict, wanted
from ftplan.launcher.confirm import confirm
from ftplan.launcher.lock import held
from ftplan.launcher.packages import require_training
from ftplan.launcher.plan_cautions import plan_cautions
from ftplan.launcher.settings_flags import given_settings
from ftplan.launcher.stage_file import (
    AskedStage,
    checked_replay_share,
    read_stage_file,
    stage_name,
    write_stage_file,
)
from ftplan.launcher.stage_runs import (
    begin_anew,
    carry_out_stages,
    show_end,
    write_stages,
)
from ftplan.launcher.stages import PlannedStage, plan_stages, total_usd
from ftplan.launcher.stages_dir import StagesDir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError

# What is of one data file: stages of a file each have their own.
_OF_ONE_STAGE = ("eval_data", "columns")


def run_plan(arguments: argparse.Namespace, ui: Ui) -> int:
    """`ftplan plan A --then B`."""
    if arguments.explain:
        raise InputError(
            "`--explain` is of one plan, and there are several stages",
            "leave out `--then`, or read the reasons in the file of `--out`",
        )
    stages = plan_stages(
        ui,
        _asked(arguments),
        model=arguments.model,
        named_device=named_device(arguments.gpu, arguments.free_memory),
        runs_dir=arguments.runs_dir,
        for_launch=False,
        wanted=wanted(arguments),
        calibrate=arguments.calibration,
        on_processor=arguments.cpu,
    )
    if arguments.out is not None:
        write_stage_file(stages, arguments.out)
    ui.json(stages_to_dict(stages))
    show_stages(ui, stages)
    if arguments.out is not None:
        shown = shlex.quote(str(arguments.out))
        ui.say(f"written to {arguments.out}; carry it out with `ftplan launch {shown}`")
    return 0


def run_auto(arguments: argparse.Namespace, ui: Ui) -> int:
    """`ftplan auto A --then B`, once it is known that somebody is there to be asked."""
    stages = plan_stages(
        ui,
        _asked(arguments),
        model=arguments.model,
        named_device=None,
        runs_dir=arguments.runs_dir,
        for_launch=True,
        wanted=wanted(arguments),
        checked=partial(confirm, ui),
        calibrate=arguments.calibration,
        on_processor=arguments.cpu,
    )
    show_stages(ui, stages)
    if not arguments.yes and not ui.confirm("Start these stages?"):
        ui.say("not started; nothing was written")
        return 0
    return _carry_out_new(ui, stages, arguments.name, arguments.runs_dir)


def run_stage_file(arguments: argparse.Namespace, ui: Ui) -> int:
    """`ftplan launch stages.yaml`: planned again for this machine."""
    require_training()
    file = read_stage_file(arguments.run)
    stages = plan_stages(
        ui,
        file.stages,
        model=file.model,
        named_device=None,
        runs_dir=arguments.runs_dir,
        for_launch=True,
        calibrate=arguments.calibration,
        on_processor=arguments.cpu,
    )
    show_stages(ui, stages)
    return _carry_out_new(ui, stages, arguments.name, arguments.runs_dir)


def run_again(path: Path, ui: Ui) -> int:
    """`ftplan launch` of a directory of stages: all of them from the beginning."""
    stages = StagesDir(path)
    with held(stages.root):
        begin_anew(ui, stages)
        return _carry_out(ui, stages, {"schema": 1})


def run_rest(path: Path, ui: Ui) -> int:
    """`ftplan resume` of a directory of stages."""
    stages = StagesDir(path)
    if stages.finished:
        raise InputError(f"`{path}` has finished", f"`ftplan launch {stages.quoted}` runs it again")
    with held(stages.root):
        return _carry_out(ui, stages, {"schema": 1})


def _carry_out_new(
    ui: Ui, planned: Sequence[PlannedStage], name: str | None, runs_dir: Path
) -> int:
    stages = write_stages(planned, name, runs_dir)
    ui.say(f"run directory: {stages.root}")
    with held(stages.root):
        return _carry_out(ui, stages, stages_to_dict(planned))


def _carry_out(ui: Ui, stages: StagesDir, told: dict[str, Any]) -> int:
    record = carry_out_stages(ui, stages)
    show_end(ui, stages, record)
    ui.json({**told, "run_dir": str(stages.root), "record": record})
    return 0


def _asked(arguments: argparse.Namespace) -> list[AskedStage]:
    """The stages of a command line: settings are those of all of them."""
    for name in _OF_ONE_STAGE:
        if getattr(arguments, name):
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"`{flag}` is of one data file, and `--then` makes several stages",
                "write the stages to a file with `ftplan plan ... --then ... --out stages.yaml`, "
                f"and give each its own `data.{'eval_paths' if name == 'eval_data' else name}`",
            )
    given, first = given_settings(arguments), data_asked(arguments)
    share = checked_replay_share(arguments.replay_share or 0.0)
    stages = [AskedStage(name=stage_name(None, first.paths), asked=first, settings=given)]
    for paths in arguments.then:
        asked = data_asked(argparse.Namespace(**{**vars(arguments), "data": paths}))
        name = stage_name(None, asked.paths)
        stages.append(AskedStage(name=name, asked=asked, settings=given, replay_share=share))
    return stages


def show_stages(ui: Ui, stages: Sequence[PlannedStage]) -> None:
    """The stages' table, and what is to be noted about each."""
    if ui.as_json:
        return
    from ftplan.launcher import stage_views

    ui.show(*stage_views.stages_parts(stages))
    for stage in stages:
        if stage.number > 1 and stage.replay_share and not stage.replayed:
            ui.say(f"stage {stage.number} replays nothing: no text of an earlier stage suits it")
        for caution in plan_cautions(stage.planned):
            ui.warn(f"stage {stage.number}: {caution}")


def stages_to_dict(stages: Sequence[PlannedStage]) -> dict[str, Any]:
    """The object of `plan --then ... --json`."""
    return {
        "schema": 1,
        "stages": [
            {
                "name": stage.name,
                "begin": stage.begin,
                "replayed": [
                    {"stage": stages[rows.stage - 1].name, "rows": rows.rows}
                    for rows in stage.replayed
                ],
                **planned_to_dict(stage.planned),
            }
            for stage in stages
        ],
        "total": {
            "seconds": sum(stage.seconds for stage in stages),
            "usd": dict(total_usd(stages)),
        },
    }
