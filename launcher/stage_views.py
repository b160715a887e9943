"""What is shown of stages: their plans side by side, and what was lost. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

_HELPS = (
    "rows of the earlier stages among those of the later (`replay_share: 0.05` of the file, "
    "`--replay-share 0.05`), a lower `learning_rate` or fewer epochs in the later stages"
)


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


def lost_table(record: Mapping[str, Any]) -> Table:
    """The held-out loss of each stage: before it, at its end, and after each later one."""
    stages = record["stages"]
    rows: list[list[RenderableType]] = []
    for number, stage in enumerate(stages):
        later = [_found(after, stage["folder"]) for after in stages[number + 1 :]]
        end = [kept for kept in later if kept is not None][-1:]
        cells = [_loss(stage["evaluation"]["before"]), _loss(stage["evaluation"]["after"])]
        cells += [_loss(kept.after if kept else None) for kept in later[-1:]]
        cells += ["-"] if not later else []
        cells.append(_change(end[0]) if end else "-")
        rows.append([f"{number + 1} {stage['name']}", stage["objective"], *cells])
    columns = ("Stage", "", ">before it", ">at its end", ">after all", "change since")
    return table("Loss on held-out rows of every stage", columns, rows)


def _found(stage: Mapping[str, Any], folder: str) -> Kept | None:
    found = [one for one in stage["earlier"] if one["stage"] == folder]
    return msgspec.convert(found[0], Kept) if found else None


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _change(kept: Kept) -> str:
    share = format_percent(kept.after / kept.at_its_end - 1) if kept.at_its_end > 0 else ""
    return f"{kept.rise:+.3f}" + (f" ({share})" if share else "")


def losses_told(record: Mapping[str, Any]) -> Iterator[str]:
    """Warnings of what was lost, with what helps; and the backward transfer in words."""
    if record["lost"]:
        transfers = record["backward_transfer"].items()
        told = ", ".join(f"{value:+.3f} ({objective})" for objective, value in transfers)
        yield (
            f"later stages undid some of {', '.join(record['lost'])}: backward transfer {told}, "
            f"where below 0 is forgetting. What helps: {_HELPS}"
        )
