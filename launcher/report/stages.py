"""report.html of several stages: how each stands, what it has learned and what became of it, and
where its own report is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ftplan.launcher.report.elements import Html, join, prose, table, tag
from ftplan.launcher.report.facts import RunFacts, mapping, number, read_facts, said
from ftplan.launcher.report.page import badge, document
from ftplan.launcher.report.planned import commands, shown_root
from ftplan.launcher.run_dir import read_mapping
from ftplan.launcher.stages_dir import StageRun, StagesDir
from ftplan.planner.errors import InputError
from ftplan.planner.units import format_seconds

_COLUMNS = (
    "stage", "objective", "method", "state", ">before it", ">at its end", ">after all", ">training"
)  # fmt: skip


def stages_page(stages: StagesDir) -> str:
    """Raises InputError where the folder is damaged."""
    runs = stages.runs()
    facts = [read_facts(stage.run) for stage in runs]
    earlier = _after_all(facts[-1])
    rows = [
        _row(number, stage, of, earlier)
        for number, (stage, of) in enumerate(zip(runs, facts, strict=True), start=1)
    ]
    record = _record(stages)
    name = stages.root.resolve().name
    return document(
        name,
        tag("header", tag("h1", name), tag("p", _standing(stages, facts), class_="outcome")),
        tag(
            "main",
            tag("section", tag("h2", "Stages"), table("Loss on held-out rows", _COLUMNS, rows)),
            _lost(record.get("lost"), record.get("what_helps")),
            tag("section", tag("h2", "Go on"), _commands(stages)),
        ),
    )


def _record(stages: StagesDir) -> Mapping[str, Any]:
    try:
        return read_mapping(stages.record)
    except InputError:
        return {}


def _standing(stages: StagesDir, facts: list[RunFacts]) -> Html:
    done = sum(one.outcome.state == "finished" for one in facts)
    telling = next((one for one in facts if one.outcome.state != "finished"), facts[-1])
    return join(badge(telling.outcome), f" {done} of {len(facts)} stages have finished")


def _after_all(last: RunFacts) -> dict[str, object]:
    """The losses of earlier stages when the last one had ended, by their folders."""
    return {str(row.get("stage")): row.get("after") for row in last.earlier}


def _row(
    at: int, stage: StageRun, facts: RunFacts, earlier: Mapping[str, object]
) -> tuple[Html | str, ...]:
    # `./` keeps a folder's name from being read as a scheme.
    link = f"./{quote(stage.folder)}/{stage.run.report.name}"
    title = f"{at} {stage.name}"
    losses = [facts.evaluation(when).get("eval_loss") for when in ("before", "after")]
    seconds = number(mapping(facts.record.get("measured")).get("train_seconds"))
    return (
        tag("a", title, href=link) if stage.run.report.is_file() else title,
        stage.objective,
        stage.method,
        f"{facts.outcome.mark} {facts.outcome.state}",
        *(said(loss, "{:.3f}".format) for loss in losses),
        said(earlier.get(stage.folder), "{:.3f}".format),
        said(seconds, format_seconds),
    )


def _lost(lost: object, helps: object) -> Html | None:
    if not isinstance(lost, list) or not lost:
        return None
    advice = "; ".join(map(str, helps)) if isinstance(helps, list) else ""
    said_lost = f"Later stages have undone part of {', '.join(map(str, lost))}."
    return tag("p", said_lost, prose(f" What helps: {advice}" if advice else ""), class_="warning")


def _commands(stages: StagesDir) -> Html:
    root: Path = shown_root(stages.root)
    again = ("repeat all from the beginning", "launch")
    rows = [again] if stages.finished else [("go on with the stages", "resume"), again]
    rows.append(("make this report again", "report"))
    return commands(root, rows)
