"""What the closed form models, and what only a dry run knows."""

from __future__ import annotations

from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan, flag_name

MODELLED_SHARDINGS = ("none", "fsdp")


def unmodelled(plan: TrainingPlan) -> str | None:
    """What the closed form does not model of `plan`, as the command line spells it; None where it
    models all."""
    if plan.objective != "sft":
        return _spelled(plan, "objective")
    if plan.sharding not in MODELLED_SHARDINGS:
        return _spelled(plan, "sharding")
    if plan.resolved_method.counted_by is None:
        return _spelled(plan, "method")
    if plan.optimizer.exact_only:
        return f"{_spelled(plan, 'optim')} ({plan.optimizer.exact_only})"
    for setting in ("modules_to_save", "peft_config"):
        if getattr(plan, setting):
            return _spelled(plan, setting)
    return None


def _spelled(plan: TrainingPlan, setting: str) -> str:
    value = getattr(plan, setting)
    return f"`{flag_name(setting)} {','.join(value) if isinstance(value, tuple) else value}`"


def check_closed_form(plan: TrainingPlan) -> None:
    """Raises InputError for a plan that only a dry run knows."""
    what = unmodelled(plan)
    if what is not None:
        raise InputError(
            f"the closed form does not model {what}",
            "`ftplan estimate` with `--exact` carries out the step itself, on tensors without data",
        )
