"""loss.png and memory.png, for slides and mail: dark on white, so that they can be read on any
page. matplotlib is imported where they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftplan.launcher.report.charts import smoothed
from ftplan.launcher.report.elements import printable
from ftplan.launcher.report.facts import RunFacts, read_facts
from ftplan.launcher.report.memory import PhaseGroup, phase_groups, shown_components
from ftplan.launcher.report.results import evaluation_points, loss_unit, step_points
from ftplan.launcher.report.style import LIGHT, NUM_COLOURS
from ftplan.launcher.run_dir import RunDir
from ftplan.planner.phases import COMPONENTS
from ftplan.planner.units import GIB, MIB, format_bytes

_DOTS_PER_INCH = 120

# Over neighbouring colours, so that they differ without colours too.
_HATCHES = ("", "///", "|||", "\\\\\\")


def draw_pictures(run: RunDir) -> list[Path]:
    """Those for which there is something to draw. Raises ImportError without matplotlib, OSError
    where they cannot be written."""
    facts = read_facts(run)
    figures = {run.loss_plot: _loss(facts), run.memory_plot: _memory(facts)}
    drawn = {path: figure for path, figure in figures.items() if figure is not None}
    for path, figure in drawn.items():
        beside = path.with_name(f".{path.name}.tmp")
        figure.savefig(beside, dpi=_DOTS_PER_INCH, format="png", facecolor="white")
        beside.replace(path)
    return list(drawn)


def _figure(height: float) -> tuple[Any, Any]:
    """A figure that no window system knows of, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _title(facts: RunFacts) -> str:
    """The run's name. A dollar would begin a formula."""
    return printable(facts.name).replace("$", r"\$")


def _loss(facts: RunFacts) -> Any:
    """The training loss of each step and smoothed, and the held-out loss where it was measured."""
    points, held_out = step_points(facts, "loss"), evaluation_points(facts)
    if not points:
        return None
    figure, axes = _figure(4.2)
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    training, other = LIGHT["c0"], LIGHT["c1"]
    axes.plot(steps, losses, color=training, alpha=0.45, linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color=training, linewidth=2, label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color=other, label="held-out")
    lowest = min([0.0, *(loss for loss in losses if loss == loss)])
    axes.set_ylim(bottom=lowest or 0)
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss{loss_unit(facts)}")
    axes.set_title(_title(facts), loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _memory(facts: RunFacts) -> Any:
    """A bar for each phase that was predicted, by component, and one for what was measured."""
    groups = phase_groups(facts)
    bars = [bar for group in groups for bar in _bars(group)]
    if not bars:
        return None
    components = shown_components(groups)
    highest = max(sum(sizes.values()) for _, sizes in bars)
    unit, unit_name = (GIB, "GiB") if highest >= GIB else (MIB, "MiB")
    figure, axes = _figure(1.6 + 0.36 * len(bars))
    for at, (_, sizes) in enumerate(bars):
        _draw_bar(axes, at, sizes, components, unit)
        total = sum(sizes.values())
        axes.text(total / unit, at, f" {format_bytes(total)}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * highest / unit)
    axes.set_xlabel(f"tensors at the highest point of each phase ({unit_name})")
    axes.set_title(_title(facts), loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(
        handles=_keys(components, any(_MEASURED in sizes for _, sizes in bars)),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    return figure


_MEASURED = "measured"


def _bars(group: PhaseGroup) -> list[tuple[str, dict[str, int]]]:
    bars = [(phase.name, dict(phase.components)) for phase in group.predicted]
    if size := group.measured_bytes:
        over = f" {group.name}" if len(group.predicted) != 1 else ""
        bars.append((f"measured{over}", {_MEASURED: size}))
    return bars


def _draw_bar(axes: Any, at: int, sizes: dict[str, int], components: list[str], unit: int) -> None:
    left = 0.0
    for name in (*components, _MEASURED):
        if size := sizes.get(name):
            look = _look(components, name)
            axes.barh(at, size / unit, left=left / unit, height=0.7, linewidth=0.6, **look)
            left += size


def _look(components: list[str], name: str) -> dict[str, Any]:
    if name == _MEASURED:
        return {"facecolor": "white", "edgecolor": "black", "hatch": "...."}
    at = components.index(name)
    hatch = _HATCHES[at % len(_HATCHES)]
    return {"facecolor": LIGHT[f"c{at % NUM_COLOURS}"], "edgecolor": "white", "hatch": hatch}


def _keys(components: list[str], measured: bool) -> list[Any]:
    from matplotlib.patches import Patch

    names = [*components, *([_MEASURED] if measured else [])]
    return [Patch(label=COMPONENTS.get(name, name), **_look(components, name)) for name in names]
