"""Plans with what they need and take, and what was chosen of them and why not others."""

from __future__ import annotations

from msgspec import Struct

from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MEMORY_MARGIN, MemoryEstimate, needed_bytes
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.step_time import StepTime
from ftplan.planner.teams import Team


class Evaluated(Struct, frozen=True, kw_only=True):
    """A plan with what it needs and takes on each GPU of a team."""

    reasoned: ReasonedPlan
    team: Team
    memory: MemoryEstimate
    step: StepTime

    @property
    def plan(self) -> TrainingPlan:
        return self.reasoned.plan

    @property
    def device(self) -> Device:
        """What each of the team's GPUs does at least."""
        return self.team.device

    @property
    def seconds_per_row(self) -> float:
        """What plans are compared by, whatever number of rows a step takes."""
        return self.step.step_seconds / self.plan.effective_batch_size

    @property
    def gpu_seconds_per_row(self) -> float:
        """What is paid for."""
        return self.plan.num_gpus * self.seconds_per_row


class Rejection(Struct, frozen=True, kw_only=True):
    """A method that was not taken, and what stopped it; for want of memory `nearest`, its plan that
    misses by least, of which `margin` was to be kept free."""

    method: str
    reason: str
    nearest: Evaluated | None = None
    margin: float = MEMORY_MARGIN

    @property
    def needs_bytes(self) -> int | None:
        """What the nearest plan needs on each GPU, with the margin."""
        return needed_bytes(self.nearest.memory, self.margin) if self.nearest else None


class LeftOut(Struct, frozen=True, kw_only=True):
    """`count` of a method's candidates that cannot be estimated or run, and why."""

    method: str
    reason: str
    hint: str
    count: int


class Ranking(Struct, frozen=True, kw_only=True):
    """The chosen plan (None if nothing fits), the runners-up, and what was not taken: whole
    methods, and candidates of others."""

    best: Evaluated | None
    alternatives: tuple[Evaluated, ...]
    rejected: tuple[Rejection, ...]
    left_out: tuple[LeftOut, ...]
    nearest: Evaluated | None
    """What misses by least; None when something fits."""
    by_policy: tuple[str, ...]
    """The methods that fit, in the policy's order."""
    goal: str
    """What the best is best at."""
    margin: float
    """Of what is required the share that was kept free."""
    num_plans: int
    """Of how many plans it was chosen."""
    num_timed: int
    """Of how many of them the time was worked out: that of the others is bounded."""
    num_evaluated: int
    """At how many of them memory was looked at."""
