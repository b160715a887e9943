"""Several tasks in one run: how often the rows of each come.

Tasks are weighted by drawing their rows more or less often, not by factors before their losses: a
row costs the same time whatever its factor, and a factor of rare rows makes gradients noisy.

Sources, short: T5 = Raffel et al. 2019, arXiv 1910.10683, section 3.5.2; mT5 = Xue et al. 2020,
2010.11934, section 3.1; GradNorm = Chen et al. 2017, 1711.02257, section 3.1; dynamic weight
average = Liu et al. 2018, 1803.10704, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

from msgspec import Struct

from ftplan.planner.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan

TASK_WEIGHTINGS = ("proportional", "equal", "temperature", "fixed", "dynamic")

# Rows that name no task, beside others that name one.
NO_TASK = "other"


def read_task_weights(texts: Iterable[str]) -> dict[str, float]:
    """`task=weight` each; raises InputError."""
    weights = {}
    for text in texts:
        task, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not task.strip() or not 0 <= weight < math.inf:
            raise InputError(
                f"`--task-weights {text}`: a task and a number of 0 or above are expected",
                "for example `--task-weights sentiment=2,summary=1`",
            )
        weights[task.strip()] = weight
    if weights and not any(weights.values()):
        raise InputError("`--task-weights`: every task has a weight of 0")
    return weights


class TaskWeighting(Struct, frozen=True, kw_only=True):
    """How tasks are weighted. `weights`: of fixed ones, or those that dynamic ones begin with."""

    weighting: str = "proportional"
    temperature: float = 2.0
    weights: tuple[str, ...] = ()

    @staticmethod
    def of(plan: TrainingPlan) -> TaskWeighting:
        return TaskWeighting(
            weighting=plan.task_weighting,
            temperature=plan.task_temperature,
            weights=plan.task_weights,
        )

    @property
    def is_dynamic(self) -> bool:
        return self.weighting == "dynamic"

    @property
    def takes_each_row_once(self) -> bool:
        """Whether an epoch is every row once, as without tasks."""
        return self.weighting == "proportional"

    def shares(self, counts: Mapping[str, int]) -> dict[str, float]:
        """The share of each task among the rows that are drawn, at the start; they sum to 1.

        `counts`: rows of each task. Proportional: n_i, so each row once; equal: 1; temperature:
        n_i^(1/T), T5's mixing, where T = 1 is proportional and a high T nearly equal (mT5's
        exponent is 1/T). Raises InputError where weights are given for other tasks.
        """
        weights = dict(self._weights({task: n for task, n in counts.items() if n}))
        total = sum(weights.values())
        if not total:
            raise InputError("`--task-weights`: only tasks without a training row have a weight")
        return {task: weights.get(task, 0.0) / total for task in counts}

    def _weights(self, counts: Mapping[str, int]) -> Iterable[tuple[str, float]]:
        given = read_task_weights(self.weights)
        if given:
            return [(task, _weight_of(task, given, counts)) for task in {**given, **counts}]
        if self.weighting == "equal":
            return [(task, 1.0) for task in counts]
        exponent = 1.0 if self.weighting == "proportional" else 1 / self.temperature
        most = max(counts.values())  # divided by it, no power is too large
        return [(task, (count / most) ** exponent) for task, count in counts.items()]


def _weight_of(task: str, given: Mapping[str, float], counts: Mapping[str, int]) -> float:
    if task not in counts:
        raise UnknownNameError("task", task, counts)
    if task not in given:
        raise InputError(
            f"`--task-weights` has none for task `{task}`",
            f"add `{task}=1`, or `{task}=0` to leave its rows out",
        )
    return given[task]


def check_task_weighting(plan: TrainingPlan) -> None:
    """Raises InputError where the weights are not for the weighting, or cannot be for the
    objective."""
    weighting = plan.task_weighting
    if weighting == "fixed" and not plan.task_weights:
        raise InputError(
            "`--task-weighting fixed` has no weights", "add `--task-weights sentiment=2,summary=1`"
        )
    if plan.task_weights and weighting not in ("fixed", "dynamic"):
        raise InputError(
            f"`--task-weights` are for fixed weights, and these are {weighting}",
            "leave out `--task-weighting`, or say `--task-weighting fixed`",
        )
    why_not = weighting_refused(plan.objective, generates=plan.resolved_objective.generates)
    if why_not and weighting != "proportional":
        raise InputError(
            f"`--task-weighting {weighting}` does not go with `--objective {plan.objective}`: "
            f"{why_not}",
            "use `--task-weighting proportional`",
        )
    if weighting == "dynamic" and plan.objective != "sft":
        raise InputError(
            "dynamic weights follow each task's loss a token, which plain fine-tuning has; this is "
            f"`--objective {plan.objective}`",
            "use `--task-weighting temperature` or `equal`",
        )


def weighting_refused(objective: str, *, generates: bool) -> str:
    """Why an objective takes every row once; empty where it need not."""
    if objective == "kto":
        return "its rows are paired within micro-batches before training begins"
    if generates:
        return "its trainer draws prompts itself"
    return ""


def drawn_lengths(
    lengths: Mapping[str, Sequence[int]], shares: Mapping[str, float]
) -> tuple[int, ...]:
    """Lengths of as many rows as there are, drawn by the tasks' shares, from the longest.

    `lengths`: of each task's rows, from the longest. Of a task that is drawn less than once, rows
    at even distances stand for all.
    """
    count = sum(map(len, lengths.values()))
    tasks = [task for task in lengths if lengths[task]]
    quotas = allotted([shares[task] * count for task in tasks], count)
    drawn: list[int] = []
    for task, quota in zip(tasks, quotas, strict=True):
        rows = lengths[task]
        times, rest = divmod(quota, len(rows))
        for row in rows:
            drawn += repeat(row, times)
        drawn += (rows[number * len(rows) // rest] for number in range(rest))
    return tuple(sorted(drawn, reverse=True))


def allotted(wanted: Sequence[float], count: int) -> list[int]:
    """Whole numbers next to `wanted` that sum to `count`, by the largest remainders; none below 0,
    and none where 0 or less is wanted."""
    quotas = [max(0, math.floor(number)) for number in wanted]
    by_remainder = sorted(
        (task for task in range(len(wanted)) if wanted[task] > 0),
        key=lambda task: (quotas[task] - wanted[task], task),
    )
    while (missing := count - sum(quotas)) > 0:
        for task in by_remainder[:missing]:
            quotas[task] += 1
    while (missing := count - sum(quotas)) < 0:
        quotas[max(range(len(quotas)), key=lambda task: (quotas[task] - wanted[task], task))] -= 1
    return quotas
