"""Choosing a plan: candidates, what is feasible, and the ranking.

Given settings are kept; the rest is chosen around them. Feasible means that `required` memory,
with a margin for the estimate's own error, is within the device's free memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import Struct, structs

from ftplan.planner import policy
from ftplan.planner.batching import mean_batch_tokens
from ftplan.planner.combinations import check_runs
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import (
    MEMORY_MARGIN,
    MemoryEstimate,
    context_bytes,
    estimate_memory,
    fits,
    needed_bytes,
)
from ftplan.planner.methods import COMPARED_METHODS, METHODS, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.recipe import data_recipe
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_time import StepTime, estimate_step_time

# Methods tried when none is given, best first. `freeze` is offered, not recommended, and full
# tuning is for those who ask: adapters on all linear layers reach it on data of this size
# ("LoRA Without Regret", 2025).
PREFERRED_METHODS = ("lora", "qlora")

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


class Evaluated(Struct, frozen=True, kw_only=True):
    """A plan with what it needs and takes on one device."""

    reasoned: ReasonedPlan
    memory: MemoryEstimate
    step: StepTime

    @property
    def plan(self) -> TrainingPlan:
        return self.reasoned.plan

    @property
    def seconds_per_row(self) -> float:
        """What plans are compared by, whatever number of rows a step takes."""
        return self.step.step_seconds / self.plan.effective_batch_size


class Rejection(Struct, frozen=True, kw_only=True):
    """A method that was not taken, and what stopped it."""

    method: str
    reason: str
    needs_bytes: int | None = None


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
    num_evaluated: int


def choose_plan(
    model: ModelSpec,
    data: DataProfile,
    device: Device,
    given: Mapping[str, Any],
    stack: Stack = OWN_STACK,
) -> Ranking:
    """The best plan for this data on this device, `given` settings kept.

    Deterministic: the same input gives the same ranking. Raises InputError when the given
    settings are impossible with the method asked for, or with the preferred one, and when no
    candidate can be estimated and run.
    """
    best: list[Evaluated] = []
    rejected: list[Rejection] = []
    missed: list[Evaluated] = []
    left_out: list[LeftOut] = []
    refusals: list[InputError] = []
    num_evaluated = 0
    for number, method in enumerate(_candidate_methods(given)):
        try:
            evaluated, refused = _evaluate_method(model, data, device, given, method, stack)
        except InputError as error:
            if number == 0 or isinstance(error, UnknownNameError):
                raise
            rejected.append(Rejection(method=method, reason=error.message))
            continue
        refusals += refused
        if not evaluated:
            rejected.append(Rejection(method=method, reason=refused[0].message))
            continue
        left_out += _left_out(method, refused)
        num_evaluated += len(evaluated)
        fitting = [e for e in evaluated if fits(e.memory, device)]
        if best and fitting:
            fastest: Evaluated | None = _fastest(fitting)
        else:
            fastest = _confirmed(
                [e for e in evaluated if _may_fit(e, device)], model, data, device, stack
            )
        if fastest is not None:
            best.append(fastest)
            continue
        smallest = _smallest(evaluated, model, data, device, stack)
        missed.append(smallest)
        reason = "needs more memory than is free"
        rejected.append(
            Rejection(method=method, reason=reason, needs_bytes=needed_bytes(smallest.memory))
        )
    if not num_evaluated:
        raise refusals[0]
    return Ranking(
        best=best[0] if best else None,
        alternatives=tuple(best[1:]),
        rejected=tuple(rejected),
        left_out=tuple(left_out),
        nearest=None if best else min(missed, key=lambda e: e.memory.required_bytes),
        num_evaluated=num_evaluated,
    )


def _evaluate_method(
    model: ModelSpec,
    data: DataProfile,
    device: Device,
    given: Mapping[str, Any],
    method: str,
    stack: Stack,
) -> tuple[list[Evaluated], list[InputError]]:
    """The method's candidates, and why others cannot be one; raises InputError where the given
    settings rule the method out."""
    evaluated: list[Evaluated] = []
    refused: list[InputError] = []
    for reasoned in candidates(model, data, device, given, method=method, refused=refused):
        try:
            check_runs(model, reasoned.plan, device)
            evaluated.append(evaluate(model, reasoned, device, data, stack))
        except UnknownNameError:
            raise
        except InputError as error:
            refused.append(error)
    return evaluated, refused


def _left_out(method: str, refused: Sequence[InputError]) -> list[LeftOut]:
    """The method's refused candidates, by reason."""
    counts = Counter((error.message, error.hint or "") for error in refused)
    return [
        LeftOut(method=method, reason=reason, hint=hint, count=count)
        for (reason, hint), count in counts.items()
    ]


def _least_bytes(evaluated: Evaluated, device: Device) -> int:
    """What it would require if the allocator held nothing beyond tensors."""
    return evaluated.memory.allocated_peak_bytes + context_bytes(device)


def _may_fit(evaluated: Evaluated, device: Device) -> bool:
    return _least_bytes(evaluated, device) * (1 + MEMORY_MARGIN) <= device.free_bytes


def _replayed(
    evaluated: Evaluated, model: ModelSpec, data: DataProfile, device: Device, stack: Stack
) -> Evaluated:
    """With what the allocator really holds: to find that out takes too long for all candidates."""
    memory = replayed_memory(
        model, evaluated.plan, device=device, longest_row=data.longest_in_run, stack=stack
    )
    return structs.replace(evaluated, memory=memory)


def _confirmed(
    possible: list[Evaluated], model: ModelSpec, data: DataProfile, device: Device, stack: Stack
) -> Evaluated | None:
    """The fastest of these that fits. What does not fit is no measure of how fast others are."""
    while possible:
        fastest = _fastest(possible)
        confirmed = _replayed(fastest, model, data, device, stack)
        too_large = fastest
        if fits(confirmed.memory, device):
            too_large = min(possible, key=lambda e: e.seconds_per_row)
            if too_large is fastest:
                return confirmed
            if fits(_replayed(too_large, model, data, device, stack).memory, device):
                return confirmed
        possible = [e for e in possible if e is not too_large]
    return None


def _smallest(
    evaluated: Sequence[Evaluated],
    model: ModelSpec,
    data: DataProfile,
    device: Device,
    stack: Stack,
) -> Evaluated:
    """The one that requires least."""
    first, *others = sorted(evaluated, key=lambda e: e.memory.allocated_peak_bytes)
    smallest = _replayed(first, model, data, device, stack)
    for other in others:
        if _least_bytes(other, device) >= smallest.memory.required_bytes:
            break
        replayed = _replayed(other, model, data, device, stack)
        smallest = min(smallest, replayed, key=lambda e: e.memory.required_bytes)
    return smallest


def _fastest(fitting: Sequence[Evaluated]) -> Evaluated:
    """The plan of least time a row.

    Where two differ by under 2 %, the larger micro-batch's padding and the estimate's error
    decide nothing, so the one with less memory is taken, of those with the most rows a step: that
    is the recipe's number, which a given accumulation may keep small micro-batches from.
    """
    fastest = min(e.seconds_per_row for e in fitting)
    near = [e for e in fitting if e.seconds_per_row <= 1.02 * fastest]
    rows = max(e.plan.effective_batch_size for e in near)
    enough = [e for e in near if e.plan.effective_batch_size == rows]
    return min(enough, key=lambda e: e.memory.required_bytes)


def evaluate(
    model: ModelSpec,
    reasoned: ReasonedPlan,
    device: Device,
    data: DataProfile,
    stack: Stack = OWN_STACK,
) -> Evaluated:
    """Memory on the longest batch, time on the mean one."""
    plan = reasoned.plan
    rows = plan.per_device_train_batch_size
    tokens = mean_batch_tokens(data.trained_lengths, rows, plan.max_length)
    step = estimate_step_time(
        model,
        plan,
        device,
        tokens_per_micro_batch=tokens,
        mean_length=tokens / rows,
        stack=stack,
    )
    longest = data.longest_in_run
    memory = estimate_memory(model, plan, device=device, longest_row=longest, stack=stack)
    return Evaluated(reasoned=reasoned, memory=memory, step=step)


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


def candidates(
    model: ModelSpec,
    data: DataProfile,
    device: Device,
    given: Mapping[str, Any],
    *,
    method: str | None = None,
    refused: list[InputError] | None = None,
) -> Iterator[ReasonedPlan]:
    """Plans that differ in micro-batch and checkpointing; the recipe is the same in all.

    `method`: the one they are made for; None for the given one. `refused` gets the errors of those
    that cannot be.
    """
    errors = [] if refused is None else refused
    chosen = resolve_method(method or str(given["method"]))
    base = data_recipe(model, data, device, chosen, given)
    batch = policy.effective_batch_size(data.num_train_rows)
    for size in _micro_batches(base.plan, given, batch.value):
        for sized in _made(partial(_with_batch, base, given, size, batch), errors):
            for plan in _with_losses(sized, device, given):
                if chosen.fills_cache:
                    yield plan
                else:
                    yield from _with_checkpointing(plan, given, errors)


def _made(make: Callable[[], ReasonedPlan], refused: list[InputError]) -> Iterator[ReasonedPlan]:
    """The plan, if there can be one."""
    try:
        plan = make()
    except InputError as error:
        refused.append(error)
        return
    yield plan


def _with_checkpointing(
    plan: ReasonedPlan, given: Mapping[str, Any], refused: list[InputError]
) -> Iterator[ReasonedPlan]:
    """The plan without and with checkpointing, unless one was asked for."""
    if "gradient_checkpointing" in given or given.get("every_n_layers", 1) > 1:
        yield plan
        return
    for checkpointing, why in _CHECKPOINTING.items():
        changed = partial(plan.replace, "derived", why, gradient_checkpointing=checkpointing)
        yield from _made(changed, refused)


def _with_losses(
    plan: ReasonedPlan, device: Device, given: Mapping[str, Any]
) -> Iterator[ReasonedPlan]:
    """The plan with the losses worth comparing: on a processor TRL's tiles are slow and may be
    larger than the full logits."""
    yield plan
    one_loss = plan.plan.resolved_objective.only_loss is not None
    if device.kind == "cpu" and not one_loss and "loss" not in given:
        why = "without a GPU's kernel TRL's tiles are slower than the full logits"
        yield plan.replace("derived", why, loss="stock")


_CHECKPOINTING = {
    False: "everything fits without computing layers twice",
    True: "without it the activations do not fit, or a larger batch is faster with it",
}


def _micro_batches(plan: TrainingPlan, given: Mapping[str, Any], wanted: int) -> Iterable[int]:
    """Sizes to try: those with which a step takes no more than the wanted rows, 1 at least."""
    if "per_device_train_batch_size" in given:
        return (plan.per_device_train_batch_size,)
    accumulation = given.get("gradient_accumulation_steps", 1)
    most = max(1, wanted // (accumulation * plan.data_parallel_size))
    return [size for size in MICRO_BATCHES if size <= most]


def _with_batch(
    base: ReasonedPlan, given: Mapping[str, Any], size: int, batch: policy.Advice
) -> ReasonedPlan:
    """The plan with this micro-batch, accumulated to the recipe's rows a step."""
    if "per_device_train_batch_size" not in given:
        why = "the micro-batch with the least predicted time that fits"
        base = base.replace("derived", why, per_device_train_batch_size=size)
    if "gradient_accumulation_steps" in given:
        return base
    rows = size * base.plan.data_parallel_size
    steps = max(1, batch.value // rows)
    why = f"{steps * rows} rows a step: {batch.why}"
    return base.replace("derived", why, gradient_accumulation_steps=steps)


def optimizer_steps(plan: TrainingPlan, num_train_rows: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, else as the Trainer counts them.

    What is left of the last epoch is a step, too (`Trainer.set_initial_training_values`,
    transformers 5.23).
    """
    if plan.max_steps is not None:
        return plan.max_steps
    return math.ceil(plan.num_train_epochs * steps_per_epoch(plan, num_train_rows))


def steps_per_epoch(plan: TrainingPlan, num_train_rows: int) -> int:
    """Optimizer steps of a pass over the rows; a last, smaller accumulation is one."""
    rows_per_micro_step = plan.per_device_train_batch_size * plan.data_parallel_size
    micro_batches = -(-num_train_rows // rows_per_micro_step)
    return -(-micro_batches // plan.gradient_accumulation_steps)


class RunTime(Struct, frozen=True, kw_only=True):
    """How long a run trains, of `steps` optimizer steps, and between which bounds. `joules`: of all
    its GPUs, None where their power is not known."""

    steps: int
    seconds: float
    least_seconds: float
    most_seconds: float
    epoch_seconds: float
    joules: float | None

    @staticmethod
    def of(plan: TrainingPlan, step: StepTime, num_train_rows: int) -> RunTime:
        """Of the training alone: neither loading, nor evaluations, nor saving."""
        steps = optimizer_steps(plan, num_train_rows)
        joules = step.step_joules
        return RunTime(
            steps=steps,
            seconds=steps * step.step_seconds,
            least_seconds=steps * step.least_step_seconds,
            most_seconds=steps * step.most_step_seconds,
            epoch_seconds=steps_per_epoch(plan, num_train_rows) * step.step_seconds,
            joules=None if joules is None else steps * plan.num_gpus * joules,
        )

    def to_dict(self) -> dict[str, Any]:
        return structs.asdict(self)


def limit_to_time_budget(
    chosen: Evaluated, data: DataProfile, given: Mapping[str, Any], budget_seconds: float
) -> Evaluated:
    """On a processor, stop after the budget unless the person fixed the amount of training."""
    if {"max_steps", "num_train_epochs"} & set(given):
        return chosen
    steps = optimizer_steps(chosen.plan, data.num_train_rows)
    affordable = max(2, int(budget_seconds / chosen.step.step_seconds))
    if steps <= affordable:
        return chosen
    total_minutes = steps * chosen.step.step_seconds / 60
    why = (
        f"about {budget_seconds / 60:.1f} minutes on a processor; the whole "
        f"{chosen.plan.num_train_epochs:g} epochs ({steps} steps, {total_minutes:.0f} min) "
        "with `--num-train-epochs`"
    )
    reasoned = chosen.reasoned.replace("derived", why, max_steps=affordable)
    return Evaluated(reasoned=reasoned, memory=chosen.memory, step=chosen.step)
