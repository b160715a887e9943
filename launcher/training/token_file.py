"""Token rows on disk: written batch by batch, mapped into memory where training reads them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow
from datasets import Dataset, disable_progress_bars

_IDS = pyarrow.list_(pyarrow.int32())

# What the objectives' trainers take; `margin` only where every row has one.
_PROMPTS = {"prompt": _IDS, "conversation": pyarrow.string(), "answer": pyarrow.string()}
_PAIRS = {"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS}
COLUMNS: Mapping[str, Mapping[str, pyarrow.DataType]] = {
    "sft": {"input_ids": _IDS, "labels": _IDS},
    "dpo": _PAIRS,
    "orpo": _PAIRS,
    "simpo": _PAIRS,
    "reward": {"chosen_ids": _IDS, "rejected_ids": _IDS, "margin": pyarrow.float64()},
    "grpo": _PROMPTS,
    "rloo": _PROMPTS,
    "kto": {"prompt_ids": _IDS, "completion_ids": _IDS, "label": pyarrow.bool_()},
}

# Besides, where rows are of several tasks and their losses are told apart.
TASK_COLUMN = {"task_ids": pyarrow.int32()}

# Rows that are read at once where all of a file are.
_ROWS_AT_ONCE = 512


class TokenFile:
    """An Arrow stream of token rows that is written once. `lengths`: tokens of each row."""

    def __init__(self, path: Path, columns: Mapping[str, pyarrow.DataType]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lengths = array("I")
        self._schema = pyarrow.schema(list(columns.items()))
        self._file = pyarrow.OSFile(str(path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, self._schema)

    def __enter__(self) -> TokenFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._file.close()

    def write(self, rows: Sequence[Mapping[str, Any]], lengths: Iterable[int]) -> None:
        """Add a batch."""
        if not rows:
            return
        columns = {name: [row[name] for row in rows] for name in self._schema.names}
        self._stream.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema=self._schema))
        self.lengths.extend(lengths)


def mapped(path: Path) -> Dataset:
    """The rows of a closed file; of them only what is read is in memory."""
    disable_progress_bars()
    dataset = Dataset.from_file(str(path))
    if "margin" in dataset.column_names and dataset.data.column("margin").null_count:
        dataset = dataset.remove_columns("margin")
    return dataset


def with_mismatched_answers(
    dataset: Dataset, order: Sequence[int], batch_size: int, path: Path
) -> Dataset:
    """The rows in this order, each with the answer of the row before it in its micro-batch, the
    first with that of the last: from those pairs KTO estimates its KL term.

    That is what TRL's KTOTrainer makes of its data (1.16, `add_kl_completion_ids`): so the
    mismatched answers of a micro-batch are its own ones, put to other questions. A last row alone
    keeps its own. The trainer then takes the rows as they stand.
    """
    columns = {**COLUMNS["kto"], "KL_completion_ids": _IDS}
    with TokenFile(path, columns) as file:
        for rows in _in_order(dataset, order, batch_size):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                for row, before in zip(batch, [batch[-1], *batch], strict=False):
                    row["KL_completion_ids"] = before["completion_ids"]
            file.write(rows, (0 for _ in rows))
    return mapped(path)


def _in_order(
    dataset: Dataset, order: Sequence[int], batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Some whole micro-batches at a time."""
    at_once = max(1, _ROWS_AT_ONCE // batch_size) * batch_size
    for start in range(0, len(order), at_once):
        columns = dataset[list(order[start : start + at_once])]
        names = list(columns)
        yield [
            dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)
        ]
