"""How long a run trains: its optimizer steps, and a processor's time budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.ranking import Evaluated
from ftplan.planner.step_time import StepTime


def optimizer_steps(plan: TrainingPlan, num_train_rows: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, else as the Trainer counts them.

    What is left of the last epoch is a step, too (`Trainer.set_initial_training_values`,
    transformers 5.23).
    """
    if plan.max_steps is not None:
        return plan.max_steps
    return math.ceil(plan.num_train_epochs * steps_per_epoch(plan, num_train_rows))


def steps_per_epoch(plan: TrainingPlan, num_train_rows: int) -> int:
    """Optimizer steps of a pass over the rows; a last, smaller accumulation is one.

    Prompts are taken by whole generations, the rest of a pass is left (TRL's `RepeatSampler`).
    """
    if plan.resolved_objective.generates:
        together = plan.generated_rows // plan.num_generations
        made = num_train_rows // together * plan.generated_rows
        return -(-made // plan.effective_batch_size)
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
    return structs.replace(chosen, reasoned=reasoned)
