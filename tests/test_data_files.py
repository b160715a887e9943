"""Reading data files: every format, encoding and compression; broken rows and broken files."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.launcher.data import hub, json_rows, streams
from ftplan.launcher.data.csv_rows import CsvRows
from ftplan.launcher.data.files import Note, Record, Source, merged, open_source, row_start
from ftplan.launcher.data.folders import choose, natural_order
from ftplan.launcher.data.json_lines import JsonLines
from ftplan.launcher.data.json_rows import JsonRows
from ftplan.launcher.data.records import MAX_ROW_CHARACTERS, TOO_LONG, Notes
from ftplan.launcher.data.streams import Text
from ftplan.planner.errors import InputError

ROWS = [{"instruction": f"Add é {n} 😀.", "output": "x" * n} for n in range(1, 40)]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(content: str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def read(*paths: Path) -> tuple[list[Record], Source]:
    source = open_source(paths)
    return list(source.records()), source


def values(path: Path) -> list[Any]:
    return [record.value for record in read(path)[0]]


def numbered(path: Path) -> list[tuple[int, Any]]:
    """(number, value, or why it is broken) of every row."""
    return [(record.number, record.broken or record.value) for record in read(path)[0]]


def said(path: Path) -> list[str]:
    return [str(note) for note in read(path)[1].notes]


def refusal(*paths: Path | str) -> InputError:
    with pytest.raises(InputError) as caught:
        list(open_source(paths).records())
    assert caught.value.hint
    return caught.value


def json_lines(rows: Sequence[Any] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(delimiter: str = ",", rows: Sequence[dict[str, str]] = ROWS) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def arrow(rows: Sequence[Any] = ROWS, *, stream: bool = False, chunk: int = 10) -> bytes:
    columns = pyarrow.Table.from_pylist(list(rows))
    sink = pyarrow.BufferOutputStream()
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(sink, columns.schema) as writer:
        writer.write_table(columns, max_chunksize=chunk)
    return bytes(sink.getvalue())


def parquet(rows: Sequence[Any] = ROWS) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink, row_group_size=10)
    return bytes(sink.getvalue())


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


LINES = json_lines().encode()

FILES = {
    "JSON lines": LINES,
    "JSON lines in ASCII": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "no newline at the end": LINES.rstrip(),
    "CRLF": LINES.replace(b"\n", b"\r\n"),
    "CR": LINES.replace(b"\n", b"\r"),
    "blank lines": LINES.replace(b"\n", b"\n \n\t\r\n\n"),
    "UTF-8 with BOM": b"\xef\xbb\xbf" + LINES,
    "array": json.dumps(ROWS).encode(),
    "pretty array": json.dumps(ROWS, indent=2).encode(),
    "array of lines": b"[\n" + b",\n".join(LINES.splitlines()) + b"\n]\n",
    "array with BOM": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "wrapped": json.dumps({"version": [1, {"a": 2}], "data": ROWS}).encode(),
    "wrapped, pretty": json.dumps({"train": ROWS}, indent=4, ensure_ascii=False).encode(),
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "objects without newlines": b"".join(LINES.splitlines()),
    "gzip": gzip.compress(LINES),
    "two gzip streams": gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]),
    "gzip, padded": gzip.compress(LINES) + bytes(512),
    "zstd": zstd(LINES),
    "two zstd frames": zstd(LINES[:100]) + zstd(LINES[100:]),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "gzip, array": gzip.compress(json.dumps(ROWS).encode()),
    "gzip, CSV": gzip.compress(table().encode()),
    "CSV": table().encode(),
    "CSV with BOM": b"\xef\xbb\xbf" + table().encode(),
    "CSV with LF": table().replace("\r", "").encode(),
    "CSV with CR": table().replace("\n", "").encode(),
    "TSV": table("\t").encode(),
    "semicolons": table(";").encode(),
    "Parquet": parquet(),
    "Arrow file": arrow(),
    "Arrow stream": arrow(stream=True),
} | {
    f"{encoding}{' with BOM' if mark else ''}": (mark + json_lines()).encode(encoding)
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    for mark in ("", "\ufeff")
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["", ".jsonl", ".csv", ".bin"])
def test_a_file_is_read_whatever_its_format_and_name(name: str, suffix: str, write: Write) -> None:
    assert values(write(FILES[name], "rows" + suffix)) == ROWS


@pytest.mark.parametrize("name", FILES)
def test_reading_tells_of_every_byte_and_may_be_repeated(name: str, write: Write) -> None:
    path = write(FILES[name])
    source = open_source([path])
    told: list[int] = []
    first = list(source.records(told.append))
    assert sum(told) == path.stat().st_size == source.size_bytes
    notes = source.notes
    assert list(source.records()) == first
    assert source.notes == notes


@pytest.mark.parametrize("name", FILES)
def test_a_source_travels_to_another_process(name: str, write: Write) -> None:
    source = pickle.loads(pickle.dumps(open_source([write(FILES[name])])))
    assert [record.value for record in source.records()] == ROWS


@pytest.mark.parametrize(
    ("name", "form", "unit"),
    [
        ("JSON lines", "JSON lines", "line"),
        ("pretty objects", "JSON lines", "line"),
        ("array", "JSON", "row"),
        ("wrapped", "JSON", "row"),
        ("CSV", "CSV", "line"),
        ("semicolons", "CSV", "line"),
        ("TSV", "TSV", "line"),
        ("Parquet", "Parquet", "row"),
        ("Arrow stream", "Arrow", "row"),
    ],
)
def test_a_format_is_named_and_numbers_rows_its_way(
    name: str, form: str, unit: str, write: Write
) -> None:
    records, source = read(write(FILES[name], "rows"))
    assert (source.files[0].format, source.unit) == (form, unit)
    if unit == "row":
        assert [record.number for record in records] == list(range(1, len(ROWS) + 1))


def test_lines_are_numbered_as_an_editor_does(write: Write) -> None:
    assert numbered(write('\n{"a": 1}\n\n \n{"a":\n2}\n{"a": "\u2028"}')) == [
        (2, {"a": 1}),
        (5, {"a": 2}),
        (7, {"a": "\u2028"}),
    ]
    text = 'a,b\n1,"x\ny"\n\n2,"\n\n"\n3,z\n'
    assert [record.number for record in read(write(text, "rows.csv"))[0]] == [2, 5, 8]


TUTORIAL = """\
// one row for each question
{
  "instruction": "Add.", // see https://example.org
  "input": "a // b, /* c */ ,]",
  "output": "3",
}
/* the second
   row */
{"instruction": "x", "output": "y",},
{"instruction": "z", "tags": [1, 2, ], "output": "w"}, // last
"""


def test_rows_as_tutorials_print_them_are_read_with_a_note(write: Write) -> None:
    path = write(TUTORIAL)
    assert numbered(path) == [
        (2, {"instruction": "Add.", "input": "a // b, /* c */ ,]", "output": "3"}),
        (9, {"instruction": "x", "output": "y"}),
        (10, {"instruction": "z", "tags": [1, 2], "output": "w"}),
    ]
    assert said(path) == [
        "comments (`//`, `/* */`), left out: lines 1, 3, 7, 10",
        "commas before a closing bracket, left out: lines 5, 9, 10",
        "commas after rows, left out: lines 9, 10",
    ]


def test_an_array_may_have_comments_and_a_last_comma(write: Write) -> None:
    path = write('// data\n[\n{"a": 1}, // one\n{"a": 2,},\n]\n')
    assert values(path) == [{"a": 1}, {"a": 2}]
    assert len(said(path)) == 2


def test_a_note_names_the_first_lines_and_how_many_there_are(write: Write) -> None:
    assert said(write('{"a": 1,}\n' * 12)) == [
        "commas before a closing bracket, left out: lines 1, 2, 3, 4, 5, ... (12 in all)"
    ]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"a": 1', "broken JSON: expecting `,`, line 3, column 1"),
        ('{"a": "x}', "broken JSON: text without its closing quote, column 10"),
        ('{"a" 1}', "broken JSON: expecting `:`, column 6"),
        ("{'a': 1}", "broken JSON: expecting a name in double quotes, column 2"),
        ('{"a": }', "broken JSON: expecting a value, column 7"),
        ('{"a": 1}}', "broken JSON: extra text after the row, column 9"),
        ('{"a": 1} {', "broken JSON: expecting a name in double quotes, line 3, column 1"),
        ('{"a": 1}, "b": 2}', "broken JSON: extra text after the row, column 11"),
        ("hello", "broken JSON: expecting a value, column 1"),
        ("\0\0\0", "broken JSON: expecting a value, column 1"),
        ('{"a": "\0"}', "broken JSON: a control character inside text, column 8"),
        ('{"a": "\\x"}', "broken JSON: invalid \\escape, column 8"),
        ('{"a": "\\ud83d"}', "half a character (a lone surrogate)"),
        ('{"a": ' + "9" * 5000 + "}", "a number with thousands of digits"),
        ("[" * 5000, "JSON nested too deeply"),
        ('{"a":' * 5000, "JSON nested too deeply"),
        (b'{"a": "\xe9t\xe9"}', "not UTF-8 text (byte 0xe9), column 8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text (byte 0xed), column 8"),
    ],
)
@pytest.mark.parametrize("rows_before", [1, 0])
def test_a_broken_line_is_a_record_and_the_others_are_read(
    broken: str | bytes, reason: str, rows_before: int, write: Write
) -> None:
    line = broken if isinstance(broken, bytes) else broken.encode()
    path = write(b'{"b": 1}\n' * rows_before + line + b'\n{"a": 2}\n{"a": 3}\n')
    number = rows_before + 1
    first = [(1, {"b": 1})] * rows_before
    found = numbered(path)
    if broken == '{"a": 1} {':  # two rows, the second one broken
        found.remove((number, {"a": 1}))
    reason = reason.replace("line 3", f"line {number + 1}")
    assert found == [*first, (number, reason), (number + 1, {"a": 2}), (number + 2, {"a": 3})]


def test_a_broken_row_of_several_lines_is_one_record(write: Write) -> None:
    rows = [json.dumps(row, indent=2) for row in ROWS[:3]]
    rows[1] = rows[1].replace('"output":', '"output"')
    found = numbered(write("\n".join(rows)))
    assert found == [
        (1, ROWS[0]),
        (5, "broken JSON: expecting `:`, line 7, column 12"),
        (9, ROWS[2]),
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_broken_row_of_an_array_is_one_record(indent: int | None, write: Write) -> None:
    rows = [{"id": n, "messages": [{"role": "user", "content": "x"}]} for n in range(4)]
    text = json.dumps(rows, indent=indent).replace('"id": 1', '"id": one')
    found = numbered(write(text))
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert "expecting a value" in found[1][1]
    assert [value for _, value in found if not isinstance(value, str)] == [
        rows[0],
        rows[2],
        rows[3],
    ]


def test_an_array_that_is_cut_off_says_so(write: Write) -> None:
    text = json.dumps(ROWS)
    records, _ = read(write(text[: len(text) // 2]))
    assert records[-1].broken and not any(record.broken for record in records[:-1])
    path = write(json.dumps(ROWS)[:-1])
    assert values(path) == ROWS
    assert said(path) == ["the array has no closing `]`: the file may be cut off"]


def test_what_stands_behind_an_array_is_not_left_out_in_silence(write: Write) -> None:
    assert said(write('[{"a": 1}]\nmore'))[0].startswith("text behind the array")
    assert values(write('[{"a": 1}]\n[{"a": 2}]')) == [{"a": 1}, {"a": 2}]
    path = write(json.dumps({"train": ROWS, "test": ROWS}))
    assert values(path) == ROWS
    assert "only `train` is read, not what the file holds behind it" in said(path)


def test_a_row_that_holds_a_list_is_no_object_around_rows(write: Write) -> None:
    row = {"messages": [{"role": "user", "content": "x"}]}
    for text in (json.dumps(row), json.dumps(row, indent=1), json_lines([{"turns": [{}]}] * 2)):
        assert "messages" in values(write(text))[0] or "turns" in values(write(text))[0]


def test_rows_that_are_no_objects_are_given_as_they_are(write: Write) -> None:
    assert values(write('["a"]\n["b"]\n')) == [["a"], ["b"]]
    assert values(write('"a"\n12\nnull\n')) == ["a", 12, None]


@pytest.mark.parametrize(
    "content",
    [
        {"instruction": ["a", "b"], "output": ["c", "d"]},
        {"instruction": {"0": "a"}, "output": {"0": "b"}},
    ],
)
def test_columns_are_no_rows(content: Any, write: Write) -> None:
    assert "columns" in refusal(write(json.dumps(content))).message


def test_nan_is_missing_and_a_repeated_key_counts_last(write: Write) -> None:
    path = write('{"a": NaN, "b": -Infinity, "c": 1, "c": 2}\n{"a": 1}\n{"a": NaN}')
    assert values(path) == [{"a": None, "b": None, "c": 2}, {"a": 1}, {"a": None}]
    assert said(path) == ["NaN or Infinity, read as null: lines 1, 3"]


def test_tabs_and_line_breaks_inside_text_are_read(write: Write) -> None:
    path = write('{"a": "x\ty"}\n{"a": "x\ny"}\n{"a": 3}\n')
    assert numbered(path) == [(1, {"a": "x\ty"}), (2, {"a": "x\ny"}), (4, {"a": 3})]
    assert len(said(path)) == 1


def test_a_row_longer_than_any_may_be_is_broken(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (
        '{"a": "' + "x" * (MAX_ROW_CHARACTERS + 2 * streams.BLOCK_BYTES) + '"}\n{"a": 2}\n',
        '[{"a": "' + "x" * (MAX_ROW_CHARACTERS + 2 * streams.BLOCK_BYTES) + '"}, {"a": 2}]',
    ):
        records, _ = read(write(text))
        assert records[0].broken == TOO_LONG
        assert [record.value for record in records[1:]] == [{"a": 2}]


# CSV


def test_a_table_may_quote_delimiters_quotes_and_newlines(write: Write) -> None:
    rows = [{"a": 'x, "y"\nz', "b": "1;2"}, {"a": "", "b": " 3 "}]
    assert values(write(table(rows=rows), "rows.csv")) == rows


def test_a_table_of_one_column_needs_its_suffix(write: Write) -> None:
    assert values(write("text\nhello\nworld\n", "rows.csv")) == [
        {"text": "hello"},
        {"text": "world"},
    ]


def test_a_row_of_a_table_may_be_short_but_not_long(write: Write) -> None:
    assert numbered(write("a,b\n1\n1,2,3\n4,5\n", "rows.csv")) == [
        (2, {"a": "1"}),
        (3, "3 fields where the first line names 2"),
        (4, {"a": "4", "b": "5"}),
    ]


def test_a_quote_that_is_not_closed_breaks_its_own_row_only(write: Write) -> None:
    rows = "".join(f"{n},x\n" for n in range(2, 2000))
    found = numbered(write('a,b\n1,"x\n' + rows, "rows.csv"))
    assert found[0] == (2, "broken CSV: a quote is opened and not closed")
    assert len(found) == 1999 and found[1] == (3, {"a": "2", "b": "x"})


def test_a_table_that_is_not_utf8_loses_the_rows_that_are_not(write: Write) -> None:
    path = write(b"a,b\nx\xe9,1\ny,2\n", "rows.csv")
    assert numbered(path) == [(2, "not UTF-8 text (byte 0xe9)"), (3, {"a": "y", "b": "2"})]
    assert "iconv" in said(path)[0]


@pytest.mark.parametrize(
    "text",
    [
        "What is 2 + 2?,4\nWhat is 3 + 3?,6\n",
        "1,2\n3,4\n",
        "a,a\n1,2\n",
        ",\n1,2\n",
        '"a\nb",c\n1,2\n',
    ],
)
def test_a_table_without_a_header_is_refused(text: str, write: Write) -> None:
    error = refusal(write(text, "rows.csv"))
    assert "first line" in error.message and "instruction,output" in str(error.hint)


def test_names_of_columns_are_utf8(write: Write) -> None:
    assert "iconv" in refusal(write(b"a,b\xe9\n1,2\n", "rows.csv")).message


def test_a_field_longer_than_any_may_be_is_broken(write: Write) -> None:
    text = "a,b\n" + "x" * (MAX_ROW_CHARACTERS + 10) + ",1\n2,3\n"
    records, _ = read(write(text, "rows.csv"))
    assert records[0].broken
    assert records[-1].value == {"a": "2", "b": "3"}


# Columns


def test_nested_columns_become_objects_and_lists(write: Write) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}], "n": 1}, {"messages": [], "n": None}]
    for content in (parquet(rows), arrow(rows), arrow(rows, stream=True)):
        assert values(write(content)) == rows


def test_columns_of_bytes_that_are_not_utf8_break_their_rows_only(write: Write) -> None:
    texts = pyarrow.array([b"a", b"\xe9", b"c"], pyarrow.binary()).view(pyarrow.string())
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
    found = numbered(write(bytes(sink.getvalue())))
    assert found == [(1, {"text": "a"}), (2, "not UTF-8 text"), (3, {"text": "c"})]


@pytest.mark.parametrize("content", [parquet()[:-20], arrow()[:-20], parquet()[:8]])
def test_a_damaged_file_of_columns_is_refused(content: bytes, write: Write) -> None:
    assert "cut off or damaged" in refusal(write(content)).message


def test_a_stream_that_is_cut_off_gives_what_is_whole(write: Write) -> None:
    content = arrow(stream=True)
    records, _ = read(write(content[: len(content) - 300]))
    assert [record.value for record in records[:-1]] == ROWS[:30]
    assert records[-1].number == 31 and "cut off" in records[-1].broken


@pytest.mark.parametrize(("name", "word"), [("Parquet", "pyarrow"), ("zstd", "pyarrow")])
def test_a_missing_package_is_named(
    name: str, word: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "compression", None)
    assert f"pip install {word}" in str(refusal(write(FILES[name])).hint)


# Whole files


@pytest.mark.parametrize("name", ["gzip", "zstd", "bzip2", "xz"])
def test_compressed_data_that_is_cut_off_gives_what_is_whole(name: str, write: Write) -> None:
    pack = {"gzip": gzip.compress, "zstd": zstd, "bzip2": bz2.compress, "xz": lzma.compress}[name]
    rows = [{"n": n, "text": os.urandom(400).hex()} for n in range(1500)]
    content = pack(json_lines(rows).encode())
    records, _ = read(write(content[: len(content) * 3 // 4]))
    good, last = records[:-1], records[-1]
    assert len(good) > 200 and [record.value for record in good] == rows[: len(good)]
    assert "cut off" in last.broken and last.number in (len(good) + 1, len(good) + 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),  # the bytes are in the test's name
        (b"PK\x03\x04....", "ZIP"),
        (b"%PDF-1.7", "PDF"),
        (bytes(range(256)) * 20, "neither text nor"),
        (b"Once upon a time.\nThe end.\n", "no rows"),
        (gzip.compress(LINES, mtime=0)[:12], "cut off"),
        (gzip.compress(LINES, mtime=0)[:20] + bytes(99), "gzip"),
        (gzip.compress(parquet(), mtime=0), "unpack it first"),
    ],
)
def test_a_file_without_rows_is_refused(content: bytes, words: str, write: Write) -> None:
    error = refusal(write(content, "rows"))
    assert words in f"{error.message} ({error.hint})"


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.jsonl").message
    assert "not a plain file" in refusal("/dev/null").message
    for name in ("x" * 5000, "a\0b"):
        assert "cannot read" in refusal(name).message


def test_a_file_that_changed_is_refused(write: Write) -> None:
    path = write(LINES)
    source = open_source([path])
    path.write_bytes(LINES * 2)
    with pytest.raises(InputError, match="changed"):
        list(source.records())


def test_the_digest_is_of_the_file_as_it_is_stored(write: Write) -> None:
    import hashlib

    one, two = write(FILES["gzip"], "a.gz"), write(LINES, "b.jsonl")
    digests = [hashlib.sha256(path.read_bytes()) for path in (one, two)]
    assert open_source([one]).sha256() == digests[0].hexdigest()
    both = hashlib.sha256(b"".join(digest.digest() for digest in digests))
    assert open_source([one, two]).sha256() == both.hexdigest()


# Several files


def test_several_files_are_one_source(write: Write) -> None:
    one, two = write('{"a": 1}\n{"a"', "a.jsonl"), write('[{"b": 1}]', "b.json")
    records, source = read(one, two, one)
    assert [(r.file, r.number, r.value) for r in records] == [
        (0, 1, {"a": 1}),
        (0, 2, None),
        (1, 1, {"b": 1}),
    ]
    assert source.unit == "row"
    assert source.place(2) == "line 2 of a.jsonl" and source.place(1, 1) == "row 1 of b.json"
    assert [str(note) for note in source.notes] == [
        f"given twice, read once: `{one}`",
        "the files are of several formats: 1 JSON lines, 1 JSON",
    ]


def test_a_folder_gives_its_data_files_in_natural_order(write: Write) -> None:
    for n in (1, 2, 10):
        write(json_lines([{"n": n}]), f"d/part-{n}.jsonl")
    write("# Rows", "d/README.md")
    write("{}", "d/dataset_info.json")
    write(json_lines(), "d/.hidden.jsonl")
    write(gzip.compress(b'{"n": 11}'), "d/x/part.jsonl.gz")
    write("", "d/x/zero.jsonl")
    folder = write("notes", "d/notes.txt").parent
    records, source = read(folder)
    assert [record.value["n"] for record in records] == [1, 2, 10, 11]
    remarks = [str(note) for note in source.notes]
    assert remarks[0] == "left out, not data files: `dataset_info.json`, `notes.txt`, `README.md`"
    assert "zero.jsonl` is empty" in remarks[-1]


def test_a_folders_evaluation_files_are_not_trained_on(write: Write) -> None:
    write(json_lines(), "d/train-00000-of-00001.jsonl")
    path = write(json_lines(), "d/test-00000-of-00001.jsonl")
    _, source = read(path.parent)
    assert len(source.files) == 1
    assert "test-00000-of-00001.jsonl" in str(source.notes[0])
    assert len(read(path)[1].files) == 1  # named, it is read


def test_a_folder_without_data_is_refused_with_what_it_holds(write: Write) -> None:
    error = refusal(write("x", "d/README.md").parent)
    assert "README.md" in error.message and ".parquet" in str(error.hint)


def test_natural_order_compares_numbers_as_numbers() -> None:
    names = ["b", "a10", "a2", "a", "10", "9"]
    assert sorted(names, key=natural_order) == ["9", "10", "a", "a2", "a10", "b"]


def test_only_files_for_evaluation_are_data_all_the_same() -> None:
    assert choose(["test.jsonl"]).paths == ("test.jsonl",)


# The Hub


class FakeHub:
    """A Hub with one dataset, or out of reach."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.cached = False
        self.asked: list[Any] = []
        monkeypatch.setattr(hub, "_hub", lambda hub_id: self)
        monkeypatch.setattr("urllib.request.urlopen", self.urlopen)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def get_token(self) -> str:
        return "token"

    def urlopen(self, request: Any, timeout: float) -> io.BytesIO:
        assert request.get_header("Authorization") == "Bearer token"
        if self.error:
            raise self.error
        files = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*")]
        return io.BytesIO(json.dumps({"siblings": [{"rfilename": f} for f in files]}).encode())

    def snapshot_download(self, hub_id: str, **options: Any) -> str:
        self.asked.append(options)
        if options.get("local_files_only") and not self.cached:
            raise FileNotFoundError
        return str(self.folder)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-0.jsonl").write_text('{"a": 1}')
    (tmp_path / "data/test-0.jsonl").write_text('{"a": 2}')
    (tmp_path / "README.md").write_text("x")
    return FakeHub(tmp_path, monkeypatch)


def test_a_dataset_on_the_hub_is_fetched_for_training(fake_hub: FakeHub) -> None:
    records, source = read(Path("org/name"))
    assert [record.value for record in records] == [{"a": 1}]
    assert fake_hub.asked == [
        {"repo_type": "dataset", "allow_patterns": ["data/train-0.jsonl"]},
    ]
    assert "test-0.jsonl" in str(source.notes[0])


def test_a_dataset_that_was_fetched_needs_no_connection(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fake_hub.cached = True
    records, source = read(Path("org/name"))
    assert [record.value for record in records] == [{"a": 1}]
    assert "not in reach" in str(source.notes[-1])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("no route"), "out of reach (no route)"),
        (TimeoutError(), "out of reach (TimeoutError)"),
        (404, "neither a file here nor a dataset"),
        (403, "gated"),
    ],
)
def test_what_the_hub_refuses_is_said(
    error: Exception | int, words: str, fake_hub: FakeHub
) -> None:
    from urllib.error import HTTPError

    if isinstance(error, int):
        error = HTTPError("url", error, "reason", {}, None)  # type: ignore[arg-type]
    fake_hub.error = error
    assert words in refusal("org/name").message


def test_several_datasets_in_one_repository_are_not_mixed(fake_hub: FakeHub) -> None:
    (fake_hub.folder / "other").mkdir()
    (fake_hub.folder / "other/train.jsonl").write_text('{"a": 3}')
    assert "data, other" in refusal("org/name").message


# Properties

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


@given(
    st.lists(OBJECTS, min_size=1, max_size=6),
    st.sampled_from([None, 0, 1, 4]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 50),
)
def test_strict_json_is_read_as_the_standard_library_does(
    rows: list[Any], indent: int | None, ascii_only: bool, array: bool, block: int
) -> None:
    if array:
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    else:
        text = "\n".join(json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows)
    reader, notes = reader_of(text.encode(), "array" if array else "lines", block)
    assert [(record.value, record.broken) for record in reader] == [(row, "") for row in rows]
    assert not notes.collected()


def reader_of(content: bytes, kind: str, block: int) -> tuple[Iterator[Record], Notes]:
    """Records of bytes that come a few at a time."""
    notes = Notes()
    blocks = iter([content[n : n + block] for n in range(0, len(content), block)])
    if kind == "lines":
        return iter(JsonLines(blocks, notes)), notes
    text = Text(blocks)
    text.drop_byte_order_mark()
    if kind == "rows":
        return iter(JsonRows(text, notes)), notes
    if kind == "csv":
        return iter(CsvRows(text, notes, 0, delimiter=",")), notes
    text.position += 1
    return iter(JsonRows(text, notes, array=True)), notes


PIECES = [
    *('"', "{", "}", "[", "]", ",", ":", "\n", "\n", "\r\n", " ", "//", "/*", "*/", "\\", "\t"),
    *('{"a": 1}', '{"a": 1}\n', '{"a": [1, 2,],}', '{"b": "x // y"}', "NaN", '"\\ud83d"', '"é"'),
    *(
        '{"a": {"b": 1}}\n',
        '{\n "a": 1\n}\n',
        "{\n",
        '"a": 2,\n',
        "// c\n",
        "/* c\n */",
        "12",
        "\0",
    ),
    *('a,"b\n', '""', "x,y\n"),
]


# How far a comment of several lines reaches beside broken rows depends on what was mended before.
IN_LINES = [piece for piece in PIECES if "/*" not in piece and "*/" not in piece]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(IN_LINES), max_size=25).map("".join).map(str.encode),
    st.sampled_from(["lines", "rows", "array", "csv"]),
    st.integers(1, 30),
)
def test_where_a_window_ends_changes_nothing(content: bytes, kind: str, block: int) -> None:
    if kind == "array":
        content = b"[" + content
    whole, whole_notes = reader_of(content, kind, len(content) + 1)
    pieces, notes = reader_of(content, kind, block)
    records = list(whole)
    assert list(pieces) == records
    if not any(record.broken for record in records):
        assert set(notes.collected()) == set(whole_notes.collected())


@pytest.mark.parametrize("block", range(1, 60, 4))
def test_a_window_may_end_anywhere_in_a_tutorial(block: int) -> None:
    whole, whole_notes = reader_of(TUTORIAL.encode(), "lines", 1000)
    pieces, notes = reader_of(TUTORIAL.encode(), "lines", block)
    assert list(pieces) == list(whole)
    assert set(notes.collected()) == set(whole_notes.collected())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES) | st.just('{"c": 1, "d": "xy"}\n' * 5), max_size=40),
    st.integers(1, 6),
)
def test_parts_give_the_rows_of_the_whole(pieces: list[str], count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "a.jsonl"), Path(folder, "b.json")
        one.write_text('{"z": 0}\n{"z": 1}\n' + "".join(pieces).replace("/*", ""), newline="")
        two.write_text('[{"a": 1}, {"a": 2}]')
        source = open_source([one, two])
        whole = list(source.records())
        parts = [pickle.loads(pickle.dumps(part)) for part in source.parts(count)]
        assert len(parts) <= count
        assert [record for part in parts for record in part.records()] == whole
        assert sum(part.size_bytes for part in parts) == source.size_bytes
        notes = merged([*open_source([one, two]).notes, *(n for p in parts for n in p.notes)])
        if not any(record.broken for record in whole):
            assert set(notes) == set(source.notes)


def test_a_large_file_is_split_evenly(write: Write) -> None:
    path = write(LINES * 200)
    parts = open_source([path]).parts(4)
    assert len(parts) == 4
    assert max(part.size_bytes for part in parts) < path.stat().st_size / 4 + 5000
    records = [record for part in parts for record in part.records()]
    assert [record.number for record in records] == list(range(1, len(ROWS) * 200 + 1))


def test_a_file_is_not_split_inside_a_row(write: Write) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 50}] * 2}
    pretty = json.dumps(row, indent=0) + "\n"
    assert row_start(write(pretty * 50), 100) is None
    assert row_start(write('[{"a": 1},\n{"a": 2},\n{"a": 3}\n,{"a": 4}]'), 5) is None
    assert row_start(write('{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a": 4}\n'), 5) == 18


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with bytes changed, left out, put in, or its end cut off."""
    junk = st.binary(max_size=8) | st.sampled_from([p.encode() for p in PIECES])
    edit = st.tuples(st.integers(0, len(content)), st.integers(0, 20), junk)

    def apply(edits: list[tuple[int, int, bytes]], end: int) -> bytes:
        changed = content
        for at, length, new in edits:
            changed = changed[:at] + new + changed[at + length :]
        return changed[:end]

    ends = st.just(10**6) | st.integers(0, len(content))
    return st.builds(apply, st.lists(edit, max_size=3), ends)


SEEDS = {
    name: content
    for name, content in FILES.items()
    if name in ("JSON lines", "pretty array", "wrapped", "CSV", "gzip", "zstd", "Parquet")
    or name in ("Arrow file", "Arrow stream", "xz", "bzip2", "utf-16-le with BOM")
} | {"comments": TUTORIAL.encode()}

HOSTILE = (
    st.binary(max_size=300)
    | st.binary(max_size=200).map(gzip.compress)
    | st.binary(max_size=200).map(zstd)
    | st.lists(st.sampled_from(PIECES), max_size=30).map("".join).map(str.encode)
    | st.lists(st.sampled_from(PIECES), max_size=30).map("".join).map(lambda t: t.encode("utf-16"))
    | st.sampled_from(sorted(SEEDS)).flatmap(lambda name: mutated(SEEDS[name]))
)


@settings(max_examples=300, deadline=None)
@given(HOSTILE, st.sampled_from(["a.jsonl", "a.csv", "a"]))
def test_any_bytes_give_records_or_an_error_for_people(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            records, source = read(path)
        except InputError as error:
            assert error.message and error.hint
            return
    assert all(first.number <= second.number for first, second in pairwise(records))
    for record in records:
        assert record.number >= 1 and isinstance(record.broken, str)
        assert record.value is None or not record.broken
        json.dumps(record.value, ensure_ascii=False, default=str).encode()
    assert all(str(note) for note in source.notes)


@pytest.mark.parametrize(
    ("name", "content", "most_bytes"),
    [
        ("a.jsonl", LINES * 5000, 2**23),
        ("a.json", b"[" + b",".join(LINES.splitlines() * 5000) + b"]", 2**23),
        ("a.csv", b"a,b\n" + b'1,"x y z"\n' * 10**5, 2**23),
        ("a.parquet", parquet(ROWS * 1000), 2**24),
        ("zeros.gz", gzip.compress(b'{"a": 1}\n' + bytes(100 * 2**20)), 8 * MAX_ROW_CHARACTERS),
        ("blanks.gz", gzip.compress(b'{"a": 1}\n' + b" " * (100 * 2**20)), 8 * MAX_ROW_CHARACTERS),
        ("quote.jsonl", b'{"a": "' + b"x" * (60 * 2**20), 8 * MAX_ROW_CHARACTERS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_little_is_held_in_memory(name: str, content: bytes, most_bytes: int, write: Write) -> None:
    source = open_source([write(content, name)])
    tracemalloc.start()
    try:
        for _ in source.records():
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most_bytes


@pytest.mark.parametrize("template", ["[{}]", '[{{"text": {}}}]', '{{"text": {}}}', "// c\n{}"])
@pytest.mark.parametrize(
    ("depth", "fits"), [(150, True), (250, False), (900, False), (5000, False)]
)
def test_how_deep_rows_may_nest_is_the_same_wherever_a_reader_is_called_from(
    template: str, depth: int, fits: bool, write: Write
) -> None:
    """Python's limit counts the frames of its callers, too."""
    nested = "[" * depth + "]" * depth
    row = {"data": nested, "text": "a"}
    text = template.format(json.dumps(row).replace(json.dumps(nested), nested))
    path = write(text + "\n" if template[0] != "[" else text)

    def read_below(frames: int) -> list[Any]:
        return read_below(frames - 1) if frames else [r.broken for r in read(path)[0]]

    expected = [""] if fits else ["JSON nested too deeply"]
    assert read_below(0) == read_below(300) == read_below(500) == expected


def test_a_deep_row_that_is_broken_too_is_too_deep_for_every_caller(write: Write) -> None:
    path = write('{"a": ' + '{"messages":[' * 470 + "1\n" + '{"a": 1}\n' * 3)

    def read_below(frames: int) -> list[Any]:
        return read_below(frames - 1) if frames else [r.broken for r in read(path)[0]]

    assert read_below(0) == read_below(400) == ["JSON nested too deeply", "", "", ""]


def test_lists_side_by_side_are_not_nested(write: Write) -> None:
    row = {"a": [[{"b": "[[{"}]] * 300}
    assert values(write(json_lines([row, row]))) == [row, row]


@pytest.mark.parametrize("broken", ["},\n", "],\n\n", ",1]\n", '"a": [1,],\n', '{"a": [1,],]\n'])
def test_many_broken_rows_take_no_longer_than_their_text(
    broken: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is cleaned of comments and commas to read a row is not a large piece for each."""
    cleaned = 0
    whole = json_rows._Clean.__init__

    def counted(self: Any, begin: int = 0, text: str = "") -> None:
        nonlocal cleaned
        cleaned += len(text)
        whole(self, begin, text)

    monkeypatch.setattr(json_rows._Clean, "__init__", counted)
    path = write('{"a": 1}\n' + broken * 3000)
    records, _ = read(path)
    assert len(records) > 1000 and all(record.broken for record in records[1:])
    assert cleaned < 600 * len(records)


def test_notes_of_parts_are_merged() -> None:
    notes = [Note("x", 0, 2, (1, 4)), Note("x", 0, 7, (9, 10, 11, 12, 13)), Note("x", 1), Note("y")]
    assert merged(notes) == (Note("x", 0, 9, (1, 4, 9, 10, 11)), Note("x", 1), Note("y"))
