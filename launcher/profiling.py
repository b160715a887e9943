"""From a data file to a DataProfile: split, token lengths, what stands out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.data_reader import DataFile, Row, where
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.policy import EVAL_SHARE, data_advice

# Characters a token, where no tokenizer is at hand: about 4 in English text (GPT-2's byte-pair
# encoding and its successors); the template adds a few tokens a message.
_CHARACTERS_PER_TOKEN = 4.0
_TEMPLATE_TOKENS_PER_MESSAGE = 5

# Held-out rows are evaluated twice, before and after training; a few hundred tell enough.
_MAX_EVAL_ROWS = 500

SPLIT_SEED = 42


class Split(Struct, frozen=True, kw_only=True):
    """Rows to train on and rows held out."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]


def split_rows(rows: Sequence[Row], share: float = EVAL_SHARE, seed: int = SPLIT_SEED) -> Split:
    """A seeded split, grouped by prompt so that no prompt stands on both sides.

    No more rows than the share are held out; where every prompt has more, those of the rarest.
    Raises InputError when there are too few different prompts to hold any out.
    """
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt or row.text, []).append(row)
    if len(groups) < 2:
        raise InputError(
            "at least two different rows are needed: one to train on and one to hold out",
            "add rows, or give held-out rows with `--eval-data FILE`",
        )
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    wanted = min(max(1, round(share * len(rows))), _MAX_EVAL_ROWS, len(rows) - 1)
    held_out: list[Row] = []
    for key in reversed(keys):
        if len(held_out) + len(groups[key]) <= wanted:
            held_out += groups.pop(key)
    if not held_out:
        held_out = groups.pop(min(keys, key=lambda key: len(groups[key])))
    train = [row for group in groups.values() for row in group]
    return Split(train=_in_file_order(train), held_out=_in_file_order(held_out))


def _in_file_order(rows: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: row.line))


def make_split(data: DataFile, eval_data: DataFile | None) -> Split:
    """The given held-out file, or a split of the data file."""
    if eval_data is None:
        return split_rows(data.rows)
    return Split(train=data.rows, held_out=eval_data.rows[:_MAX_EVAL_ROWS])


def profile_data(
    data: DataFile,
    split: Split,
    tokenizer: RowTokenizer | None,
    progress: Callable[[int], None] = lambda done: None,
) -> DataProfile:
    """Measure the training rows with the model's tokenizer; estimate without one."""
    if tokenizer is not None:
        lengths = [len(r.input_ids) for r in tokenizer.tokenize(split.train, progress)]
    else:
        lengths = [estimated_tokens(row) for row in split.train]
    return DataProfile(
        path=str(data.path),
        sha256=data.sha256,
        format=data.format,
        objective=data.objective,
        num_rows=data.num_rows,
        num_usable_rows=len(data.rows),
        num_eval_rows=len(split.held_out),
        lengths=tuple(sorted(lengths, reverse=True)),
        exact=tokenizer is not None,
        duplicates=data.duplicates,
        problems=data.problems,
        warnings=_warnings(data),
    )


def profile_to_dict(profile: DataProfile, max_position_embeddings: int) -> dict[str, Any]:
    """The object of `data --json` and of a run's data_profile.json."""
    advice = data_advice(profile.num_train_rows, profile.longest, max_position_embeddings)
    max_length = advice["max_length"].value
    return {
        "schema": 1,
        "path": profile.path,
        "sha256": profile.sha256,
        "format": profile.format,
        "objective": profile.objective,
        "num_rows": profile.num_rows,
        "num_usable_rows": profile.num_usable_rows,
        "num_train_rows": profile.num_train_rows,
        "num_eval_rows": profile.num_eval_rows,
        "problems": [structs.asdict(problem) for problem in profile.problems],
        "token_lengths": profile.summary(),
        "max_length": max_length,
        "truncated_rows": profile.cut_rows(max_length),
        "duplicates": profile.duplicates,
        "advice": [
            {"setting": setting, "value": item.value, "why": item.why}
            for setting, item in advice.items()
        ],
    }


def estimated_tokens(row: Row) -> int:
    """Tokens of a row by its characters."""
    texts = [m.content for m in row.messages] or [row.text]
    characters = sum(map(len, texts))
    return max(1, round(characters / _CHARACTERS_PER_TOKEN)) + _TEMPLATE_TOKENS_PER_MESSAGE * len(
        texts
    )


def _warnings(data: DataFile) -> tuple[str, ...]:
    warnings = [
        f"{problem.count} of {data.num_rows} rows left out: {problem.kind} "
        f"({where(problem, data.unit)})"
        for problem in data.problems
    ]
    if data.duplicates:
        warnings.append(f"{data.duplicates} rows repeat an earlier row word for word")
    return tuple(warnings)
