"""What cannot be trained by an objective, said before any model is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.objectives import LOSS_SETTINGS, OBJECTIVES, Objective
from ftplan.planner.rewards import RULE_REWARDS

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan


def check_objective(plan: TrainingPlan) -> None:
    """Raises InputError for settings that the plan's objective cannot be trained with."""
    objective = plan.resolved_objective
    name = f"`--objective {objective.name}`"
    if objective.name != "sft" and plan.trainer != "trl":
        raise InputError(
            f"{name} is TRL's: `--trainer {plan.trainer}` has it not",
            "use `--trainer trl`, or leave `--trainer` out",
        )
    if objective.only_loss is not None and plan.loss != objective.only_loss:
        raise InputError(
            f"{name} has no `--loss {plan.loss}`: {objective.why_only_loss}",
            f"use `--loss {objective.only_loss}`, or leave `--loss` out",
        )
    if plan.precompute_ref_log_probs and not objective.has_reference:
        raise InputError(
            f"{name} has no reference whose log-probabilities could be computed before",
            "leave `--precompute-ref-log-probs` out, or use `--objective dpo` or `kto`",
        )
    if plan.per_device_train_batch_size < objective.min_batch_size:
        raise InputError(
            f"{name} needs `--per-device-train-batch-size` {objective.min_batch_size} or more: "
            "each prompt is also paired with another row's completion",
            f"use `--per-device-train-batch-size {objective.min_batch_size}`",
        )
    _check_loss_settings(plan)
    _check_generation(plan)
    matches_head = plan.autocast or plan.dtype == "bfloat16"
    if objective.name == "reward" and plan.quantization != "none" and not matches_head:
        raise InputError(
            f"{name} on a {plan.quantization} base cannot compute in {plan.dtype}: "
            "TRL holds the trained head in bf16 there",
            "use `--mixed-precision bf16` or fp16, or `--dtype bfloat16`",
        )


# Settings that only an objective that generates has.
GENERATION_SETTINGS = (
    *("num_generations", "max_completion_length", "steps_per_generation"),
    *("reward_model", "reward"),
)


def _check_loss_settings(plan: TrainingPlan) -> None:
    """Raises InputError for what the objective's loss has not."""
    objective = plan.resolved_objective
    for name in LOSS_SETTINGS:
        if getattr(plan, name) is not None and not _has(objective, name):
            raise _not_of(objective, name)
    if plan.loss_type is not None:
        _check_loss_type(objective, plan.loss_type)
    if plan.beta == 0 and not objective.generates:
        raise InputError(
            f"`--beta 0` leaves `--objective {objective.name}` nothing to learn from",
            f"use a number above 0; usual is {objective.beta:g}",
        )


def _has(objective: Objective, name: str) -> bool:
    if name == "loss_type":
        return bool(objective.loss_types)
    return getattr(objective, name) is not None


def _check_loss_type(objective: Objective, loss_type: str) -> None:
    if why := objective.other_loss_types.get(loss_type):
        raise InputError(
            f"`--loss-type {loss_type}` is not trained: {why}",
            "use one of: " + ", ".join(objective.loss_types),
        )
    if loss_type not in objective.loss_types:
        raise UnknownNameError("loss type", loss_type, objective.loss_types)


def _not_of(objective: Objective, setting: str) -> InputError:
    flag = "--" + setting.replace("_", "-")
    others = ", ".join(f"`{one.name}`" for one in OBJECTIVES.values() if _has(one, setting))
    return InputError(
        f"`{flag}` is for `--objective` {others}, and this is `{objective.name}`",
        f"leave `{flag}` out, or use such an objective",
    )


def _check_generation(plan: TrainingPlan) -> None:
    """Raises InputError for settings that completions cannot be generated with (TRL's GRPOConfig),
    or that another objective has not."""
    if not plan.resolved_objective.generates:
        for name in GENERATION_SETTINGS:
            if getattr(plan, name) != type(plan).__dataclass_fields__[name].default:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"`{flag}` is for `--objective grpo` and `rloo`, and this is "
                    f"`{plan.objective}`",
                    f"leave `{flag}` out, or use `--objective grpo`",
                )
        return
    for name in plan.reward:
        if name not in RULE_REWARDS:
            raise UnknownNameError("reward", name, RULE_REWARDS)
    if plan.num_generations < 2:
        raise InputError(
            f"`--num-generations {plan.num_generations}`: each completion is compared with the "
            "others of its prompt",
            "use 2 or more",
        )
    if plan.max_completion_length >= plan.max_length:
        raise InputError(
            f"`--max-completion-length {plan.max_completion_length}` leaves no token of "
            f"`--max-length {plan.max_length}` to the prompt",
            "raise `--max-length`, which counts prompt and completion together",
        )
    _check_groups(plan)


def _check_groups(plan: TrainingPlan) -> None:
    """Raises InputError where a group of completions of one prompt would be torn apart."""
    if plan.num_gpus > 1:
        raise InputError(
            f"`--objective {plan.objective}` on several GPUs is not modelled",
            "leave `--num-gpus` out: under DDP each GPU generates and trains for itself",
        )
    if plan.generated_rows % plan.num_generations:
        raise InputError(
            f"{plan.generated_rows:,} completions generated at once are no whole groups of "
            f"`--num-generations {plan.num_generations}`",
            "`--per-device-train-batch-size` x `--steps-per-generation` (by default "
            f"`--gradient-accumulation-steps`) must be a multiple of {plan.num_generations}",
        )
