"""The rows of a run: read as they were profiled, split alike, and put into tokens on disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from msgspec import Struct

from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.hashes import RowHashes, row_hashes
from ftplan.launcher.data.overlong import Lengths, Rule, Tally, text_sizes, turns_apart
from ftplan.launcher.data.profiling import make_split
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.split import MAX_EVAL_ROWS, Split
from ftplan.launcher.data.survey import group_of
from ftplan.launcher.data.tokens import RowTokenizer, TokenPair, TokenRow
from ftplan.launcher.training.config import DataConfig, TrainConfig
from ftplan.launcher.training.labels import NO_LOSS
from ftplan.launcher.training.token_file import (
    COLUMNS,
    TASK_COLUMN,
    TokenFile,
    mapped,
    with_mismatched_answers,
)
from ftplan.planner.batching import training_order
from ftplan.planner.errors import InputError
from ftplan.planner.evaluating import ASKED_ROWS
from ftplan.planner.overlong import RowCounts, refuse_overlong

# Rows that are put into tokens at once.
_ROWS_AT_ONCE = 256


class TrainingRows(Struct, frozen=True):
    """Rows as the objective's trainer takes them, each one's tokens, and what was done to them.
    `tasks`: each one's, numbers of `TrainConfig.tasks`; None without tasks. `files`, `numbers`:
    where each one stands in the data."""

    dataset: Dataset
    lengths: Sequence[int]
    counts: RowCounts
    tasks: Sequence[int] | None = None
    files: Sequence[int] = ()
    numbers: Sequence[int] = ()

    def source(self, row: int) -> tuple[int, int] | None:
        """The number of a row's file, and its own there; None of a row of another stage."""
        return (self.files[row], self.numbers[row]) if row < len(self.numbers) else None


class RunRows(Struct, frozen=True):
    """Rows to train on, rows that are evaluated before and after, and some of these to put to the
    model as questions; none for plain text."""

    train: TrainingRows
    held_out: TrainingRows
    asked: Sequence[Row]
    hashes: RowHashes


def read_rows(
    config: TrainConfig,
    tokenizer: RowTokenizer,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> RunRows:
    """Rows as tokens, in files of `folder`; `progress` is told how many of how many rows are done.

    Raises InputError where the data, or what is made of it, is not what was profiled.
    """
    data = _read_checked(config.data, config.objective)
    eval_data = _read_checked(config.eval_data, config.objective) if config.eval_data else None
    split = make_split(data, eval_data, config.test_share)
    hashes = row_hashes(data, split, eval_data, tokenizer)
    if differing := hashes.differing(config.hashes):
        raise InputError(
            f"the run is not the one that was planned: {differing}",
            "plan again with `ftplan auto`, or put back what has changed",
        )
    train, held_out = (
        _Side(config, tokenizer, folder / f"{side}-{process_rank()}.arrow")
        for side in ("train", "held-out")
    )
    asked = _Asked()
    with train.file, held_out.file, _all_cores():
        num_rows = len(data.groups())
        for done, row in enumerate(_rows(data, split), start=1):
            if group_of(row) in split.held_out:
                asked.take(row)
                held_out.take(row)
            else:
                train.take(row)
            if done % _ROWS_AT_ONCE == 0:
                progress(done, num_rows)
        for row in islice(eval_data.rows(), MAX_EVAL_ROWS) if eval_data else ():
            asked.take(row)
            held_out.take(row, of_held_out_file=True)
        train.flush()
        held_out.flush()
    return RunRows(
        train.finished(shuffled=True), held_out.finished(shuffled=False), asked.rows, hashes
    )


def _rows(data: DataFile, split: Split) -> Iterator[Row]:
    return data.rows(lambda group: group not in split.test)


def _read_checked(config: DataConfig, objective: str) -> DataFile:
    data = read_data(config.files, columns=config.columns, objective=objective, checks=False)
    if data.sha256 != config.sha256:
        raise InputError(
            f"`{config.files[0]}` has changed since the run was planned",
            "plan again with `ftplan auto`, or put the file back",
        )
    return data


def process_rank() -> int:
    """Of this process among those of a run: each has token files of its own."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer take all cores, which the launcher forbids for the rest of the run; where
    several processes tokenize side by side, one each."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = str(int(os.environ.get("WORLD_SIZE", "1")) == 1).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Asked:
    """Questions, with a wanted answer or alone: each as likely to be kept as any other (Vitter
    1985, algorithm R), the same ones each time."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._seen = 0
        self._random = random.Random(0)

    def take(self, row: Row) -> None:
        if not row.messages or not (row.answer or row.is_prompt) or row.label is False:
            return
        self._seen += 1
        if len(self.rows) < ASKED_ROWS:
            self.rows.append(row)
            return
        place = self._random.randrange(self._seen)
        if place < ASKED_ROWS:
            self.rows[place] = row


class _CountingTally(Tally):
    """`kept`: of each row, how many are left of it."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.kept: list[int] = []

    def take(self, whole: Lengths, pieces: Sequence[Lengths]) -> list[int]:
        left = super().take(whole, pieces)
        self.kept.append(sum(map(bool, left)))
        return left


class _Side:
    """Rows of one side of the split on their way into a file."""

    def __init__(self, config: TrainConfig, tokenizer: RowTokenizer, path: Path) -> None:
        self.config = config
        rule = Rule(config.overlong, config.max_length, config.completion_length)
        self.tally = _CountingTally(rule)
        columns = COLUMNS[config.objective]
        if config.tasks and config.objective == "sft":
            columns = {**columns, **TASK_COLUMN}
        self.file = TokenFile(path, columns)
        self.make = MAKERS[config.objective](tokenizer, self.tally)
        self.tasks: array[int] | None = array("I") if config.tasks else None
        self.files, self.numbers = array("I"), array("Q")
        self._pending: list[Row] = []
        self._tasks: list[int] = []

    def take(self, row: Row, *, of_held_out_file: bool = False) -> None:
        self._pending.append(row)
        if self.config.tasks:
            self._tasks.append(self.config.tasks.number(row, held_out_file=of_held_out_file))
        if len(self._pending) == _ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        made = list(self.make.rows(self._pending))
        for row, count in zip(self._pending, self.tally.kept, strict=True):
            self.files.extend([row.file] * count)
            self.numbers.extend([row.number] * count)
        if self.tasks is not None:
            self._name_tasks([row for row, _ in made])
        self.file.write([row for row, _ in made], (length for _, length in made))
        self._pending, self._tasks, self.tally.kept = [], [], []

    def _name_tasks(self, made: Sequence[dict[str, Any]]) -> None:
        """Each made row is of the task of the row that it was made of."""
        assert self.tasks is not None
        kept = zip(self._tasks, self.tally.kept, strict=True)
        tasks = [task for task, count in kept for _ in range(count)]
        for row, task in zip(made, tasks, strict=True):
            row["task_ids"] = task
        self.tasks.extend(tasks)

    def finished(self, *, shuffled: bool) -> TrainingRows:
        """Raises InputError when nothing is left."""
        counts, limit = self.tally.counts, self.config.max_length
        if self.tally.rule.mode == "refuse" and counts.num_too_long:
            raise refuse_overlong(counts.num_too_long, limit, "`ftplan data` says which")
        if not counts.num_rows_left:
            raise InputError(
                f"at {limit} tokens, no row has an answer left", "raise `--max-length`"
            )
        dataset, lengths = mapped(self.file.path), self.file.lengths
        if self.config.objective == "kto":
            return self._paired(dataset, lengths, shuffled=shuffled)
        return TrainingRows(dataset, lengths, counts, self.tasks, self.files, self.numbers)

    def _paired(self, dataset: Dataset, lengths: array[int], *, shuffled: bool) -> TrainingRows:
        """KTO's rows, which its trainer takes in the order in which they stand: that of training's
        first pass, then, is that of all."""
        settings = self.config.training_arguments
        size = settings["per_device_train_batch_size"]
        order = list(range(len(lengths)))
        if shuffled:
            together = size * int(os.environ.get("WORLD_SIZE", "1"))
            steps = settings["gradient_accumulation_steps"]
            order = training_order(lengths, together, steps, settings["seed"], epoch=0)
        path = self.file.path.with_suffix(".paired.arrow")
        paired = with_mismatched_answers(dataset, order, size, path)
        self.file.path.unlink()
        ordered, files, numbers = (
            [values[row] for row in order] for values in (lengths, self.files, self.numbers)
        )
        return TrainingRows(paired, ordered, self.tally.counts, files=files, numbers=numbers)


Made = tuple[dict[str, Any], int]
"""A row of a trainer, and its length."""


class _Maker:
    """What an objective makes of rows. `tally` decides which are left, and how much of them."""

    def __init__(self, tokenizer: RowTokenizer, tally: Tally) -> None:
        self.tokenizer = tokenizer
        self.tally = tally

    def rows(self, rows: Sequence[Row]) -> Iterator[Made]:
        raise NotImplementedError


class _Answered(_Maker):
    """Of pairs, the chosen answer."""

    def rows(self, rows: Sequence[Row]) -> Iterator[Made]:
        answered = [row.with_chosen_alone() for row in rows]
        for row, whole in zip(answered, self.tokenizer.tokenize(answered), strict=True):
            length = _lengths(whole)
            pieces = self._pieces(row, whole) if self.tally.rule.splits(length) else [whole]
            lefts = self.tally.take(length, [_lengths(piece) for piece in pieces])
            for piece, left in zip(pieces, lefts, strict=True):
                if left:
                    yield (
                        {"input_ids": piece.input_ids[:left], "labels": _labels(piece, left)},
                        left,
                    )

    def _pieces(self, row: Row, whole: TokenRow) -> list[TokenRow]:
        limit = self.tally.rule.limit
        assert limit is not None, "a run has a longest row"
        if row.text:
            opening = self.tokenizer.opening_tokens(row, self.tokenizer.segments(row))
            return _text_pieces(whole, opening, limit)
        pieces = turns_apart(row, limit, lambda piece: len(self._tokens(piece).input_ids))
        return list(self.tokenizer.tokenize(pieces)) if len(pieces) > 1 else [whole]

    def _tokens(self, row: Row) -> TokenRow:
        return next(self.tokenizer.tokenize([row]))


def _text_pieces(whole: TokenRow, opening: int, limit: int) -> list[TokenRow]:
    """Each begins as the whole text does, with the tokenizer's first token."""
    head, pieces, begin = whole.input_ids[:opening], [], opening
    for size in text_sizes(len(whole.input_ids), opening, limit):
        text = whole.input_ids[begin : begin + size]
        pieces.append(TokenRow(head + text, [0] * opening + [1] * size))
        begin += size
    return pieces


def _lengths(row: TokenRow) -> Lengths:
    tokens, mask = len(row.input_ids), row.completion_mask
    first = mask.index(1, 1) if 1 in mask[1:] else tokens
    return Lengths(tokens, sum(mask), first)


def _labels(row: TokenRow, length: int) -> list[int]:
    tokens = zip(row.input_ids[:length], row.completion_mask, strict=False)
    return [token if carries else NO_LOSS for token, carries in tokens]


class _Compared(_Maker):
    """Pairs, and answers that are judged alone."""

    def rows(self, rows: Sequence[Row]) -> Iterator[Made]:
        for row, pair in zip(rows, self.tokenizer.pairs(rows), strict=True):
            answer = max(len(pair.chosen_ids), len(pair.rejected_ids))
            whole = Lengths(len(pair.prompt_ids) + answer, answer, len(pair.prompt_ids))
            (left,) = self.tally.take(whole, [whole])
            if left:
                yield self.columns(row, pair, left), left

    def columns(self, row: Row, pair: TokenPair, left: int) -> dict[str, Any]:
        """The trainer's columns, of `left` tokens at most. Prompts are shorter than that."""
        room = left - len(pair.prompt_ids)
        return {
            "prompt_ids": pair.prompt_ids,
            "chosen_ids": pair.chosen_ids[:room],
            "rejected_ids": pair.rejected_ids[:room],
        }


class _Scored(_Compared):
    """Whole conversations; with the margin where every row has one."""

    def columns(self, row: Row, pair: TokenPair, left: int) -> dict[str, Any]:
        return {
            "chosen_ids": (pair.prompt_ids + pair.chosen_ids)[:left],
            "rejected_ids": (pair.prompt_ids + pair.rejected_ids)[:left],
            "margin": row.margin,
        }


class _Labelled(_Compared):
    """The answer stays longer than the row has room for, as it may be put to a shorter question;
    TRL's collator cuts it at `max_length`."""

    def columns(self, row: Row, pair: TokenPair, left: int) -> dict[str, Any]:
        return {
            "prompt_ids": pair.prompt_ids,
            "completion_ids": pair.chosen_ids[: self.tally.rule.limit],
            "label": bool(row.label),
        }


class _Prompts(_Maker):
    """Prompts, and what their completions are judged by."""

    def rows(self, rows: Sequence[Row]) -> Iterator[Made]:
        for row in rows:
            asked = row.as_prompt()
            (prompt,) = self.tokenizer.tokenize([asked])
            whole = self.tally.rule.completed(len(prompt.input_ids))
            (left,) = self.tally.take(whole, [whole])
            if left:
                messages = [message.to_dict() for message in asked.messages]
                made = {"prompt": prompt.input_ids, "conversation": json.dumps(messages)}
                yield {**made, "answer": row.answer}, left


MAKERS: dict[str, type[_Maker]] = {
    "sft": _Answered,
    "dpo": _Compared,
    "orpo": _Compared,
    "simpo": _Compared,
    "reward": _Scored,
    "kto": _Labelled,
    "grpo": _Prompts,
    "rloo": _Prompts,
}


def remove_token_files(folder: Path) -> None:
    """This process's, and what `datasets` has derived of them; and the folder after the last."""
    for path in (*_files_of(folder), *folder.glob("cache-*.arrow")):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _files_of(folder: Path) -> Iterable[Path]:
    return folder.glob(f"*-{process_rank()}.*arrow")
