"""The directory of several stages: one run directory for each, carried out in order."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ftplan.launcher.launching import (
    carry_out,
    default_name,
    planned_settings,
    result_lines,
    write_run,
)
from ftplan.launcher.lock import held
from ftplan.launcher.merge_adapter import merge_adapter
from ftplan.launcher.run_dir import (
    create_run,
    write_json,
    write_yaml,
)
from ftplan.launcher.stage_file import of_stage
from ftplan.launcher.stages import PlannedStage
from ftplan.launcher.stages_dir import StageRun, StagesDir, is_stages_dir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import FtplanError, InputError
from ftplan.planner.stages import Kept, backward_transfer, what_helps

_SCHEMA = 1


def check_whole(path: Path) -> None:
    """Raises InputError for the run directory of one stage: stages are carried out together."""
    parent = path.resolve().parent
    if is_stages_dir(parent):
        shown = shlex.quote(str(path.parent))
        raise InputError(
            f"`{path}` is a stage of `{path.parent}`",
            f"`ftplan resume {shown}` goes on with the stages, `ftplan launch {shown}` begins anew",
        )


def write_stages(stages: Sequence[PlannedStage], name: str | None, runs_dir: Path) -> StagesDir:
    """The directory of all stages, whole or not at all."""
    made = StagesDir(create_run(runs_dir, name or _default_name(stages)).root)
    try:
        for stage in stages:
            write_run(stage.planned, stage.folder, made.root, _of_stage(stage, stages))
        told = [
            {
                "folder": stage.folder,
                "name": stage.name,
                "begin": stage.begin,
                "objective": stage.plan.objective,
                "method": stage.plan.method,
            }
            for stage in stages
        ]
        # Last: without it the folder is none of stages.
        write_yaml(made.stages, {"schema": _SCHEMA, "stages": told}, "Trained in this order.")
    except BaseException:
        shutil.rmtree(made.root, ignore_errors=True)
        raise
    return made


def _default_name(stages: Sequence[PlannedStage]) -> str:
    """`smollm2-135m-instruct-lora-books-then-preferences`."""
    names = [default_name(stages[0].planned), *(stage.name for stage in stages[1:])]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-then-".join(names))[:100].strip("-.")


def _of_stage(stage: PlannedStage, stages: Sequence[PlannedStage]) -> dict[str, Any]:
    """What train.yaml says of a stage, beside what it says of every run."""
    before = stages[: stage.number - 1]
    scores = stage.plan.resolved_objective.scores
    # A reward model gives no text, so the loss of a text is not there to be asked for.
    comparable = [one for one in before if one.plan.resolved_objective.scores == scores]
    told: dict[str, Any] = {
        "stage": {
            "earlier": [f"../{one.folder}" for one in comparable],
            "keeps": stage.number < len(stages) and not stage.plan.resolved_objective.generates,
            "keeps_to_replay": [
                {"stage": later.folder, "rows": rows.rows, "max_length": rows.max_length}
                for later in stages[stage.number :]
                for rows in later.replayed
                if rows.stage == stage.number
            ],
            "replayed": [
                f"../{stages[rows.stage - 1].folder}/replay/{stage.folder}"
                for rows in stage.replayed
            ],
        }
    }
    base = _base_of(stage, stages)
    if base is not None:
        told["model"] = base
    if stage.begin == "adapter":
        told["adapter"] = f"../{before[-1].folder}/adapter"
    return told


def _base_of(stage: PlannedStage, stages: Sequence[PlannedStage]) -> str | None:
    """The folder of the model that a stage loads; None for the model that was asked for."""
    if stage.begin is None:
        return None
    before = stages[stage.number - 2]
    if stage.begin == "model":
        return f"../{before.folder}/model"
    if stage.begin == "merged":
        return "base"
    base = _base_of(before, stages)
    return f"../{before.folder}/base" if base == "base" else base


def begin_anew(ui: Ui, stages: StagesDir) -> None:
    """Set aside what earlier attempts have left, of each stage in its own folder."""
    for stage in stages.runs():
        with held(stage.run.root):  # its launcher may have been killed, and it may go on
            stage.run.set_results_aside()
        shutil.rmtree(stage.run.base, ignore_errors=True)  # of a stage that is trained again
    if stages.finished:
        number = 1 + sum(1 for _ in stages.previous.glob("*/record.json"))
        kept = stages.previous / str(number)
        kept.mkdir(parents=True)
        for path in (stages.record, stages.report):
            if path.is_file():
                path.rename(kept / path.name)
        ui.say(f"results of the earlier attempt are kept in `previous` of each stage and {kept}")


def carry_out_stages(ui: Ui, stages: StagesDir) -> dict[str, Any]:
    """Every stage that has not finished; returns the record of all.

    Raises what `carry_out` does, told of the stage. One that was broken off goes on from its last
    checkpoint.
    """
    from ftplan.launcher.report.write import report_stages_end

    try:
        return _carried_out(ui, stages)
    finally:
        report_stages_end(ui, stages)


def _carried_out(ui: Ui, stages: StagesDir) -> dict[str, Any]:
    runs = stages.runs()
    began = time.time()
    for number, stage in enumerate(runs, start=1):
        said = f"stage {number} of {len(runs)}, `{stage.name}`"
        if stage.run.finished:
            ui.say(f"{said}, has finished already")
            continue
        try:
            _begin(ui, runs, number)
            goes_on = stage.run.last_checkpoint() is not None
            ui.say(f"{said}: {'going on' if goes_on else 'training'}")
            carry_out(ui, stage.run, resume=True, is_last=False)
        except FtplanError as error:
            hint = f"then go on with `ftplan resume {stages.quoted}`"
            raise of_stage(error, number, _hint(error, stage, stages, hint)) from error
    record = _record(stages, runs, time.time() - began)
    write_json(stages.record, record)
    return record


def _hint(error: FtplanError, stage: StageRun, stages: StagesDir, otherwise: str) -> str:
    """An error's hint, with the folder of all stages where it names a stage's."""
    if not error.hint:
        return otherwise.removeprefix("then ")
    rest = f"`ftplan resume {stages.quoted}`"
    words = re.sub(r"`ftplan (launch|resume) [^`]*`", lambda _: rest, error.hint)
    return words if words != error.hint else f"{error.hint}; {otherwise}"


def _begin(ui: Ui, runs: Sequence[StageRun], number: int) -> None:
    """Merge the adapter of the stage before, where this one begins from that and it is not there
    yet."""
    stage = runs[number - 1]
    if stage.begin != "merged" or stage.run.base.is_dir():
        return
    ui.say(f"merging the adapter of stage {number - 1} into its base ...")
    merge_adapter(runs[number - 2].run, stage.run.base)


def _record(stages: StagesDir, runs: Sequence[StageRun], seconds: float) -> dict[str, Any]:
    """record.json of all stages: what each has learned, and what became of it."""
    records = [stage.run.read_record() for stage in runs]
    kept = kept_of(records[-1])
    lost = [one.stage for one in kept if one.is_lost]
    plans = {s.folder: planned_settings(s.run, s.run.read_plan()) for s in runs}
    return {
        "schema": _SCHEMA,
        "name": stages.root.name,
        "model": records[0]["model"],
        "stages": [
            {
                "folder": stage.folder,
                "name": stage.name,
                "begin": stage.begin,
                "objective": stage.objective,
                "method": stage.method,
                "evaluation": record["evaluation"],
                "earlier": record.get("earlier", []),
                "train_seconds": record["measured"]["train_seconds"],
            }
            for stage, record in zip(runs, records, strict=True)
        ],
        "seconds": seconds,
        "backward_transfer": backward_transfer(kept),
        "lost": lost,
        "what_helps": what_helps(lost, plans) if lost else [],
        "output": f"{runs[-1].folder}/{records[-1]['output']}",
    }


def kept_of(record: Mapping[str, Any]) -> list[Kept]:
    """What a stage's record says of the earlier ones."""
    return [msgspec.convert(one, Kept) for one in record.get("earlier", [])]


def show_end(ui: Ui, stages: StagesDir, record: Mapping[str, Any]) -> None:
    """What was lost, and what was made."""
    if ui.as_json:
        return
    from ftplan.launcher import stage_views

    ui.show("", *stage_views.lost_parts(record), "")
    ui.show_lines(list(_end_lines(stages)))
    warning = stage_views.said_lost(record)
    if warning:
        ui.warn(warning)


def _end_lines(stages: StagesDir) -> Iterator[str]:
    last = stages.runs()[-1].run
    made, *rest = result_lines(last, last.read_record())
    yield made
    yield f"figures     {stages.record}"
    yield f"again       ftplan launch {stages.quoted}"
    yield from rest[rest.index("use it") :]
