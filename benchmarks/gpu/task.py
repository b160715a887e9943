"""What a measuring process is told. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from ftplan.launcher.dry_run.case import DryRunCase

# Steps before those that are timed: the first has no optimizer states, in the first two the
# allocator still asks the driver for memory.
WARM_UP_STEPS = 2

# How a process says that the GPU's memory was not enough.
OUT_OF_MEMORY = "out_of_memory"


class Task(Struct, frozen=True, kw_only=True):
    """A run of so many optimizer steps, the first WARM_UP_STEPS of them not timed.

    `ballast_bytes`: of the GPU's memory that are taken before the run begins.
    """

    case: DryRunCase
    steps: int
    ballast_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "case": self.case.to_dict(),
            "steps": self.steps,
            "ballast_bytes": self.ballast_bytes,
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Task:
        return Task(**{**raw, "case": DryRunCase.from_dict(raw["case"])})
