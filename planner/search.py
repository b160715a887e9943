"""Choosing a plan: candidates, what is feasible, and the ranking.

Given settings are kept; the rest is chosen around them. Feasible means that `required` memory,
with a margin for the estimate's own error, is within the device's free memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftplan.planner import policy
from ftplan.planner.batching import mean_batch_tokens
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.methods import METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.recipe import data_recipe
from ftplan.planner.step_time import StepTime, estimate_step_time

# Kept free on top of `required`: the first memory model is within 5 % of the measured runs it
# was compared with (docs/memory-model.md).
MEMORY_MARGIN = 0.05

# Methods tried when none is given, best first. `freeze` is offered, not recommended, and full
# tuning is for those who ask: adapters on all linear layers reach it on data of this size
# ("LoRA Without Regret", 2025).
PREFERRED_METHODS = ("lora", "qlora")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A plan with what it needs and takes on one device."""

    reasoned: ReasonedPlan
    memory: MemoryEstimate
    step: StepTime

    @property
    def plan(self) -> TrainingPlan:
        return self.reasoned.plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A method that was not taken, and what stopped it."""

    method: str
    reason: str
    needs_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """The chosen plan (None if nothing fits), the runners-up, and the methods left out."""

    best: Evaluated | None
    alternatives: tuple[Evaluated, ...]
    rejected: tuple[Rejection, ...]
    nearest: Evaluated | None
    """What misses by least, when nothing fits."""
    num_evaluated: int


def choose_plan(
    model: ModelSpec, data: DataProfile, device: Device, given: Mapping[str, Any]
) -> Ranking:
    """The best plan for this data on this device, `given` settings kept.

    Deterministic: the same input gives the same ranking.
    """
    best: list[Evaluated] = []
    rejected: list[Rejection] = []
    nearest: Evaluated | None = None
    num_evaluated = 0
    for method in _candidate_methods(given):
        obstacle = _obstacle(method, device, given)
        if obstacle:
            rejected.append(Rejection(method=method, reason=obstacle))
            continue
        evaluated = [
            evaluate(model, reasoned, device, data)
            for reasoned in candidates(model, data, device, {**given, "method": method})
        ]
        num_evaluated += len(evaluated)
        fitting = [e for e in evaluated if fits(e.memory, device)]
        if fitting:
            # Least time; where two differ by under 2 %, the larger micro-batch's padding and
            # the estimate's error decide nothing, so the one with less memory is taken.
            fastest = min(e.step.step_seconds for e in fitting)
            near = [e for e in fitting if e.step.step_seconds <= 1.02 * fastest]
            best.append(min(near, key=lambda e: e.memory.required_bytes))
            continue
        smallest = min(evaluated, key=lambda e: e.memory.required_bytes)
        rejected.append(
            Rejection(
                method=method,
                reason="needs more memory than is free",
                needs_bytes=needed_bytes(smallest.memory),
            )
        )
        if nearest is None or smallest.memory.required_bytes < nearest.memory.required_bytes:
            nearest = smallest
    return Ranking(
        best=best[0] if best else None,
        alternatives=tuple(best[1:]),
        rejected=tuple(rejected),
        nearest=nearest,
        num_evaluated=num_evaluated,
    )


def needed_bytes(memory: MemoryEstimate) -> int:
    """Free memory that a plan is given: what it requires, and the margin."""
    return round(memory.required_bytes * (1 + MEMORY_MARGIN))


def fits(memory: MemoryEstimate, device: Device) -> bool:
    return needed_bytes(memory) <= device.free_bytes


def evaluate(
    model: ModelSpec, reasoned: ReasonedPlan, device: Device, data: DataProfile
) -> Evaluated:
    """Memory on the longest batch, time on the mean one."""
    plan = reasoned.plan
    tokens = mean_batch_tokens(data.lengths, plan.per_device_train_batch_size, plan.max_length)
    step = estimate_step_time(
        model,
        plan,
        device,
        tokens_per_micro_batch=tokens,
        mean_length=tokens / plan.per_device_train_batch_size,
    )
    memory = estimate_memory(model, plan, device=device, longest_row=data.longest)
    return Evaluated(reasoned=reasoned, memory=memory, step=step)


def _candidate_methods(given: Mapping[str, Any]) -> Iterable[str]:
    if "method" in given:
        return (str(given["method"]),)
    if given.get("quantization", "none") != "none":
        return ("qlora",)
    others = (name for name in METHODS if name not in PREFERRED_METHODS)
    return (*PREFERRED_METHODS, *sorted(others))


def _obstacle(method: str, device: Device, given: Mapping[str, Any]) -> str | None:
    """Why a method is out before its memory is looked at; None if it is not."""
    quantized = method == "qlora" or given.get("quantization", "none") != "none"
    if quantized and device.kind == "cpu":
        message = "4- and 8-bit bases are for GPUs: on a processor they save little and run slowly"
        if "method" in given or "quantization" in given:
            raise InputError(message, "use `--method lora`")
        return message
    if quantized and not device.supports_quantization:
        return f"{device.name} lacks compute capability 6.0, which 4-bit bases need"
    return None


def candidates(
    model: ModelSpec, data: DataProfile, device: Device, given: Mapping[str, Any]
) -> Iterator[ReasonedPlan]:
    """Plans that differ in micro-batch and checkpointing; the recipe is the same in all."""
    base = data_recipe(model, data, device, given)
    batch = policy.effective_batch_size(data.num_train_rows)
    wanted = batch.value
    sizes: Iterable[int] = [s for s in (1, 2, 4, 8, 16, 32) if s <= wanted]
    if "per_device_train_batch_size" in given:
        sizes = (base.plan.per_device_train_batch_size,)
    checkpointings: Iterable[bool] = (False, True)
    if "gradient_checkpointing" in given:
        checkpointings = (base.plan.gradient_checkpointing,)
    for size in sizes:
        for checkpointing in checkpointings:
            plan = base
            if "per_device_train_batch_size" not in given:
                plan = plan.replace(
                    "derived",
                    "the micro-batch with the least predicted time that fits",
                    per_device_train_batch_size=size,
                )
            if "gradient_accumulation_steps" not in given:
                steps = max(1, wanted // (size * plan.plan.num_gpus))
                plan = plan.replace(
                    "derived",
                    f"{steps * size * plan.plan.num_gpus} rows a step: {batch.why}",
                    gradient_accumulation_steps=steps,
                )
            if "gradient_checkpointing" not in given:
                why = (
                    "without it the activations do not fit, or a larger batch is faster with it"
                    if checkpointing
                    else "everything fits without computing layers twice"
                )
                plan = plan.replace("derived", why, gradient_checkpointing=checkpointing)
            yield plan


def optimizer_steps(plan: TrainingPlan, num_train_rows: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, else the epochs' micro-batches, as the
    Trainer counts them (a last, smaller accumulation counts as a step)."""
    if plan.max_steps is not None:
        return plan.max_steps
    rows_per_micro_step = plan.per_device_train_batch_size * plan.num_gpus
    micro_batches = -(-num_train_rows // rows_per_micro_step)
    per_epoch = max(1, -(-micro_batches // plan.gradient_accumulation_steps))
    return max(1, round(per_epoch * plan.num_train_epochs))


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
