"""Finished runs of a made-up machine, whose constants are known."""

from __future__ import annotations

import random

from ftplan.planner.calibration import Calibration
from ftplan.planner.calibration_fit import PastRun
from ftplan.planner.step_time import StepParts, corrected, joined_seconds
from ftplan.planner.units import GIB, MIB

CONTEXT_BYTES = 512 * MIB


def parts_of(configuration: int) -> StepParts:
    """Of another mixture of arithmetic, traffic and launching for each configuration."""
    draw = random.Random(configuration)
    return StepParts(
        arithmetic=draw.uniform(0.1, 2),
        traffic=draw.uniform(0.1, 1),
        optimizer=draw.uniform(0.01, 0.1),
        sending=0.0,
        copying=0.0,
        on_host=0.0,
        launching=draw.uniform(0.05, 2.5),
    )


def past_runs(
    truth: Calibration,
    count: int,
    *,
    noise: float = 0.03,
    memory_noise: float = 0.003,
    configurations: int = 8,
    seed: int = 1,
) -> list[PastRun]:
    """Runs on a GPU whose constants are `truth`. `noise`: of a step's time, and `memory_noise` of
    what is reserved, as standard deviations."""
    draw = random.Random(seed)
    runs = []
    for number in range(count):
        configuration = number % configurations
        shape = random.Random(-1 - configuration)
        allocated = round(shape.uniform(4, 20) * GIB)
        reserved = round(allocated * shape.uniform(1.02, 1.06))
        parts = parts_of(configuration)
        seconds, _ = joined_seconds(corrected(parts, truth), "cuda")
        held = round(reserved * truth.reserved * draw.lognormvariate(0, memory_noise))
        beside = round(CONTEXT_BYTES * truth.context * draw.lognormvariate(0, 0.02))
        runs.append(
            PastRun(
                configuration=str(configuration),
                kind="cuda",
                allocated_bytes=allocated,
                reserved_bytes=reserved,
                least_reserved_bytes=reserved,
                context_bytes=CONTEXT_BYTES,
                measured_allocated_bytes=allocated,
                measured_reserved_bytes=held,
                measured_device_bytes=held + beside,
                parts=parts,
                step_seconds=seconds * draw.lognormvariate(0, noise),
            )
        )
    return runs
