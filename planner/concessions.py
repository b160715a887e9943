"""What a method's plans give up where none fits: one thing on top of the other, each a little of
accuracy, and with each the memory falls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftplan.planner.hardware_spec import Device
from ftplan.planner.plan import TrainingPlan

# AdamW with its states in 8 bits reaches what 32 bits reach (Dettmers et al., arXiv 2110.02861).
SMALL_OPTIMIZER = "adamw_bnb_8bit"
_WHY_SMALL_OPTIMIZER = "states in 8 bits, which train as well (arXiv 2110.02861); 32 do not fit"

# Alpaca-LoRA's rank; what is less saves hardly anything.
_SMALLEST_RANK = 8

Settings = Mapping[str, tuple[Any, str]]
"""Settings, each with why."""


def concessions(plan: TrainingPlan, device: Device, given: Mapping[str, Any]) -> list[Settings]:
    """The first gives up nothing, each further one all that those before it do. Given settings
    stay; states that FSDP divides are not put into 8 bits (`Space`)."""
    found: list[Settings] = [{}]
    for step in _steps(plan, device, given):
        found.append({**found[-1], **step})
    return found


def _steps(plan: TrainingPlan, device: Device, given: Mapping[str, Any]) -> Iterator[Settings]:
    quantizes = device.kind == "cuda" and device.supports_quantization("int8")
    if quantizes and "optim" not in given and plan.sharding != "fsdp":
        yield {"optim": (SMALL_OPTIMIZER, _WHY_SMALL_OPTIMIZER)}
    if not plan.resolved_method.adapter or "lora_rank" in given:
        return
    rank = plan.lora_rank // 2
    while rank >= _SMALLEST_RANK:
        why = f"adapters of rank {plan.lora_rank} do not fit"
        alpha = {} if "lora_alpha" in given else {"lora_alpha": (2 * rank, "twice the rank")}
        yield {"lora_rank": (rank, why), **alpha}
        rank //= 2
