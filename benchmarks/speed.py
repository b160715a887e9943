"""How many estimates a second the closed form makes, on plans as a search varies them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from benchmarks.comparison import closed_form
from benchmarks.draws import Configuration
from ftplan.planner.closed_form import check_closed_form
from ftplan.planner.errors import FtplanError, InputError
from ftplan.planner.memory import estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan

BAR_PER_SECOND = 20_000

_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_LENGTHS = (512, 1024, 2048, 4096)
_CHECKPOINTING = (False, True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """`models`: configurations that the plans were varied from. `seconds` of processor time."""

    models: int
    estimates: int
    seconds: float

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
            **asdict(self),
        }


def measure_speed(configurations: Sequence[Configuration]) -> Speed:
    """Processor time of `estimate_memory` alone: specifications and plans are made before.

    Takes the configurations that the closed form models.
    """
    work = [_work(c) for c in configurations if _modelled(c)]
    began = time.process_time()
    for model, plans in work:
        for plan in plans:
            estimate_memory(model, plan)
    seconds = time.process_time() - began
    estimates = sum(len(plans) for _, plans in work)
    return Speed(models=len(work), estimates=estimates, seconds=seconds)


def _modelled(configuration: Configuration) -> bool:
    try:
        closed_form(configuration)
    except FtplanError:
        return False
    return True


def _work(configuration: Configuration) -> tuple[ModelSpec, list[TrainingPlan]]:
    """The model, and plans of every batch, length and checkpointing that the search tries and that
    the configuration's method goes with."""
    plans: list[TrainingPlan] = []
    for rows, length, checkpointing in product(_BATCH_SIZES, _LENGTHS, _CHECKPOINTING):
        changes = {
            "per_device_train_batch_size": rows,
            "max_length": length,
            "gradient_checkpointing": checkpointing,
            "use_reentrant": False,
        }
        with suppress(InputError):
            plan = configuration.plan.replace(**changes)
            check_closed_form(plan, configuration.source.spec)
            plans.append(plan)
    return configuration.source.spec, plans
