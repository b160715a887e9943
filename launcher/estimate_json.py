"""The object of `estimate --json`, which `plan`, `auto` and plan.yaml hold as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftplan.launcher.costs import usd_per_million_tokens
from ftplan.launcher.own_stack import installed_stack
from ftplan.planner.closed_form import unmodelled
from ftplan.planner.combination import Caution
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MEMORY_MARGIN, MemoryEstimate, fits, needed_bytes
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import trained_model, trained_part
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.rules_of_thumb import rule_to_dict
from ftplan.planner.step_time import STEP_KEYS, StepTime, estimate_step_time

if TYPE_CHECKING:
    from ftplan.planner.dry_run_summary import DryRunSummary


def estimate_to_dict(
    model: ModelSpec,
    reasoned: ReasonedPlan,
    memory: MemoryEstimate,
    device: Device | None,
    warnings: Sequence[Caution],
    step: StepTime | None = None,
    dry_run: DryRunSummary | None = None,
    confirmed: bool = False,
    margin: float = MEMORY_MARGIN,
) -> dict[str, Any]:
    """The object of `estimate --json`.

    `step`: of what is trained on; None where that is not known, so that rows are full.
    `confirmed`: `memory` is from a dry run; `dry_run`: that dry run, where it is to be told.
    `margin`: the share of what is required that is kept free.
    """
    num_parameters, num_trainable = parameter_counts(model, reasoned.plan, dry_run)
    return {
        "schema": 1,
        "model": {
            "name": model.name,
            "architecture": model.architecture,
            "num_parameters": num_parameters,
            "num_trainable_parameters": num_trainable,
        },
        "plan": reasoned.to_dict(),
        "per_gpu": memory.to_dict(),
        "host_ram_peak_bytes": memory.host_ram_peak_bytes,
        "disk_bytes": memory.disk_bytes,
        "step": _step(step or full_step(model, reasoned.plan, device), device),
        "rule_of_thumb": rule_to_dict(num_parameters),
        "fits": _fits(memory, device, margin),
        "estimated_by": "dry-run" if dry_run or confirmed else "closed-form",
        **({"dry_run": _dry_run(dry_run)} if dry_run else {}),
        **({"calibration": used} if (used := calibration_to_dict(device)) else {}),
        "warnings": [caution.to_dict() for caution in (*_stand_in(model), *warnings)],
    }


def calibration_to_dict(device: Device | None) -> dict[str, Any] | None:
    """What predictions are corrected by; None without a calibration."""
    if device is None or not device.calibration.in_force:
        return None
    return device.calibration.to_dict()


def _stand_in(model: ModelSpec) -> list[Caution]:
    if not model.approximate:
        return []
    return [
        Caution(
            name="stand-in",
            text=f"`{model.name}` stands for {model.approximate}",
            way_out="name a model, such as one of `ftplan models`",
        )
    ]


def parameter_counts(
    model: ModelSpec, plan: TrainingPlan, dry_run: DryRunSummary | None
) -> tuple[int, int]:
    """(all, trained) parameters: the dry run's own count where there is one."""
    if dry_run:
        return dry_run.num_parameters, dry_run.num_trainable_parameters
    model = trained_model(model, plan)
    trained = trained_part(model, plan)
    return model.num_parameters, trained.num_trainable_parameters


def _dry_run(summary: DryRunSummary) -> dict[str, Any]:
    """What only a dry run tells: the curve, the allocator, and what is alive at the peak."""
    known = ("phases", "num_parameters", "num_trainable_parameters")
    return {key: value for key, value in summary.to_dict().items() if key not in known}


def full_step(model: ModelSpec, plan: TrainingPlan, device: Device | None) -> StepTime | None:
    """Time of a step of full rows; unknown without a device, without a closed form, and where it
    waits for completions."""
    if device is None or unmodelled(plan) or plan.resolved_objective.generates:
        return None
    rows = plan.per_device_train_batch_size * plan.resolved_objective.sequences_per_row
    return estimate_step_time(
        model,
        plan,
        device,
        tokens_per_micro_batch=rows * plan.max_length,
        mean_length=plan.max_length,
        stack=installed_stack(device),
    )


def _step(step: StepTime | None, device: Device | None) -> dict[str, Any]:
    if step is None or device is None:
        return dict.fromkeys((*STEP_KEYS, "usd_per_million_tokens"))
    return {**step.to_dict(), "usd_per_million_tokens": usd_per_million_tokens(device, step)}


def _fits(memory: MemoryEstimate, device: Device | None, margin: float) -> dict[str, Any] | None:
    if device is None:
        return None
    return {
        "gpu": device.name,
        "free_bytes": device.free_bytes,
        "verdict": "fits" if fits(memory, device, margin) else "does not fit",
        "margin_bytes": device.free_bytes - needed_bytes(memory, margin),
    }
