"""What `estimate --exact` prints besides the memory table, and the curve as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ftplan.launcher.ui import table
from ftplan.launcher.views import phases_table
from ftplan.planner.dry_run_summary import DryRunSummary
from ftplan.planner.phases import COMPONENTS
from ftplan.planner.step_trace import EVALUATION_PHASE, GENERATION_PHASE, SCORING_PHASE
from ftplan.planner.units import GIB, format_bytes

_TIMELINE_CELLS = 64
_LEVELS = "▁▂▃▄▅▆▇█"


def tables(summary: DryRunSummary) -> list[RenderableType]:
    """The timeline, the phases, what is on the device at the peak, and how it was traced."""
    return [
        timeline(summary),
        Text(""),
        phases_table(summary.phases),
        Text(""),
        tensors_table(summary),
        Text(""),
        Text(traced(summary), style="dim"),
    ]


def traced(summary: DryRunSummary) -> str:
    layers = f"{summary.num_layers} layers"
    if summary.num_layers_traced < summary.num_layers:
        layers = f"{summary.num_layers_traced} of {layers} traced, the others are equal"
    return f"dry run: {summary.num_events:,} allocations and frees in two steps; {layers}"


def timeline(summary: DryRunSummary) -> Text:
    """Allocated memory over the run, one character a stretch; phases are named below."""
    peak = max(level for _, level in summary.curve)
    cells = [0] * _TIMELINE_CELLS
    for place, level in summary.curve:
        cell = place * _TIMELINE_CELLS // max(1, summary.num_events)
        cells[cell] = max(cells[cell], level)
    for number in range(1, _TIMELINE_CELLS):  # short runs have fewer points than cells
        cells[number] = cells[number] or cells[number - 1]
    evaluates = any(name == EVALUATION_PHASE for _, name in summary.phase_starts)
    over = "two steps, an evaluation and a save" if evaluates else "two steps and a save"
    line = Text(f"Allocated over {over}\n", style="bold")
    for level in cells:
        step = min(len(_LEVELS) - 1, level * len(_LEVELS) // (peak + 1))
        line.append(_LEVELS[step], style="red" if level == peak else "cyan")
    line.append(f" {format_bytes(peak)}\n", style="not bold")
    line.append(_phase_marks(summary), style="dim not bold")
    return line


_INITIALS = {
    "load": "l",
    GENERATION_PHASE: "g",
    SCORING_PHASE: "p",
    "forward": "f",
    "backward": "b",
    "optimizer step": "o",
    EVALUATION_PHASE: "e",
    "save": "s",
}


def _phase_marks(summary: DryRunSummary) -> str:
    """The first letter of each phase below the cell where it begins."""
    marks = [" "] * _TIMELINE_CELLS
    for place, name in summary.phase_starts:
        cell = min(_TIMELINE_CELLS - 1, place * _TIMELINE_CELLS // max(1, summary.num_events))
        if marks[cell] == " ":
            marks[cell] = _INITIALS.get(name, "?")
    legend = ", ".join(
        name for name in _INITIALS if any(n == name for _, n in summary.phase_starts)
    )
    return "".join(marks).rstrip() + f"\n{legend}"


def tensors_table(summary: DryRunSummary) -> Table:
    """The largest tensors alive at the peak."""
    rows: list[list[RenderableType]] = [
        [
            format_bytes(tensor.num_bytes * tensor.count),
            f"{tensor.count}x",
            f"{'x'.join(map(str, tensor.shape))} {tensor.dtype}",
            f"{COMPONENTS[tensor.component]}; {_origin(tensor.module, tensor.operation)}",
        ]
        for tensor in summary.tensors
    ]
    title = f"On the device at the peak ({summary.peak_phase.name})"
    return table(title, (">size", ">", "tensor", "what, and where from"), rows)


def _origin(module: str, operation: str) -> str:
    """Where a tensor comes from: the module's path without wrappers, and the operation."""
    short = operation.removeprefix("aten.").split(".")[0]
    place = module.removeprefix("base_model.model").removeprefix(".").removeprefix("model.")
    if not place:
        return f"{short} in the model's own forward"
    return place if operation == "load" else f"{short} in {place}"


def plot(summary: DryRunSummary, path: Path, title: str) -> None:
    """The whole curve as PNG, with the phases and the peak."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed or wanted
    from matplotlib import pyplot

    colours = dict(zip(_INITIALS, pyplot.get_cmap("Pastel1").colors, strict=False))
    places = [place for place, _ in summary.curve]
    levels = [level / GIB for _, level in summary.curve]
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    ends = [place for place, _ in summary.phase_starts[1:]] + [summary.num_events]
    named = set()
    for (start, name), end in zip(summary.phase_starts, ends, strict=True):
        label = None if name in named else name
        named.add(name)
        axes.axvspan(start, end, color=colours.get(name, "0.9"), alpha=0.6, label=label, lw=0)
    axes.fill_between(places, levels, step="pre", color="tab:blue", alpha=0.35, lw=0)
    axes.plot(places, levels, drawstyle="steps-pre", color="tab:blue", linewidth=1)
    peak = summary.peak_phase.allocated_peak_bytes / GIB
    axes.plot([summary.peak_position], [peak], "o", color="tab:red", markersize=5)
    axes.annotate(
        f"{peak:.2f} GiB in {summary.peak_phase.name}",
        (summary.peak_position, peak),
        textcoords="offset points",
        xytext=(0, 6),
        ha="center",
        color="tab:red",
    )
    axes.set_xlim(0, summary.num_events)
    axes.set_ylim(0, peak * 1.12)
    axes.set_xlabel("allocations and frees, in order")
    axes.set_ylabel("allocated (GiB)")
    axes.set_title(title)
    axes.legend(frameon=False, ncols=len(named), loc="lower center", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
