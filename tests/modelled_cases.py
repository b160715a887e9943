"""Small models with plans, over everything that the closed form models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from benchmarks.draws import AXES, Weights
from ftplan.planner.closed_form import MODELLED_METHODS
from ftplan.planner.errors import InputError
from ftplan.planner.families import FAMILIES, spec_from_config
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.plan import QUANTIZATIONS, ReasonedPlan, TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.sharding import SHARDINGS
from tests.conftest import TINY_CONFIGS

# Each value has so many cases of its own; what is beside it is drawn.
TURNS: Mapping[str, tuple[int, Sequence[str]]] = {
    "family": (1, sorted(FAMILIES)),
    "method": (1, sorted(MODELLED_METHODS)),
    "objective": (6, sorted(OBJECTIVES)),
    "sharding": (8, sorted(SHARDINGS)),
    "quantization": (3, sorted(QUANTIZATIONS)),
}
_WEIGHTS: Mapping[str, Weights] = {
    **{axis: w for axis, w in AXES.items() if axis not in ("target_modules", "modules_to_save")},
    "family": dict.fromkeys(TURNS["family"][1], 1),
}
# PEFT's own block lengths do not divide the sides of such small matrices.
_PEFT_CONFIG = {"c3a": ("block_size=16",), "vblora": ("vector_length=16",)}
# What goes with generating, which little does.
_GENERATING: Mapping[str, Any] = {
    **{"num_generations": 2, "max_completion_length": 64, "per_device_train_batch_size": 4},
    **{"trainer": "trl", "loss": "trl-fused", "packing": False, "precompute_ref_log_probs": False},
    **{"num_gpus": 1, "sharding": "none", "offload": "none", "beta": 0.1},
}
# So many hands are refused in a row where values hardly go together.
_MOST_HANDS = 1000


@dataclass(frozen=True)
class ModelledCase:
    """A small model and a plan that the closed form models."""

    model: ModelSpec
    reasoned: ReasonedPlan

    @property
    def plan(self) -> TrainingPlan:
        return self.reasoned.plan

    def __repr__(self) -> str:
        """Short enough to be read in a failure."""
        changed = {
            field.name: value
            for field in dataclasses.fields(self.plan)
            if (value := getattr(self.plan, field.name)) != field.default
        }
        return f"{self.model.name} {changed}"

    def estimate(self, **changes: Any) -> MemoryEstimate:
        """The estimate, with some settings changed; raises InputError where they do not go."""
        return estimate_memory(self.model, self.plan.replace(**changes))


@cache
def modelled_cases() -> tuple[ModelledCase, ...]:
    """The same cases each time, some of each value of each of TURNS."""
    return tuple(
        _dealt(axis, value, Random(f"{value}/{number}"))
        for axis, (count, values) in TURNS.items()
        for value in values
        for number in range(count)
    )


def _dealt(axis: str, value: str, rng: Random) -> ModelledCase:
    """A case with that value; what ftplan refuses is dealt again."""
    for _ in range(_MOST_HANDS):
        hand = {name: rng.choices(list(w), list(w.values()))[0] for name, w in _WEIGHTS.items()}
        hand[axis] = value
        if OBJECTIVES[hand["objective"]].generates:
            hand |= _GENERATING
        hand["peft_config"] = _PEFT_CONFIG.get(hand["method"], ())
        family = hand.pop("family")
        try:
            model = spec_from_config({"model_type": family, **TINY_CONFIGS[family]}, family)
            reasoned = estimate_recipe(model, None, hand)
            estimate_memory(model, reasoned.plan)
        except InputError:
            continue
        return ModelledCase(model, reasoned)
    raise AssertionError(f"ftplan refuses everything with {axis} {value}")
