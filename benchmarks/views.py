"""What `benchmarks.accuracy` prints: tables made from comparisons. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table

from benchmarks.comparison import BARS, Compared, Report, statistics
from benchmarks.draws import AXES, Draw, axis_values
from benchmarks.speed import BAR_PER_SECOND, Speed
from ftplan.launcher.ui import table
from ftplan.planner.phases import COMPONENTS, Phase
from ftplan.planner.plan import flag_name
from ftplan.planner.units import format_bytes, format_count, format_percent

_LEGEND = (
    "Errors are closed form / dry run - 1 of the allocated peak. Median, 95th percentile and "
    "maximum are of their size, bias is their mean."
)

# Differences of components that a line names.
_DIFFERENCES = 3


def report(found: Report, num_worst: int) -> list[RenderableType]:
    """All tables, those that would be empty left out."""
    parts: list[RenderableType] = []
    if found.compared:
        parts += [groups_table(found), "", _LEGEND, ""]
        parts += [worst_table(found.worst[:num_worst]), ""]
    for who, reasons in (
        ("closed form", found.refused_by_closed_form),
        ("dry run, so that there is nothing to compare with", found.refused_by_dry_run),
    ):
        if reasons:
            parts += [refusals_table(f"Refused by the {who}", reasons), ""]
    return [*parts, summary(found)]


def groups_table(found: Report) -> Table:
    """Statistics of each group, and of all."""
    columns = ("by", "", ">count", ">median", ">p95", ">max", ">bias")
    return table("Allocated peak", columns, group_rows(found, tuple(found.groups())))


def group_rows(found: Report, groupings: Sequence[str]) -> list[list[str]]:
    """The cells of that table for these groupings; each is named in the first of its rows."""
    rows = [
        _row(grouping if not number else "", group, errors)
        for grouping in groupings
        for number, (group, errors) in enumerate(sorted(found.groups()[grouping].items()))
    ]
    return [*rows, _row("all", "", found.errors)]


def _row(grouping: str, group: str, errors: Sequence[float]) -> list[str]:
    stats = statistics(errors)
    assert stats is not None
    shares = [f"{100 * stats[name]:.2f} %" for name in ("median", "p95", "max")]
    return [grouping, group, f"{stats['count']}", *shares, format_percent(stats["bias"])]


def worst_table(worst: Sequence[Compared]) -> Table:
    """The configurations that are farthest off, and which components are."""
    rows: list[list[RenderableType]] = [
        [
            c.reference.configuration.key,
            format_percent(c.error),
            format_bytes(c.reference.peak_phase.allocated_peak_bytes),
            f"{_what(c)}: {_differences(c)}",
        ]
        for c in worst
    ]
    columns = ("key", ">off by", ">dry run", "what, and its components above the dry run's")
    return table("Farthest off", columns, rows)


def _what(c: Compared) -> str:
    drawn = c.reference.configuration
    given = drawn.given
    tokens = f"{given['per_device_train_batch_size']}x{given['max_length']}"
    return ", ".join(
        (drawn.name, given["method"], given["quantization"], tokens, c.reference.peak_phase.name)
    )


def _differences(c: Compared) -> str:
    largest = list(c.differences.items())[:_DIFFERENCES]
    return ", ".join(
        f"{name} {'+' if size > 0 else ''}{format_bytes(size)}" for name, size in largest
    )


def refusals_table(title: str, reasons: Mapping[str, int]) -> Table:
    """How many configurations each reason stopped."""
    ordered = sorted(reasons.items(), key=lambda pair: -pair[1])
    rows: list[list[RenderableType]] = [[f"{count}", why] for why, count in ordered]
    return table(title, (">count", "why"), rows)


def summary(found: Report) -> str:
    """One line: how many, and whether the bars are reached."""
    by_form = sum(found.refused_by_closed_form.values())
    by_run = sum(found.refused_by_dry_run.values())
    bars = (
        f"{BARS.least_count} compared or more, median {100 * BARS.median:g} %, "
        f"95th percentile {100 * BARS.p95:g} %, maximum {100 * BARS.farthest:g} %"
    )
    return (
        f"{len(found.compared)} compared, {by_form} refused by the closed form, {by_run} by the "
        f"dry run. Bars ({bars}): {'reached' if found.within else 'MISSED'}"
    )


def configuration(c: Compared) -> list[RenderableType]:
    """One configuration: settings as flags, what lives at the peak, the peak of each phase."""
    drawn = c.reference.configuration
    flags = " ".join(
        f"{flag_name(name)} {_spelled(value)}" for name, value in drawn.given.items() if value != ()
    )
    parts: list[RenderableType] = [drawn.name, flags]
    if drawn.config is not None:
        parts.append(json.dumps(drawn.config))
    if c.refused is not None:
        parts.append(f"refused: {c.refused}")
    if not c.reference.refused:
        parts += ["", components_table(c), "", phases_table("dry run", c.reference.phases)]
    if c.estimate is not None:
        parts += ["", phases_table("closed form", c.estimate.phases)]
    return parts


def _spelled(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def components_table(c: Compared) -> Table:
    """Components at both peaks, side by side."""
    known = c.reference.peak_phase
    said = c.estimate.peak_phase if c.estimate else None
    rows: list[list[RenderableType]] = [
        [
            what,
            *_beside(known.components.get(name, 0), said.components.get(name, 0) if said else None),
        ]
        for name, what in COMPONENTS.items()
    ]
    peak = said.allocated_peak_bytes if said else None
    rows.append(["all", *_beside(known.allocated_peak_bytes, peak)])
    rows.append(["in", known.name, said.name if said else "-", ""])
    return table("At the peak", ("component", ">dry run", ">closed form", ">above"), rows)


def _beside(known: int, said: int | None) -> tuple[str, str, str]:
    if said is None:
        return format_bytes(known), "-", ""
    return format_bytes(known), format_bytes(said), format_bytes(said - known)


def phases_table(who: str, phases: Sequence[Phase]) -> Table:
    """The allocated peak of each phase."""
    rows: list[list[RenderableType]] = [
        [phase.name, format_bytes(phase.allocated_peak_bytes)] for phase in phases
    ]
    return table(f"Phases by {who}", ("phase", ">allocated"), rows)


def draw(drawn: Draw) -> list[RenderableType]:
    """How often each value of each axis came up, and what was drawn again."""
    counts: Counter[tuple[str, object]] = Counter()
    models: Counter[str] = Counter()
    for item in drawn.configurations:
        counts.update(axis_values(item).items())
        models[item.name] += 1
    rows: list[list[RenderableType]] = [
        [axis, ", ".join(f"{value if value != '' else '-'}: {counts[axis, value]}" for value in w)]
        for axis, w in AXES.items()
    ]
    rows.append(["model", ", ".join(f"{name}: {n}" for name, n in sorted(models.items()))])
    return [
        table(f"{len(drawn.configurations)} configurations", ("axis", "values"), rows),
        "",
        refusals_table("Drawn again", drawn.redrawn),
    ]


def reserved(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Errors of what the allocator holds: of the replay, and of a share in its place."""
    rows: list[Sequence[RenderableType]] = [
        [
            allocator.replace("_", " ") if not number else "",
            way,
            str(of.get("count", 0)),
            *(format_percent(of[name]) if of else "" for name in ("median", "p95", "max", "bias")),
        ]
        for allocator, ways in found.items()
        for number, (way, of) in enumerate(ways.items())
    ]
    columns = ("allocator", "by", ">count", ">median", ">p95", ">max", ">bias")
    return table("Peak of reserved bytes, closed form / dry run - 1", columns, rows)


def speed(measured: Speed) -> str:
    """Estimates a second, first ones and known ones, and whether that is enough."""
    reached = "reached" if measured.within else "MISSED"
    return (
        f"{format_count(measured.estimates)} plans of {measured.models} models on one core: "
        f"{format_count(measured.per_second)} estimates a second where the kind of plan is known "
        f"(bar {format_count(BAR_PER_SECOND)}: {reached}), "
        f"{format_count(measured.first_per_second)} with every kind worked out on the way"
    )
