"""What a plan needs to know about a data set: how many rows, and how long in tokens."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from operator import neg
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.batching import mean_batch_tokens
from ftplan.planner.errors import InputError
from ftplan.planner.evaluating import Questions
from ftplan.planner.labels import LabelRows
from ftplan.planner.overlong import RowCounts, overlong_to_dict
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import Stack
from ftplan.planner.tasks import TaskWeighting, drawn_lengths


class Problem(Struct, frozen=True, kw_only=True):
    """A kind of trouble in a data file, with the first line numbers where it stands.

    `where`: the same for people. `left_out`: such rows are not trained on; of others a person is
    warned, and `advice` says what to do.
    """

    kind: str
    count: int
    first_lines: tuple[int, ...]
    where: str = ""
    left_out: bool = True
    advice: str = ""


class DataProfile(Struct, frozen=True, kw_only=True):
    """A data file, read and measured.

    `objective`: what its rows are for, in words; `trains`: the plan's objective that follows.
    `lengths` are the usable training rows' lengths in tokens, template included, sorted from
    the longest; `exact` says whether the model's own tokenizer measured them. `trained_tokens` of
    them carry loss. `task_lengths`: where rows are of several tasks, the `trained_lengths` of each
    one's. `labels`: where all answers are labels, the rows of
    each. `language`: of most rows whose language is plain; empty where none is.

    `overlong`: what becomes of rows longer than `limit` (None: no row is too long, whatever its
    length), as `planner.overlong` names it. `train_counts`, `eval_counts`: what became of which.
    `lengths_left`: the lengths of the rows that go into training, where those are not `lengths`.
    `longest_held_out`: the length of the longest held-out row, `longest_evaluated` what is left of
    it. `questions`: held-out rows that the model is asked.
    """

    path: str
    sha256: str
    format: str
    objective: str
    num_rows: int
    num_usable_rows: int
    num_eval_rows: int
    lengths: tuple[int, ...]
    exact: bool
    trains: str = "sft"
    trained_tokens: int = 0
    num_test_rows: int = 0
    duplicates: int = 0
    has_margins: bool = False
    task_lengths: Mapping[str, tuple[int, ...]] = {}
    labels: Mapping[str, LabelRows] = {}
    language: str = ""
    rows_each: float = 1.0
    """Rows that each of `lengths` stands for: more than one where they are a sample."""
    overlong: str = "truncate"
    limit: int | None = None
    train_counts: RowCounts = RowCounts()
    eval_counts: RowCounts = RowCounts()
    lengths_left: tuple[int, ...] | None = None
    longest_held_out: int = 0
    longest_evaluated: int = 0
    questions: Questions = Questions()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.lengths:
            raise InputError(f"`{self.path}` has no usable training row")
        for lengths in (self.lengths, self.trained_lengths):
            assert list(lengths) == sorted(lengths, reverse=True), "longest first"
        if not self.trained_lengths:
            raise InputError(
                f"`{self.path}`: no row is left to train on at {self.limit:,} tokens",
                "raise `--max-length`",
            )

    @property
    def trained_lengths(self) -> tuple[int, ...]:
        """Of the rows that go into training, once those too long have been seen to."""
        return self.lengths if self.lengths_left is None else self.lengths_left

    @property
    def tasks(self) -> dict[str, int]:
        """Rows of each task that go into training, where there are several tasks."""
        return {
            task: round(self.rows_each * len(lengths))
            for task, lengths in self.task_lengths.items()
        }

    def epoch_lengths(self, weighting: TaskWeighting) -> tuple[int, ...]:
        """Of as many rows as go into training, drawn as tasks are weighted at the start. Raises
        InputError where weights are given for other tasks."""
        if weighting.takes_each_row_once or not self.task_lengths:
            return self.trained_lengths
        return drawn_lengths(self.task_lengths, weighting.shares(self.tasks))

    @property
    def num_train_rows(self) -> int:
        """Rows that go into training."""
        return round(self.rows_each * len(self.trained_lengths))

    @property
    def longest(self) -> int:
        """The longest row of those that are trained on and those held out, before any is cut."""
        return max(self.lengths[0], self.longest_held_out)

    @property
    def longest_in_run(self) -> int:
        """The longest row that goes through the model."""
        return max(self.trained_lengths[0], self.longest_evaluated)

    @property
    def mean_length(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    def overlong_to_dict(self, max_length: int) -> dict[str, Any]:
        """What becomes of rows that are too long, for JSON. `max_length`: of the run; no row is
        between it and `limit`."""
        return overlong_to_dict(self.overlong, max_length, self.train_counts, self.eval_counts)

    def cut_rows(self, max_length: int) -> int:
        """Rows longer than `max_length`, whose end is cut off."""
        return round(self.rows_each * self._num_longer(max_length))

    def _num_longer(self, max_length: int) -> int:
        return bisect_left(self.lengths, -max_length, key=neg)

    @property
    def total_tokens(self) -> int:
        """Tokens of all training rows, before any is cut."""
        return round(self.rows_each * sum(self.lengths))

    def cut_tokens(self, max_length: int) -> int:
        """Tokens beyond `max_length`."""
        return round(self.rows_each * self._tokens_beyond(max_length))

    def _tokens_beyond(self, max_length: int) -> int:
        longer = self.lengths[: self._num_longer(max_length)]
        return sum(longer) - len(longer) * max_length

    def padded_share(self, batch_size: int, max_length: int) -> float:
        """Of the tokens that micro-batches of so many rows compute on, those of padding."""
        tokens = mean_batch_tokens(self.lengths, batch_size, max_length)
        rows = min(batch_size, len(self.lengths))
        mean = (sum(self.lengths) - self._tokens_beyond(max_length)) / len(self.lengths)
        return max(0.0, 1 - rows * mean / tokens)

    def on(self, stack: Stack, plan: TrainingPlan) -> Stack:
        """The stack as these rows make it work: where a micro-batch holds rows of unlike lengths,
        the shorter ones are padded and attention is masked. Two answers to a question are seldom
        of one length."""
        longest, shortest = self.longest_in_run, self.trained_lengths[-1]
        unlike = min(shortest, plan.max_length) < min(longest, plan.max_length)
        several = plan.per_device_train_batch_size > 1 and not plan.packing
        if (several and unlike) or plan.resolved_objective.sequences_per_row > 1:
            return structs.replace(stack, padded=True)
        return stack

    def summary(self) -> dict[str, Any]:
        """Minimum, median, mean, 95th and 99th percentile, maximum of the token lengths."""
        ascending = self.lengths[::-1]
        return {
            "min": ascending[0],
            "median": percentile(ascending, 0.50),
            "mean": round(self.mean_length, 1),
            "p95": percentile(ascending, 0.95),
            "p99": percentile(ascending, 0.99),
            "max": ascending[-1],
            "exact": self.exact,
        }


def percentile(ascending: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]
