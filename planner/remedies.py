"""What would hold a method that does not fit: more GPUs that divide the model, or a larger one.

Where to look is told by the plan that needs least, in closed form; what is found there is one of
the plans that a search compares. Allocations are replayed only where that leaves it open.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import methodcaller
from typing import Any

from msgspec import Struct

from ftplan.planner.concessions import Settings
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MemoryEstimate, estimate_memory, fits, may_fit, needed_bytes
from ftplan.planner.methods import resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.space import Group, Space
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.teams import Team

# GPUs of a machine, at most. More are several machines.
MOST_OF_A_MACHINE = 8

# Of plans that need as much, those whose allocations are replayed.
_MOST_REPLAYED = 4

# Numbers of GPUs that are offered.
NUMBERS_OF_GPUS = (*range(2, MOST_OF_A_MACHINE + 1), 16, 32, 64)


class Wish(Struct, frozen=True, kw_only=True):
    """A model to train on data; the `given` settings name a method."""

    model: ModelSpec
    data: DataProfile
    given: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Those given, without machines: where GPUs stand changes nothing of what they hold."""
        return {name: value for name, value in self.given.items() if name != "num_machines"}


class Remedy(Struct, frozen=True, kw_only=True):
    """`num_gpus` of a device hold a plan of which each has to have `needed_bytes` free, the margin
    included; `sharding` says what they divide."""

    device: Device
    num_gpus: int
    sharding: str
    needed_bytes: int


def fewest_of(
    wish: Wish, device: Device, stack: Stack = OWN_STACK, *, more_than: int = 1
) -> Remedy | None:
    """The least of NUMBERS_OF_GPUS that hold it where they divide the parameters (FSDP, unless a
    sharding is given); None where none does. What each of them needs falls with their number."""
    numbers = [number for number in NUMBERS_OF_GPUS if number > more_than]
    return _first([_Trial(wish, device, stack, number) for number in numbers])


def smallest_of(
    wish: Wish,
    devices: Sequence[Device],
    stack_on: Callable[[Device], Stack] = lambda device: OWN_STACK,
) -> Remedy | None:
    """The first of the devices, given in the order of their memory, that holds it alone."""
    return _first([_Trial(wish, device, stack_on(device), 1) for device in devices])


def held_by(wish: Wish, device: Device, num_gpus: int, stack: Stack = OWN_STACK) -> bool:
    """Whether so many of the device hold it, divided where they are several."""
    trial = _Trial(wish, device, stack, num_gpus)
    return trial.may_hold() and trial.remedy() is not None


class _Trial:
    """Plans of a method on so many of a device."""

    def __init__(self, wish: Wish, device: Device, stack: Stack, num_gpus: int) -> None:
        self._wish, self._stack, self._team = wish, stack, Team(device, num_gpus)
        sharding = wish.settings.get("sharding", "fsdp") if num_gpus > 1 else "none"
        self._given = {**wish.settings, "num_gpus": num_gpus, "sharding": sharding}
        self._method = resolve_method(str(wish.settings["method"]))
        self._space = Space(wish.model, wish.data, self._given, stack)
        first, *others = self._space.concessions(self._method, [self._team])
        self._concessions = [first, *others[-1:]]

    def may_hold(self) -> bool:
        """False only where they cannot: the smallest of those that give up most."""
        return any(may_fit(memory, self._team.device) for _, memory in self._least(-1))

    def remedy(self) -> Remedy | None:
        """One of the plans that a search finds there; None where it finds none."""
        for place in range(len(self._concessions)):
            found = self._found(place)
            if found is not None:
                return found
        return None

    def _found(self, place: int) -> Remedy | None:
        device = self._team.device
        least = list(self._least(place))
        for plan, memory in least:
            if fits(memory, device):
                return _remedy(plan, memory, device)
        if not any(may_fit(memory, device) for _, memory in least):
            return None
        # It is close: what the allocator makes of plans that need as much differs by some percent.
        every = [one for one in self._least(place, all_of_them=True) if may_fit(one[1], device)]
        every.sort(key=lambda one: one[1].allocated_peak_bytes)
        for plan, _ in every[:_MOST_REPLAYED]:
            memory = self._memory(replayed_memory, plan)
            if fits(memory, device):
                return _remedy(plan, memory, device)
        return None

    def _least(
        self, place: int, *, all_of_them: bool = False
    ) -> Iterator[tuple[TrainingPlan, MemoryEstimate]]:
        """Of plans that give up so much, one row at once or all that a step takes; with as many
        layers checkpointed as may be, or with any number: one of them needs least."""
        groups = self._groups(self._concessions[place])
        most = min(map(_keeps_activations, groups), default=None)
        for group in groups:
            held = self._space.least_bytes(group)
            keeps_more = _keeps_activations(group) != most and not all_of_them
            if keeps_more or held > self._team.device.free_bytes:
                continue
            for size in group.smallest:
                with suppress(InputError):  # there is none, or it is not modelled
                    plan = self._space.plan(group, size).plan
                    yield plan, self._memory(estimate_memory, plan)

    def _groups(self, conceded: Settings) -> list[Group]:
        with suppress(InputError):
            return self._space.groups(self._method, [self._team], conceded)
        return []

    def _memory(self, look: Callable[..., MemoryEstimate], plan: TrainingPlan) -> MemoryEstimate:
        wish = self._wish
        return look(
            wish.model,
            plan,
            device=self._team.device,
            longest_row=wish.data.longest_in_run,
            stack=wish.data.on(self._stack, plan),
        )


def _keeps_activations(group: Group) -> tuple[bool, int]:
    plan = group.base.plan
    return not plan.gradient_checkpointing, plan.every_n_layers


def _remedy(plan: TrainingPlan, memory: MemoryEstimate, device: Device) -> Remedy:
    return Remedy(
        device=device,
        num_gpus=plan.num_gpus,
        sharding=plan.sharding,
        needed_bytes=needed_bytes(memory),
    )


def _first(trials: Sequence[_Trial]) -> Remedy | None:
    """The first that fits, of trials in such an order that whatever follows one that may fit may
    fit too."""
    start = bisect_left(trials, True, key=methodcaller("may_hold"))
    remedies = (trial.remedy() for trial in trials[start:])
    return next((remedy for remedy in remedies if remedy is not None), None)
