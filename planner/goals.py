"""What the best plan is best at, and what it may take."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from msgspec import Struct, structs

from ftplan.planner.plan import TrainingPlan
from ftplan.planner.ranking import Evaluated
from ftplan.planner.run_time import RunTime
from ftplan.planner.step_time import StepTime
from ftplan.planner.units import SECONDS_PER_HOUR, format_bytes, format_seconds

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

    @property
    def limits_a_run(self) -> bool:
        return self.seconds is not None or self.usd is not None


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
    if goal not in _BY_FIGURE or not found:
        return _by_policy(found)
    figure, why = _BY_FIGURE[goal]
    first, *others = sorted(found, key=attrgetter(figure))
    return [_for_the_goal(first, goal, why), *others]


_BY_FIGURE = {
    "fastest": ("seconds_per_row", "of the methods that fit the fastest"),
    "cheapest": ("gpu_seconds_per_row", "of the methods that fit the one that costs least"),
    "least-memory": ("memory.required_bytes", "of the methods the one that needs least memory"),
}


def _for_the_goal(evaluated: Evaluated, goal: str, why: str) -> Evaluated:
    """With the goal as the reason of the method, if that was not given."""
    reasoned = evaluated.reasoned
    if reasoned.reasons["method"].origin == "given":
        return evaluated
    reasoned = reasoned.replace(
        "derived", f"{why} (`--prefer {goal}`)", method=evaluated.plan.method
    )
    return structs.replace(evaluated, reasoned=reasoned)


def _by_policy(found: Sequence[Evaluated]) -> list[Evaluated]:
    """In the given order, but for a 16-bit base that is no use beside a quantized one."""
    order = list(found)
    if len(order) > 1 and order[1].plan.resolved_method.quantized_base:
        first, second = order[:2]
        if first.seconds_per_row > USEFUL_TIMES * second.seconds_per_row:
            order[:2] = second, first
    return order


def why_not(other: Evaluated, chosen: Evaluated, goal: str) -> str:
    """Why another method's plan that fits was not taken."""
    times = other.seconds_per_row / chosen.seconds_per_row
    if goal == "fastest":
        return f"takes {times:.2g} times as long"
    if goal == "cheapest":
        return f"costs {other.gpu_seconds_per_row / chosen.gpu_seconds_per_row:.2g} times as much"
    if goal == "least-memory":
        more = other.memory.required_bytes - chosen.memory.required_bytes
        return f"needs {format_bytes(more)} more"
    if other.plan.resolved_method.quantized_base:
        if times < 1:
            return "faster, but a 4-bit base costs some quality"
        return "a 4-bit base costs time and some quality"
    if chosen.plan.resolved_method.quantized_base and other.plan.resolved_method.adapter:
        return f"takes {times:.2g} times as long: what fits beside the unquantized base is no use"
    if chosen.plan.method == "full":
        return "trains less than the data tell"
    return f"{chosen.plan.method} reaches the same with fewer trained parameters"
