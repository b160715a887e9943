"""A method beside others on one model: what it trains and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from ftplan.launcher.cards import smallest_card
from ftplan.planner.combinations import check_together
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MemoryEstimate, estimate_memory, needed_bytes
from ftplan.planner.methods import Method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.stack import Stack

# Settings that make sense for one method only; left out when others are compared.
METHOD_BOUND = ("method", "quantization", "dtype", "mixed_precision")


class ComparedMethod(Struct, frozen=True, kw_only=True):
    """A method beside others on the same model: its memory, and what it trains."""

    method: str
    plan: TrainingPlan
    num_trainable_parameters: int
    memory: MemoryEstimate
    card: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "num_trainable_parameters": self.num_trainable_parameters,
            "per_gpu": self.memory.to_dict(),
        }


def compared(
    method: Method,
    model: ModelSpec,
    device: Device | None,
    given: Mapping[str, Any],
    stack: Stack,
    *,
    exactly: bool = True,
) -> ComparedMethod:
    """One configuration by `method`, `given` settings kept. Raises InputError where it cannot be.

    `exactly`: what the allocator holds has been replayed, which takes far longer than the rest.
    """
    plan = estimate_recipe(model, device, {**given, "method": method.name}).plan
    check_together(model, plan)
    memory = (replayed_memory if exactly else estimate_memory)(
        model, plan, device=device, stack=stack
    )
    trained = method.count(model, plan.method_settings)
    return ComparedMethod(
        method=method.name,
        plan=plan,
        num_trainable_parameters=trained.num_trainable_parameters,
        memory=memory,
        card=smallest_card(needed_bytes(memory)),
    )
