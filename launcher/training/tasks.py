"""Rows of several tasks in training: drawn by their weights, their losses told apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from msgspec import Struct
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ftplan.launcher.training.config import TrainConfig
from ftplan.launcher.training.labels import predicted
from ftplan.launcher.training.order import PlannedSampler
from ftplan.planner.batching import BATCHES_SORTED_TOGETHER, training_order
from ftplan.planner.task_draws import RecentLosses, TaskDraws

# Tokens whose logits are looked at together, where a trainer gives logits only.
_TOKENS_AT_ONCE = 256


class TaskMix:
    """The tasks of a run: the shares that rows are drawn by, round after round, and the losses.

    `numbers`: each training row's task. An epoch is one round, but with dynamic weights, where a
    round is as many micro-batches as are sorted by length together. `rounds`: the shares of each
    round so far; kept in checkpoints, so that a resumed run draws the same rows.
    """

    def __init__(self, config: TrainConfig, numbers: Sequence[int]) -> None:
        assert config.tasks is not None
        self.names = config.tasks.names
        self.numbers = numbers
        self.weighting = config.task_weighting
        counts = dict.fromkeys(self.names, 0)
        for number in numbers:
            counts[self.names[number]] += 1
        shares = self.weighting.shares(counts)
        self.base = [shares[name] for name in self.names]
        self.rounds: list[list[float]] = []
        self.recent = RecentLosses(len(self.names))
        self.losses = TaskLosses(len(self.names))
        self.rows_drawn = [0] * len(self.names)
        self.metrics: dict[str, Any] = {}
        self._counts = counts

    def shares_of(self, number: int) -> list[float]:
        """The shares of a round, which are settled when they are first asked for."""
        if not self.weighting.is_dynamic:
            return self.base
        while len(self.rounds) <= number:
            self.recent.end_round()
            self.rounds.append(self.recent.shares(self.base))
        return self.rounds[number]

    def sampler(self, *planned: Any) -> TaskSampler:
        """In the place of a PlannedSampler of these arguments."""
        return TaskSampler(self, *planned)

    def observe(self, losses: Sequence[TaskLoss]) -> None:
        """What a step's losses were, alike on every rank."""
        self.recent.observe([loss.total for loss in losses], [loss.tokens for loss in losses])
        for task, loss in enumerate(losses):
            self.rows_drawn[task] += round(loss.rows)
        shares = self.rounds[-1] if self.rounds else self.base
        self.metrics = {
            "task_losses": self.by_name(losses),
            "task_shares": dict(zip(self.names, shares, strict=True)),
        }

    def by_name(self, losses: Sequence[TaskLoss]) -> dict[str, float | None]:
        """Nats a token of each task; None of one without a token."""
        return {
            name: loss.total / loss.tokens if loss.tokens else None
            for name, loss in zip(self.names, losses, strict=True)
        }

    def drawn(self) -> dict[str, dict[str, Any]]:
        """Of each task its training rows, and its share of those that were drawn; as weighted where
        a trainer does not tell them apart."""
        total = sum(self.rows_drawn)
        shares = [rows / total for rows in self.rows_drawn] if total else self.base
        return {
            name: {"num_rows": self._counts[name], "share": share}
            for name, share in zip(self.names, shares, strict=True)
        }

    def state(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "recent": self.recent.state(),
            "rows_drawn": self.rows_drawn,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.rounds = [list(shares) for shares in state["rounds"]]
        self.recent.restore(state["recent"])
        self.rows_drawn = list(state["rows_drawn"])


class TaskSampler(PlannedSampler):
    """Rows as tasks are weighted, each round of them in `planner.batching.training_order`. An epoch
    has as many rows as the data; rare tasks' rows come more than once, others' not all."""

    def __init__(self, mix: TaskMix, *args: Any) -> None:
        super().__init__(*args)
        self.mix = mix

    def __iter__(self) -> Iterator[int]:
        draws = TaskDraws(self.mix.numbers, self.lengths, self.seed)
        sizes = self._round_sizes()
        first = self.epoch * len(sizes)
        for number in range(first):
            draws.skip(self.mix.shares_of(number), sizes[number % len(sizes)])
        for number, size in enumerate(sizes, start=first):
            rows = draws.take(self.mix.shares_of(number), size)
            lengths = [self.lengths[row] for row in rows]
            order = training_order(
                lengths, self.batch_size, self.accumulation_steps, self.seed, number
            )
            yield from (rows[place] for place in order)

    def _round_sizes(self) -> list[int]:
        """Rows of each round of an epoch: whole optimizer steps but for the last."""
        if not self.mix.weighting.is_dynamic:
            return [len(self)]
        step = self.batch_size * self.accumulation_steps
        steps = -(-BATCHES_SORTED_TOGETHER // self.accumulation_steps)
        size = steps * step
        return [min(size, len(self) - begin) for begin in range(0, len(self), size)]


class TaskLoss(Struct, frozen=True):
    """The loss of a task's tokens, summed, and how many tokens and rows those are."""

    total: float
    tokens: float
    rows: float


class TaskLosses:
    """Adds up each task's loss from what the model's forward pass returns. `ids`: the tasks of the
    micro-batch at hand; None where its rows are not told apart."""

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self.ids: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None

    def watch(self, model: nn.Module) -> None:
        model.register_forward_hook(self._look, with_kwargs=True)

    @contextlib.contextmanager
    def of(self, ids: torch.Tensor) -> Iterator[None]:
        """While the micro-batch of these tasks goes through the model."""
        self.ids = ids
        try:
            yield
        finally:
            self.ids = None

    def clear(self) -> None:
        self._sums = None

    def take(self, accelerator: Any) -> list[TaskLoss]:
        """What was added up since, over all ranks."""
        sums = self._sums
        if sums is None:
            sums = torch.zeros(3, self.num_tasks, device=accelerator.device)
        columns = accelerator.reduce(sums, reduction="sum").tolist()
        self.clear()
        return [TaskLoss(*sums) for sums in zip(*columns, strict=True)]

    def _look(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.ids is None:
            return
        with torch.no_grad():
            totals, tokens = _row_losses(output, kwargs.get("labels"))
            rows = torch.stack([totals, tokens, torch.ones_like(totals)])
            # A product, since adding by index differs from run to run on GPUs.
            sums = rows @ one_hot(self.ids.long(), self.num_tasks).to(rows)
            self._sums = sums if self._sums is None else self._sums + sums


def _row_losses(output: Any, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats, tokens) of each row: from TRL's log-probabilities, or from logits."""
    log_probs = getattr(output, "log_probs", None)
    if log_probs is not None:
        return -log_probs.float().sum(dim=1), output.label_mask.float().sum(dim=1)
    assert labels is not None, "rows that are trained on have labels"
    targets = labels[:, 1:]
    logits = output.logits[:, -labels.shape[1] : -1]  # behind the prompts of a tuner, if any
    mask = predicted(labels)
    totals = [
        _summed_loss(row[kept], target[kept])
        for row, target, kept in zip(logits, targets, mask, strict=True)
    ]
    return torch.stack(totals), mask.float().sum(dim=1)


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Some tokens at a time: all logits in fp32 would be a peak that the plan does not have."""
    parts = zip(logits.split(_TOKENS_AT_ONCE), targets.split(_TOKENS_AT_ONCE), strict=True)
    total = torch.zeros((), device=logits.device)
    for some, wanted in parts:
        total = total + cross_entropy(some.float(), wanted, reduction="sum")
    return total


def evaluated_by_task(trainer: Any) -> tuple[dict[str, Any], dict[str, float | None]]:
    """The trainer's metrics on the held-out rows, and the loss of each task where it tells them
    apart."""
    tasks: TaskMix | None = getattr(trainer, "tasks", None)
    if tasks is None or not isinstance(trainer.data_collator, TaskCollator):
        return trainer.evaluate(), {}
    tasks.losses.clear()
    metrics = trainer.evaluate()
    return metrics, tasks.by_name(tasks.losses.take(trainer.accelerator))


class TaskCollator:
    """A collator's batches, with the rows' tasks."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.tensor([row.pop("task_ids") for row in rows])
        return {**self.collator(rows), "task_ids": ids}


class TaskReporter(TrainerCallback, ExportableState):
    """Lets the mix see every step's losses, and keeps its state in checkpoints."""

    def __init__(self, mix: TaskMix) -> None:
        self.mix = mix
        self.trainer: Any = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.mix.state()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept: Any = (state.stateful_callbacks or {}).get(type(self).__name__)
        if kept:
            self.mix.restore(kept["attributes"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mix.losses.clear()  # of what evaluation left

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.mix.observe(self.mix.losses.take(self.trainer.accelerator))
