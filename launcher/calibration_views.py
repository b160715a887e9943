"""What `ftplan calibrate` shows. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ftplan.launcher.calibration_file import Stored
from ftplan.launcher.plan_views import format_margin, said_factors
from ftplan.launcher.ui import table
from ftplan.planner.calibration import Calibration
from ftplan.planner.calibration_fit import BLOCKS, DEVICE_MEMORY
from ftplan.planner.memory import MEMORY_MARGIN

_HEADS = ("", ">runs", ">middle", ">worst", ">middle with", ">worst with", "corrected")


def stored_parts(stored: Stored) -> list[RenderableType]:
    """A calibration, and how far off predictions were without it and with it."""
    calibration = stored.calibration
    head = Text.assemble(
        (str(stored.stack), "bold"), f": {calibration.num_runs} runs, {calibration.fitted_on}"
    )
    held_out = "configuration" if stored.by_configuration else "run"
    refused = " What is refused would bring them no nearer." if stored.refused else ""
    return [
        head,
        held_out_table(stored),
        Text(
            "How far predictions are off, without the corrections and with them, on runs that they "
            f"were not fitted to: each {held_out} in turn is held out.{refused}",
            style="dim",
        ),
    ]


def held_out_table(stored: Stored) -> Table:
    """A row for each quantity that at least three runs tell of."""
    rows: list[list[RenderableType]] = []
    for one in stored.held_out:
        errors = (one[name] for name in _ERRORS)
        cells = [f"{100 * error:.1f} %" for error in errors]
        verdict = _verdict(one["quantity"], stored.calibration, stored.refused)
        rows.append([one["quantity"], str(one["num_runs"]), *cells, verdict])
    return table("", _HEADS, rows)


_ERRORS = ("median_before", "worst_before", "median_after", "worst_after")


def _verdict(quantity: str, calibration: Calibration, refused: Mapping[str, float]) -> str:
    if quantity == DEVICE_MEMORY:
        return _said_margin(calibration.margin)
    names = next(block.names for block in BLOCKS if block.quantity == quantity)
    kept = {name: calibration.factors[name] for name in names}
    if said := said_factors(kept):
        return said
    tried = {name: refused[name] for name in names if name in refused}
    return f"refused: {said_factors(tried)}"


def _said_margin(margin: float | None) -> str:
    if margin is None:
        return ""
    assumed = format_margin(MEMORY_MARGIN)
    return f"margin {format_margin(margin)}, where {assumed} would be assumed"


def said_left_out(left_out: Mapping[str, int]) -> Iterator[str]:
    for why, count in left_out.items():
        yield f"left out: {count} run{'' if count == 1 else 's'} {why}"


def to_dict(
    stored: Sequence[Stored], too_few: Mapping[str, int], left_out: Mapping[str, int]
) -> dict[str, Any]:
    """The object of `calibrate --json`. `too_few`: runs of each machine that has no calibration."""
    import msgspec

    listed = [msgspec.to_builtins(one) for one in stored]
    return {
        "schema": 1,
        "calibrations": listed,
        "too_few": dict(too_few),
        "left_out": dict(left_out),
    }
