"""Choosing a plan: the best method of which one fits, and its fastest plan.

Given settings are kept; the rest is chosen around them. Feasible means that `required` memory,
with a margin for the estimate's own error, is within the free memory of each GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import structs

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.goals import GOALS, NO_LIMITS, Limits, ranked
from ftplan.planner.hardware_spec import Device, Host
from ftplan.planner.host_verdict import lacking_ram
from ftplan.planner.memory import (
    fits,
    least_required_bytes,
    may_fit,
    with_margin,
)
from ftplan.planner.methods import COMPARED_METHODS, METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.ranking import Evaluated, LeftOut, Ranking, Rejection
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.space import Candidate, Group, Space
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.teams import Team, teams_of

# Methods tried when none is given, best first. `freeze` is offered, not recommended, and full
# tuning is for those who ask: adapters on all linear layers reach it on data of this size
# ("LoRA Without Regret", 2025).
PREFERRED_METHODS = ("lora", "qlora")

# Plans that differ by less are alike: that is within the estimate's error.
_ALIKE = 1.02

# What needs so many times what is free is far from fitting: the closed form's share for the
# allocator is within 4 % of its replay.
_FAR = 1.1


def choose_plan(
    model: ModelSpec,
    data: DataProfile,
    device: Device | Sequence[Device],
    given: Mapping[str, Any],
    stack: Stack = OWN_STACK,
    *,
    divides: bool = True,
    goal: str = GOALS[0],
    limits: Limits = NO_LIMITS,
    host: Host | None = None,
    rows_per_step: int | None = None,
) -> Ranking:
    """The best plan for this data, `given` settings kept.

    `device`: one of which there are as many as `num_gpus` says, or the GPUs of a machine, any of
    which may train. `divides`: whether they may divide what the model holds. `goal`: one of GOALS,
    what the best is best at; `limits`: what a run may take at most; `host`: whose RAM it may take,
    None for any; `rows_per_step`: in the place of the policy's. Deterministic: the same input gives
    the same ranking. Raises InputError when the given settings are impossible with the method asked
    for, or with the preferred one, and when no candidate can be estimated and run.
    """
    teams = teams_of(device, given.get("num_gpus"))
    fitting: list[Evaluated] = []
    rejected: list[Rejection] = []
    missed: list[Evaluated] = []
    left_out: list[LeftOut] = []
    refusals: list[InputError] = []
    beyond: list[str] = []
    num_plans = num_evaluated = 0
    for number, method in enumerate(_candidate_methods(given)):
        space = Space(model, data, given, stack, divides=divides, rows_per_step=rows_per_step)
        search = _MethodSearch(space, model, data, stack, goal, limits, host)
        try:
            found = search.best(method, teams, thorough=not fitting)
        except InputError as error:
            if number == 0 or isinstance(error, UnknownNameError):
                raise
            rejected.append(Rejection(method=method, reason=error.message))
            continue
        num_plans += space.num_plans
        num_evaluated += space.num_evaluated
        refusals += space.refused
        if found is None and not (search.missed or search.beyond):
            rejected.append(Rejection(method=method, reason=space.refused[0].message))
            continue
        left_out += _left_out(method, space.refused)
        if found is not None:
            fitting.append(found)
            continue
        if not search.missed:
            rejected.append(Rejection(method=method, reason=search.beyond[0]))
            beyond.append(search.beyond[0])
            continue
        smallest = search.smallest()
        missed.append(smallest)
        reason = "needs more memory than is free"
        rejected.append(Rejection(method=method, reason=reason, nearest=smallest))
    if not (fitting or missed or beyond):
        raise refusals[0]
    best = ranked(fitting, goal)
    return Ranking(
        best=best[0] if best else None,
        alternatives=tuple(best[1:]),
        rejected=tuple(rejected),
        left_out=tuple(left_out),
        nearest=min(missed, key=lambda e: e.memory.required_bytes) if missed and not best else None,
        goal=goal,
        num_plans=num_plans,
        num_evaluated=num_evaluated,
    )


def _candidate_methods(given: Mapping[str, Any]) -> Iterable[str]:
    if "method" in given:
        return (str(given["method"]),)
    if given.get("quantization", "none") != "none":
        return ("qlora",)
    others = sorted(name for name in COMPARED_METHODS if name not in PREFERRED_METHODS)
    unquantized = "quantization" in given
    return [
        name
        for name in (*PREFERRED_METHODS, *others)
        if not (unquantized and METHODS[name].quantized_base)
    ]


def _left_out(method: str, refused: Sequence[InputError]) -> list[LeftOut]:
    """The method's refused candidates, by reason."""
    counts = Counter((error.message, error.hint or "") for error in refused)
    return [
        LeftOut(method=method, reason=reason, hint=hint, count=count)
        for (reason, hint), count in counts.items()
    ]


class _MethodSearch:
    """A method's best plan that fits and keeps the limits; `missed` gets those that do not fit,
    `beyond` how others are beyond the limits."""

    def __init__(
        self,
        space: Space,
        model: ModelSpec,
        data: DataProfile,
        stack: Stack,
        goal: str,
        limits: Limits,
        host: Host | None,
    ) -> None:
        self.space = space
        self._model, self._data, self._stack = model, data, stack
        self._goal, self._limits, self._host = goal, limits, host
        self.missed: list[Evaluated] = []
        self.beyond: list[str] = []

    def best(self, method: str, teams: list[Team], *, thorough: bool) -> Evaluated | None:
        """None where nothing fits. Raises InputError where given settings rule the method out.

        `thorough`: what is taken has been replayed. Without, the closed form's share for the
        allocator is enough, which takes a fraction of the time.
        """
        groups = self.space.groups(resolve_method(method), teams)
        if self._goal == "least-memory":
            return self._smallest_of(groups)
        if not thorough:
            found = self._first(groups)
            if found is not None:
                return found
        return self._confirmed(groups)

    def smallest(self) -> Evaluated:
        """Of those that do not fit, the one that requires least."""
        return self._smallest(self.missed)

    def _smallest(self, several: Sequence[Evaluated]) -> Evaluated:
        least = min(several, key=lambda e: e.memory.required_bytes)
        if _is_far(least):  # an estimate is enough, and large models take long to replay
            return least
        first, *others = sorted(several, key=lambda e: e.memory.allocated_peak_bytes)
        smallest = self._replayed(first)
        for other in others:
            if _least_bytes(other) >= smallest.memory.required_bytes:
                break
            smallest = min(smallest, self._replayed(other), key=lambda e: e.memory.required_bytes)
        return smallest

    def _smallest_of(self, groups: list[Group]) -> Evaluated | None:
        """The plan of least memory: memory rises with the micro-batch."""
        found: list[Evaluated] = []
        for group in groups:
            for size in group.sizes:
                candidate = self.space.refuse(partial(self.space.candidate, group, size))
                evaluated = self._evaluated(candidate) if candidate else None
                if candidate is not None and evaluated is not None and self._keeps(candidate):
                    if self._host_holds(evaluated):
                        found.append(evaluated)
                    break
        if not found:
            return None
        smallest = self._smallest(found)
        if fits(smallest.memory, smallest.device):
            return _as_smallest(smallest)
        self.missed += found
        return None

    def _keeps(self, candidate: Candidate) -> bool:
        """Whether a plan keeps the limits."""
        rows = self._data.num_train_rows
        beyond = self._limits.exceeded_by(candidate.reasoned.plan, candidate.step, rows)
        if beyond is not None:
            self.beyond.append(beyond)
        return beyond is None

    def _host_holds(self, evaluated: Evaluated) -> bool:
        """Whether the host has the RAM that a plan takes."""
        if self._host is None:
            return True
        lacking = lacking_ram(evaluated.memory, self._host, evaluated.device)
        if lacking is not None:
            self.beyond.append(lacking)
        return lacking is None

    def _price(self, evaluated: Evaluated) -> float:
        """What plans of a method are compared by."""
        if self._goal == "cheapest":
            return evaluated.gpu_seconds_per_row
        return evaluated.seconds_per_row

    def _first(self, groups: list[Group]) -> Evaluated | None:
        """The best of those that fit by the closed form."""
        alike: list[Evaluated] = []
        for evaluated in self._by_price(groups):
            if alike and self._price(evaluated) > _ALIKE * self._price(alike[0]):
                break
            if fits(evaluated.memory, evaluated.device):
                alike.append(evaluated)
        return self._best(alike) if alike else None

    def _confirmed(self, groups: list[Group]) -> Evaluated | None:
        """The best that fits. What does not fit is no measure of how fast others are."""
        coming = self._by_price(groups)
        waiting = next(coming, None)
        possible: list[Evaluated] = []
        while True:
            while waiting is not None and (
                not possible or self._price(waiting) <= _ALIKE * self._price(possible[0])
            ):
                possible.append(waiting)
                waiting = next(coming, None)
            if not possible:
                return None
            chosen = self._best(possible)
            confirmed = self._replayed(chosen)
            too_large = chosen
            if fits(confirmed.memory, chosen.device):
                too_large = possible[0]
                if too_large is chosen:
                    return confirmed
                if fits(self._replayed(too_large).memory, too_large.device):
                    return confirmed
            self.missed.append(too_large)
            possible = [evaluated for evaluated in possible if evaluated is not too_large]

    def _by_price(self, groups: list[Group]) -> Iterator[Evaluated]:
        """Plans that may fit, the best first; the others are noted as missed."""
        stream = self.space.by_time(groups, of_all_gpus=self._goal == "cheapest")
        for group, candidate in stream:
            if not self._keeps(candidate):
                continue
            evaluated = self._evaluated(candidate)
            if evaluated is None or not self._host_holds(evaluated):
                continue
            if _may_fit(evaluated):
                yield evaluated
            else:
                self.missed.append(evaluated)
                stream.leave_out_from(group, candidate)

    def _best(self, fitting: Sequence[Evaluated]) -> Evaluated:
        """The plan of least time a row.

        Where two differ by under 2 %, the larger micro-batch's padding and the estimate's error
        decide nothing, so the one with less memory is taken, of those with the most rows a step:
        that is the recipe's number, which a given accumulation may keep small micro-batches from.
        """
        least = min(map(self._price, fitting))
        near = [e for e in fitting if self._price(e) <= _ALIKE * least]
        rows = max(e.plan.effective_batch_size for e in near)
        enough = [e for e in near if e.plan.effective_batch_size == rows]
        return min(enough, key=lambda e: e.memory.required_bytes)

    def _evaluated(self, candidate: Candidate) -> Evaluated | None:
        try:
            return self.space.evaluate(candidate)
        except UnknownNameError:
            raise
        except InputError as error:
            self.space.refused.append(error)
            return None

    def _replayed(self, evaluated: Evaluated) -> Evaluated:
        """With what the allocator really holds: to find that out takes too long for all."""
        memory = replayed_memory(
            self._model,
            evaluated.plan,
            device=evaluated.device,
            longest_row=self._data.longest_in_run,
            stack=self._stack,
        )
        return structs.replace(evaluated, memory=memory)


def _as_smallest(evaluated: Evaluated) -> Evaluated:
    """With memory as the reason of what was chosen for it."""
    reasoned, plan = evaluated.reasoned, evaluated.plan
    for name in ("per_device_train_batch_size", "gradient_checkpointing"):
        if reasoned.reasons[name].origin != "given":
            chosen = {name: getattr(plan, name)}
            reasoned = reasoned.replace("derived", "what needs the least memory", **chosen)
    return structs.replace(evaluated, reasoned=reasoned)


def _least_bytes(evaluated: Evaluated) -> int:
    return least_required_bytes(evaluated.memory, evaluated.device)


def _may_fit(evaluated: Evaluated) -> bool:
    return may_fit(evaluated.memory, evaluated.device)


def _is_far(evaluated: Evaluated) -> bool:
    """Whether it misses by so much that an exact figure says no more than an estimate."""
    return with_margin(_least_bytes(evaluated)) > _FAR * evaluated.device.free_bytes
