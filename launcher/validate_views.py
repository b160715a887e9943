"""What `ftplan validate` prints: tables made from comparisons. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table

from ftplan.launcher.cases import TRAINERS_OF_CASES, UNKNOWN_TRAINER
from ftplan.launcher.ui import table
from ftplan.planner.accuracy import (
    FAILED_WITH,
    FAR_UNDER,
    QUANTITIES,
    SURVIVED_WITH,
    Comparison,
    GroupStatistics,
    errors_by_group,
    grouped,
    percentile,
)
from ftplan.planner.units import format_bytes, format_count, format_percent

_TITLES = dict(
    zip(
        QUANTITIES,
        ("Allocated memory", "Reserved memory", "Device memory", "Tokens per second and GPU"),
        strict=True,
    )
)
_SHORT_TITLES = dict(zip(QUANTITIES, ("allocated", "reserved", "device", "tokens/s"), strict=True))
_WORST = 3
# So that a row of the statistics keeps to 80 columns.
_SOURCE_WIDTH = 26

_LEGEND = (
    "Errors are predicted / measured - 1: above 0 where ftplan says too much. Median and p95 (95th "
    "percentile) are of their size, bias is their mean, under the share of runs predicted too low."
)

_BOUNDS_LEGEND = (
    "Of these runs only a limit of the rows' length is known. They are predicted at that limit, "
    "which should be above what was measured. Held: the share where it is; closest and median: "
    "predicted / measured - 1."
)


def report(comparisons: Sequence[Comparison]) -> list[RenderableType]:
    """All tables, those that would be empty left out."""
    predicted = [c for c in comparisons if c.predicted]
    compared = [q for q in QUANTITIES if errors_by_group(predicted, q)]
    parts: list[RenderableType] = [trainers_table(comparisons), ""] if compared else []
    for quantity in compared:
        parts += [statistics_table(predicted, quantity), ""]
    if compared:
        parts += [_LEGEND, "", worst_table(predicted, compared[0]), ""]
    bounds = [c for c in predicted if c.is_bound]
    if any(c.excess(q) is not None for c in bounds for q in QUANTITIES):
        parts += [bounds_table(bounds), "", _BOUNDS_LEGEND, ""]
    if tight := [c for c in predicted if c.survival_foreseen is not None]:
        parts += [survival_table(tight), ""]
    if len(predicted) < len(comparisons):
        parts += [refusals_table(comparisons), ""]
    if any(c.refused[0].startswith(UNKNOWN_TRAINER) for c in comparisons if c.refused):
        parts += [f"Trainers that are modelled: {', '.join(TRAINERS_OF_CASES)}.", ""]
    count, refused = len(comparisons), len(comparisons) - len(predicted)
    cases = "1 case" if count == 1 else f"{count} cases"
    parts.append(f"{cases}: {len(predicted)} predicted, {refused} refused")
    if compared:
        parts.append(_far_under(predicted, compared[0]))
    within = [c.speed_within for c in predicted if c.speed_within is not None]
    if within:
        parts.append(f"Speed within its bounds: {sum(within)} of {len(within)}")
    return parts


def survival_table(comparisons: Sequence[Comparison]) -> Table:
    """Runs that were left little memory on purpose: how much, and whether they survived."""
    rows = [
        [
            comparison.id,
            format_bytes(required := _required(comparison)),
            format_bytes(free := comparison.measured[name] or 0),
            format_percent(free / required - 1),
            "survived" if name == SURVIVED_WITH else "failed",
            "foreseen" if comparison.survival_foreseen else "not foreseen",
        ]
        for comparison in comparisons
        for name in (SURVIVED_WITH, FAILED_WITH)
        if comparison.measured.get(name) is not None
    ]
    columns = ("case", ">required", ">free", ">more", "", "")
    return table("Runs with little memory", columns, rows)


def _required(comparison: Comparison) -> int:
    assert comparison.predicted is not None
    return comparison.predicted.required_bytes


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 1 else 0}f} %"


def _far_under(comparisons: Sequence[Comparison], quantity: str) -> str:
    group = GroupStatistics.of([error for _, error in errors_by_group(comparisons, quantity)])
    far = round(group.far_under_share * group.count)
    much = f"by more than {100 * FAR_UNDER:g} %"
    return f"{_TITLES[quantity]} predicted too low {much}: {far} of {group.count}"


def trainers_table(comparisons: Sequence[Comparison]) -> Table:
    """How many cases of each training stack are predicted, and how far off each quantity is."""
    columns = ("trainer", ">predicted", "", ">runs", ">median", ">p95", ">bias", ">under")
    return table("By trainer", columns, trainer_rows(comparisons))


def trainer_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """The cells of that table; a trainer is named in the first of its rows."""
    rows: list[list[str]] = []
    for trainer, count in Counter(c.trainer for c in comparisons).most_common():
        predicted = [c for c in comparisons if c.trainer == trainer and c.predicted]
        groups = [(q, [e for _, e in errors_by_group(predicted, q)]) for q in QUANTITIES]
        found = [
            [_SHORT_TITLES[quantity], *_cells(GroupStatistics.of(errors))]
            for quantity, errors in groups
            if errors
        ]
        head = [trainer or "-", f"{len(predicted)} of {count}"]
        for cells in found or [["-"] * 6]:
            rows.append([*head, *cells])
            head = ["", ""]
    return rows


def statistics_table(comparisons: Sequence[Comparison], quantity: str) -> Table:
    """The errors of one quantity, a row for each source and method, and one for all."""
    errors = errors_by_group(comparisons, quantity)
    groups = grouped(errors)
    names = short_sources({c.source for c in comparisons})
    width = max(map(len, names.values()))  # the same in each table of a report
    rows = [
        _row(names[source].ljust(width), method, groups[source, method])
        for source, method in sorted(groups)
    ]
    if len(groups) > 1:
        rows.append(_row("all", "", GroupStatistics.of([error for _, error in errors])))
    columns = ("source", "method", ">runs", ">median", ">p95", ">bias", ">under")
    return table(_TITLES[quantity], columns, rows)


def _row(source: str, method: str, group: GroupStatistics) -> list[RenderableType]:
    return [source, method, *_cells(group)]


def _cells(group: GroupStatistics) -> list[str]:
    return [
        f"{group.count}",
        _percent(group.median),
        _percent(group.p95),
        signed_percent(group.bias),
        f"{100 * group.under_share:.0f} %",
    ]


def signed_percent(share: float) -> str:
    """With its sign, unless it is printed as 0."""
    size = _percent(abs(share))
    sign = "" if size == _percent(0) else "+" if share > 0 else "-"
    return sign + size


def worst_table(comparisons: Iterable[Comparison], quantity: str) -> Table:
    """The runs whose predictions are farthest off."""
    errors = [(c, error) for c in comparisons if (error := c.error(quantity)) is not None]
    worst = sorted(errors, key=lambda pair: -abs(pair[1]))[:_WORST]
    form = format_bytes if quantity.endswith("_bytes") else format_count
    rows: list[list[RenderableType]] = [
        [
            format_percent(error),
            form(getattr(c.predicted, quantity)),
            form(c.measured[quantity] or 0),
            c.id,
        ]
        for c, error in worst
    ]
    return table(
        f"Farthest off: {_TITLES[quantity].lower()}",
        (">off by", ">predicted", ">measured", "case"),
        rows,
    )


def bounds_table(bounds: Sequence[Comparison]) -> Table:
    """How far upper bounds are above what was measured, by quantity and source."""
    names = short_sources({c.source for c in bounds})
    rows: list[list[RenderableType]] = []
    for quantity in QUANTITIES:
        for source in sorted(names):
            found = [c.excess(quantity) for c in bounds if c.source == source]
            above = [excess for excess in found if excess is not None]
            if not above:
                continue
            held = sum(excess >= 0 for excess in above) / len(above)
            rows.append(
                [
                    _TITLES[quantity].lower(),
                    names[source],
                    f"{len(above)}",
                    f"{100 * held:.0f} %",
                    format_percent(min(above)),
                    format_percent(percentile(above, 0.5)),
                ]
            )
    columns = ("quantity", "source", ">runs", ">held", ">closest", ">median")
    return table("Upper bounds", columns, rows)


def refusals_table(comparisons: Iterable[Comparison]) -> Table:
    """How many cases each reason stopped; a case counts under its first."""
    reasons = Counter(c.refused[0] for c in comparisons if c.refused)
    rows: list[list[RenderableType]] = [
        [f"{count}", reason] for reason, count in reasons.most_common()
    ]
    return table("Refused", (">cases", "why"), rows)


def short_sources(sources: Iterable[str]) -> dict[str, str]:
    """The shortest name that sets each source apart, in `_SOURCE_WIDTH` columns."""
    spellings = {source: _spellings(source) for source in sources}
    taken = Counter(name for names in spellings.values() for name in dict.fromkeys(names))
    return {
        source: next((name for name in names if taken[name] == 1), names[-1]) or "-"
        for source, names in spellings.items()
    }


def _spellings(source: str) -> list[str]:
    """Ever longer names of a source.

    `fitcheck`, `fitcheck t4-sweep`, `fitcheck t4-sweep-2026-09-15` for
    `fitcheck 0.3.1: measurements/t4-sweep-2026-09-15.json`.
    """
    path = re.sub(r"^https?://[^/]+/", "", source)
    parts = (path.split() or [""])[0].split("/")
    project = parts[1] if len(parts) > 1 and parts[1] else parts[0]
    last = re.sub(r"\.\w+$", "", (re.findall(r"[\w.-]+", source) or [""])[-1])
    undated = re.sub(r"-\d{4}-?\d\d-?\d\d$", "", last)
    return [_clipped(name) for name in (project, f"{project} {undated}", f"{project} {last}")]


def _clipped(name: str) -> str:
    """Its beginning and its end, where two long names differ."""
    if len(name) <= _SOURCE_WIDTH:
        return name
    return f"{name[: _SOURCE_WIDTH - 13]}…{name[-12:]}"
