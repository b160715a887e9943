"""What a run took beside memory by phase: seconds, money, and what its devices did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ftplan.launcher.costs import usd_for_gpu
from ftplan.launcher.report.charts import Series, line_chart
from ftplan.launcher.report.elements import Html, join, table, tag
from ftplan.launcher.report.facts import RunFacts, mapping, number, said
from ftplan.launcher.report.results import step_points
from ftplan.planner.units import GIB, format_percent, format_seconds


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}"


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("a step", "step_seconds", format_seconds),
    ("tokens a second", "tokens_per_second_per_gpu", _rate),
    ("training", "train_seconds", format_seconds),
    ("evaluation", "evaluation_seconds", format_seconds),
)


def time_section(facts: RunFacts) -> Html | None:
    points = step_points(facts, "seconds")
    predicted = number(facts.predicted.get("step_seconds"))
    series = [Series(name="measured", points=points)] if points else []
    if points and predicted:
        ends = [(point[0], predicted) for point in (points[0], points[-1])]
        series.append(Series(name="predicted", points=ends, look="dashed", colour=1))
    rows = list(_time_rows(facts))
    return join(
        line_chart("Seconds a step", series) if series else None,
        table("Predicted and measured", ("", ">predicted", ">measured", ">off by"), rows)
        if rows
        else None,
    )


def _time_rows(facts: RunFacts) -> Iterator[tuple[str, str, str, str]]:
    measured = facts.measured
    for label, name, form in _FIGURES:
        guess, real = number(facts.predicted.get(name)), number(measured.get(name))
        if guess is not None or real is not None:
            off = format_percent(guess / real - 1) if guess and real else "-"
            if name == "train_seconds" and not facts.record and real:
                label, off = "training so far", "-"
            yield label, said(guess, form), said(real, form), off
    for label, name in (("loading", "load"), ("the whole run", "total")):
        seconds = number(mapping(measured.get("seconds")).get(name))
        if seconds is not None:
            yield label, "-", format_seconds(seconds), "-"
    yield from _cost_rows(facts, number(measured.get("train_seconds")))


def _cost_rows(facts: RunFacts, seconds: float | None) -> Iterator[tuple[str, str, str, str]]:
    """Of training alone, at the lowest prices of the catalog."""
    device = str(mapping(facts.plan.get("device")).get("name"))
    gpus = number(facts.setting("num_gpus")) or 1
    planned, real = (
        usd_for_gpu(device, gpus * known) if known else {}
        for known in (number(facts.predicted.get("train_seconds")), seconds)
    )
    for billing in dict.fromkeys([*planned, *real]):
        sides = [usd.get(billing) for usd in (planned, real)]
        if any(side is not None for side in sides):
            told = ["-" if side is None else f"{side:.2f} USD" for side in sides]
            yield f"cost of training, {billing}", told[0], told[1], "-"


# Of each GPU: key of a sample, title, and what one unit of the chart is.
_OF_GPU: tuple[tuple[str, str, float], ...] = (
    ("used_bytes", "Memory in use (GiB)", GIB),
    ("utilization", "Utilization (%)", 0.01),
    ("temperature_celsius", "Temperature (°C)", 1),
    ("power_watts", "Power (W)", 1),
)
_OF_PROCESS: tuple[tuple[str, str, float], ...] = (
    ("process_bytes", "Memory of the process (GiB)", GIB),
    ("cores", "Processor cores kept busy", 1),
)


def devices_section(facts: RunFacts) -> Html | None:
    """What GPUs and the process did over the run, where samples were taken."""
    times = [at for row in facts.samples if (at := number(row.get("at"))) is not None]
    if len(times) < 2:
        return None
    first = times[0]
    rows = [row for row in facts.samples if number(row.get("at")) is not None]
    minutes = [(number(row["at"]) or first) / 60 - first / 60 for row in rows]
    charts = []
    for key, title, unit in _OF_GPU:
        lines = list(_gpu_lines(rows, minutes, key, unit))
        if lines:
            charts.append(line_chart(title, lines, "minutes", small=True))
    for key, title, unit in _OF_PROCESS:
        points = _points(rows, minutes, key, unit)
        if points:
            charts.append(
                line_chart(title, [Series(name=title, points=points)], "minutes", small=True)
            )
    return tag("div", charts, class_="row") if charts else None


def _gpu_lines(
    rows: list[dict[str, Any]], minutes: list[float], key: str, unit: float
) -> Iterator[Series]:
    by_gpu = [_gpus(row) for row in rows]
    for colour, index in enumerate(sorted({index for gpus in by_gpu for index in gpus})):
        of_one = [gpus.get(index, {}) for gpus in by_gpu]
        points = _points(of_one, minutes, key, unit)
        if points:
            look: Any = "dashed" if colour % 2 else "line"
            yield Series(name=f"GPU {index}", points=points, colour=colour, look=look)


def _gpus(row: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    gpus = row.get("gpus")
    told = [mapping(gpu) for gpu in gpus] if isinstance(gpus, list) else []
    return {gpu["index"]: gpu for gpu in told if isinstance(gpu.get("index"), int)}


def _points(
    rows: list[Any], minutes: list[float], key: str, unit: float
) -> list[tuple[float, float]]:
    return [
        (at, value / unit)
        for at, row in zip(minutes, rows, strict=True)
        if (value := number(row.get(key))) is not None
    ]
