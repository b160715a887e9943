"""Methods that change what they train while they train: when they do, and what they need for it.

ReLoRA (Lialin et al. 2023, arXiv 2307.05695) and PLoRA (Meng et al. 2024, arXiv 2402.16141) merge
their adapters into the base and begin anew, LoRA-drop (Zhou et al. 2024, arXiv 2402.07721) looks
for the layers that matter first, AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) takes ranks away.
`launcher/training/cycles` carries them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ftplan.planner.errors import InputError
from ftplan.planner.objectives import asks_reference
from ftplan.planner.peft_options import read_options

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan

# Methods that merge their adapters into the base.
RESTARTING = ("relora", "plora")

# Times that adapters are begun where nothing else is asked for, and the fewest steps between two
# of them. ReLoRA's own runs have 4 to 20 cycles of 1,000 steps and more; fine-tuning has few steps.
DEFAULT_CYCLES = 4
LEAST_CYCLE_STEPS = 5

# ReLoRA warms up for 50 to 100 of some thousand steps (section 3); of a short cycle this share.
RESTART_WARMUP_SHARE = 0.1

# axolotl's names; `reset` forgets all of the states.
PRUNE_METHODS = ("magnitude", "random", "reset")

# The share of the run's steps that LoRA-drop looks for important layers before it (its samples are
# a tenth of the data), and how many layers then keep their own adapter on average (abstract).
SCORING_SHARE = 0.1
LORA_DROP_KEPT_SHARE = 0.5

# As in AdaLoRA's own runs: it begins with one and a half times the ranks that it ends with, warms
# up for about a tenth of the steps and trains about the last half with the ranks found.
_ADALORA_EXCESS = 1.5
_ADALORA_SHARES = {"tinit": 0.1, "tfinal": 0.5}
_ADALORA_ALLOCATIONS = 100

# Settings that only these methods have.
CYCLE_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "jagged_restart_steps": RESTARTING,
    "jagged_restart_warmup_steps": ("relora",),
    "relora_prune_ratio": ("relora",),
    "relora_prune_method": ("relora",),
    "plora_momentum": ("plora",),
    "lora_drop_threshold": ("lora-drop",),
}

# What an option of PEFT must be for an adapter that is merged and begun anew, or shared.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "init_lora_weights": (True, "gaussian"),
    "trainable_token_indices": (None,),
}


def check_cycles(plan: TrainingPlan) -> None:
    """Raises InputError for settings that the plan's method cannot go through its cycles with."""
    for name, methods in CYCLE_SETTINGS.items():
        given = getattr(plan, name) != type(plan).__dataclass_fields__[name].default
        if given and plan.method not in methods:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"`{flag}` is for method `{methods[0]}`, and this is `{plan.method}`",
                f"leave `{flag}` out, or use `--method {methods[0]}`",
            )
    if plan.method in (*RESTARTING, "lora-drop"):
        _check_plain(plan)
    if plan.method in RESTARTING:
        _check_merges(plan)
    if plan.method == "adalora":
        _check_ranks(plan)


def _check_plain(plan: TrainingPlan) -> None:
    """Raises InputError for adapters that are more than two matrices."""
    given = read_options(plan.peft_config)
    for name, allowed in _PLAIN.items():
        if name in given and given[name] not in allowed:
            raise InputError(
                f"`--peft-config {name}={given[name]}` does not go with method `{plan.method}`, "
                "which begins adapters anew that are two matrices each",
                f"leave `{name}` out, or use `--method lora`",
            )


def _check_merges(plan: TrainingPlan) -> None:
    """Raises InputError where adapters cannot be merged into the base while it trains."""
    if plan.quantization != "none":
        raise InputError(
            f"method `{plan.method}` merges its adapters into the base, and one of "
            f"{plan.quantization} would round away most of what they have learned",
            "use `--quantization none`, or `--method qlora`",
        )
    if asks_reference(plan) and not plan.precompute_ref_log_probs:
        raise InputError(
            f"`--objective {plan.objective}` compares with the model without its adapters, and "
            f"method `{plan.method}` merges them into it",
            "use `--method lora`"
            + (
                ", or `--precompute-ref-log-probs true`"
                if plan.resolved_objective.has_reference
                else " or `--beta 0`"
            ),
        )


def _check_ranks(plan: TrainingPlan) -> None:
    """Raises InputError where AdaLoRA has no ranks to take away."""
    given = read_options(plan.peft_config)
    target = given.get("target_r", plan.lora_rank)
    first = given.get("init_r", adalora_first_rank(target))
    if type(first) is int and type(target) is int and first <= target:
        raise InputError(
            f"method `adalora` begins with rank {first} and ends with {target} on average: there "
            "is nothing to take away",
            f"give `--peft-config init_r={adalora_first_rank(target)}`, or leave `init_r` out",
        )


def adalora_first_rank(target_rank: Any) -> Any:
    """The rank that AdaLoRA begins with, of the one it ends with on average."""
    return math.ceil(_ADALORA_EXCESS * target_rank) if type(target_rank) is int else target_rank


class AdaloraSchedule(Struct, frozen=True, kw_only=True):
    """PEFT's names: steps before ranks shrink, steps after it, steps between two allocations."""

    total_step: int
    tinit: int
    tfinal: int
    deltaT: int

    def to_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__struct_fields__}


def adalora_schedule(steps: int, given: Mapping[str, Any]) -> AdaloraSchedule:
    """When AdaLoRA takes ranks away in a run of `steps` optimizer steps; `given` options stay.

    Raises InputError where that leaves no step to do it.
    """
    chosen: dict[str, int] = {name: int(share * steps) for name, share in _ADALORA_SHARES.items()}
    chosen["deltaT"] = max(1, steps // _ADALORA_ALLOCATIONS)
    chosen |= {name: given[name] for name in chosen if name in given}
    if chosen["tinit"] >= steps - chosen["tfinal"]:
        raise InputError(
            f"AdaLoRA's `tinit` of {chosen['tinit']} and `tfinal` of {chosen['tfinal']} steps "
            f"leave none of the run's {steps:,} steps to take ranks away",
            "leave them out of `--peft-config`, or train longer",
        )
    return AdaloraSchedule(total_step=steps, **chosen)


def restart_steps(plan: TrainingPlan, steps: int) -> int:
    """Optimizer steps between two restarts of ReLoRA or PLoRA in a run of `steps`.

    Raises InputError for a run that has no room for two cycles.
    """
    return cycle_steps(plan.method, plan.jagged_restart_steps, steps)


def cycle_steps(method: str, given: int | None, steps: int) -> int:
    """The same of the one setting."""
    if given is not None and given < steps:
        return given
    cycles = min(DEFAULT_CYCLES, steps // LEAST_CYCLE_STEPS)
    if given is None and cycles >= 2:
        return math.ceil(steps / cycles)
    asked = LEAST_CYCLE_STEPS if given is None else given
    raise InputError(
        f"method `{method}` needs two cycles, and the run's {steps:,} optimizer steps have no "
        f"room for two of {asked:,}",
        f"train longer (`--max-steps {2 * asked}`), give fewer `--jagged-restart-steps`, or use "
        "`--method lora`",
    )


def num_restarts(steps: int, every: int) -> int:
    """Times that adapters are merged and begun anew before the run ends."""
    return (steps - 1) // every


def restart_warmup_steps(given: int | None, every: int) -> int:
    """Steps after a restart until the learning rate is back on its curve."""
    return max(1, round(RESTART_WARMUP_SHARE * every)) if given is None else given


def scoring_steps(steps: int) -> int:
    """Optimizer steps that LoRA-drop takes to find the layers that matter, before the run's own.
    In the first one adapters still give zeros."""
    return max(LEAST_CYCLE_STEPS, round(SCORING_SHARE * steps))


def check_steps(plan: TrainingPlan, steps: int) -> None:
    """Raises InputError where the run is too short for what its method does."""
    if plan.method in RESTARTING:
        restart_steps(plan, steps)
    if plan.method == "adalora":
        adalora_schedule(steps, read_options(plan.peft_config))
