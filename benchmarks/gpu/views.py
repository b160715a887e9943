"""What the suite prints of itself: the runs it chose, and a device's ceilings. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.gpu.configurations import Run
from ftplan.launcher.ui import table
from ftplan.planner.hardware_spec import Device
from ftplan.planner.units import format_bytes, format_seconds

# What the data sheets call the dtype of a product.
_PEAK_OF_DTYPE = {"tf32": "tensorfloat32"}


def runs_table(runs: Sequence[Run], more_seconds: float) -> Table:
    """What would be measured, in order. `more_seconds`: of what comes after the runs."""
    rows = [
        [
            run.key,
            format_bytes(run.candidate.required_bytes),
            format_seconds(run.candidate.step_seconds),
            run.candidate.plan.optim,
        ]
        for run in runs
    ]
    total = sum(run.candidate.seconds for run in runs) + more_seconds
    title = f"{len(runs)} runs, about {format_seconds(total)}"
    return table(title, ("run", ">requires", ">step", "optimizer"), rows)


def ceilings_table(lines: Iterable[Mapping[str, Any]], device: Device) -> Table:
    """The best rate of each kind, beside the data sheet's where it has one."""
    best: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        if "seconds" in line:
            best[_kind(line)] = max(best.get(_kind(line), line), line, key=_worth)
    rows = [[name, _rate(line), _sheet(line, device), _sizes(line)] for name, line in best.items()]
    return table("What the device reaches", ("", ">at most", ">data sheet", "at"), rows)


def _kind(line: Mapping[str, Any]) -> str:
    more = [str(line[key]) for key in ("dtype", "kernel", "pass", "how") if key in line]
    flags = [key for key in ("autograd", "pinned") if line.get(key)]
    return " ".join([line["what"], *more, *flags])


def _worth(line: Mapping[str, Any]) -> tuple[float, float]:
    """Small copies stay in a cache: of those the largest counts, else the fastest."""
    rate = line.get("flops_per_second") or line.get("bytes_per_second") or 1 / line["seconds"]
    return line.get("bytes", 0), rate


def _rate(line: Mapping[str, Any]) -> str:
    if "flops_per_second" in line:
        return f"{line['flops_per_second'] / 1e12:.4g} TFLOP/s"
    if "bytes_per_second" in line:
        return f"{line['bytes_per_second'] / 1e9:.4g} GB/s"
    return f"{1e6 * line['seconds']:.3g} us"


def _sheet(line: Mapping[str, Any], device: Device) -> str:
    if line["what"] == "matmul":
        dtype = _PEAK_OF_DTYPE.get(line["dtype"], line["dtype"])
        peak = device.peak_flops_per_second.get(dtype)
        return f"{peak / 1e12:.4g}" if peak else ""
    if line["what"] in ("copy", "add", "adamw"):
        return f"{device.memory_bandwidth_bytes_per_second / 1e9:.4g}"
    return ""


def _sizes(line: Mapping[str, Any]) -> str:
    if line["what"] == "matmul":
        return f"{line['m']} x {line['n']} x {line['k']}"
    if line["what"] == "attention":
        heads = f"{line['heads']}/{line['key_value_heads']} heads of {line['head_dim']}"
        return f"{line['rows']} x {line['length']}, {heads}"
    return format_bytes(line["bytes"]) if "bytes" in line else ""
