"""What the closed form models, and what only a dry run knows."""

from __future__ import annotations

from ftplan.planner.errors import InputError
from ftplan.planner.methods import METHODS
from ftplan.planner.plan import TrainingPlan, flag_name

# Methods whose step the closed form models; what they train and add is counted for all of them.
MODELLED_METHODS = frozenset(("lora", "qlora", "rslora", "pissa", "freeze", "full", "dora","ia3","adalora","loha","lokr","bitfit","ln-tuning", "oft","vera","hra","c3a","road","miss","beft","randlora","vblora","unilora","hira","trainable-tokens","prompt-tuning","p-tuning","multitask-prompt-tuning","delora","gralora","glora","lily","deft","peanut","shira","supertuning","psoft","fourierft","tinylora","waveft","pvera","poly"))


def unmodelled(plan: TrainingPlan) -> str | None:
    """What the closed form does not model of `plan`, as the command line spells it; None where it
    models all."""
    if plan.objective != "sft":
        return _spelled(plan, "objective")
    if plan.sharding != "none":
        return _spelled(plan, "sharding")
    if plan.method not in MODELLED_METHODS:
        return _spelled(plan, "method")
    if plan.optimizer.exact_only:
        return f"{_spelled(plan, 'optim')} ({plan.optimizer.exact_only})"
    for setting in ():
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


def check_modelled_method(name: str) -> None:
    """Raises InputError for a method that only a dry run knows, or for which there is no trainer:
    no plan is made for it."""
    method = METHODS.get(name)
    if method is None or name in MODELLED_METHODS:
        return
    method.check_trained()
    raise InputError(
        f"method `{name}` has no closed form",
        "`ftplan estimate MODEL --exact` carries out its step; to plan or launch, take "
        "another method",
    )
