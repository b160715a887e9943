"""What a step of a run takes, by the seconds of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# The first steps of a run are measured while memory is, and are slower for it.
PROFILED_STEPS = 2


def mean_step_seconds(seconds: Sequence[float]) -> float | None:
    """Mean seconds of the steps after the profiled ones; of all when there are no others.

    The mean, not the median: it is what the estimate predicts, and lengths vary.
    """
    settled = seconds[PROFILED_STEPS:] or seconds
    return statistics.fmean(settled) if settled else None


def settled_tokens_per_second(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens a second of the steps after the profiled ones, by their rows of metrics.jsonl; None
    where there are no others."""
    settled = steps[PROFILED_STEPS:]
    seconds = sum(row["seconds"] for row in settled)
    return sum(row["tokens"] for row in settled) / seconds if seconds else None
