"""Charts as inline SVG. Lines are drawn in a box that is stretched to the page; what is read stands
beside it as text, so that it has its size on a telephone too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from msgspec import Struct

from ftplan.launcher.report.elements import Html, tag

Point = tuple[float, float]

# A box of this many units is stretched to the chart's width and height.
_BOX = 1000

# What most charts go along.
STEPS = "optimizer step"

_MOST_POINTS = 500
_TICKS = 5

# Of a round number's first digits.
_ROUND = (1, 2, 2.5, 5, 10)


class Series(Struct, frozen=True, kw_only=True):
    """A line of a chart: `look` is how it is drawn, `colour` one of the palette."""

    name: str
    points: Sequence[Point]
    look: Literal["line", "faint", "dashed", "dots"] = "line"
    colour: int = 0


class Axis(Struct, frozen=True):
    """From `low` to `high`, both ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where a value stands, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def axis(values: Sequence[float], *, to_the_end: bool = False, whole: bool = False) -> Axis:
    """An axis that begins at 0, or below where values do. `to_the_end`: it ends with the highest
    value, else with a tick; `whole`: ticks are whole numbers."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if high == low:
        high = low + 1
    width = _round_up((high - low) / _TICKS)
    width = max(1, math.ceil(width)) if whole else width
    first, last = math.floor(low / width), math.ceil(high / width - 1e-9)
    ticks = tuple(width * number for number in range(first, last + 1))
    if to_the_end:
        return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high))
    return Axis(ticks[0], ticks[-1], ticks)


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * digits for digits in _ROUND if power * digits >= value * (1 - 1e-9))


def said_tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}" if value else "0"


def line_chart(
    title: str, series: Sequence[Series], x_label: str = STEPS, *, small: bool = False
) -> Html:
    """A figure with its title, a legend and both axes; `small` for one of several in a row."""
    known = [point for one in series for point in one.points if _is_finite(point)]
    x = axis([p[0] for p in known], to_the_end=True, whole=x_label == STEPS)
    y = axis([p[1] for p in known])
    lines = [_drawn(one, x, y) for one in series]
    grid = [
        tag("line", x1=0, x2=_BOX, y1=_down(y, tick), y2=_down(y, tick), class_="grid")
        for tick in y.ticks
    ]
    picture = tag(
        "svg",
        grid,
        lines,
        viewBox=f"0 0 {_BOX} {_BOX}",
        preserveAspectRatio="none",
        role="img",
        aria_label=_described(title, series, x_label),
    )
    frame = tag(
        "div",
        tag("div", [_y_tick(y, tick) for tick in y.ticks], class_="ys", aria_hidden="true"),
        tag("div", picture, class_="plot"),
        tag("div", [_x_tick(x, tick) for tick in x.ticks], class_="xs", aria_hidden="true"),
        tag("div", x_label, class_="xlabel"),
        class_="frame",
    )
    return tag(
        "figure",
        tag("figcaption", tag("b", title), _legend(series)),
        frame,
        class_="chart small" if small else "chart",
    )


def _drawn(one: Series, x: Axis, y: Axis) -> list[Html]:
    """Its unbroken pieces: what is no number leaves a gap."""
    classes = f"{one.look} c{one.colour}"
    if one.look == "dots":
        return [_dot(x, y, point, classes) for point in one.points if _is_finite(point)]
    found = []
    for piece in _pieces(one.points):
        if len(piece) == 1:
            found.append(_dot(x, y, piece[0], f"dots c{one.colour}"))
            continue
        told = " ".join(f"{_across(x, px)},{_down(y, py)}" for px, py in thinned(piece))
        found.append(tag("polyline", points=told, class_=classes))
    return found


def _pieces(points: Sequence[Point]) -> Iterator[list[Point]]:
    piece: list[Point] = []
    for point in points:
        if _is_finite(point):
            piece.append(point)
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most so many points: of each stretch the lowest and the highest, so that none is
    hidden."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    found: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def _dot(x: Axis, y: Axis, point: Point, classes: str) -> Html:
    """A line of no length with round ends: a circle that is not stretched."""
    at, down = _across(x, point[0]), _down(y, point[1])
    return tag("path", d=f"M{at} {down}h0", class_=classes)


def _across(x: Axis, value: float) -> str:
    return f"{_BOX * x.at(value):.1f}".removesuffix(".0")


def _down(y: Axis, value: float) -> str:
    return f"{_BOX * (1 - y.at(value)):.1f}".removesuffix(".0")


def _y_tick(y: Axis, tick: float) -> Html:
    return tag("span", said_tick(tick), style=f"bottom:{100 * y.at(tick):.2f}%")


def _x_tick(x: Axis, tick: float) -> Html:
    return tag("span", said_tick(tick), style=f"left:{100 * x.at(tick):.2f}%")


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _legend(series: Sequence[Series]) -> Html | None:
    """What the lines are; a single one is told by the title."""
    if len(series) < 2:
        return None
    return tag("span", [_key(one) for one in series], class_="legend")


def _key(one: Series) -> Html:
    picture = tag(
        "svg",
        tag("path", d="M8 8h0" if one.look == "dots" else "M1 8h14", class_=_classes(one)),
        viewBox="0 0 16 16",
        class_="key",
        aria_hidden="true",
    )
    return tag("span", picture, one.name)


def _classes(one: Series) -> str:
    return f"{one.look} c{one.colour}"


def _described(title: str, series: Sequence[Series], x_label: str) -> str:
    """The chart in words: where each line begins and ends."""
    told = []
    for one in series:
        points = [point for point in one.points if _is_finite(point)]
        if points:
            (first_x, first), (last_x, last) = points[0], points[-1]
            told.append(
                f"{one.name}: {first:.4g} at {x_label} {first_x:.6g}, {last:.4g} at {last_x:.6g}"
            )
    return f"{title}. {'; '.join(told)}"


def smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average with the start-up bias taken out; what is no number is passed
    over."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        result.append(total / norm if norm else math.nan)
    return result
