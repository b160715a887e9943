"""What the formulas alone say of a planned run: what `ftplan calibrate` learns from."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from ftplan.launcher.estimate_json import calibration_to_dict
from ftplan.launcher.planning import Planned
from ftplan.planner.calibration import UNCALIBRATED
from ftplan.planner.step_time import step_parts


def uncalibrated(planned: Planned) -> dict[str, Any]:
    """`formula` of plan.yaml's `predicted`: figures without the device's calibration, and that
    calibration, None without one. The parts of a step are None where it waits for completions."""
    chosen, device = planned.chosen, planned.device
    work, plain = chosen.step.work, structs.replace(device, calibration=UNCALIBRATED)
    timed = work is not None and not chosen.plan.resolved_objective.generates
    closed_form = planned.closed_form
    return {
        "formula": {
            "reserved_bytes": chosen.memory.uncalibrated_reserved_bytes,
            "closed_form_reserved_bytes": closed_form and closed_form.uncalibrated_reserved_bytes,
            "context_bytes": device.context_bytes,
            "tokens_per_step": chosen.step.tokens_per_step,
            "step_parts": structs.asdict(step_parts(work, plain)) if timed and work else None,
        },
        "calibration": calibration_to_dict(device),
    }
