"""What a run gives up after memory has run out, so that it goes on: one thing at a time, each once.

What leaves the result as it is comes first: fewer rows at once with the same rows a step, layers
computed again, smaller evaluation batches. The next plan of the ranking comes last.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from msgspec import Struct, structs

from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.refused_steps import needs_whole_graph

# What a row of metrics.jsonl, and the stage of status.json, call it.
EVENT = "out of memory"

Place = Literal["load", "forward", "backward", "optimizer step", "evaluation", "save"]

# Where activations are alive, or what they leave of the allocator's blocks counts.
_OF_A_STEP = ("forward", "backward", "optimizer step")

# Objectives whose loss compares the rows of a micro-batch or draws groups of completions, and
# losses of pairs that follow the mean of the micro-batches before.
_ROWS_TOGETHER = ("kto", "grpo", "rloo")
_RUNNING_MEAN = ("bco_pair",)


class Lowered(Struct, frozen=True, kw_only=True):
    """What a run computes with now. Rows are those of one process.

    `train_rows`: at once, of a micro-batch that is otherwise as planned; `eval_rows`: the same in
    evaluation. `checkpoints_all`: every layer is computed again in backward. `plans_used`: how many
    plans of the ranking have taken the place of the first.
    """

    train_rows: int
    eval_rows: int
    checkpoints_all: bool = False
    plans_used: int = 0

    @classmethod
    def as_planned(cls, plan: TrainingPlan, plans_used: int = 0) -> Lowered:
        rows = plan.per_device_train_batch_size
        return cls(
            train_rows=rows,
            eval_rows=rows,
            checkpoints_all=checkpoints_all(plan),
            plans_used=plans_used,
        )


class Change(Struct, frozen=True, kw_only=True):
    """What is given up next. `what`: in words, after `memory ran out in ...:`; `why`: what it buys
    and leaves alone."""

    lowered: Lowered
    what: str
    why: str


def next_change(
    plan: TrainingPlan, now: Lowered, place: Place, plans_left: int = 0
) -> Change | None:
    """What to give up after memory ran out at `place`; None where nothing is left.

    `plans_left`: plans of the ranking that need less and have not been tried.
    """
    if place == "evaluation" and now.eval_rows > 1:
        return _smaller_evaluation(now)
    if place in _OF_A_STEP:
        if now.train_rows > 1 and is_divisible(plan):
            return _fewer_rows(plan, now)
        if not now.checkpoints_all and can_checkpoint(plan):
            return Change(
                lowered=structs.replace(now, checkpoints_all=True),
                what="every layer is computed again in backward",
                why="backward keeps the layers' inputs alone; the result is the same",
            )
    if place == "save" or not plans_left:
        return None
    return Change(
        lowered=structs.replace(now, plans_used=now.plans_used + 1),
        what="the next plan of the ranking that needs less",
        why="all that leaves the plan as it is has been tried",
    )


def _fewer_rows(plan: TrainingPlan, now: Lowered) -> Change:
    """Half the rows at once, of an odd number the larger half."""
    rows = (now.train_rows + 1) // 2
    steps = _passes(plan.per_device_train_batch_size, rows) * plan.gradient_accumulation_steps
    return Change(
        lowered=structs.replace(now, train_rows=rows),
        what=f"{_rows(rows)} at once instead of {now.train_rows}, {steps} micro-batches a step",
        why="the rows of a step, their order and the schedule are the same",
    )


def _smaller_evaluation(now: Lowered) -> Change:
    rows = (now.eval_rows + 1) // 2
    return Change(
        lowered=structs.replace(now, eval_rows=rows),
        what=f"{_rows(rows)} at once in evaluation instead of {now.eval_rows}",
        why="only evaluation takes longer",
    )


def _passes(rows: int, at_once: int) -> int:
    return -(-rows // at_once)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def row_pieces(num_rows: int, at_once: int) -> list[range]:
    """Rows in pieces of at most `at_once`, as even as can be: 5 rows of at most 3 are 2 and 3."""
    count = _passes(num_rows, max(1, at_once))
    ends = [num_rows * number // count for number in range(count + 1)]
    return [range(first, end) for first, end in pairwise(ends)]


def is_divisible(plan: TrainingPlan) -> bool:
    """Whether the loss of a micro-batch is that of its rows, so that it may be computed in
    pieces."""
    together = plan.objective in _ROWS_TOGETHER or plan.loss_type in _RUNNING_MEAN
    return not together and not plan.packing


def checkpoints_all(plan: TrainingPlan) -> bool:
    return plan.gradient_checkpointing and plan.every_n_layers == 1


def can_checkpoint(plan: TrainingPlan) -> bool:
    """Whether every layer may be checkpointed, by the plan's own checks."""
    if needs_whole_graph(plan.resolved_method.peft_type):
        return False
    try:
        plan.replace(gradient_checkpointing=True, every_n_layers=1)
    except InputError:
        return False
    return True
