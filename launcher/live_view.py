"""What a person sees of a run that goes on, in as many columns and rows as there are. Pure: from
what the run's files tell to lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct
from rich.text import Text

from ftplan.launcher.braille import curve
from ftplan.launcher.gpu_samples import GpuSample, Sample
from ftplan.planner.units import format_bytes, format_seconds

Row = Mapping[str, Any]

# Words, their style, and perhaps fewer words for where there is less room.
Part = tuple[str, str] | tuple[str, str, str]

# Speed and time left are those of the latest steps: the first ones warm things up.
RECENT_STEPS = 8

_LABEL_CELLS = 11
_FEWEST_PLOT_ROWS, _MOST_PLOT_ROWS = 2, 12
_ROWS_WITH_AXIS = 5

# Where rows are few, so many facts matter more than the curve, and the others less.
_FACTS_BEFORE_PLOT = 3

# Worth a colour: a prediction that is missed by more.
_FAR_OFF = 0.1


class Watched(Struct, frozen=True, kw_only=True):
    """A run at one moment. `rows` are all of metrics.jsonl, `predicted` the plan's figures."""

    name: str = ""
    total_steps: int = 0
    predicted: Mapping[str, Any] = {}
    status: Mapping[str, Any] = {}
    rows: Sequence[Row] = ()
    sample: Sample | None = None
    elapsed_seconds: float = 0.0
    checkpoint: str | None = None
    ascii_only: bool = False

    @property
    def stage(self) -> str:
        return str(self.status.get("stage", "starting"))

    @property
    def steps(self) -> Sequence[Row]:
        return step_rows(self.rows)


def step_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of optimizer steps; events may have a step too."""
    return [row for row in rows if "step" in row and "loss" in row and "event" not in row]


def seconds_left(steps: Sequence[Row], total_steps: int) -> float:
    """Of training alone, at the pace of the latest steps."""
    recent = [row["seconds"] for row in steps[-RECENT_STEPS:]]
    return float((total_steps - steps[-1]["step"]) * sum(recent) / len(recent))


def said_rows(status: Mapping[str, Any]) -> str:
    """How far the reading of the data is, where that takes long."""
    return f"{status['rows']:,} of {status['of_rows']:,} rows" if "rows" in status else ""


def said_events(rows: Sequence[Row]) -> list[str]:
    """What a person should see of what happened, in order: rows of events that are worth it have
    it in words, under `said`."""
    return [printable(row["said"]) for row in rows if isinstance(row.get("said"), str)]


def view(watched: Watched, width: int, height: int) -> list[Text]:
    """At most `height` lines; what matters less is left out first."""
    steps = watched.steps
    head = [_title(watched, width), _progress(watched, steps, width)]
    facts = list(_facts(watched, steps, width, height))
    room = height - len(head)
    plot_rows = min(room - len(facts), _MOST_PLOT_ROWS)
    if plot_rows < _FEWEST_PLOT_ROWS:
        plot_rows = min(_FEWEST_PLOT_ROWS, room - _FACTS_BEFORE_PLOT)
    draws = plot_rows >= _FEWEST_PLOT_ROWS and not watched.ascii_only
    plot = loss_plot(steps, width, plot_rows) if draws else []
    kept = {id(line) for _, line in sorted(facts, key=_rank)[: max(0, room - len(plot))]}
    return [*head, *plot, *(line for _, line in facts if id(line) in kept)][:height]


def _rank(fact: tuple[int, Text]) -> int:
    return fact[0]


def _title(watched: Watched, width: int) -> Text:
    """The run's name on the left, what it does on the right."""
    elapsed = format_seconds(watched.elapsed_seconds).strip()
    right = f"{watched.stage}  {elapsed}"
    room = width - len(right) - 2
    if room < 8:
        return _cropped(Text(right, style="bold"), width)
    name = Text(watched.name, style="bold")
    name.truncate(room, overflow="crop" if watched.ascii_only else "ellipsis", pad=True)
    colour = {"failed": "red", "interrupted": "yellow", "finished": "green"}
    return Text.assemble(
        name, "  ", (watched.stage, colour.get(watched.stage, "cyan")), "  ", (elapsed, "dim")
    )


def _progress(watched: Watched, steps: Sequence[Row], width: int) -> Text:
    done, total = (steps[-1]["step"] if steps else 0), watched.total_steps
    words = [f"{done}/{total} steps"]
    if "rows" in watched.status and watched.status.get("of_rows"):
        done, total = watched.status["rows"], watched.status["of_rows"]
        words = [said_rows(watched.status)]
    elif steps and done < total and watched.stage == "training":
        words.append(f"{format_seconds(seconds_left(steps, total)).strip()} left")
    elif not steps and (seconds := watched.predicted.get("train_seconds")):
        words.append(f"about {format_seconds(seconds).strip()}")
    said = " " + ", ".join(words)
    cells = max(4, min(width - len(said), 120))
    share = min(1.0, done / total) if total else 0.0
    filled = math.floor(share * cells)
    full, empty = ("=", "-") if watched.ascii_only else ("━", "─")
    parts = ((full * filled, "cyan"), (empty * (cells - filled), "dim"), said)
    return _cropped(Text.assemble(*parts), width)


def _facts(
    watched: Watched, steps: Sequence[Row], width: int, height: int
) -> Iterator[tuple[int, Text]]:
    """Lines in the order in which they stand, each with its rank: 0 is kept longest."""
    if steps:
        yield 0, _line("loss", _loss_parts(steps[-1]), width)
        yield 1, _line("speed", _speed_parts(watched, steps), width)
        if (allocated := steps[-1].get("allocated_bytes")) is not None:
            parts = _size_parts(allocated, watched.predicted.get("allocated_bytes"))
            yield 3, _line("tensors", parts, width)
    sample = watched.sample
    if sample is not None:
        yield from _device_facts(watched, sample, width, height)
    if watched.checkpoint:
        yield 4, _line("saved", [(watched.checkpoint, "")], width)


def _loss_parts(row: Row) -> list[Part]:
    parts: list[Part] = [(f"{row['loss']:.3f}", "bold")]
    if row.get("learning_rate") is not None:
        parts.append((f"learning rate {row['learning_rate']:.2e}", ""))
    if row.get("grad_norm") is not None:
        parts.append((f"gradient norm {row['grad_norm']:.3g}", "dim"))
    if row.get("epoch") is not None:
        parts.append((f"epoch {row['epoch']:.2f}", "dim"))
    return parts


def _speed_parts(watched: Watched, steps: Sequence[Row]) -> list[Part]:
    recent = steps[-RECENT_STEPS:]
    seconds = sum(row["seconds"] for row in recent)
    tokens = sum(row.get("tokens") or 0 for row in recent)
    a_step = (f"{format_seconds(seconds / len(recent)).strip()} a step", "")
    rate = tokens / seconds if tokens and seconds else recent[-1].get("tokens_per_second")
    if not rate:
        return [a_step]
    said = (f"{rate:,.0f} tokens/s", "bold")
    expected = watched.predicted.get("tokens_per_second_per_gpu")
    if not expected:
        return [said, a_step]
    off = rate / expected - 1
    style = "yellow" if off < -_FAR_OFF else ""
    return [
        said,
        (f"predicted {expected:,.0f} ({_signed(off)})", style, f"({_signed(off)})"),
        a_step,
    ]


def _size_parts(size: float, expected: float | None) -> list[Part]:
    parts: list[Part] = [(format_bytes(size), "bold")]
    if expected:
        off = size / expected - 1
        style = "yellow" if off > _FAR_OFF else ""
        parts.append(
            (f"predicted {format_bytes(expected)} ({_signed(off)})", style, f"({_signed(off)})")
        )
    return parts


def _device_facts(
    watched: Watched, sample: Sample, width: int, height: int
) -> Iterator[tuple[int, Text]]:
    """A line for each GPU, or one of all where there are too many rows of them; of a run without
    one, what the process holds."""
    expected = watched.predicted.get("device_bytes")
    if sample.gpus:
        if len(sample.gpus) > max(1, height // 4):
            yield (
                2,
                _line(f"{len(sample.gpus)} GPUs", _all_gpus_parts(sample.gpus, expected), width),
            )
            return
        for gpu in sample.gpus:
            yield 2, _line(f"GPU {gpu.index}", _gpu_parts(gpu, expected, watched), width)
    elif sample.process_bytes is not None:
        parts = _size_parts(sample.process_bytes, expected)
        if sample.cores is not None:
            parts.append((f"{sample.cores:.1f} cores busy", ""))
        yield 2, _line("process", parts, width)


def _gpu_parts(gpu: GpuSample, expected: float | None, watched: Watched) -> list[Part]:
    parts: list[Part] = []
    if gpu.used_bytes is not None and gpu.total_bytes:
        tight = gpu.used_bytes > 0.98 * gpu.total_bytes
        used = f"{format_bytes(gpu.used_bytes)} of {format_bytes(gpu.total_bytes)}"
        parts.append((used, "yellow" if tight else "bold"))
    if gpu.utilization is not None:
        parts.append((_percent(gpu.utilization), ""))
    if gpu.temperature_celsius is not None:
        degree = "" if watched.ascii_only else "°"
        parts.append((f"{gpu.temperature_celsius:.0f} {degree}C", ""))
    if gpu.power_watts is not None:
        of = f" of {gpu.power_limit_watts:.0f}" if gpu.power_limit_watts else ""
        parts.append((f"{gpu.power_watts:.0f}{of} W", ""))
    if expected:
        held = gpu.run_bytes
        off = f" ({_signed(held / expected - 1)})" if held else ""
        parts.append((f"predicted {format_bytes(expected)}{off}", ""))
    return parts or [("the driver tells nothing of it", "yellow")]


def _all_gpus_parts(gpus: Sequence[GpuSample], expected: float | None) -> list[Part]:
    """The fullest, the least busy, the hottest, and what all draw."""
    parts: list[Part] = []
    if used := [gpu.used_bytes for gpu in gpus if gpu.used_bytes is not None]:
        parts.append((f"{format_bytes(max(used))} at most", "bold"))
    if busy := [gpu.utilization for gpu in gpus if gpu.utilization is not None]:
        parts.append((f"{_percent(min(busy))} to {_percent(max(busy))}", ""))
    if hot := [gpu.temperature_celsius for gpu in gpus if gpu.temperature_celsius is not None]:
        parts.append((f"{max(hot):.0f} C", ""))
    if watts := [gpu.power_watts for gpu in gpus if gpu.power_watts is not None]:
        parts.append((f"{sum(watts):,.0f} W", ""))
    if expected:
        parts.append((f"predicted {format_bytes(expected)}", ""))
    return parts


def _line(label: str, parts: Sequence[Part], width: int) -> Text:
    """The label and as many parts as go into the line."""
    line = Text.assemble((f"{label:<{_LABEL_CELLS}}", "dim"))
    for number, (said, style, *shorter) in enumerate(parts):
        gap = "  " if number and said else ""
        room = width - line.cell_len - len(gap)
        fitting = next((words for words in (said, *shorter) if len(words) <= room), None)
        if fitting is None and number:
            break
        line.append(gap + (fitting or said), style)
    return _cropped(line, width)


def _cropped(line: Text, width: int) -> Text:
    line.truncate(width, overflow="crop")
    return line


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _signed(share: float) -> str:
    return f"{round(100 * share):+d} %"


def printable(text: str) -> str:
    """On one line, without what would move a terminal's cursor or turn the direction of text."""
    return "".join(c if c.isprintable() else " " for c in text)


def loss_plot(steps: Sequence[Row], width: int, rows: int) -> list[Text]:
    """The training loss in so many lines, with what its edges mean; none where there is no room."""
    cells = width - _LABEL_CELLS - 1
    if len(steps) < 2 or cells < 4:
        return []
    with_axis = rows >= _ROWS_WITH_AXIS
    drawn, low, high = curve([float(row["loss"]) for row in steps], cells, rows - with_axis)
    labels = {0: f"{high:#.3g}", len(drawn) - 1: f"{low:#.3g}"}
    lines = [
        Text.assemble((f"{labels.get(number, ''):>{_LABEL_CELLS - 1}} ", "dim"), (line, "cyan"))
        for number, line in enumerate(drawn)
    ]
    if with_axis:
        first, last = str(steps[0]["step"]), f"step {steps[-1]['step']}"
        lines.append(Text(" " * _LABEL_CELLS + f"{first}{last:>{cells - len(first)}}", style="dim"))
    return lines
