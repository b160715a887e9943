"""Plans among which a choice is a matter of taste: less memory, less time, or a better method.

The search passes over what cannot be the best. Here each plan counts to which no other is at least
as good in all three: required memory, time a row, and its class, in which the methods stand in the
policy's order. Memory is the closed form's, but for plans that the search has replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any

from msgspec import Struct

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.goals import NO_LIMITS, Limits
from ftplan.planner.hardware_spec import Device, Host
from ftplan.planner.host_verdict import lacking_ram
from ftplan.planner.memory import fits
from ftplan.planner.methods import resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.space import CHOSEN_SHARDINGS, SECONDS_PER_ROW, Candidate, Group, Space
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.teams import teams_of


class Class(Struct, frozen=True, kw_only=True):
    """Plans of one quality: groups of a space. `known`: those of them that fit as the search found
    out already."""

    space: Space
    groups: Sequence[Group]
    known: tuple[Evaluated, ...] = ()


def pareto_front(
    classes: Iterable[Class],
    keeps: Callable[[Candidate], bool],
    has_memory: Callable[[Evaluated], bool],
) -> list[Evaluated]:
    """The front, class by class, in each the fastest first. Of equal plans one is taken.

    `classes`: the best first. `keeps`: whether a plan is allowed, whatever its memory.
    `has_memory`: whether there is enough for it; what needs more than one that does not fit does
    not fit either.
    """
    front: list[Evaluated] = []
    for one in classes:
        found = _worth_it(one, keeps, has_memory, [*front, *one.known])
        front += _undominated([*one.known, *found], front)
    return front


def front_of(
    ranking: Ranking,
    model: ModelSpec,
    data: DataProfile,
    device: Device | Sequence[Device],
    given: Mapping[str, Any],
    stack: Stack = OWN_STACK,
    *,
    shardings: Sequence[str] = CHOSEN_SHARDINGS,
    has_liger: bool = False,
    limits: Limits = NO_LIMITS,
    host: Host | None = None,
) -> list[Evaluated]:
    """The front among all plans of the methods that fit, as `choose_plan` ranked them for the same
    arguments."""
    teams = teams_of(device, given.get("num_gpus"))
    found = [ranking.best, *ranking.alternatives] if ranking.best else []

    def class_of(method: str) -> Class:
        space = Space(model, data, given, stack, shardings=shardings, has_liger=has_liger)
        known = tuple(evaluated for evaluated in found if evaluated.plan.method == method)
        return Class(space=space, groups=space.groups(resolve_method(method), teams), known=known)

    def keeps(candidate: Candidate) -> bool:
        plan, step = candidate.reasoned.plan, candidate.step
        return limits.exceeded_by(plan, step, data.num_train_rows) is None

    def has_memory(evaluated: Evaluated) -> bool:
        memory, gpu = evaluated.memory, evaluated.device
        held = host is None or lacking_ram(memory, host, gpu) is None
        return held and fits(memory, gpu, ranking.margin)

    return pareto_front(map(class_of, ranking.by_policy), keeps, has_memory)


def _worth_it(
    one: Class,
    keeps: Callable[[Candidate], bool],
    has_memory: Callable[[Evaluated], bool],
    others: Sequence[Evaluated],
) -> Iterator[Evaluated]:
    """Plans of a class that are not dominated by each other or by `others`.

    They come with rising time, so that one counts where it needs less than all before it. Memory
    rises with the micro-batch: where a plan needs too much, larger ones of its group do, and where
    the smallest does, the whole group.
    """
    space, known = one.space, [evaluated.plan for evaluated in one.known]
    waiting = sorted(others, key=attrgetter("seconds_per_row"), reverse=True)
    least: float = float("inf")
    seen: set[int] = set()
    passed_over: set[int] = set()
    stream = space.by_price(list(one.groups), SECONDS_PER_ROW)
    for group, candidate in stream:
        while waiting and waiting[-1].seconds_per_row <= candidate.seconds_per_row:
            least = min(least, waiting.pop().memory.required_bytes)
        if id(group) not in seen:
            seen.add(id(group))
            small = [_evaluated(space, made) for made in _smallest(space, group)]
            known_small = [evaluated for evaluated in small if evaluated is not None]
            too_much = [_needs_too_much(one, least, has_memory) for one in known_small]
            if too_much and all(too_much):
                passed_over.add(id(group))
        if id(group) in passed_over:
            continue
        if not keeps(candidate) or candidate.reasoned.plan in known:
            continue
        evaluated = _evaluated(space, candidate)
        if evaluated is None:
            continue
        if _needs_too_much(evaluated, least, has_memory):
            stream.leave_out_from(group, candidate)
            continue
        least = evaluated.memory.required_bytes
        yield evaluated


def _smallest(space: Space, group: Group) -> Iterator[Candidate]:
    """Plans of a group of which one needs the least."""
    for size in group.smallest:
        with suppress(InputError):
            yield space.candidate(group, size)


def _evaluated(space: Space, candidate: Candidate) -> Evaluated | None:
    try:
        return space.evaluate(candidate)
    except InputError:
        return None


def _needs_too_much(
    evaluated: Evaluated, least: float, has_memory: Callable[[Evaluated], bool]
) -> bool:
    return evaluated.memory.required_bytes >= least or not has_memory(evaluated)


def _undominated(plans: Iterable[Evaluated], better: Sequence[Evaluated]) -> Iterator[Evaluated]:
    """Those of a class that none of it or of `better` dominates, with rising time."""
    waiting = sorted(better, key=attrgetter("seconds_per_row"), reverse=True)
    least: float = float("inf")
    for plan in sorted(plans, key=attrgetter("seconds_per_row", "memory.required_bytes")):
        while waiting and waiting[-1].seconds_per_row <= plan.seconds_per_row:
            least = min(least, waiting.pop().memory.required_bytes)
        if plan.memory.required_bytes < least:
            least = plan.memory.required_bytes
            yield plan


def thinned(front: Sequence[Evaluated], most: int, keep: Evaluated) -> list[Evaluated]:
    """At most so many of them, evenly spaced, both ends and `keep` among them."""
    if len(front) <= most:
        return list(front)
    places = {round(n * (len(front) - 1) / (most - 1)) for n in range(most)}
    if keep in front and (place := front.index(keep)) not in places:
        inner = sorted(places)[1:-1]
        places.remove(min(inner, key=lambda other: abs(other - place)))
        places.add(place)
    return [front[place] for place in sorted(places)]
