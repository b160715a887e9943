"""What a dry run is asked, as it crosses to the process that carries it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.plan import TrainingPlan

# Kernels of an unnamed GPU are those of an A100.
DEFAULT_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunCase:
    """One configuration.

    - `config`: what the model's config.json holds.
    - `kind`, `capability`: whose kernels run.
    - `row_length`: tokens of every row of the longest batch; `padded`: whether some of its rows
      are shorter, so that attention is masked.
    - `kbit_prepare`: PEFT's `prepare_model_for_kbit_training` is called; `casts_back`: TRL 0.x
      turns embeddings, head and adapters to bf16 after it.
    - `repeats_key_value`: grouped heads are repeated before the attention kernel.
    - `transformers_version`: the release whose stock loss is meant; None for the installed one.
    - `fused_kernels`: norms and rotary embeddings are fms-acceleration's.
    - `fsdp_version`: of fully sharded data parallelism, where the plan has it.
    - `few_layers`: whether equal layers are traced a few times only.
    """

    config: Mapping[str, Any]
    plan: TrainingPlan
    kind: DeviceKind
    capability: tuple[int, int] = DEFAULT_CAPABILITY
    row_length: int
    padded: bool = False
    kbit_prepare: bool = False
    casts_back: bool = False
    repeats_key_value: bool = False
    transformers_version: tuple[int, ...] | None = None
    fused_kernels: bool = False
    fsdp_version: int = 2
    few_layers: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "plan": dataclasses.asdict(self.plan)}

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
