"""What the best plan is best at, and what it may take."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from ftplan.planner.plan import TrainingPlan
from ftplan.planner.ranking import Evaluated
from ftplan.planner.run_time import RunTime
from ftplan.planner.step_time import StepTime
from ftplan.planner.units import SECONDS_PER_HOUR, format_seconds

# `quality`: the method that the policy prefers, by its fastest plan. `largest-model` is the same
# once the model is chosen.
GOALS = ("quality", "fastest", "cheapest", "least-memory", "largest-model")

# A 16-bit base is worth having while it takes no longer than this many times a 4-bit one: beyond,
# it is divided or recomputed so much that the run is another one. A judgement.
USEFUL_TIMES = 2.0


class Wanted(Struct, frozen=True, kw_only=True):
    """What is asked of a plan: one of GOALS, and a run's seconds and USD at most, None for any."""

    goal: str = GOALS[0]
    seconds: float | None = None
    usd: float | None = None


ANY_PLAN = Wanted()


class Limits(Struct, frozen=True, kw_only=True):
    """What a run may take at most; None for any. Costs need the price of a GPU for an hour."""

    seconds: float | None = None
    usd: float | None = None
    usd_per_gpu_hour: float | None = None

    def exceeded_by(self, plan: TrainingPlan, step: StepTime, num_train_rows: int) -> str | None:
        """How a plan's run is beyond them, for a person."""
        if self.seconds is None and self.usd is None:
            return None
        seconds = RunTime.of(plan, step, num_train_rows).seconds
        if self.seconds is not None and seconds > self.seconds:
            return f"takes {format_seconds(seconds)}, over {format_seconds(self.seconds)}"
        if self.usd is not None and self.usd_per_gpu_hour is not None:
            usd = self.usd_per_gpu_hour * plan.num_gpus * seconds / SECONDS_PER_HOUR
            if usd > self.usd:
                return f"costs {usd:.2f} USD, over {self.usd:.2f} USD"
        return None


NO_LIMITS = Limits()


def ranked(found: Sequence[Evaluated], goal: str) -> list[Evaluated]:
    """Each method's plan, the best first. `found`: in the policy's order."""
    if goal == "fastest":
        return sorted(found, key=lambda one: one.seconds_per_row)
    if goal == "cheapest":
        return sorted(found, key=lambda one: one.gpu_seconds_per_row)
    if goal == "least-memory":
        return sorted(found, key=lambda one: one.memory.required_bytes)
    return _by_policy(found)


def _by_policy(found: Sequence[Evaluated]) -> list[Evaluated]:
    """In the given order, but for a 16-bit base that is no use beside a quantized one."""
    order = list(found)
    if len(order) > 1 and order[1].plan.resolved_method.quantized_base:
        first, second = order[:2]
        if first.seconds_per_row > USEFUL_TIMES * second.seconds_per_row:
            order[:2] = second, first
    return order
