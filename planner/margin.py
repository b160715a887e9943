"""What is kept free for the memory estimate's own error, by how far off it was in earlier runs."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ftplan.planner.memory import MEMORY_MARGIN

# Fewer runs say little about the next. Added to the worst of them, since the next may be worse.
# Both are judgements.
_LEAST_RUNS = 3
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
    if len(underestimates) < _LEAST_RUNS:
        return ASSUMED_MARGIN
    share = _ADDED + max(0.0, *underestimates)
    return Margin(share=min(share, MEMORY_MARGIN), num_runs=len(underestimates))
