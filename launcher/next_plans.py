"""The plans of the ranking that a run falls back on when memory runs out, kept beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ftplan.launcher.run_dir import RunDir, read_mapping, write_json, write_yaml
from ftplan.planner.memory import needed_bytes
from ftplan.planner.ranking import Evaluated, Ranking

PlanFiles = Mapping[str, Any]
"""`plan`, `train` and `accelerate`: what plan.yaml, train.yaml and accelerate.yaml hold."""


def cheaper_plans(chosen: Evaluated, ranking: Ranking) -> Iterator[Evaluated]:
    """The runners-up on the same GPUs, in the ranking's order, each of which needs less than all
    before it."""
    least = needed_bytes(chosen.memory, ranking.margin)
    for other in ranking.alternatives:
        needed = needed_bytes(other.memory, ranking.margin)
        if needed < least and other.team == chosen.team:
            least = needed
            yield other


def write_next_plans(
    run: RunDir, plans: Sequence[Evaluated], files_of: Callable[[Evaluated], PlanFiles]
) -> None:
    """next_plans.json; no file where there is none."""
    if plans:
        write_json(run.next_plans, {"plans": [dict(files_of(plan)) for plan in plans]})


def num_next_plans(run: RunDir) -> int:
    return len(_read(run))


def take_next_plan(run: RunDir, number: int) -> None:
    """Put the `number`-th of them, from 1, in the place of the run's plan. The plan before it, with
    its checkpoints, goes to `previous`."""
    plan = _read(run)[number - 1]
    target = run.new_previous()
    for path in (run.plan, run.train, run.accelerate):
        shutil.copyfile(path, target / path.name)
    if run.checkpoints.exists():
        shutil.move(run.checkpoints, target / run.checkpoints.name)
    write_yaml(run.train, plan["train"], "Read by the training process.")
    write_yaml(run.accelerate, plan["accelerate"])
    write_yaml(run.plan, plan["plan"], "What was planned, and why.")
    write_json(run.lowered, {"plans_used": number})


def _read(run: RunDir) -> list[PlanFiles]:
    return read_mapping(run.next_plans)["plans"] if run.next_plans.is_file() else []
