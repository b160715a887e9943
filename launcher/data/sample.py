"""A look at some rows of large files of JSON lines, chosen at random over all their bytes.

A row is found behind a random byte, so rows behind long ones are found more often; their own length
makes no difference. The bytes are spread evenly, one in each part of the file of equal size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from random import Random

import msgspec
from msgspec import Struct

from ftplan.launcher.data.files import Source
from ftplan.launcher.data.records import Record, nested_too_deeply
from ftplan.planner.errors import InputError

SEED = 42

# Smaller files are read whole in a moment.
LEAST_BYTES = 8 * 2**20


class Estimate(Struct, frozen=True):
    """A figure of the whole, from a sample of it."""

    value: float
    standard_error: float


class Sample(Struct, frozen=True, kw_only=True):
    """What a sample says of the whole: its rows, tokens a row, tokens in all."""

    num_sampled: int
    rows: Estimate
    mean_tokens: Estimate
    total_tokens: Estimate

    @staticmethod
    def of(sizes: Sequence[int], tokens: Sequence[int], size_bytes: int) -> Sample:
        """`sizes`: bytes of each sampled row, its line feed included; `tokens`: of each.

        Of ratios of means the error is that of the first order (Cochran, Sampling Techniques,
        section 6.4).
        """
        per_byte = _ratio(tokens, sizes)
        rows_per_byte = _ratio([1] * len(sizes), sizes)
        return Sample(
            num_sampled=len(sizes),
            rows=_times(size_bytes, rows_per_byte),
            mean_tokens=_ratio(tokens, [1] * len(tokens)),
            total_tokens=_times(size_bytes, per_byte),
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "num_sampled": self.num_sampled,
            **{
                name: {"value": one.value, "standard_error": one.standard_error}
                for name, one in (
                    ("rows", self.rows),
                    ("mean_tokens", self.mean_tokens),
                    ("total_tokens", self.total_tokens),
                )
            },
        }


def _times(factor: float, one: Estimate) -> Estimate:
    return Estimate(factor * one.value, factor * one.standard_error)


def _ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """The ratio of two means over the same rows."""
    count, mean = len(above), statistics.fmean(below)
    ratio = statistics.fmean(above) / mean
    if count < 2:
        return Estimate(ratio, math.inf)
    squares = sum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    return Estimate(ratio, math.sqrt(squares / (count - 1) / count) / mean)


def check_sampled(source: Source) -> None:
    """Raises InputError for files in whose middle reading cannot begin."""
    for file in source.files:
        if not file.splits:
            what = f"{file.format}, {file.compression}" if file.compression else file.format
            raise InputError(
                f"`{file.path}` cannot be sampled ({what}): only JSON lines as they are can",
                "leave out `--sample`: all is read",
            )


def sampled_records(
    source: Source, count: int, progress: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[tuple[Record, int]]:
    """About so many rows in order, each with its bytes. `Record.number` is the byte at which the
    row begins."""
    rng = Random(SEED)
    total = source.size_bytes
    offsets = [(place + rng.random()) * total / count for place in range(count)]
    behind = 0
    for index, file in enumerate(source.files):
        last = -1
        with open(file.path, "rb") as opened:
            for offset in offsets:
                if not behind <= offset < behind + file.size_bytes:
                    continue
                opened.seek(int(offset - behind))
                opened.readline()
                begin = opened.tell()
                line = opened.readline()
                if begin != last and line.strip():
                    last = begin
                    yield _record(line, begin, index), len(line)
                progress(total // count)
        behind += file.size_bytes


def _record(line: bytes, begin: int, file: int) -> Record:
    try:
        value = msgspec.json.decode(line)
        if nested_too_deeply(value):
            raise RecursionError
        return Record(begin, value, file=file)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Record(begin, None, "broken JSON", file)
