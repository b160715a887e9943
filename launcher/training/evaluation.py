"""What a model can do, before training and after it: loss on the held-out rows, short answers
scored, some answers to be read, and general text, where forgetting shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct, to_builtins

from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.training.answer_scores import AnswerScores, score
from ftplan.launcher.training.answering import answers
from ftplan.launcher.training.config import TrainConfig
from ftplan.launcher.training.general_text import general_loss, perplexity
from ftplan.launcher.training.tasks import evaluated_by_task
from ftplan.planner.evaluating import (
    MOST_PROMPT_TOKENS,
    MOST_SCORED_TOKENS,
    SCORING_SECONDS,
    SHOWN_NEW_TOKENS,
    SHOWN_ROWS,
    SPARE_TOKENS,
    are_short,
    tokens_at_once,
)
from ftplan.planner.forgetting import PERPLEXITY_RISE, has_forgotten, what_helps
from ftplan.planner.methods import resolve_method
from ftplan.planner.objectives import OBJECTIVES

# Of TRL's metrics: the share of pairs in which the chosen answer has the higher reward.
_ACCURACIES = ("eval_rewards/accuracies", "eval_accuracy")


class AskedRow(Struct, frozen=True):
    """A held-out question, its tokens, and how many its answer has."""

    row: Row
    prompt: list[int]
    answer_tokens: int


class Evaluator(Struct, frozen=True):
    """What stays the same from the evaluation before training to that after it."""

    trainer: Any
    tokenizer: RowTokenizer
    config: TrainConfig
    rows: Sequence[AskedRow]
    say: Callable[[str], None]

    def evaluate(self, when: str, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A row of metrics.jsonl. `before`: that of the evaluation before training, whose rows and
        pieces of text are taken again."""
        self.say(f"evaluating {when} training")
        metrics, by_task = evaluated_by_task(self.trainer)
        result = {"event": "evaluation", "when": when, **_from_metrics(metrics)}
        if by_task:
            result["eval_loss_by_task"] = by_task
        nothing: dict[str, Any] = {"scores": None, "num_scored": 0, "shown": [], "general": None}
        objective = OBJECTIVES[self.config.objective]
        if objective.generates:  # what is minimized says nothing of how good completions are
            result["eval_loss"] = None
        if objective.scores:  # that model gives a number
            return {**result, **nothing}
        if self.rows:
            self.say(f"answering held-out questions {when} training")
        answered = self._answered(before)
        self.say(f"reading general text {when} training")
        return {**result, **answered, "general": self._general(before)}

    def _answered(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Scores of short answers, and the first rows with what the model answers."""
        short = self.config.objective == "sft" and are_short([r.answer_tokens for r in self.rows])
        rows = self.rows if short else self.rows[:SHOWN_ROWS]
        seconds = SCORING_SECONDS if short else None
        if before is not None and before["num_scored"]:
            rows, seconds = rows[: before["num_scored"]], None
        longest = max((row.answer_tokens for row in rows), default=0) + SPARE_TOKENS
        said = answers(
            self.trainer,
            self.tokenizer,
            [row.prompt for row in rows],
            tasks=[self.config.task_number(row.row) for row in rows],
            max_new_tokens=min(longest, MOST_SCORED_TOKENS) if short else SHOWN_NEW_TOKENS,
            tokens_at_once=self._tokens_at_once,
            seconds=seconds,
        )
        references = [row.row.answer for row in rows[: len(said)]]
        return {
            "scores": to_builtins(score(said, references)) if short else None,
            "num_scored": len(said) if short else 0,
            "shown": [
                {
                    "prompt": row.row.prompt[-1].content,
                    "reference": row.row.answer or None,
                    "answer": text,
                }
                for row, text in zip(rows[:SHOWN_ROWS], said, strict=False)
            ],
        }

    def _general(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        same = before["general"]["num_pieces"] if before and before["general"] else None
        found = general_loss(self.trainer, self.tokenizer, num_pieces=same)
        return {**to_builtins(found), "perplexity": found.perplexity}

    @property
    def _tokens_at_once(self) -> int:
        longest = int(self.config.training_arguments.get("max_length") or MOST_PROMPT_TOKENS)
        rows = int(self.config.training_arguments["per_device_eval_batch_size"])
        recovery = getattr(self.trainer, "recovery", None)
        return tokens_at_once(recovery.lowered.eval_rows if recovery else rows, longest)


def asked_rows(config: TrainConfig, tokenizer: RowTokenizer, rows: Sequence[Row]) -> list[AskedRow]:
    """The rows that can be asked, the shortest few first: these are shown.

    Without those whose prompt is longer than a row may be.
    """
    longest = int(config.training_arguments.get("max_length") or MOST_PROMPT_TOKENS)
    asked = []
    for row in rows:
        prompt = tokenizer.prompt_ids(row.prompt, row.tools)
        (answer,) = tokenizer.ids([row.answer])
        if len(prompt) < longest:
            asked.append(AskedRow(row, prompt, len(answer)))
    shown = sorted(asked, key=lambda one: sum(map(len, one.row.texts)))[:SHOWN_ROWS]
    return [*shown, *(one for one in asked if one not in shown)]


def _from_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the trainer measured on the held-out rows; None for what its objective does not have."""
    accuracy = next((metrics[name] for name in _ACCURACIES if name in metrics), None)
    return {
        "eval_loss": _number(metrics.get("eval_loss")),
        "accuracy": _number(accuracy),
        "reward": _number(metrics.get("eval_reward")),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def evaluation_record(
    objective: str, before: Mapping[str, Any], after: Mapping[str, Any], num_rows: int
) -> dict[str, Any]:
    """`evaluation` of record.json: the loss, and the other measures side by side."""
    losses: tuple[Any, Any] = (before["eval_loss"], after["eval_loss"])
    plain = objective == "sft" and all(loss is not None for loss in losses)
    measures: dict[str, tuple[Any, ...]] = {
        "perplexity": tuple(map(perplexity, losses)) if plain else (None, None),
        "accuracy": (before["accuracy"], after["accuracy"]),
        "reward": (before["reward"], after["reward"]),
    }
    for name in AnswerScores.__struct_fields__:
        measures[name] = tuple((row["scores"] or {}).get(name) for row in (before, after))
    return {
        "before": losses[0],
        "after": losses[1],
        "num_rows": num_rows,
        "num_scored": after["num_scored"],
        **{name: _side_by_side(values) for name, values in measures.items()},
    }


def _side_by_side(values: tuple[float | None, ...]) -> dict[str, float] | None:
    before, after = values
    return None if before is None or after is None else {"before": before, "after": after}


def samples_record(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[dict[str, str | None]]:
    """`samples` of record.json: questions with the model's answers before and after."""
    return [
        {
            "prompt": later["prompt"],
            "reference": later["reference"],
            "before": earlier["answer"],
            "after": later["answer"],
        }
        for earlier, later in zip(before["shown"], after["shown"], strict=False)
    ]


def forgetting_record(
    config: TrainConfig, before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any] | None:
    """`forgetting` of record.json; None for a model that gives numbers."""
    if not before["general"] or not after["general"]:
        return None
    earlier, later = before["general"]["perplexity"], after["general"]["perplexity"]
    forgotten = has_forgotten(earlier, later)
    return {
        "num_tokens": after["general"]["num_tokens"],
        "before": earlier,
        "after": later,
        "threshold": PERPLEXITY_RISE,
        "forgotten": forgotten,
        "what_helps": _what_helps(config) if forgotten else [],
    }


def _what_helps(config: TrainConfig) -> list[str]:
    method, arguments = resolve_method(config.method), config.training_arguments
    return what_helps(
        adapter=method.adapter,
        lora_rank=config.method_settings["lora_rank"] if method.has_rank else None,
        learning_rate=arguments["learning_rate"],
        num_train_epochs=arguments["num_train_epochs"],
        max_steps=arguments["max_steps"] if arguments["max_steps"] > 0 else None,
    )
