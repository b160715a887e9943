"""`ftplan doctor`'s checks, in the order in which things build on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ftplan.launcher.checkup import stack, surroundings
from ftplan.launcher.checkup.facts import Facts, Finding

CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    stack.python,
    surroundings.driver,
    surroundings.gpus,
    stack.torch,
    stack.libraries,
    stack.bitsandbytes,
    stack.flash_attention,
    stack.accelerate_config,
    surroundings.hub,
    surroundings.disk,
    surroundings.memory,
)


def findings(facts: Facts) -> list[Finding]:
    """Every check's outcome."""
    return [finding for check in CHECKS for finding in check(facts)]
