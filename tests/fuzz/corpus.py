"""What the fuzzer starts from: rows of every shape in every format that docs/data.md names."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from ftplan.launcher.data import shapes

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4, as\never."},
]
SHAREGPT = [
    {"from": "human", "value": "Grüße 😀?"},
    {"from": "gpt", "value": "<b>ja</b> &amp; nein"},
]
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "w", "arguments": '{"city": "Rome"}'}}
        ],
    },
    {"role": "tool", "name": "w", "content": "sun"},
    {"role": "assistant", "content": "Sun."},
]
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}]

ROWS: dict[str, list[dict[str, Any]]] = {
    "instruction": [
        {"instruction": f"Add {n}.", "input": "2 + 2" * (n % 2), "output": "x" * n, "system": ""}
        for n in range(1, 9)
    ],
    "history": [{"instruction": "b", "output": "c", "history": [["a", "b"]]}] * 3,
    "prompt": [{"question": f"{n}?", "answer": f"<think>a</think> {n}"} for n in range(5)],
    "messages": [{"messages": CONVERSATION}, {"conversations": SHAREGPT}, {"messages": CALLS}],
    "tools": [{"messages": CALLS, "tools": TOOLS}, {"messages": CALLS, "tools": json.dumps(TOOLS)}],
    "pairs": [
        {
            "prompt": "2 + 2?",
            "chosen": "4",
            "rejected": str(n),
            "score": {"chosen": 2, "rejected": 1},
        }
        for n in range(5, 9)
    ],
    "conversations": [
        {
            "chosen": CONVERSATION,
            "rejected": [*CONVERSATION[:2], {"role": "assistant", "content": "5"}],
            "score_chosen": 7.5,
            "score_rejected": 1,
        },
        {"prompt": CONVERSATION[:2], "chosen": CONVERSATION[2:], "rejected": "5", "margin": 0.5},
    ],
    "labelled": [
        {"prompt": "2 + 2?", "completion": "5", "label": False},
        {"messages": CONVERSATION, "kto_tag": True},
    ],
    "tasks": [
        {"task": "add", "input": "2 + 2", "output": "4"},
        {"task": "t", "input": "a", "answer": "b"},
    ],
    "classes": [
        {"text": "I hate it", "label": 0, "label_text": "bad"},
        {"text": "good", "label": "ok"},
    ],
    "text": [{"text": "Two and two are four. " * n} for n in range(1, 6)],
    "odd": [
        {"text": text}
        for text in (
            "\x00\x07 \u202e â€™ \ufffd <|im_start|>user hi<|im_end|> [INST] </s>",
            "DB_PASSWORD=aB3dE5fG7hI9jK1 https://u:s3cr3tpw9@db.corp.net AKIAQWERTZUIOPASDF23",
            "-----BEGIN PRIVATE KEY-----\nMII",
            "jane.miller@initech.de +49 171 2839 4756 4539 5787 6362 1478",
            "DE44500105175407324931",
            "As an AI language model &nbsp; der die und das ist nicht ein Wort von mir, es ist so",
        )
    ],
    "ambiguous": [
        {"instruction": "a", "output": "b", "text": "### a b"},
        {"prompt": "p", "chosen": "c", "rejected": "r", "messages": CONVERSATION},
        {"task": "t", "prompt": "p", "completion": "c", "label": 1},
    ],
    "prompts alone": [{"prompt": f"{n}?"} for n in range(4)],
}

FIELDS = sorted(
    {
        *shapes.FIELDS,
        *shapes._ANSWERS,
        *shapes._QUESTIONS,
        *shapes._CONVERSATIONS,
        *shapes._LABELS,
        *(name for pair in shapes._SCORES for name in pair),
        *("role", "from", "content", "value", "name", "tool_calls", "function", "arguments"),
        *("functions", "label_text", "label_name", "data", "rows"),
    }
)
ROLES = sorted(shapes._ROLES)


def json_lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def raw_json_lines(rows: Sequence[Any]) -> bytes:
    """Without escapes; half characters as the bytes that Python has for them."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-8", "surrogatepass")


def indented(rows: Sequence[Any]) -> bytes:
    return "\n".join(json.dumps(row, indent=2) for row in rows).encode()


def array(rows: Sequence[Any]) -> bytes:
    return json.dumps(list(rows), indent=1).encode()


def wrapped(rows: Sequence[Any]) -> bytes:
    return json.dumps({"version": 1, "data": list(rows), "more": [1]}).encode()


def commented(rows: Sequence[Any]) -> bytes:
    lines = (f"/* row\n {n} */ {json.dumps(row)[:-1]},}}, // so" for n, row in enumerate(rows))
    return "\n".join(lines).encode()


def table(rows: Sequence[Any], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def tabbed(rows: Sequence[Any]) -> bytes:
    return table(rows, "\t")


def parquet(rows: Sequence[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink, row_group_size=2)
    return bytes(sink.getvalue())


def arrow(rows: Sequence[Any], *, stream: bool = False) -> bytes:
    columns = pyarrow.Table.from_pylist(list(rows))
    sink = pyarrow.BufferOutputStream()
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(sink, columns.schema) as writer:
        writer.write_table(columns, max_chunksize=2)
    return bytes(sink.getvalue())


def arrow_stream(rows: Sequence[Any]) -> bytes:
    return arrow(rows, stream=True)


FORMATS: dict[str, Callable[[Sequence[Any]], bytes]] = {
    "rows.jsonl": json_lines,
    "raw.jsonl": raw_json_lines,
    "indented.json": indented,
    "array.json": array,
    "wrapped.json": wrapped,
    "commented.jsonc": commented,
    "table.csv": table,
    "table.tsv": tabbed,
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "stream.arrow": arrow_stream,
}
NAMES = (*FORMATS, "rows", "rows.txt", "data.csv.gz", "test.jsonl")


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


PACKED: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: gzip.compress(content, 1, mtime=0),
    lambda content: bz2.compress(content, 1),
    lambda content: lzma.compress(content, preset=0),
    zstd,
)

ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig", "cp1252")


def encoded(content: bytes, encoding: str) -> bytes:
    """UTF-8 text in another encoding, as well as that goes."""
    return content.decode("utf-8", "replace").encode(encoding, "replace")


def written(rng: Random, rows: Sequence[Any]) -> tuple[str, bytes]:
    """The rows in one of the formats; JSON lines where they do not fit into it."""
    name = rng.choice(tuple(FORMATS))
    try:
        return name, FORMATS[name](rows)
    except (
        pyarrow.ArrowException,
        ValueError,
        TypeError,
        OverflowError,
        AttributeError,
        csv.Error,
    ):
        return "rows.jsonl", json_lines(rows)


def seeds() -> Iterator[tuple[str, bytes]]:
    """Every shape in every format that has room for it, each compression and encoding."""
    for rows in ROWS.values():
        for name, write in FORMATS.items():
            try:
                yield name, write(rows)
            except pyarrow.ArrowException:  # columns of mixed types
                continue
    plain = json_lines(ROWS["instruction"])
    yield from (("packed", pack(plain)) for pack in PACKED)
    yield from ((f"{encoding}.jsonl", encoded(plain, encoding)) for encoding in ENCODINGS)
