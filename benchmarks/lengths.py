"""Megabytes a second of `TokenCounter` beside the tokenizer itself, and how new their words are.

    python -m benchmarks.lengths TOKENIZER_FOLDER [FILE.jsonl ...]

Texts: generated rows (`data_file.py`), the files given, and local text: the sources of Python's
standard library, the manual pages and the documents of what is installed here. The second half of
each is timed, after the first. Processor time of one process.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import log
from pathlib import Path
from typing import Any

from msgspec import Struct

from benchmarks.data_file import Rows
from ftplan.launcher.data.lengths import TokenCounter

_BYTES = 40_000_000
_BYTES_TOKENIZED = 2_000_000
_ROW_CHARACTERS = 1500


class Speed(Struct, frozen=True):
    """`growth` is Heaps' exponent over the last half of the chunks between blanks, `new` the share
    of them there that had not come before."""

    texts: str
    megabytes: float
    first_mb_per_second: float
    mb_per_second: float
    tokenizer_mb_per_second: float
    new: float
    growth: float


def generated(seed: int = 0) -> Iterator[str]:
    for line in Rows(seed):
        yield from row_texts(line)


def row_texts(line: str) -> Iterator[str]:
    """The texts of a row, however it is shaped."""
    try:
        row = json.loads(line)
    except ValueError:
        return
    stack = [row]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            stack.extend(value.values() if isinstance(value, dict) else value)


def of_file(path: Path) -> Iterator[str]:
    with path.open() as file:
        for line in file:
            yield from row_texts(line)


def local(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of these files in pieces of a row's length."""
    for path in paths:
        raw = path.read_bytes()
        try:
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        except (OSError, UnicodeDecodeError):
            continue
        for start in range(0, len(text), _ROW_CHARACTERS):
            yield text[start : start + _ROW_CHARACTERS]


def take(texts: Iterator[str], size_bytes: int) -> list[str]:
    taken = []
    for text in texts:
        taken.append(text)
        size_bytes -= len(text.encode())
        if size_bytes <= 0:
            break
    return taken


def growth(texts: Sequence[str]) -> tuple[float, float]:
    """The share of new chunks in the second half of the texts, and Heaps' exponent there."""
    seen: set[str] = set()
    chunks = half_chunks = half_seen = 0
    for number, text in enumerate(texts):
        if number == len(texts) // 2:
            half_chunks, half_seen = chunks, len(seen)
        pieces = text.split()
        chunks += len(pieces)
        seen.update(pieces)
    new = (len(seen) - half_seen) / (chunks - half_chunks)
    return new, log(len(seen) / half_seen) / log(chunks / half_chunks)


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(name: str, tokenizer: Any, texts: list[str]) -> Speed:
    half = len(texts) // 2
    size = [sum(len(text.encode()) for text in part) / 1e6 for part in (texts[:half], texts[half:])]
    counter = TokenCounter(tokenizer)
    first = seconds(lambda: counter.counts(texts[:half]))
    second = seconds(lambda: counter.counts(texts[half:]))
    some = take(iter(texts[half:]), _BYTES_TOKENIZED)
    some_size = sum(len(text.encode()) for text in some) / 1e6
    backend = tokenizer.backend_tokenizer
    whole: list[int] = []
    encode = backend.encode_batch_fast
    tokenized = seconds(lambda: whole.extend(map(len, encode(some, add_special_tokens=False))))
    if whole != counter.counts(some):
        raise SystemExit(f"{name}: the counts differ from the tokenizer's")
    new, exponent = growth(texts)
    return Speed(
        name,
        sum(size),
        size[0] / first,
        size[1] / second,
        some_size / tokenized,
        new,
        exponent,
    )


def sources(files: Sequence[Path]) -> Iterator[tuple[str, Iterator[str]]]:
    yield "generated rows", generated()
    for path in files:
        yield path.name, of_file(path)
    yield "python sources", local(sorted(Path(os.__file__).parent.glob("*.py")))
    yield "manual pages", local(sorted(Path("/usr/share/man").glob("man*/*.gz")))
    site = Path(json.__file__).parents[1]
    documents = [*site.rglob("*.md"), *site.rglob("*.rst"), *Path("/usr/share/doc").rglob("*.txt")]
    yield "documents", local(sorted(documents))


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m benchmarks.lengths TOKENIZER_FOLDER [FILE.jsonl ...]")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    print(TokenCounter(tokenizer).reason)
    print("texts              MB   first  then  tokenizer MB/s   new chunks  Heaps' exponent")
    for name, texts in sources([Path(name) for name in islice(sys.argv, 2, None)]):
        taken = take(texts, _BYTES)
        if len(taken) < 2:
            continue
        s = measure(name, tokenizer, taken)
        print(
            f"{name:16}{s.megabytes:5.0f}{s.first_mb_per_second:8.1f}{s.mb_per_second:6.1f}"
            f"{s.tokenizer_mb_per_second:11.1f}{s.new:16.1%}{s.growth:15.2f}",
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory {peak / 1024:.0f} MiB, texts and transformers included")


if __name__ == "__main__":
    main()
