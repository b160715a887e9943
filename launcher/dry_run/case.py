"""What a dry run is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftplan.planner.hardware_spec import Device
from ftplan.planner.plan import TrainingPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunCase:
    """One configuration.

    `config`: what the model's config.json holds. `row_length`: tokens of every row of the longest
    batch; `padded`: whether some of its rows are shorter than that, so that attention is masked.
    `kbit_prepare`: PEFT's `prepare_model_for_kbit_training` is called. `transformers_version`: the
    release whose stock loss is meant; None for the installed one. `few_layers`: whether equal
    layers are traced a few times only.
    """

    config: Mapping[str, Any]
    plan: TrainingPlan
    device: Device
    row_length: int
    padded: bool = False
    kbit_prepare: bool = False
    transformers_version: tuple[int, ...] | None = None
    few_layers: bool = True
