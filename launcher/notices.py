"""What is said on the terminal of bad steps while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftplan.launcher.ui import Ui
from ftplan.planner.bad_steps import SAID, SKIPPED, SPIKE

# Of each kind; metrics.jsonl has them all.
_SAID_AT_MOST = 5

_ROWS_NAMED = 3


class Notices:
    """Says each new event of metrics.jsonl that a person should know of, once."""

    def __init__(self, ui: Ui) -> None:
        self._ui = ui
        self._seen: int | None = None
        self._said: dict[str, int] = {}

    def update(self, status: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """What has been told of before a run is resumed is not said again."""
        seen = len(rows) if self._seen is None else min(self._seen, len(rows))
        new, self._seen = rows[seen:], len(rows)
        for row in new:
            say = _SAYS.get(str(row.get("event")))
            if say:
                self._say(str(row["event"]), say(row))

    def _say(self, event: str, message: str) -> None:
        count = self._said[event] = self._said.get(event, 0) + 1
        if count < _SAID_AT_MOST:
            self._ui.warn(message)
        elif count == _SAID_AT_MOST:
            self._ui.warn(f"{message}. More of these are told in metrics.jsonl alone")


def _skipped(row: Mapping[str, Any]) -> str:
    said = SAID.get(row["why"], str(row["why"]))
    return f"step {row['at_step']} was skipped: {said}{_of_rows(row)}"


def _spike(row: Mapping[str, Any]) -> str:
    return (
        f"the loss rose to {row['loss']:.3g} at step {row['at_step']}, where "
        f"{row['level']:.3g} was usual{_of_rows(row)}"
    )


def _of_rows(row: Mapping[str, Any]) -> str:
    """`; its batch: row 3 of a.jsonl, and 4 others`."""
    known = [one for one in row.get("rows", ()) if "number" in one]
    if not known:
        return ""
    named = [f"row {one['number']} of {one['file']}" for one in known[:_ROWS_NAMED]]
    others = row["num_rows"] - len(named)
    more = f" and {others} more" if others else ""
    return f"; its batch: {', '.join(named)}{more}"


_SAYS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {SKIPPED: _skipped, SPIKE: _spike}
