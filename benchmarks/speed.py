"""Estimates a second of the closed form, on plans as a search over one model varies them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.model_source import find_source
from ftplan.planner.closed_form import check_closed_form
from ftplan.planner.errors import InputError
from ftplan.planner.memory import estimate_memory
from ftplan.planner.methods import COMPARED_METHODS, METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan

BAR_PER_SECOND = 20_000

# Dense, with alternating windows, with biases, and a mixture of experts.
MODELS = ("llama-3.1-8b", "gemma-2-9b", "qwen2.5-7b", "mixtral-8x7b")

_VARIED: dict[str, tuple[Any, ...]] = {
    "lora_rank": (8, 64),
    "optim": (
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "adafactor",
        "lion_8bit",
        "sgd",
    ),
    "per_device_train_batch_size": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
    "max_length": (512, 1024, 2048, 4096, 8192),
    "gradient_accumulation_steps": (1, 4),
    "gradient_checkpointing": (True, False),
    "loss": ("trl-fused", "liger", "stock"),
}


class Speed(Struct, frozen=True, kw_only=True):
    """Of all estimates of so many models, each plan estimated twice. Processor time:
    `first_seconds` with what a model's plans share worked out, `seconds` once it is known, as it is
    for all but 3 % of these plans."""

    models: int
    estimates: int
    first_seconds: float
    seconds: float

    @property
    def first_per_second(self) -> float:
        return self.estimates / self.first_seconds

    @property
    def per_second(self) -> float:
        return self.estimates / self.seconds

    @property
    def within(self) -> bool:
        return self.per_second >= BAR_PER_SECOND

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "within": self.within,
            "bar_per_second": BAR_PER_SECOND,
            "per_second": self.per_second,
            "first_per_second": self.first_per_second,
            **structs.asdict(self),
        }


def measure_speed() -> Speed:
    """Processor time of `estimate_memory` alone: specifications and plans are made before."""
    estimates, first_seconds, seconds = 0, 0.0, 0.0
    for name in MODELS:
        model = find_source(name).spec
        plans = list(_plans(model))
        first_seconds += _seconds(model, plans)
        seconds += _seconds(model, plans)
        estimates += len(plans)
    return Speed(
        models=len(MODELS), estimates=estimates, first_seconds=first_seconds, seconds=seconds
    )


def _seconds(model: ModelSpec, plans: Iterable[TrainingPlan]) -> float:
    began = time.process_time()
    for plan in plans:
        estimate_memory(model, plan)
    return time.process_time() - began


def _plans(model: ModelSpec) -> Iterator[TrainingPlan]:
    """Every combination that there is."""
    for name in COMPARED_METHODS:
        method = METHODS[name]
        ranks = _VARIED["lora_rank"][: None if method.adapter else 1]
        varied = {**_VARIED, "lora_rank": ranks}
        base = {"method": name, "quantization": "nf4" if method.quantized_base else "none"}
        for values in product(*varied.values()):
            with suppress(InputError):
                plan = TrainingPlan(**base, **dict(zip(varied, values, strict=True)))
                check_closed_form(plan, model)
                yield plan
