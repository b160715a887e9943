"""What a data file is, by its first bytes. Its name is only a hint, for text that may be either."""

from __future__ import annotations

import contextlib
import io
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from ftplan.launcher.data import columns
from ftplan.launcher.data.csv_rows import (
    DELIMITER_NAMES,
    likely_delimiter,
    missing_header,
    parse,
    surrogate,
)
from ftplan.launcher.data.shapes import FIELDS
from ftplan.launcher.data.streams import (
    BYTE_ORDER_MARKS,
    Compression,
    Damaged,
    Encoding,
    Text,
    compression_of,
    stored_blocks,
    unpacked_blocks,
)
from ftplan.planner.errors import InputError

Format = Literal["JSON lines", "JSON", "CSV", "TSV", "Parquet", "Arrow", "text"]

COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".json5", ".jsonc")
COLUMN_SUFFIXES = (".parquet", ".arrow", ".feather")

HEAD_BYTES = 2**20

_KINDS = "JSON, JSON lines, CSV, TSV, Parquet and Arrow"

# Lists of objects that a row may hold: their file is no object around the rows.
_LISTS_IN_ROWS = frozenset(
    (
        *("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "history"),
        *("tools", "functions", "prompt", "completion", "chosen", "rejected", "completions"),
        *("responses", "answers", "choices"),
    )
)

_OTHER_FILES = (
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", "unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save the sheet as CSV"),
    (b"%PDF", "a PDF document", "write its text as rows: one JSON object a line"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    (b"GGUF", "a model, not data", "give the file of rows to train on"),
    (b"\x93NUMPY", "a NumPy array", "write rows of text: one JSON object a line"),
)

_OPENING = re.compile(r"(?:\s|//[^\n]*(?:\n|\Z)|/\*.*?\*/)*", re.DOTALL)
_BLANK = re.compile(r"(?:\s|//[^\n]*(?:\n|\Z)|/\*.*?\*/|,)*", re.DOTALL)
_KEY = re.compile(r'\s*,?\s*("(?:[^"\\\n]|\\.)*")\s*:\s*')
_LIST_OF_OBJECTS = re.compile(r"\[\s*\{")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")


class SourceFile(Struct, frozen=True, kw_only=True):
    """A data file and how it is read.

    `size_bytes` as it is stored; `modified_ns` so that a change under a reader is noticed;
    `array_at`: the characters before an array's rows; `wrapper`: the key of the object that holds
    the array.
    """

    path: Path
    format: Format
    size_bytes: int
    modified_ns: int
    compression: Compression = ""
    encoding: Encoding = "utf-8"
    delimiter: str = ""
    array_at: int = 0
    wrapper: str = ""
    lone_returns: bool = False
    marked: bool = False

    @property
    def unit(self) -> Literal["line", "row"]:
        """What `Record.number` counts."""
        return "line" if self.format in ("JSON lines", "CSV", "TSV", "text") else "row"

    @property
    def splits(self) -> bool:
        """Whether reading may begin in its middle."""
        return (
            self.format == "JSON lines"
            and not self.compression
            and self.encoding == "utf-8"
            and not self.lone_returns
        )


class EmptyFileError(InputError):
    """A file without a byte, or of blanks only."""


def look_at(path: Path) -> tuple[SourceFile, tuple[str, ...]]:
    """What a file is, and what to say about it. Raises InputError for what holds no rows."""
    size, modified = _size(path)
    stored_head = next(stored_blocks(path), b"")
    if not stored_head:
        raise EmptyFileError(f"`{path}` is empty", "it needs one JSON object a line")
    compression = compression_of(stored_head)
    head, whole = _head(path, compression)
    kind = columns.format_of(head)
    if kind is not None:
        if compression:
            raise InputError(f"`{path}` is {kind} inside {compression}", "unpack it first")
        return SourceFile(path=path, format=kind, size_bytes=size, modified_ns=modified), ()
    _refuse_others(path, head)
    encoding, marked, guessed = _encoding(head)
    text = _head_text(head, encoding, whole)
    if encoding == "utf-8" and not guessed:
        _refuse_binary(path, text)
    if not text.strip():
        if whole:
            raise EmptyFileError(f"`{path}` is empty", "it needs one JSON object a line")
        raise InputError(f"`{path}`: its first MiB is blank", _advice())
    lone_returns = "\r" in text and "\n" not in text
    if lone_returns:
        text = text.replace("\r", "\n")
    fields = _text_format(path, text, whole)
    file = SourceFile(
        path=path,
        size_bytes=size,
        modified_ns=modified,
        compression=compression,
        encoding=encoding,
        marked=marked,
        lone_returns=lone_returns,
        **fields,
    )
    return file, tuple(_remarks(file, guessed))


def _remarks(file: SourceFile, guessed: bool) -> Iterator[str]:
    if file.encoding != "utf-8":
        name = file.encoding.upper().removesuffix("-LE").removesuffix("-BE")
        yield f"{name} text{' without a byte order mark' if guessed else ''}: read as such"
    if file.delimiter in (";", "|"):
        yield f"fields are separated by {DELIMITER_NAMES[file.delimiter]}"
    if file.wrapper:
        yield f"the rows are the list `{file.wrapper}` of an object"
    expected = _suffix(file.path)
    known = {".parquet": "Parquet", ".arrow": "Arrow", ".csv": "CSV", ".tsv": "TSV"}
    if known.get(expected, file.format) != file.format:
        yield f"holds {file.format}, whatever its name says"


def _suffix(path: Path) -> str:
    """Without the suffix of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _size(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no such file: `{path}`", "check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read `{path}`: {reason}", "check the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            f"`{path}` is not a plain file", "it is read more than once: write it to a file first"
        )
    return status.st_size, status.st_mtime_ns


def _head(path: Path, compression: Compression) -> tuple[bytes, bool]:
    """The first MiB without compression, and whether that is all of it."""
    pieces, length = [], 0
    try:
        for block in unpacked_blocks(path, compression):
            pieces.append(block)
            length += len(block)
            if length > HEAD_BYTES:
                return b"".join(pieces)[:HEAD_BYTES], False
    except Damaged as damage:
        if not pieces:
            raise InputError(f"`{path}`: {damage}", "fetch or write it again") from None
        return b"".join(pieces), False
    return b"".join(pieces), True


def _refuse_others(path: Path, head: bytes) -> None:
    for magic, name, advice in _OTHER_FILES:
        if head.startswith(magic):
            raise InputError(f"`{path}` is {name}", advice)
    if head[257:262] == b"ustar":
        raise InputError(f"`{path}` is a tar archive", "unpack it, then give the folder")


def _encoding(head: bytes) -> tuple[Encoding, bool, bool]:
    """The encoding, whether a mark says so, and whether it was guessed.

    Without a mark by where zeros stand in the first two characters, as RFC 4627, section 3, has it:
    those of JSON are ASCII.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding, True, False
    zeros = "".join("0" if byte == 0 else "x" for byte in head[:8])
    guesses: dict[str, Encoding] = {
        "x0x0": "utf-16-le",
        "0x0x": "utf-16-be",
        "x000x000": "utf-32-le",
        "000x000x": "utf-32-be",
    }
    for pattern, encoding in guesses.items():
        if zeros.startswith(pattern):
            return encoding, False, True
    return "utf-8", False, False


def _head_text(head: bytes, encoding: Encoding, whole: bool) -> str:
    text = Text(iter([head]), encoding)
    text.drop_byte_order_mark()
    if whole:
        while text.more():
            pass
    return text.text[text.position :]


def _refuse_binary(path: Path, text: str) -> None:
    """Control characters and bytes that are no UTF-8 in more than a tenth of the first KiB."""
    start = text[:1024]
    odd = len(_CONTROL.findall(start)) + sum("\udc80" <= c <= "\udcff" for c in start)
    if odd > max(4, len(start) / 10) and not start.lstrip("\0").lstrip().startswith(("{", "[")):
        raise InputError(f"`{path}` is neither text nor a data file that ftplan knows", _advice())


def _advice() -> str:
    return f'{_KINDS} are read; for example {{"instruction": "...", "output": "..."}} in each line'


def _text_format(path: Path, text: str, whole: bool) -> dict[str, Any]:
    """The fields of SourceFile that tell how text is read."""
    suffix = _suffix(path)
    begin = _OPENING.match(text).end()  # type: ignore[union-attr]
    opening = text[begin : begin + 1]
    if opening == "[" and not _is_line_of_list(text, begin):
        return {"format": "JSON", "array_at": begin + 1}
    if opening in ("{", "[") and (suffix not in TABLE_SUFFIXES or _decodes(text, begin)):
        return _objects(path, text, begin, whole)
    if suffix in TABLE_SUFFIXES:
        return _table(path, text, suffix)
    if re.search(r"^\s*\{", text, re.MULTILINE):  # its first rows are broken
        return {"format": "JSON lines"}
    if suffix in TEXT_SUFFIXES and not _names_fields(text):
        return {"format": "text"}
    if likely_delimiter(text):
        return _table(path, text, suffix)
    if suffix in JSON_SUFFIXES:
        return {"format": "JSON lines"}
    raise InputError(f"`{path}` holds text, but no rows of a format that ftplan knows", _advice())


def _names_fields(text: str) -> bool:
    """Whether the first line of a table names fields of rows: in prose commas name nothing."""
    delimiter = likely_delimiter(text)
    first = text.lstrip().partition("\n")[0]
    names = {name.strip().strip('"').lower() for name in first.split(delimiter or "\n")}
    return delimiter is not None and not names.isdisjoint(FIELDS)


def _decodes(text: str, begin: int) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.JSONDecoder().raw_decode(text, begin)
        return True
    return False


def _is_line_of_list(text: str, begin: int) -> bool:
    """A list of no objects, with another behind it in the next line: rows that are lists."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return False
    rest = text[end:].lstrip()
    return rest.startswith("[") and not any(isinstance(item, dict) for item in value)


def _objects(path: Path, text: str, begin: int, whole: bool) -> dict[str, Any]:
    """Rows one after the other, or the one object around a list of them."""
    rows = {"format": "JSON lines"}
    first_key = _KEY.match(text, begin + 1)
    if first_key and re.search(rf"\n\s*\{{\s*{re.escape(first_key.group(1))}", text[begin:]):
        return rows
    try:
        value, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        pass
    else:
        if not whole or _BLANK.match(text, end).end() < len(text):  # type: ignore[union-attr]
            return rows
        if isinstance(value, dict) and _is_columns(value):
            raise InputError(
                f"`{path}` holds columns, not rows",
                "write a row a line, with pandas: "
                "`frame.to_json(path, orient='records', lines=True)`",
            )
    found = _list_of_objects(text, begin)
    if found is None:
        return rows
    key, array_at = found
    return {"format": "JSON", "array_at": array_at, "wrapper": key}


def _is_columns(value: dict[str, Any]) -> bool:
    """One object whose fields are all lists of texts, or all objects keyed by row numbers."""
    fields = list(value.values())
    if len(fields) < 2 or not _LISTS_IN_ROWS.isdisjoint(value):
        return False
    lists = all(isinstance(f, list) and f and isinstance(f[0], str) for f in fields)
    numbered = all(isinstance(f, dict) and f and all(k.isdecimal() for k in f) for f in fields)
    return lists or numbered


def _list_of_objects(text: str, begin: int) -> tuple[str, int] | None:
    """The first field of an object that holds rows: its key, and where its first row may begin."""
    decoder = json.JSONDecoder()
    position = begin + 1
    while (match := _KEY.match(text, position)) is not None:
        try:
            key = json.loads(match.group(1))
            opening = _LIST_OF_OBJECTS.match(text, match.end())
            if opening and key not in _LISTS_IN_ROWS and not surrogate(key):
                return str(key), match.end() + 1
            _, position = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return None
    return None


def _table(path: Path, text: str, suffix: str) -> dict[str, Any]:
    hint = "\t" if suffix in (".tsv", ".tab") else ","
    delimiter = likely_delimiter(text, hint) or hint
    try:
        names = next(row for row in parse(iter(io.StringIO(text, newline="")), delimiter) if row)
    except Exception:  # csv.Error, StopIteration: a first row that is broken or too long
        names = []
    trouble = missing_header([name.strip() for name in names]) if names else "it cannot be read"
    if trouble:
        raise InputError(
            f"`{path}`: its first line does not name the columns: {trouble}",
            "add a first line such as `instruction,output`",
        )
    return {"format": "TSV" if delimiter == "\t" else "CSV", "delimiter": delimiter}
