"""The rows of a run: read as they were profiled, split alike, and put into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from msgspec import Struct, structs, to_builtins

from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.profiling import make_split
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.split import MAX_EVAL_ROWS
from ftplan.launcher.data.tokens import RowTokenizer, TokenRow
from ftplan.launcher.training.config import DataConfig, TrainConfig
from ftplan.planner.errors import InputError


class RunRows(Struct, frozen=True):
    """Rows to train on, and rows that are evaluated before and after."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


class TrainingRows(Struct, frozen=True):
    """Rows as the objective's trainer takes them, and each one's tokens."""

    rows: list[dict[str, Any]]
    lengths: list[int]


def read_rows(config: TrainConfig) -> RunRows:
    """Raises InputError where the data is not what was profiled."""
    data = _read_checked(config.data, config.objective)
    held_out = _read_checked(config.eval_data, config.objective) if config.eval_data else None
    split = make_split(data, held_out, config.test_share)
    return RunRows(
        train=tuple(data.rows(split.trains)),
        held_out=tuple(
            islice(held_out.rows(), MAX_EVAL_ROWS)
            if held_out
            else data.rows(lambda group: group in split.held_out)
        ),
    )


def _read_checked(config: DataConfig, objective: str) -> DataFile:
    data = read_data(config.files, columns=config.columns, objective=objective, checks=False)
    if data.sha256 != config.sha256:
        raise InputError(
            f"`{config.files[0]}` has changed since the run was planned",
            "plan again with `ftplan auto`, or put the file back",
        )
    return data


def training_rows(
    tokenizer: RowTokenizer, rows: Sequence[Row], objective: str, limit: int
) -> TrainingRows:
    """Token rows cut at `limit`; rows without a trained token left are dropped.

    Raises InputError when nothing is left.
    """
    made = {
        "sft": _answered,
        "dpo": _pairs,
        "reward": _scored,
        "kto": _labelled,
    }[objective](tokenizer, rows, limit)
    if not made.rows:
        raise InputError(
            f"cut at {limit} tokens, no row has an answer left", "raise `--max-length`"
        )
    return made


def _answered(tokenizer: RowTokenizer, rows: Sequence[Row], limit: int) -> TrainingRows:
    as_answered = [_chosen_alone(row) for row in rows]
    cut = [
        TokenRow(row.input_ids[:limit], row.completion_mask[:limit])
        for row in tokenizer.tokenize(as_answered)
    ]
    kept = [row for row in cut if any(row.completion_mask[1:])]
    return TrainingRows([to_builtins(row) for row in kept], [len(row.input_ids) for row in kept])


def _chosen_alone(row: Row) -> Row:
    """A pair's question and chosen answer."""
    if not row.chosen:
        return row
    return structs.replace(row, messages=(*row.messages, *row.chosen), chosen=(), rejected=())


def _pairs(tokenizer: RowTokenizer, rows: Sequence[Row], limit: int) -> TrainingRows:
    made, lengths = [], []
    for row in rows:
        pair = tokenizer.pair(row)
        room = limit - len(pair.prompt_ids)
        if room < 1:
            continue
        one = to_builtins(pair)
        for name in ("chosen_ids", "rejected_ids"):
            one[name] = one[name][:room]
        made.append(one)
        lengths.append(len(pair.prompt_ids) + max(len(one["chosen_ids"]), len(one["rejected_ids"])))
    return TrainingRows(made, lengths)


def _scored(tokenizer: RowTokenizer, rows: Sequence[Row], limit: int) -> TrainingRows:
    """Whole conversations; with the margin where every row has one."""
    has_margins = all(row.margin is not None for row in rows)
    made, lengths = [], []
    for row in rows:
        pair = tokenizer.pair(row)
        one: dict[str, Any] = {
            "chosen_ids": (pair.prompt_ids + pair.chosen_ids)[:limit],
            "rejected_ids": (pair.prompt_ids + pair.rejected_ids)[:limit],
        }
        if has_margins:
            one["margin"] = row.margin
        made.append(one)
        lengths.append(max(len(one["chosen_ids"]), len(one["rejected_ids"])))
    return TrainingRows(made, lengths)


def _labelled(tokenizer: RowTokenizer, rows: Sequence[Row], limit: int) -> TrainingRows:
    """Each beside the answer of the row before it, from which the KL term is estimated."""
    pairs = [tokenizer.pair(row) for row in rows]
    made, lengths = [], []
    for number, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        room = limit - len(pair.prompt_ids)
        if room < 1:
            continue
        made.append(
            {
                "prompt_ids": pair.prompt_ids,
                "completion_ids": pair.chosen_ids[:room],
                "KL_completion_ids": pairs[number - 1].chosen_ids[:room],
                "label": bool(row.label),
            }
        )
        lengths.append(len(pair.prompt_ids) + min(room, len(pair.chosen_ids)))
    return TrainingRows(made, lengths)


def sample_row(held_out: Iterable[Row]) -> Row | None:
    """The conversation whose question and answer are shortest together; None for plain text."""
    return min(
        (row for row in held_out if row.messages),
        key=lambda row: sum(map(len, row.texts)),
        default=None,
    )
