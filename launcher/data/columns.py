"""Rows of Parquet and Arrow files, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ftplan.launcher.data.records import Record
from ftplan.launcher.data.streams import Progress
from ftplan.planner.errors import InputError

_BATCH_BYTES = 4 * 2**20
_MOST_ROWS = 4096

ColumnFormat = Literal["Parquet", "Arrow"]

PARQUET_MAGIC = b"PAR1"
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"


def format_of(head: bytes) -> ColumnFormat | None:
    """By a file's first bytes."""
    if head.startswith(PARQUET_MAGIC):
        return "Parquet"
    # A stream begins with a message's length: a schema, not longer than a few MiB.
    stream = head.startswith(ARROW_STREAM_MAGIC) and head[7:8] == b"\x00"
    return "Arrow" if stream or head.startswith(ARROW_FILE_MAGIC) else None


def column_rows(
    path: Path, kind: ColumnFormat, file: int, size_bytes: int, progress: Progress | None
) -> Iterator[Record]:
    """The rows, numbered from 1. Raises InputError where not one can be read."""
    number = 0
    told = 0
    try:
        for batch, done in _batches(path, kind):
            for record in _records(batch, number, file):
                number = record.number
                yield record
            if progress is not None and (more := round(done * size_bytes) - told) > 0:
                progress(more)
                told += more
    except InputError:
        raise
    except Exception as error:  # pyarrow's, of many kinds, for a damaged file
        reason = f"the {kind} file is cut off or damaged ({_first_line(error)})"
        if number == 0:
            raise InputError(f"`{path}`: {reason}", "fetch or write it again") from error
        yield Record(number + 1, None, reason, file)
    if progress is not None and told < size_bytes:
        progress(size_bytes - told)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _batches(path: Path, kind: ColumnFormat) -> Iterator[tuple[Any, float]]:
    """Batches of rows, and which share of the file is read with each."""
    return _parquet_batches(path) if kind == "Parquet" else _arrow_batches(path)


def _parquet_batches(path: Path) -> Iterator[tuple[Any, float]]:
    _require_pyarrow(path, "Parquet")
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, pre_buffer=False) as file:
        metadata = file.metadata
        num_rows = metadata.num_rows
        groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
        num_bytes = sum(group.total_byte_size for group in groups)
        done = 0
        for batch in file.iter_batches(batch_size=_batch_rows(num_bytes, num_rows)):
            done += batch.num_rows
            yield batch, done / max(num_rows, 1)


def _arrow_batches(path: Path) -> Iterator[tuple[Any, float]]:
    _require_pyarrow(path, "Arrow")
    from pyarrow import OSFile, ipc

    with OSFile(str(path)) as source:
        is_file = source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
        source.seek(0)
        if is_file:
            reader = ipc.open_file(source)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        else:
            batches = iter(ipc.open_stream(source))
        size = max(source.size(), 1)
        done = 0
        for batch in batches:
            batch.validate(full=True)  # a damaged one would be read beyond its memory
            done += batch.nbytes
            rows = _batch_rows(batch.nbytes, batch.num_rows)
            for begin in range(0, batch.num_rows, rows):
                yield batch.slice(begin, rows), min(done / size, 1.0)


def _batch_rows(num_bytes: int, num_rows: int) -> int:
    if num_bytes <= 0 or num_rows <= 0:
        return 1
    return max(1, min(_MOST_ROWS, _BATCH_BYTES * num_rows // num_bytes))


def _records(batch: Any, before: int, file: int) -> Iterator[Record]:
    try:
        rows = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        for n in range(batch.num_rows):
            yield _record(batch.slice(n, 1), before + n + 1, file)
        return
    for number, row in enumerate(rows, start=before + 1):
        yield Record(number, row, "", file)


def _record(batch: Any, number: int, file: int) -> Record:
    try:
        return Record(number, batch.to_pylist()[0], "", file)
    except UnicodeDecodeError:
        return Record(number, None, "not UTF-8 text", file)
    except (ValueError, OverflowError) as error:  # a date after the year 9999, for one
        return Record(number, None, f"a value that Python has not ({_first_line(error)})", file)


def _require_pyarrow(path: Path, kind: str) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise InputError(
            f"`{path}` is a {kind} file, which needs pyarrow here",
            '`pip install pyarrow`, which `pip install "ftplan[train]"` includes',
        ) from None
