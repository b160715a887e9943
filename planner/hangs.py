"""When a run that shows no sign of life counts as hanging.

A choice, made so that what is slow is not called hung: a step may be ten times as long as usual
(other programs on the machine, longer rows, a compilation in the middle), and nothing is called a
hang within five minutes. Where nothing is known of how long work takes, half an hour: a checkpoint
of hundreds of GiB over a network takes that long to load. torch's own limits on collective
operations are 10 minutes (NCCL) and 30 (gloo), after which it ends the run by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

TIMES_A_STEP = 10.0

FEWEST_SECONDS = 300.0

SECONDS_OF_A_FIRST_STEP = 900.0
"""Kernels are compiled, tuned and loaded in the first steps of a process."""

SECONDS_OF_UNKNOWN_WORK = 1800.0

# Steps of which the median is taken.
_RECENT_STEPS = 32


def patience_seconds(
    stage: str, predicted_step_seconds: float | None, measured: Sequence[float]
) -> float:
    """Seconds without a sign of life after which a run is taken to hang. `measured`: seconds of
    this process's steps so far."""
    if stage != "training":
        return SECONDS_OF_UNKNOWN_WORK
    if not measured:
        return max(SECONDS_OF_A_FIRST_STEP, TIMES_A_STEP * (predicted_step_seconds or 0.0))
    usual = statistics.median(measured[-_RECENT_STEPS:])
    return max(FEWEST_SECONDS, TIMES_A_STEP * usual)
