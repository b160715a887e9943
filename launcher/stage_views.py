"""What is shown of stages: their plans side by side, and what was lost. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ftplan.launcher import views
from ftplan.launcher.stages import PlannedStage, total_usd
from ftplan.launcher.ui import facts, table
from ftplan.planner.stages import Kept
from ftplan.planner.units import format_bytes, format_percent, format_seconds

# Of a diverged model; the exponential of more has no name.
_MOST_NATS = 100.0


def stages_parts(stages: Sequence[PlannedStage]) -> list[RenderableType]:
    """All stages on one screen."""
    first = stages[0].planned
    total = format_seconds(sum(stage.seconds for stage in stages))
    costs = total_usd(stages)
    known = [("model", f"{first.source.spec.name}: {first.model_why}")]
    known.append(("hardware", f"{first.device.name}, {format_bytes(first.device.free_bytes)} free"))
    known.append(("time", f"{total} for {len(stages)} stages"))
    if any(costs.values()):
        known.append(("cost", ": ".join(views.cost_cells(costs, first.device))))
    return [facts(known), Text(""), stages_table(stages), Text(""), settings_table(stages)]


def stages_table(stages: Sequence[PlannedStage]) -> Table:
    """What each stage does, and what it takes."""
    rows: list[list[RenderableType]] = []
    for stage in stages:
        memory, planned = stage.planned.chosen.memory, stage.planned
        rows.append(
            [
                f"{stage.number} {stage.name}",
                f"{stage.plan.objective}, {stage.plan.method}",
                f"{planned.profile.num_train_rows:,}",
                format_bytes(memory.required_bytes),
                format_seconds(stage.seconds),
                stage.said_begin,
            ]
        )
    columns = ("Stage", "", ">rows", ">memory", ">time", "begins from")
    return table("Stages, each begun where the last one ended", columns, rows)


def settings_table(stages: Sequence[PlannedStage]) -> Table:
    """Settings that a stage is known by."""
    rows: list[list[RenderableType]] = []
    for stage in stages:
        plan = stage.plan
        passes = f"{plan.num_train_epochs:g} epochs"
        rows.append(
            [
                f"{stage.number} {stage.name}",
                f"{plan.learning_rate:g}",
                f"{stage.planned.steps:,}" + ("" if plan.max_steps else f" ({passes})"),
                f"{plan.effective_batch_size}",
                f"{plan.max_length:,}",
                str(plan.lora_rank) if plan.resolved_method.has_rank else "-",
                _said_replay(stage, stages),
            ]
        )
    columns = ("Stage", ">rate", ">steps", ">batch", ">tokens", ">rank", "replays")
    return table("Settings", columns, rows)


def _said_replay(stage: PlannedStage, stages: Sequence[PlannedStage]) -> str:
    told = [f"{rows.rows:,} rows of {stages[rows.stage - 1].name}" for rows in stage.replayed]
    return ", ".join(told) or "-"


def lost_parts(record: Mapping[str, Any]) -> list[RenderableType]:
    """The losses of all stages, and the backward transfer."""
    transfers = record["backward_transfer"].items()
    told = ", ".join(f"{value:+.3f} ({objective})" for objective, value in transfers)
    said = f"{told}; below 0 is forgetting"
    return [lost_table(record), *([facts([("backward transfer", said)])] if told else [])]


def lost_table(record: Mapping[str, Any]) -> Table:
    """The held-out loss of each stage: before it, at its end, and after the last one."""
    last = record["stages"][-1]
    rows: list[list[RenderableType]] = []
    for number, stage in enumerate(record["stages"], start=1):
        kept = _found(last, stage["folder"])
        evaluation = stage["evaluation"]
        rows.append(
            [
                f"{number} {stage['name']}",
                stage["objective"],
                _loss(evaluation["before"]),
                _loss(evaluation["after"]),
                _loss(kept.after) if kept else "-",
                _change(kept) if kept else "-",
            ]
        )
    columns = ("Stage", "", ">before it", ">at its end", ">after all", "change since")
    return table("Loss on held-out rows of every stage", columns, rows)


def _found(stage: Mapping[str, Any], folder: str) -> Kept | None:
    found = [one for one in stage["earlier"] if one["stage"] == folder]
    return msgspec.convert(found[0], Kept) if found else None


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _change(kept: Kept) -> str:
    """Of texts, that of the perplexity as well."""
    if kept.objective != "sft":
        return f"{kept.rise:+.3f}"
    return f"{kept.rise:+.3f}, perplexity {format_percent(math.expm1(min(kept.rise, _MOST_NATS)))}"


def said_lost(record: Mapping[str, Any]) -> str | None:
    """Which stages were undone, and what helps; None where little was."""
    if not record["lost"]:
        return None
    names = ", ".join(f"`{name}`" for name in record["lost"])
    return f"later stages undid part of {names}. What helps: {'; '.join(record['what_helps'])}"
