"""What is kept free for the memory estimate's own error, by how far off it was in earlier runs."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ftplan.planner.memory import MEMORY_MARGIN

# Fewer runs say little about the next. Added to the worst of them, since the next may be worse.
# Both are judgements.
LEAST_RUNS = 3
_ADDED = 0.01


class Margin(Struct, frozen=True, kw_only=True):
    """A share of what a plan requires. `num_runs`: that it follows from, 0 where it is assumed."""

    share: float = MEMORY_MARGIN
    num_runs: int = 0


ASSUMED_MARGIN = Margin()


def measured_margin(underestimates: Sequence[float]) -> Margin:
    """From finished runs' (measured - predicted) / predicted device peaks, one for each run.

    The worst of them and 1 %, at least 1 % and at most what is assumed where nothing was measured.
    """
    if len(underestimates) < LEAST_RUNS:
        return ASSUMED_MARGIN
    return Margin(share=_beyond(underestimates), num_runs=len(underestimates))


def raised_margin(margin: Margin, underestimates: Sequence[float]) -> Margin:
    """A margin that was measured before, after further runs: one that needed more raises it."""
    if not underestimates:
        return margin
    share = max(margin.share, _beyond(underestimates))
    return Margin(share=share, num_runs=margin.num_runs + len(underestimates))


def _beyond(underestimates: Sequence[float]) -> float:
    return min(_ADDED + max(0.0, *underestimates), MEMORY_MARGIN)
