"""What a dry run is asked, as it crosses to the process that carries it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from msgspec import structs

from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import DEFAULT_CAPABILITY, Stack


class DryRunCase(Stack, frozen=True, kw_only=True):
    """One configuration, on a training stack.

    - `config`: what the model's config.json holds.
    - `kind`, `capability`: whose kernels run.
    - `reward_config`: the same of the model that judges completions, where there is one.
    - `row_length`: tokens of every row of the longest batch.
    - `few_layers`: whether equal layers are traced a few times only.
    """

    config: Mapping[str, Any]
    plan: TrainingPlan
    kind: DeviceKind
    capability: tuple[int, int] = DEFAULT_CAPABILITY
    row_length: int
    few_layers: bool = True
    reward_config: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**structs.asdict(self), "plan": dataclasses.asdict(self.plan)}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> DryRunCase:
        version = raw["transformers_version"]
        plan: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in raw["plan"].items()
        }
        return DryRunCase(
            **{
                **raw,
                "plan": TrainingPlan(**plan),
                "capability": tuple(raw["capability"]),
                "transformers_version": tuple(version) if version else None,
            }
        )
