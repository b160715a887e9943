"""What the closed form models, and what only a dry run knows."""

from __future__ import annotations

from ftplan.planner.errors import InputError
from ftplan.planner.methods import METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan, flag_name

# Methods whose step the closed form models; what they train and add is counted for all of them.
MODELLED_METHODS = frozenset(("lora", "qlora", "rslora", "pissa", "freeze", "full"))

# Families whose forward pass it does not follow. Falcon gives torch's attention a mask always, and
# one key head for all queries: which kernel then runs is not established.
UNMODELLED_FAMILIES = frozenset(("falcon",))

# Families that it follows under checkpointing only: without, Gemma 3 with its vision tower fills a
# cache of keys and values while it trains, for `use_cache` is turned off on the outer config alone.
CHECKPOINTED_FAMILIES = frozenset(("gemma3",))


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
    for setting in ("modules_to_save", "peft_config", "trainable_modules"):
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


def check_modelled_family(model: ModelSpec, plan: TrainingPlan) -> None:
    """Raises InputError for an architecture that only a dry run knows."""
    family, without = model.model_type, ""
    if family in CHECKPOINTED_FAMILIES and not plan.gradient_checkpointing:
        without = " without gradient checkpointing"
    if family in UNMODELLED_FAMILIES or without:
        raise InputError(
            f"model `{model.name}`: the closed form does not model `{family}`{without}",
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
