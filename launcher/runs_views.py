"""What `ftplan runs` prints: the list, and one run with what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ftplan.launcher.gpu_samples import sampled_peaks
from ftplan.launcher.live_view import loss_plot, printable, step_rows
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.run_states import RunSummary, size_bytes
from ftplan.launcher.ui import facts, table
from ftplan.planner.units import format_bytes

_COLOURS = {
    "pending": "cyan",
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "failed": "red",
    "stale": "yellow",
    "damaged": "red",
}

# Of a plan's settings, those that tell most of a run.
_IN_SHORT = (
    "quantization", "lora_rank", "dtype", "mixed_precision", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "gradient_checkpointing", "learning_rate",
    "num_train_epochs", "max_steps", "optim", "num_gpus", "report_to",
)  # fmt: skip

# The first steps warm things up, on a processor they are profiled: as in record.json.
_WARMING_STEPS = 2

_PLOT_ROWS = 7


def runs_table(runs: Sequence[RunSummary], now: float) -> Table:
    """One line a run, and one for each of its stages."""
    rows: list[list[RenderableType]] = []
    for run in runs:
        rows.append(_row(run, now, Text(printable(run.name))))
        rows += [_row(part, now, Text("  " + part.path.name, style="dim")) for part in run.stages]
    heads = ("run", "state", ">step", ">loss", ">age", ">size", "model, method")
    result = table("", heads, rows)
    result.title = None
    result.columns[0].no_wrap, result.columns[0].overflow = False, "fold"
    return result


def _row(run: RunSummary, now: float, name: Text) -> list[RenderableType]:
    what = ", ".join(word for word in (run.model, run.method) if word)
    return [
        name,
        Text(run.state, style=_COLOURS.get(run.state, "")),
        said_step(run),
        "-" if run.loss is None else f"{run.loss:.3f}",
        said_age(now - run.changed_at),
        format_bytes(run.size_bytes),
        Text(printable(what or run.why or "")),
    ]


def said_step(run: RunSummary) -> str:
    if run.steps is None and run.step is None:
        return "-"
    return f"{run.step or 0}/{run.steps or '?'}"


def said_age(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h`, `5 d`: whole units, for a column."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def run_facts(
    run: RunSummary, plan: Mapping[str, Any], record: Mapping[str, Any], now: float
) -> Table:
    """What it is, how far it is, and its plan in short."""
    state: str = run.state
    if state == "running" and run.stage:
        state += f", {run.stage}"
    elif state == "stale":
        state += f": its process has gone while {run.stage}"
    rows = [
        ("run", str(run.path)),
        ("state", f"{state}; {said_age(now - run.changed_at)} ago"),
        *([("job", run.job)] if run.job else []),
        *([("why", printable(run.why))] if run.why else []),
        ("model", str(run.model)),
        ("device", str(record.get("device") or (plan.get("device") or {}).get("name", "?"))),
        ("steps", said_step(run)),
        *([("loss", f"{run.loss:.3f}")] if run.loss is not None else []),
        ("method", str(run.method)),
        ("settings", _in_short(plan)),
        ("size", format_bytes(run.size_bytes)),
    ]
    return facts(rows)


def _in_short(plan: Mapping[str, Any]) -> str:
    settings = plan["plan"]
    told = ((name, settings[name]["value"]) for name in _IN_SHORT if name in settings)
    shown = ((name, value) for name, value in told if value not in (None, "none", [], "no"))
    return ", ".join(f"{name} {_said(value)}" for name, value in shown)


def _said(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def measured_so_far(run: RunDir) -> dict[str, Any]:
    """Of a run that has not finished, under the names of record.json's `measured`."""
    steps = step_rows(list(run.metric_rows()))
    seconds = [row["seconds"] for row in steps]
    settled = seconds[_WARMING_STEPS:] or seconds
    peaks = sampled_peaks(run) or {}
    held = [gpu["run_peak_bytes"] or gpu["used_peak_bytes"] for gpu in peaks.get("gpus", ())]
    tokens = sum(row.get("tokens") or 0 for row in steps)
    return {
        "allocated_bytes": steps[-1].get("allocated_bytes") if steps else None,
        "device_bytes": max((h for h in held if h), default=peaks.get("process_peak_bytes")),
        "step_seconds": sum(settled) / len(settled) if settled else None,
        "tokens_per_second_per_gpu": tokens / sum(seconds) if sum(seconds) else None,
    }


def last_losses(run: RunDir, width: int) -> list[Text]:
    """The loss of all steps as a curve."""
    return loss_plot(step_rows(list(run.metric_rows())), width, _PLOT_ROWS)


def sampled_line(record: Mapping[str, Any]) -> str | None:
    """What the GPUs did, of a run that has finished."""
    gpus = (record.get("sampled") or {}).get("gpus") or []
    told = [_said_gpu(gpu) for gpu in gpus]
    return "; ".join(told) if told else None


def _said_gpu(gpu: Mapping[str, Any]) -> str:
    parts = [f"GPU {gpu['index']}:"]
    if gpu["used_peak_bytes"]:
        parts.append(f"{format_bytes(gpu['used_peak_bytes'])} at most,")
    if gpu["utilization_mean"] is not None:
        parts.append(f"{100 * gpu['utilization_mean']:.0f} % busy,")
    if gpu["temperature_peak_celsius"] is not None:
        parts.append(f"{gpu['temperature_peak_celsius']:.0f} °C at most,")
    if gpu["power_mean_watts"] is not None:
        parts.append(f"{gpu['power_mean_watts']:.0f} W in the mean")
    return " ".join(parts).rstrip(",")


def file_lines(run: RunDir) -> list[str]:
    """What there is to look at, with sizes; lines to be copied."""
    shown = (
        run.adapter, run.model, run.merged, run.checkpoints, run.record, run.loss_plot,
        run.memory_plot, run.report, run.trackers, run.metrics,
        run.samples, run.stderr,
    )  # fmt: skip
    return [f"  {path} ({format_bytes(_size(path))})" for path in shown if path.exists()]


def _size(path: Path) -> int:
    return size_bytes(path) if path.is_dir() else path.stat().st_size


def commands(run: RunSummary, *, merges: bool) -> list[tuple[str, str]]:
    """What to do next, and the command for it."""
    return list(_commands(run, shlex.quote(str(run.path)), merges))


def go_on(run: RunSummary) -> list[tuple[str, str]]:
    """The commands that carry on a run which has ended too early: where it was carried out."""
    words = shlex.quote(str(run.path))
    words += f" --backend {run.job.split()[0]}" if run.job else ""
    from_the_start = ("from the start", f"ftplan launch {words}")
    resumes = run.checkpoint or run.stages
    return [*([("go on", f"ftplan resume {words}")] if resumes else []), from_the_start]


def _commands(run: RunSummary, path: str, merges: bool) -> Iterator[tuple[str, str]]:
    if run.state in ("running", "pending"):
        if run.state == "running":
            yield "watch it", f"ftplan runs show {path} --follow"
        yield "end it", f"ftplan cancel {path}"
    elif run.state == "finished":
        if merges:
            yield "one model", f"ftplan merge {path}"
        yield "again", f"ftplan launch {path}"
    else:
        yield from go_on(run)
    if run.step is not None or run.stages:
        yield "report", f"ftplan report {path}"
