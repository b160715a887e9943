"""What a method asks of the other settings: refused before any model is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftplan.planner.errors import InputError
from ftplan.planner.lora_optimizers import LORA_FA_OPTIMIZERS
from ftplan.planner.objectives import asks_reference
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.peft_options import read_options

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan

# Bases whose weights LoftQ looks up again as they were.
LOFTQ_BASES = ("nf4", "fp4")


def check_method_settings(plan: TrainingPlan) -> None:
    """Raises InputError for settings that the plan's method cannot be trained with."""
    check = _CHECKS.get(plan.method)
    if check is not None:
        check(plan)
    given = read_options(plan.peft_config)
    if given.get("init_lora_weights") == "loftq":
        raise InputError(
            "PEFT's own `init_lora_weights=loftq` takes an unquantized base and puts another one "
            "in its place",
            "use `--method loftq`, which begins beside a 4-bit base",
        )
    if given.get("prompt_tuning_init") == "TEXT" and not given.get("prompt_tuning_init_text"):
        raise InputError(
            "`--peft-config prompt_tuning_init=TEXT` needs the text",
            "for example `--peft-config 'prompt_tuning_init=TEXT,"
            'prompt_tuning_init_text="Answer in one sentence:"\'`',
        )


def _check_lora_plus(plan: TrainingPlan) -> None:
    if OPTIMIZERS[plan.optim].needs_trainer:
        raise InputError(
            f"method `lora-plus` gives adapters two learning rates, and `--optim {plan.optim}` "
            "makes groups of its own",
            "use `--optim adamw_torch_fused`, or `--method lora`",
        )
    _check_trainer(plan)


def _check_lora_fa(plan: TrainingPlan) -> None:
    if plan.optim not in LORA_FA_OPTIMIZERS:
        raise InputError(
            "method `lora-fa` has an AdamW of its own, which takes the frozen matrix out of the "
            f"other's gradients: `--optim {plan.optim}` does not",
            "leave `--optim` out, or use `--method lora`",
        )
    if plan.sharding != "none":
        raise InputError(
            f"method `lora-fa` steps on whole matrices: `--sharding {plan.sharding}` is not "
            "modelled",
            "leave `--sharding` out, or use `--method lora`",
        )
    given = read_options(plan.peft_config)
    for option in ("use_dora", "lora_bias"):
        if given.get(option):
            raise InputError(
                f"method `lora-fa` steps on pairs of matrices, and `--peft-config {option}=true` "
                "adds a third parameter to them",
                f"leave `{option}` out, or use `--method lora`",
            )
    _check_trainer(plan)


def _check_loftq(plan: TrainingPlan) -> None:
    if plan.quantization not in LOFTQ_BASES:
        raise InputError(
            "method `loftq` begins with what 4 bits took from the weights, and this base is "
            f"quantized to {plan.quantization}",
            "use `--quantization nf4`, or `--method qlora`",
        )


def _check_bottleneck(plan: TrainingPlan) -> None:
    objective = plan.resolved_objective
    if asks_reference(plan):
        raise InputError(
            f"`--objective {plan.objective}` compares with the model as it was, which TRL finds by "
            "switching adapters off, and it knows PEFT's only: not those of method `bottleneck`",
            "use `--method lora`",
        )
    if objective.scores:
        raise InputError(
            f"`--objective {plan.objective}` trains a score beside adapters, which method "
            "`bottleneck` leaves as it began",
            "use `--method lora`",
        )


def _check_trainer(plan: TrainingPlan) -> None:
    if plan.trainer == "loop":
        raise InputError(
            f"method `{plan.method}` is set up by a trainer, a plain loop has none",
            "use `--trainer trl` or `--trainer transformers`",
        )


_CHECKS = {
    "lora-plus": _check_lora_plus,
    "lora-fa": _check_lora_fa,
    "loftq": _check_loftq,
    "bottleneck": _check_bottleneck,
}
