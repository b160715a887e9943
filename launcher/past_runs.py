"""Finished runs on this machine: how far their memory was from what was predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftplan.launcher.run_dir import RunDir
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.margin import (
    ASSUMED_MARGIN,
    Margin,
    measured_margin,
    raised_margin,
)


def margin_of(device: Device, runs_dir: Path) -> Margin:
    """What to keep free on a GPU by the runs that were trained on such ones; where it is
    calibrated, by the runs that were held out then and those planned since. What a processor's runs
    take varies from one to the next, so theirs is assumed."""
    if device.kind == "cpu":
        return ASSUMED_MARGIN
    found, calibration = _underestimates(device.name, runs_dir), device.calibration
    if calibration.margin is None:
        return measured_margin([under for under, _ in found])
    since = [under for under, told in found if told == calibration.to_dict()]
    fitted = Margin(share=calibration.margin, num_runs=calibration.num_runs)
    return raised_margin(fitted, since)


def _underestimates(device_name: str, runs_dir: Path) -> Iterator[tuple[float, object]]:
    """Of each finished run how much more the device held than was predicted, as a share, and the
    calibration by which it was."""
    stages = runs_dir.glob("*/*-*/record.json")
    for path in sorted([*runs_dir.glob("*/record.json"), *stages]):
        try:
            record = RunDir(path.parent).read_record()
        except InputError:
            continue
        if record.get("device") != device_name:
            continue
        measured = _bytes(record.get("measured"), "device_bytes")
        predicted = [
            size
            for name in ("device_bytes", "closed_form_device_bytes")
            if (size := _bytes(record.get("predicted"), name))
        ]
        if measured and predicted:
            yield measured / min(predicted) - 1, record["predicted"].get("calibration")


def _bytes(figures: object, name: str) -> int | None:
    """A positive number of a damaged or older record, None for anything else."""
    value: Any = figures.get(name) if isinstance(figures, Mapping) else None
    return value if type(value) is int and value > 0 else None
