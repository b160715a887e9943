"""Choosing a plan: the best method of which one fits, and its fastest plan.

Given settings are kept; the rest is chosen around them. Feasible means that `required` memory,
with a margin for the estimate's own error, is within the free memory of each GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import structs

from ftplan.planner.combinations import QUANTIZED_ON_PROCESSOR
from ftplan.planner.concessions import Settings
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.goals import GOALS, NO_LIMITS, Limits, ranked
from ftplan.planner.hardware_spec import Device, Host
from ftplan.planner.host_verdict import lacking_ram
from ftplan.planner.memory import MEMORY_MARGIN, fits, least_required_bytes, may_fit
from ftplan.planner.methods import COMPARED_METHODS, METHODS, Method, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.policy import preferred_methods
from ftplan.planner.ranking import Evaluated, LeftOut, Ranking, Rejection
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.space import CHOSEN_SHARDINGS, Batches, Candidate, Group, Pricing, Space
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_time import StepTime
from ftplan.planner.teams import Team, teams_of

# What is missing is worth knowing to the percent where it is less than this share of what is free,
# from so many more plans than the smallest.
_NEAR = 1.1
_MOST_REPLAYED = 3

# Plans that differ by less are alike: that is within the estimate's error.
_ALIKE = 1.02


def choose_plan(
    model: ModelSpec,
    data: DataProfile,
    device: Device | Sequence[Device],
    given: Mapping[str, Any],
    stack: Stack = OWN_STACK,
    *,
    shardings: Sequence[str] = CHOSEN_SHARDINGS,
    has_liger: bool = False,
    goal: str = GOALS[0],
    limits: Limits = NO_LIMITS,
    host: Host | None = None,
    rows_per_step: int | None = None,
    margin: float = MEMORY_MARGIN,
) -> Ranking:
    """The best plan for this data, `given` settings kept.

    `device`: one of which there are as many as `num_gpus` says, or the GPUs of a machine, any of
    which may train. `shardings`: how they may divide what the model holds. `goal`: one of GOALS,
    what the best is best at; `limits`: what a run may take at most; `host`: whose RAM it may take,
    None for any; `rows_per_step`: in the place of the policy's; `margin`: a share of what is
    required that is kept free. Deterministic: the same input gives the same ranking. Raises
    InputError when the given settings are impossible with the method asked for, or with the
    preferred one, and when no candidate can be estimated and run.
    """
    teams = teams_of(device, given.get("num_gpus"))
    batches, tried = Batches(data), _Tried(margin)
    for number, method in enumerate(_candidate_methods(model, data, teams[0].device, given)):
        if _only_slows_down(method, teams[0].device, given):
            tried.rejected.append(Rejection(method=method, reason=QUANTIZED_ON_PROCESSOR))
            continue
        space = Space(
            model,
            data,
            given,
            stack,
            shardings=shardings,
            has_liger=has_liger,
            rows_per_step=rows_per_step,
            batches=batches,
        )
        search = _MethodSearch(space, model, data, stack, goal, limits, host, margin)
        try:
            found = search.best(method, teams, thorough=not tried.fitting)
        except InputError as error:
            if number == 0 or isinstance(error, UnknownNameError):
                raise
            tried.rejected.append(Rejection(method=method, reason=error.message))
        else:
            tried.take(method, search, found)
    best = ranked(tried.fitting, goal)
    if not best:
        tried.look_closer(partial(_replayed, model, data, stack))
    return Ranking(
        best=best[0] if best else None,
        alternatives=tuple(best[1:]),
        rejected=tuple(tried.rejected),
        left_out=tuple(tried.left_out),
        nearest=tried.nearest,
        by_policy=tuple(evaluated.plan.method for evaluated in tried.fitting),
        goal=goal,
        margin=margin,
        num_plans=tried.num_plans,
        num_timed=tried.num_timed,
        num_evaluated=tried.num_evaluated,
    )


class _Tried:
    """What has become of the methods: plans that fit, and what stopped the others."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self.fitting: list[Evaluated] = []
        self.rejected: list[Rejection] = []
        self.left_out: list[LeftOut] = []
        self.nearest: Evaluated | None = None
        self._missed: list[Evaluated] = []
        self._refused: list[InputError] = []
        self._is_beyond = False
        self.num_plans = self.num_timed = self.num_evaluated = 0

    def take(self, method: str, search: _MethodSearch, found: Evaluated | None) -> None:
        """A method's best plan, or why there is none."""
        space = search.space
        self.num_plans += space.num_plans
        self.num_timed += space.num_timed
        self.num_evaluated += space.num_evaluated
        self._refused += space.refused
        if found is None and not (search.missed or search.beyond):
            self.rejected.append(Rejection(method=method, reason=space.refused[0].message))
            return
        self.left_out += _left_out(method, space.refused)
        if found is not None:
            self.fitting.append(found)
        elif search.missed:
            self._missed += search.missed
            self.rejected.append(
                Rejection(
                    method=method,
                    reason="needs more memory than is free",
                    nearest=min(search.missed, key=_required_bytes),
                    margin=self._margin,
                )
            )
        else:
            self._is_beyond = True
            self.rejected.append(Rejection(method=method, reason=search.beyond[0]))

    def look_closer(self, replayed: Callable[[Evaluated], Evaluated]) -> None:
        """Where nothing fits: what misses by least. Raises InputError where nothing could be."""
        if self._missed:
            self.nearest = nearest = _nearest(self._missed, replayed)
            self.rejected = [_exactly(rejection, nearest) for rejection in self.rejected]
        elif not self._is_beyond:
            raise self._refused[0]


def _nearest(missed: Sequence[Evaluated], replayed: Callable[[Evaluated], Evaluated]) -> Evaluated:
    """What requires least, with what the allocator holds of it. Where little is missing, some that
    are as small by the closed form are looked at, too."""
    smallest, *others = sorted(missed, key=_required_bytes)
    nearest = replayed(smallest)
    if _required_bytes(nearest) > _NEAR * nearest.device.free_bytes:
        return nearest
    for other in others[:_MOST_REPLAYED]:
        if _least_bytes(other) < _required_bytes(nearest):
            nearest = min(nearest, replayed(other), key=_required_bytes)
    return nearest


def _exactly(rejection: Rejection, nearest: Evaluated) -> Rejection:
    """With the nearest plan of all, if it is the method's."""
    if rejection.nearest is None or rejection.method != nearest.plan.method:
        return rejection
    return structs.replace(rejection, nearest=nearest)


def _candidate_methods(
    model: ModelSpec, data: DataProfile, device: Device, given: Mapping[str, Any]
) -> Iterable[str]:
    """Methods to try, the best first; those that the policy does not prefer are only offered."""
    if "method" in given:
        return (str(given["method"]),)
    if given.get("quantization", "none") != "none":
        return ("qlora",)
    preferred = preferred_methods(model, data, device.kind, given).value
    others = sorted(name for name in COMPARED_METHODS if name not in preferred)
    unquantized = "quantization" in given
    return [
        name for name in (*preferred, *others) if not (unquantized and METHODS[name].quantized_base)
    ]


def _only_slows_down(method: str, device: Device, given: Mapping[str, Any]) -> bool:
    """Whether a processor takes far longer by a quantized base, which nobody asked for."""
    asked = "method" in given or given.get("quantization", "none") != "none"
    return device.kind == "cpu" and not asked and METHODS[method].quantized_base


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
        margin: float,
    ) -> None:
        self.space = space
        self._model, self._data, self._stack = model, data, stack
        self._goal, self._limits, self._host = goal, limits, host
        self._margin = margin
        self._pricing = Pricing(of_all_gpus=goal == "cheapest")
        self.missed: list[Evaluated] = []
        self.beyond: list[str] = []

    def best(self, method: str, teams: list[Team], *, thorough: bool) -> Evaluated | None:
        """The best of those that give up least; None where nothing fits. Raises InputError where
        given settings rule the method out.

        `thorough`: what is taken has been replayed. Without, the closed form's share for the
        allocator is enough, which takes a fraction of the time.
        """
        resolved = resolve_method(method)
        found = self._best_of(self.space.groups(resolved, teams), thorough=thorough)
        if found is not None or not self.missed:
            return found
        conceded = self.space.concessions(resolved, teams)
        least, most = 0, len(conceded) - 1
        # Memory falls with all that is given up, so the end says whether anything helps.
        while least < most:
            tried = most if found is None else (least + most) // 2
            if tried == least:
                break
            better = self._conceding(resolved, teams, conceded[tried], thorough=thorough)
            if better is not None:
                found, most = better, tried
            elif found is None:
                break
            else:
                least = tried
        return found

    def _conceding(
        self, method: Method, teams: list[Team], conceded: Settings, *, thorough: bool
    ) -> Evaluated | None:
        try:
            groups = self.space.groups(method, teams, conceded)
        except UnknownNameError:
            raise
        except InputError as error:
            self.space.refused.append(error)
            return None
        return self._best_of(groups, thorough=thorough)

    def _best_of(self, groups: list[Group], *, thorough: bool) -> Evaluated | None:
        groups = self._with_room(groups)
        if self._goal == "least-memory":
            return self._smallest_of(groups)
        if not thorough:
            found = self._first(groups)
            if found is not None:
                return found
        return self._confirmed(groups)

    def _with_room(self, groups: list[Group]) -> list[Group]:
        """Without those that do not fit whatever the batch; the smallest of these is noted as
        missed, where all are."""
        least = [self.space.least_bytes(group) for group in groups]
        pairs = list(zip(groups, least, strict=True))
        possible = [group for group, held in pairs if held <= group.team.device.free_bytes]
        if not possible and groups:
            smallest = min(least)
            for group, held in pairs:
                if held == smallest:
                    self._may_do(group)
        return possible

    def _may_do(self, group: Group) -> bool:
        """Whether a group's plan with the smallest micro-batch may fit; noted as missed if not. Not
        asked where much is free, as what is not fast enough need not be looked at."""
        if 2 * self.space.least_bytes(group) < group.team.device.free_bytes:
            return True
        small = [self._sized(group, size) for size in group.smallest]
        known = [evaluated for evaluated in small if evaluated is not None]
        if not known or any(_may_fit(evaluated, self._margin) for evaluated in known):
            return True
        self.missed += known
        return False

    def _sized(self, group: Group, size: int) -> Evaluated | None:
        """A group's plan with this micro-batch; None where it cannot be."""
        candidate = self.space.refuse(partial(self.space.candidate, group, size))
        return self._evaluated(candidate) if candidate else None

    def _smallest_of(self, groups: list[Group]) -> Evaluated | None:
        """The plan of least memory: memory rises with the micro-batch."""
        found: list[Evaluated] = []
        for group in groups:
            for evaluated in [self._sized(group, size) for size in group.smallest]:
                if evaluated is None or not self._keeps(evaluated.plan, evaluated.step):
                    continue
                if self._host_holds(evaluated):
                    found.append(evaluated)
        if not any(_may_fit(evaluated, self._margin) for evaluated in found):
            self.missed += found
            return None
        smallest = self._smallest(found)
        if fits(smallest.memory, smallest.device, self._margin):
            return _as_smallest(smallest)
        self.missed += found
        return None

    def _smallest(self, several: Sequence[Evaluated]) -> Evaluated:
        first, *others = sorted(several, key=lambda e: e.memory.allocated_peak_bytes)
        smallest = self._replayed(first)
        for other in others:
            if _least_bytes(other) >= smallest.memory.required_bytes:
                break
            smallest = min(smallest, self._replayed(other), key=_required_bytes)
        return smallest

    def _keeps(self, plan: TrainingPlan, step: StepTime) -> bool:
        """Whether a plan keeps the limits."""
        beyond = self._limits.exceeded_by(plan, step, self._data.num_train_rows)
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
        return self._pricing.of(evaluated.plan, evaluated.step)

    def _first(self, groups: list[Group]) -> Evaluated | None:
        """The best of those that fit by the closed form."""
        alike: list[Evaluated] = []
        for evaluated in self._by_price(groups):
            if alike and self._price(evaluated) > _ALIKE * self._price(alike[0]):
                break
            if fits(evaluated.memory, evaluated.device, self._margin):
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
            too_large, replayed = chosen, confirmed
            if fits(confirmed.memory, chosen.device, self._margin):
                too_large = possible[0]
                if too_large is chosen:
                    return confirmed
                replayed = self._replayed(too_large)
                if fits(replayed.memory, too_large.device, self._margin):
                    return confirmed
            self.missed.append(replayed)
            possible = [evaluated for evaluated in possible if evaluated is not too_large]

    def _by_price(self, groups: list[Group]) -> Iterator[Evaluated]:
        """Plans that may fit, the best first; the others are noted as missed."""
        stream = self.space.by_price(groups, self._pricing, possible=self._may_do)
        for group, candidate in stream:
            if not self._keeps(candidate.reasoned.plan, candidate.step):
                continue
            evaluated = self._evaluated(candidate)
            if evaluated is None or not self._host_holds(evaluated):
                continue
            if _may_fit(evaluated, self._margin):
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
        return min(enough, key=lambda e: (e.memory.required_bytes, self._price(e)))

    def _evaluated(self, candidate: Candidate) -> Evaluated | None:
        try:
            return self.space.evaluate(candidate)
        except UnknownNameError:
            raise
        except InputError as error:
            self.space.refused.append(error)
            return None

    def _replayed(self, evaluated: Evaluated) -> Evaluated:
        return _replayed(self._model, self._data, self._stack, evaluated)


def _replayed(model: ModelSpec, data: DataProfile, stack: Stack, evaluated: Evaluated) -> Evaluated:
    """With what the allocator really holds: to find that out takes too long for all."""
    memory = replayed_memory(
        model,
        evaluated.plan,
        device=evaluated.device,
        longest_row=data.longest_in_run,
        stack=data.on(stack, evaluated.plan),
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


def _required_bytes(evaluated: Evaluated) -> int:
    return evaluated.memory.required_bytes


def _least_bytes(evaluated: Evaluated) -> int:
    return least_required_bytes(evaluated.memory, evaluated.device)


def _may_fit(evaluated: Evaluated, margin: float) -> bool:
    return may_fit(evaluated.memory, evaluated.device, margin)
