"""For the work of measured runs, plans at least as fast as those that people ran."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ftplan.launcher.cases import Case
from ftplan.launcher.commands import validate
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.memory import fits
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.search import choose_plan
from tests.test_measured import cases

# What the search chooses; all other settings are the row's.
CHOSEN = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "offload"),
    *("gradient_checkpointing", "every_n_layers", "use_reentrant", "sharding", "num_gpus"),
)

# A third of the rows, of all kinds: a search takes up to a second.
SOME = [
    case
    for case in list(cases().values())[::3]
    if not case.is_litgpt and case.gpu is not None and case.length_is == "exact"
]


def rows_of(length: int) -> DataProfile:
    return DataProfile(
        path="rows",
        sha256="",
        format="text",
        objective="pretraining",
        num_rows=256,
        num_usable_rows=256,
        num_eval_rows=0,
        lengths=(length,) * 256,
        exact=True,
    )


def given_of(case: Case) -> dict[str, Any]:
    settings = dataclasses.asdict(case.plan)
    given = {name: value for name, value in settings.items() if name not in CHOSEN}
    return {**given, "num_gpus": case.plan.num_gpus}


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_the_chosen_plan_is_at_least_as_fast_as_the_row_s_own(case: Case) -> None:
    assert case.gpu is not None
    model, stack, plan = case.model.spec, validate._stack(case), case.plan
    own = validate._step(case)
    assert own is not None
    try:
        best = choose_plan(
            model,
            rows_of(plan.max_length),
            case.gpu,
            given_of(case),
            stack,
            rows_per_step=plan.effective_batch_size,
        ).best
    except InputError:
        best = None
    memory = replayed_memory(model, plan, device=case.gpu, stack=stack)
    if best is None or not fits(memory, case.gpu):
        # The row's own leaves less than the margin free, so that it would not be planned.
        assert not fits(memory, case.gpu)
        return
    assert best.plan.effective_batch_size == plan.effective_batch_size
    taken = own.step_seconds / plan.effective_batch_size
    assert best.seconds_per_row <= 1.02 * taken
    measured = case.measured.get("device_bytes") or case.measured.get("reserved_bytes")
    if best.plan == plan and measured:
        assert measured <= case.gpu.total_bytes
