"""All plans of one way to train, the fastest first, without looking at each.

Plans are in groups that differ in their micro-batch alone. A group's time has a lower bound that
needs no trace of its own: what the same micro-batches take when nothing is computed again. Groups
and then plans are taken in the order of their times, so that whatever comes after the first that
fits is slower. Within a group memory rises with the micro-batch, as long as gradients accumulate:
what is larger than one that does not fit is not looked at.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from msgspec import Struct, structs

from ftplan.planner import policy
from ftplan.planner.batching import mean_batch_tokens
from ftplan.planner.combinations import check_runs
from ftplan.planner.concessions import SMALL_OPTIMIZER, Settings, concessions
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.methods import Method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import OBJECTIVES, trained_part
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.ranking import Evaluated
from ftplan.planner.recipe import data_recipe
from ftplan.planner.sharding import ZERO
from ftplan.planner.stack import Stack
from ftplan.planner.step_settings import mean_model_rows
from ftplan.planner.step_time import StepTime, StepWork, step_work, time_of
from ftplan.planner.tasks import TaskWeighting
from ftplan.planner.teams import Team
from ftplan.planner.tensor_parallel import one_rank
from ftplan.planner.updated import updated_parameters
from ftplan.planner.weights import weight_memory_bytes

# Micro-batches tried where the accumulation is given; else those that divide a step's rows.
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)

# Ways to divide state among GPUs: gradients and optimizer states, and parameters too. ZeRO-3 and
# FSDP do the same; FSDP is torch's own, and trains beside a quantized base, too. Gradients and
# states of adapters are too small to be worth dividing without the base.
CHOSEN_SHARDINGS = ("zero2", "fsdp")
_SHARDINGS_OF_ADAPTERS = ("fsdp",)

# Copies of the model in hybrid sharding: one a machine, then so many times fewer.
_FEWER_COPIES = 4

# Of each so many layers one is checkpointed, where some are.
EVERY_N_LAYERS = (1, 2, 3, 4, 8)

# By how much a step may have fewer or more rows than the policy says, where all GPUs of a machine
# do not divide them.
_UNEVEN_SHARE = 1 / 8

# How many times as fast GPUs that divide state must be as those that do not: there is more to go
# wrong, and to be sure of it takes more than the time model's error, 23 % in one of ten cases.
WORTH_DIVIDING = 1.25

# Of a checkpointed layer's forward pass, what is computed again at least: all but the last product,
# where the other function of torch's checkpointing stops early.
_LEAST_RECOMPUTED = 0.5

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


class Group(Struct, frozen=True, kw_only=True):
    """Plans that differ in their micro-batch, one of `sizes`."""

    base: ReasonedPlan
    team: Team
    sizes: tuple[int, ...]

    @property
    def smallest(self) -> tuple[int, ...]:
        """Micro-batches of which one needs the least memory: the smallest, and that which may take
        a step's rows at once, without gradients that accumulate."""
        return tuple(dict.fromkeys((self.sizes[0], self.sizes[-1])))


class Pricing(Struct, frozen=True, kw_only=True):
    """What plans of a method are compared by: seconds a row, or those of all GPUs together; of GPUs
    that divide state so many times as much."""

    of_all_gpus: bool = False
    dividing: float = WORTH_DIVIDING

    def of(self, plan: TrainingPlan, step: StepTime) -> float:
        seconds = step.step_seconds / plan.effective_batch_size
        if self.of_all_gpus:
            seconds *= plan.num_gpus
        return seconds * (self.dividing if plan.sharding != "none" else 1.0)


# By time alone.
SECONDS_PER_ROW = Pricing(dividing=1.0)


class Batches:
    """Micro-batches of some data."""

    def __init__(self, data: DataProfile) -> None:
        self._data = data
        self._lengths: dict[TaskWeighting, tuple[int, ...]] = {}
        self._tokens: dict[tuple[TaskWeighting, int, int], float] = {}

    def mean_tokens(self, plan: TrainingPlan) -> float:
        """Padded tokens of the mean micro-batch, of one text of each row."""
        weighting = TaskWeighting.of(plan)
        size, max_length = plan.per_device_train_batch_size, plan.max_length
        key = (weighting, size, max_length)
        if key not in self._tokens:
            if weighting not in self._lengths:
                self._lengths[weighting] = self._data.epoch_lengths(weighting)
            self._tokens[key] = mean_batch_tokens(self._lengths[weighting], size, max_length)
        return self._tokens[key]


class Space:
    """Plans of a method on teams of GPUs, `given` settings kept.

    `shardings`: how GPUs may divide what a model holds; `has_liger`: whether Liger's kernels are
    there; `batches`: the data's, where plans of other methods know them already. `refused` gets
    the errors of plans that cannot be, `num_plans` counts all that there are, `num_timed` those
    whose time was worked out.
    """

    def __init__(
        self,
        model: ModelSpec,
        data: DataProfile,
        given: Mapping[str, Any],
        stack: Stack,
        *,
        shardings: Sequence[str] = CHOSEN_SHARDINGS,
        has_liger: bool = False,
        rows_per_step: int | None = None,
        batches: Batches | None = None,
    ) -> None:
        self._model, self._data, self._given, self._stack = model, data, given, stack
        self._has_liger = has_liger
        self._rows = policy.effective_batch_size(data.num_train_rows)
        if OBJECTIVES[data.trains].generates:
            group = given.get("num_generations", TrainingPlan().num_generations)
            self._rows = policy.completions_per_step(data.num_train_rows, group)
        if rows_per_step is not None:
            self._rows = policy.Advice(value=rows_per_step, why="asked for")
        self._shardings = tuple(shardings)
        self._batches = batches or Batches(data)
        self.refused: list[InputError] = []
        self.num_plans = 0
        self._timed: set[tuple[TrainingPlan, int]] = set()
        self._recipes: dict[tuple[str, int], ReasonedPlan] = {}
        self._held: dict[tuple[object, ...], tuple[int, int]] = {}
        self._memories: dict[tuple[TrainingPlan, int], MemoryEstimate] = {}

    @property
    def num_timed(self) -> int:
        """Plans whose time was worked out."""
        return len(self._timed)

    @property
    def num_evaluated(self) -> int:
        """Plans whose memory was looked at."""
        return len(self._memories)

    # --- what there is

    def concessions(self, method: Method, teams: list[Team]) -> list[Settings]:
        """What plans of the method give up, the first nothing, where others do not fit."""
        team = teams[0]
        try:
            plan = self._base(method, team, {}).plan
        except InputError:
            return [{}]
        return concessions(plan, team.device, self._given)

    def groups(
        self, method: Method, teams: list[Team], conceded: Settings | None = None
    ) -> list[Group]:
        """All groups of a method. Raises InputError where the given settings rule it out.

        `conceded`: what these plans give up.
        """
        most = max(team.num_gpus for team in teams)
        found: list[Group] = []
        errors: list[InputError] = []
        for team in teams:
            try:
                found += self._groups_of(
                    method, team, conceded or {}, is_whole_machine=team.num_gpus == most
                )
            except UnknownNameError:
                raise
            except InputError as error:
                errors.append(error)
        if len(errors) == len(teams):
            raise errors[-1]
        self.num_plans += sum(len(group.sizes) for group in found)
        return found

    def _groups_of(
        self, method: Method, team: Team, conceded: Settings, *, is_whole_machine: bool
    ) -> Iterator[Group]:
        recipe = self._recipe(method, team).plan
        parts = team.num_gpus // (recipe.tp_size * recipe.cp_size)
        sizes = self._sizes(recipe, parts, is_whole_machine=is_whole_machine)
        if not sizes:
            return
        base = self._base(method, team, conceded)
        for shared in self._with_shardings(base, method, team):
            for with_loss in self._with_losses(shared, team):
                for plan in self._with_checkpointing(with_loss, method):
                    yield Group(base=plan, team=team, sizes=sizes)

    def least_bytes(self, group: Group) -> int:
        """A bound for all plans of a group: the weights and the optimizer's states that a GPU
        holds, whatever the batch."""
        plan = group.base.plan
        weights, states = self._at_rest(plan)
        if plan.shards_parameters:
            weights = 0 if plan.offload == "parameters" else weights // plan.dp_shard_size
        if plan.sharding != "none":
            states = 0 if plan.offload != "none" else states // plan.dp_shard_size
        return weights + states

    def _at_rest(self, plan: TrainingPlan) -> tuple[int, int]:
        """Bytes of weights and of states that are not divided among data-parallel GPUs."""
        # ZeRO's engine holds the model as it computes, and fp32 masters among its states.
        width = plan.compute_bytes if plan.sharding in ZERO else plan.weight_bytes
        key = (plan.optim, plan.lora_rank, plan.mixed_precision, plan.tp_size, width)
        if key not in self._held:
            share = one_rank(self._model, plan.tp_size)
            updated = updated_parameters(share, plan, trained_part(share, plan))
            weights = weight_memory_bytes(self._model, plan, self._stack, width) // plan.tp_size
            self._held[key] = weights, plan.optimizer.state_bytes(updated)
        return self._held[key]

    def _base(self, method: Method, team: Team, conceded: Settings) -> ReasonedPlan:
        base = self._recipe(method, team)
        for name, (value, why) in conceded.items():
            base = base.replace("derived", why, **{name: value})
        if "num_gpus" in self._given or team.num_gpus == 1:
            return base
        why = f"each step's rows are divided among {team.num_gpus} GPUs"
        return base.replace("derived", why, num_gpus=team.num_gpus)

    def _recipe(self, method: Method, team: Team) -> ReasonedPlan:
        """The settings that the data decides; the same on any number of alike GPUs, unless some
        are given that one GPU cannot have."""
        given, alone = self._given, {"tp_size", "cp_size", "sharding", "dp_replicate_size"}
        if alone & set(given) and team.num_gpus > 1:
            given = {"num_gpus": team.num_gpus, **given}
            return data_recipe(self._model, self._data, team.device, method, given)
        key = (method.name, id(team.device))
        if key not in self._recipes:
            made = data_recipe(self._model, self._data, team.device, method, given)
            self._recipes[key] = made
        return self._recipes[key]

    def _sizes(self, plan: TrainingPlan, groups: int, *, is_whole_machine: bool) -> tuple[int, ...]:
        """Micro-batches to try for so many groups of GPUs with rows of their own; none where the
        team cannot share a step's rows."""
        given = self._given
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
        if alone or "sharding" in self._given:
            return
        for sharding in self._shardings:
            if method.adapter and sharding not in _SHARDINGS_OF_ADAPTERS:
                continue
            why = f"one GPU cannot hold all state; {team.num_gpus} divide it"
            yield from self._made(partial(self._divided, base, why, sharding))
        yield from self._with_copies(base)

    def _with_copies(self, base: ReasonedPlan) -> Iterator[ReasonedPlan]:
        """Hybrid sharding, where machines may hold a copy each, or some together."""
        copies = base.plan.num_machines
        if base.plan.num_gpus < 2 * copies or "dp_replicate_size" in self._given:
            return
        while copies > 1:
            each = base.plan.num_gpus // copies
            why = f"{each} GPUs divide a copy, so that less crosses the network"
            hybrid = partial(self._divided, base, why, "fsdp", dp_replicate_size=copies)
            yield from self._made(hybrid)
            copies = copies // _FEWER_COPIES if copies % _FEWER_COPIES == 0 else 1

    def _divided(self, base: ReasonedPlan, why: str, sharding: str, **more: int) -> ReasonedPlan:
        """bitsandbytes' optimizers fail on parameters that FSDP2 divides (bitsandbytes issue 1633,
        torchtune issue 1856): there states stay as they were, divided."""
        reasoned = base.replace("derived", why, sharding=sharding, **more)
        plan = reasoned.plan
        if plan.sharding != "fsdp" or plan.optim != SMALL_OPTIMIZER or "optim" in self._given:
            return reasoned
        why = "FSDP divides its states; those in 8 bits it cannot"
        return reasoned.replace("default", why, optim=TrainingPlan().optim)

    def _with_losses(self, plan: ReasonedPlan, team: Team) -> Iterator[ReasonedPlan]:
        """The losses worth comparing, unless the objective, the trainer or the model leaves one.

        On a GPU TRL's tiles hold less and compute the logits again in backward, Liger's do without
        that; on a processor TRL's are slow and may be larger than the full logits.
        """
        yield plan
        if plan.plan.loss != "trl-fused" or "loss" in self._given:
            return
        if plan.plan.resolved_objective.only_loss is not None:
            return
        if team.device.kind == "cpu":
            why = "without a GPU's kernel TRL's tiles are slower than the full logits"
            yield plan.replace("derived", why, loss="stock")
            return
        why = "the full logits fit, and need not be computed again in backward as tiles are"
        yield plan.replace("derived", why, loss="stock")
        if self._has_liger and plan.plan.sharding == "none":
            why = "Liger's tiles take their gradient along; nothing is computed again"
            yield plan.replace("derived", why, loss="liger")

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

    def by_price(
        self,
        groups: list[Group],
        pricing: Pricing,
        *,
        possible: Callable[[Group], bool] = lambda group: True,
    ) -> Stream:
        """The groups' plans, that of the least price first; those of equal price in the groups'
        order.

        `possible`: asked of a group before its plans' times are worked out, whether any may do.
        """
        return Stream(self, groups, pricing, possible)

    def refuse(self, make: Callable[[], Candidate]) -> Candidate | None:
        """What is made; None where it cannot be, which is noted."""
        try:
            return make()
        except UnknownNameError:
            raise
        except InputError as error:
            self.refused.append(error)
            return None

    def plan(self, group: Group, size: int) -> ReasonedPlan:
        """A group's plan with this micro-batch. Raises InputError where it cannot be."""
        reasoned = self._with_batch(group.base, size)
        check_runs(self._model, reasoned.plan, group.team.device)
        return reasoned

    def candidate(self, group: Group, size: int) -> Candidate:
        """A group's plan with this micro-batch, timed. Raises InputError where it cannot be."""
        reasoned = self.plan(group, size)
        self._timed.add((reasoned.plan, id(group.team)))
        step = time_of(self._work(reasoned.plan, group.team), group.team.device)
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
                stack=self._data.on(self._stack, candidate.reasoned.plan),
            )
        return Evaluated(
            reasoned=candidate.reasoned,
            team=candidate.team,
            memory=memory,
            step=candidate.step,
        )

    def kept(self, group: Group) -> list[tuple[TrainingPlan, StepWork]]:
        """A group's plans and their work. Empty where one cannot be."""
        try:
            plans = [self._with_batch(group.base, size).plan for size in group.sizes]
            return [(plan, self._work(plan, group.team)) for plan in plans]
        except InputError:
            return []

    def least_price(
        self, group: Group, kept: list[tuple[TrainingPlan, StepWork]], pricing: Pricing
    ) -> float:
        """A bound for all plans of a group, from those of one like it that keeps everything."""
        plan = group.base.plan
        share = 1 / plan.every_n_layers if plan.gradient_checkpointing else 0.0
        hooked = plan.gradient_checkpointing and not plan.use_reentrant
        prices = []
        for other, work in kept:
            if other.gradient_checkpointing and not plan.gradient_checkpointing:
                return 0.0
            if not other.gradient_checkpointing:
                layers = max(0.0, work.forward_flops - self._head_flops(work))
                flops = work.flops + _LEAST_RECOMPUTED * share * layers
                beside = 1.0 if plan.gradient_checkpointing else work.overlapping
                work = structs.replace(work, flops=flops, hooked=hooked, overlapping=beside)
            prices.append(pricing.of(other, time_of(work, group.team.device)))
        return min(prices, default=0.0)

    def _head_flops(self, work: StepWork) -> float:
        """Of a forward pass, the product with the vocabulary."""
        return 2 * work.tokens * self._model.vocab_size * self._model.hidden_size

    def _work(self, plan: TrainingPlan, team: Team) -> StepWork:
        tokens, length = mean_model_rows(plan, self._batches.mean_tokens(plan))
        return step_work(
            self._model,
            plan,
            team.device,
            tokens_per_micro_batch=tokens,
            mean_length=length,
            stack=self._data.on(self._stack, plan),
        )

    def _with_batch(self, base: ReasonedPlan, size: int) -> ReasonedPlan:
        """The plan with this micro-batch, accumulated to the policy's rows a step."""
        given = self._given
        if "gradient_accumulation_steps" not in given:
            groups = base.plan.data_parallel_size
            steps = max(1, round(self._rows.value / groups) // size)
            why = f"{steps * size * groups} rows a step: {self._rows.why}"
            base = base.replace("derived", why, gradient_accumulation_steps=steps)
        if "per_device_train_batch_size" in given:
            return base
        why = "the micro-batch with the least predicted time that fits"
        return base.replace("derived", why, per_device_train_batch_size=size)


class Stream:
    """Plans of groups in the order of their times, worked out as they are asked for."""

    def __init__(
        self,
        space: Space,
        groups: list[Group],
        pricing: Pricing,
        possible: Callable[[Group], bool],
    ) -> None:
        self._space, self._pricing, self._possible = space, pricing, possible
        self._heap: list[tuple[float, int, Group, Candidate | None]] = []
        self._serial = count()
        self._too_large: dict[int, int] = {}
        kept: dict[tuple[int, str, str, int], list[tuple[TrainingPlan, StepWork]]] = {}
        for group in groups:
            plan = group.base.plan
            key = (id(group.team), plan.loss, plan.sharding, plan.dp_replicate_size)
            if key not in kept:
                kept[key] = space.kept(group)
            self._push(space.least_price(group, kept[key], pricing), group, None)

    def _push(self, least: float, group: Group, candidate: Candidate | None) -> None:
        heapq.heappush(self._heap, (least, next(self._serial), group, candidate))

    def __iter__(self) -> Iterator[tuple[Group, Candidate]]:
        while self._heap:
            _, _, group, candidate = heapq.heappop(self._heap)
            if candidate is None:
                if self._possible(group):
                    self._time(group)
            elif not self._is_too_large(group, candidate):
                yield group, candidate

    def leave_out_from(self, group: Group, candidate: Candidate) -> None:
        """The group's plans with this micro-batch or a larger one do not fit; but that which takes
        a step's rows at once may, as it carries no gradients from micro-batch to micro-batch."""
        if _accumulates(candidate):
            size = self._size(candidate)
            self._too_large[id(group)] = min(size, self._too_large.get(id(group), size))

    def _is_too_large(self, group: Group, candidate: Candidate) -> bool:
        limit = self._too_large.get(id(group))
        return limit is not None and self._size(candidate) >= limit and _accumulates(candidate)

    def _time(self, group: Group) -> None:
        for size in group.sizes:
            made = self._space.refuse(partial(self._space.candidate, group, size))
            if made is not None:
                plan = made.reasoned.plan
                self._push(self._pricing.of(plan, made.step), group, made)

    @staticmethod
    def _size(candidate: Candidate) -> int:
        return candidate.reasoned.plan.per_device_train_batch_size


def _accumulates(candidate: Candidate) -> bool:
    return candidate.reasoned.plan.gradient_accumulation_steps > 1
