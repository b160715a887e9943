"""All plans of one way to train, the fastest first, without looking at each.

Plans are in groups that differ in their micro-batch alone. A group's time has a lower bound that
needs no trace of its own: what the same micro-batches take when nothing is computed again. Groups
and then plans are taken in the order of their times, so that whatever comes after the first that
fits is slower. Within a group memory rises with the micro-batch: what is larger than one that does
not fit is not looked at.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

from msgspec import Struct

from ftplan.planner import policy
from ftplan.planner.batching import mean_batch_tokens
from ftplan.planner.combinations import check_runs
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.methods import Method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.ranking import Evaluated
from ftplan.planner.recipe import data_recipe
from ftplan.planner.stack import Stack
from ftplan.planner.step_time import StepTime, StepWork, step_work, time_of
from ftplan.planner.teams import Team
from ftplan.planner.weights import weight_bytes_on_each

# Micro-batches tried where the accumulation is given; else those that divide a step's rows.
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)

# Ways to divide state among GPUs: gradients and optimizer states, and parameters too. ZeRO-3 and
# FSDP do the same; FSDP is torch's own, and trains beside a quantized base, too. Gradients and
# states of adapters are too small to be worth dividing without the base.
_SHARDINGS = ("zero2", "fsdp")
_SHARDINGS_OF_ADAPTERS = ("fsdp",)

# Of each so many layers one is checkpointed, where some are.
EVERY_N_LAYERS = (1, 2, 4)

# By how much a step may have fewer or more rows than the policy says, where all GPUs of a machine
# do not divide them.
_UNEVEN_SHARE = 1 / 8

_WITHOUT_CHECKPOINTING = "everything fits without computing layers twice"
_WITH_CHECKPOINTING = "without it the activations do not fit, or a larger batch is faster with it"


class Candidate(Struct, frozen=True, kw_only=True):
    """A plan and the time it takes, its memory not looked at."""

    reasoned: ReasonedPlan
    team: Team
    step: StepTime

    @property
    def seconds_per_row(self) -> float:
        return self.step.step_seconds / self.reasoned.plan.effective_batch_size

    @property
    def gpu_seconds_per_row(self) -> float:
        return self.team.num_gpus * self.seconds_per_row


class Group(Struct, frozen=True, kw_only=True):
    """Plans that differ in their micro-batch, one of `sizes`."""

    base: ReasonedPlan
    team: Team
    sizes: tuple[int, ...]


class Space:
    """Plans of a method on teams of GPUs, `given` settings kept.

    `divides`: whether GPUs may divide what a model holds. `refused` gets the errors of plans that
    cannot be, `num_plans` counts all that there are.
    """

    def __init__(
        self,
        model: ModelSpec,
        data: DataProfile,
        given: Mapping[str, Any],
        stack: Stack,
        *,
        divides: bool = True,
        rows_per_step: int | None = None,
    ) -> None:
        self._model, self._data, self._given, self._stack = model, data, given, stack
        self._rows = policy.effective_batch_size(data.num_train_rows)
        if rows_per_step is not None:
            self._rows = policy.Advice(value=rows_per_step, why="asked for")
        self._divides = divides
        self._tokens: dict[tuple[int, int], float] = {}
        self.refused: list[InputError] = []
        self.num_plans = 0
        self._memories: dict[tuple[TrainingPlan, int], MemoryEstimate] = {}

    @property
    def num_evaluated(self) -> int:
        """Plans whose memory was looked at."""
        return len(self._memories)

    # --- what there is

    def groups(self, method: Method, teams: list[Team]) -> list[Group]:
        """All groups of a method. Raises InputError where the given settings rule it out."""
        most = max(team.num_gpus for team in teams)
        found: list[Group] = []
        errors: list[InputError] = []
        for team in teams:
            try:
                found += self._groups_of(method, team, is_whole_machine=team.num_gpus == most)
            except UnknownNameError:
                raise
            except InputError as error:
                errors.append(error)
        if len(errors) == len(teams):
            raise errors[-1]
        self.num_plans += sum(len(group.sizes) for group in found)
        return self._worth_a_look(found)

    def _groups_of(self, method: Method, team: Team, *, is_whole_machine: bool) -> Iterator[Group]:
        base = self._base(method, team)
        sizes = self._sizes(base.plan, is_whole_machine=is_whole_machine)
        if not sizes:
            return
        for shared in self._with_shardings(base, method, team):
            for with_loss in self._with_losses(shared, team):
                for plan in self._with_checkpointing(with_loss, method):
                    yield Group(base=plan, team=team, sizes=sizes)

    def _worth_a_look(self, groups: list[Group]) -> list[Group]:
        """Without those whose weights alone do not fit; of these the smallest, where all are."""
        weights = [weight_bytes_on_each(self._model, group.base.plan) for group in groups]
        free = [group.team.device.free_bytes for group in groups]
        possible = [g for g, held, most in zip(groups, weights, free, strict=True) if held <= most]
        least = min(weights, default=0)
        return possible or [g for g, held in zip(groups, weights, strict=True) if held == least]

    def _base(self, method: Method, team: Team) -> ReasonedPlan:
        given = self._given
        if team.num_gpus > 1:
            given = {"num_gpus": team.num_gpus, **given}
        base = data_recipe(self._model, self._data, team.device, method, given)
        if "num_gpus" in self._given or team.num_gpus == 1:
            return base
        why = f"each step's rows are divided among {team.num_gpus} GPUs"
        return base.replace("derived", why, num_gpus=team.num_gpus)

    def _sizes(self, plan: TrainingPlan, *, is_whole_machine: bool) -> tuple[int, ...]:
        """Micro-batches to try; none where the team cannot share a step's rows."""
        given, groups = self._given, plan.data_parallel_size
        if "per_device_train_batch_size" in given:
            return (plan.per_device_train_batch_size,)
        rows = self._rows.value
        if "gradient_accumulation_steps" in given:
            most = max(1, rows // (plan.gradient_accumulation_steps * groups))
            return tuple(size for size in MICRO_BATCHES if size <= most)
        each = max(1, round(rows / groups))
        off = abs(each * groups - rows)
        if off > (_UNEVEN_SHARE * rows if is_whole_machine else 0) and "num_gpus" not in given:
            return ()
        return tuple(size for size in range(1, each + 1) if each % size == 0)

    def _with_shardings(
        self, base: ReasonedPlan, method: Method, team: Team
    ) -> Iterator[ReasonedPlan]:
        yield base
        divided = base.plan.tp_size > 1 or base.plan.cp_size > 1
        alone = team.num_gpus == 1 or divided
        if alone or "sharding" in self._given or not self._divides:
            return
        for sharding in _SHARDINGS_OF_ADAPTERS if method.adapter else _SHARDINGS:
            why = f"one GPU cannot hold all state; {team.num_gpus} divide it"
            yield from self._made(partial(base.replace, "derived", why, sharding=sharding))

    def _with_losses(self, plan: ReasonedPlan, team: Team) -> Iterator[ReasonedPlan]:
        """The losses worth comparing: on a GPU TRL's tiles move less and hold less; on a processor
        they are slow and may be larger than the full logits."""
        yield plan
        one_loss = plan.plan.resolved_objective.only_loss is not None
        if team.device.kind == "cpu" and not one_loss and "loss" not in self._given:
            why = "without a GPU's kernel TRL's tiles are slower than the full logits"
            yield plan.replace("derived", why, loss="stock")

    def _with_checkpointing(self, plan: ReasonedPlan, method: Method) -> Iterator[ReasonedPlan]:
        """Without, with every layer, and with one of some, unless one was asked for."""
        given = self._given
        if method.fills_cache or "gradient_checkpointing" in given or plan.plan.every_n_layers > 1:
            yield plan
            return
        yield from self._made(
            partial(plan.replace, "derived", _WITHOUT_CHECKPOINTING, gradient_checkpointing=False)
        )
        for every in (1,) if "every_n_layers" in given else EVERY_N_LAYERS:
            if every > 1 and every >= self._model.num_hidden_layers:
                break
            changed: dict[str, Any] = {"gradient_checkpointing": True}
            why = _WITH_CHECKPOINTING
            if every > 1:
                changed["every_n_layers"] = every
                why = f"one layer of {every}, so that less is computed again; the rest fits"
            yield from self._made(partial(plan.replace, "derived", why, **changed))

    def _made(self, make: Callable[[], ReasonedPlan]) -> Iterator[ReasonedPlan]:
        """The plan, if there can be one."""
        try:
            plan = make()
        except InputError as error:
            self.refused.append(error)
            return
        yield plan

    # --- in the order of their times

    def by_time(self, groups: list[Group], *, of_all_gpus: bool = False) -> Stream:
        """The groups' plans, the fastest first, or those that take the least time of all GPUs
        together; those of equal time in the groups' order."""
        return Stream(self, groups, of_all_gpus=of_all_gpus)

    def refuse(self, make: Callable[[], Candidate]) -> Candidate | None:
        """What is made; None where it cannot be, which is noted."""
        try:
            return make()
        except UnknownNameError:
            raise
        except InputError as error:
            self.refused.append(error)
            return None

    def candidate(self, group: Group, size: int) -> Candidate:
        """A group's plan with this micro-batch. Raises InputError where it cannot be."""
        reasoned = self._with_batch(group.base, size)
        device = group.team.device
        check_runs(self._model, reasoned.plan, device)
        step = time_of(self._work(reasoned.plan, group.team), device)
        return Candidate(reasoned=reasoned, team=group.team, step=step)

    def candidates(self, groups: list[Group]) -> Iterator[Candidate]:
        """Every plan of the groups, in no order of times."""
        for group in groups:
            for size in group.sizes:
                made = self.refuse(partial(self.candidate, group, size))
                if made is not None:
                    yield made

    def evaluate(self, candidate: Candidate) -> Evaluated:
        """With its memory, on the longest batch. Raises InputError where that is not modelled."""
        key = (candidate.reasoned.plan, id(candidate.team))
        memory = self._memories.get(key)
        if memory is None:
            memory = self._memories[key] = estimate_memory(
                self._model,
                candidate.reasoned.plan,
                device=candidate.team.device,
                longest_row=self._data.longest_in_run,
                stack=self._stack,
            )
        return Evaluated(
            reasoned=candidate.reasoned,
            team=candidate.team,
            memory=memory,
            step=candidate.step,
        )

    def least_seconds_per_row(self, group: Group, like: Group) -> float:
        """A bound for all plans of a group, from one that computes nothing again."""
        times = []
        for size in group.sizes:
            try:
                plan = self._with_batch(like.base, size).plan
                work = self._work(plan, like.team)
            except InputError:
                return 0.0
            seconds = time_of(work, like.team.device).step_seconds
            times.append(seconds / plan.effective_batch_size)
        return min(times)

    def _work(self, plan: TrainingPlan, team: Team) -> StepWork:
        tokens = self._mean_tokens(plan.per_device_train_batch_size, plan.max_length)
        return step_work(
            self._model,
            plan,
            team.device,
            tokens_per_micro_batch=tokens,
            mean_length=tokens / plan.per_device_train_batch_size,
            stack=self._stack,
        )

    def _mean_tokens(self, size: int, max_length: int) -> float:
        key = (size, max_length)
        if key not in self._tokens:
            self._tokens[key] = mean_batch_tokens(self._data.trained_lengths, size, max_length)
        return self._tokens[key]

    def _with_batch(self, base: ReasonedPlan, size: int) -> ReasonedPlan:
        """The plan with this micro-batch, accumulated to the policy's rows a step."""
        given = self._given
        if "per_device_train_batch_size" not in given:
            why = "the micro-batch with the least predicted time that fits"
            base = base.replace("derived", why, per_device_train_batch_size=size)
        if "gradient_accumulation_steps" in given:
            return base
        groups = base.plan.data_parallel_size
        steps = max(1, round(self._rows.value / groups) // size)
        why = f"{steps * size * groups} rows a step: {self._rows.why}"
        return base.replace("derived", why, gradient_accumulation_steps=steps)


class Stream:
    """Plans of groups in the order of their times, worked out as they are asked for."""

    def __init__(self, space: Space, groups: list[Group], *, of_all_gpus: bool) -> None:
        self._space, self._of_all_gpus = space, of_all_gpus
        self._heap: list[tuple[float, int, Group, Candidate | None]] = []
        self._serial = count()
        self._too_large: dict[int, int] = {}
        like: dict[tuple[int, str, str], Group] = {}
        for group in groups:
            plan = group.base.plan
            reference = like.setdefault((id(group.team), plan.loss, plan.sharding), group)
            seconds = space.least_seconds_per_row(group, reference)
            self._push(seconds * (plan.num_gpus if of_all_gpus else 1), group, None)

    def _push(self, seconds: float, group: Group, candidate: Candidate | None) -> None:
        heapq.heappush(self._heap, (seconds, next(self._serial), group, candidate))

    def __iter__(self) -> Iterator[tuple[Group, Candidate]]:
        while self._heap:
            _, _, group, candidate = heapq.heappop(self._heap)
            if candidate is None:
                self._time(group)
            elif self._size(candidate) < self._too_large.get(id(group), 1 << 62):
                yield group, candidate

    def leave_out_from(self, group: Group, candidate: Candidate) -> None:
        """The group's plans with this micro-batch or a larger one do not fit."""
        size = self._size(candidate)
        self._too_large[id(group)] = min(size, self._too_large.get(id(group), size))

    def _time(self, group: Group) -> None:
        for size in group.sizes:
            made = self._space.refuse(partial(self._space.candidate, group, size))
            if made is not None:
                whole = made.gpu_seconds_per_row if self._of_all_gpus else made.seconds_per_row
                self._push(whole, group, made)

    @staticmethod
    def _size(candidate: Candidate) -> int:
        return candidate.reasoned.plan.per_device_train_batch_size
