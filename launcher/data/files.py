"""Data files of any format as a stream of rows.

    source = open_source(["train.jsonl.gz"])
    for record in source.records():
        ...

A row that cannot be read is a record with a reason, not an error: the rest of its file is read.
Files are opened as often as needed, and nothing is held in memory but a few blocks.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from ftplan.launcher.data.columns import column_rows
from ftplan.launcher.data.csv_rows import CsvRows
from ftplan.launcher.data.detect import EmptyFileError, SourceFile, look_at
from ftplan.launcher.data.folders import files_below, is_data
from ftplan.launcher.data.json_lines import JsonLines
from ftplan.launcher.data.json_rows import JsonRows
from ftplan.launcher.data.records import Note, Notes, Record, merged
from ftplan.launcher.data.streams import (
    Progress,
    Text,
    stored_blocks,
    unpacked_blocks,
)
from ftplan.launcher.data.text_rows import TextRows
from ftplan.planner.errors import InputError

__all__ = ["Note", "Record", "Source", "SourceFile", "merged", "open_source"]

# How far behind its even share a part may end, so that it ends between rows.
_MOST_SEARCHED_BYTES = 8 * 2**20

# As huggingface_hub checks it.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class Segment(Struct, frozen=True):
    """A file's bytes that are read: all of them, unless it is split among processes."""

    file: int
    begin: int = 0
    end: int | None = None


class Source:
    """One or several data files. Picklable.

    `notes`: what was left out or let pass; once the rows are read, what they showed too.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        notes: Sequence[Note] = (),
        segments: Sequence[Segment] | None = None,
    ) -> None:
        self.files = tuple(files)
        self.notes = tuple(notes)
        self._opening_notes = self.notes
        self._segments = (
            tuple(Segment(file) for file in range(len(files)))
            if segments is None
            else tuple(segments)
        )

    @property
    def unit(self) -> Literal["line", "row"]:
        """What `Record.number` counts: lines, if it does so in every file."""
        return "line" if all(file.unit == "line" for file in self.files) else "row"

    @property
    def size_bytes(self) -> int:
        """Of the files as they are stored, which `progress` is told of."""
        sizes = (
            (self.files[s.file].size_bytes if s.end is None else s.end) - s.begin
            for s in self._segments
        )
        return sum(sizes)

    def records(self, progress: Progress | None = None) -> Iterator[Record]:
        """Every row, in order. `progress` is told of the bytes read, as they are stored.

        Raises InputError for a file that is gone, that changed since it was looked at, or whose
        compression or columns cannot be read at all.
        """
        self.notes = self._opening_notes
        for segment in self._segments:
            notes = Notes(segment.file)
            try:
                yield from self._rows(segment, notes, progress)
            finally:
                self.notes = merged((*self.notes, *notes.collected()))

    def sha256(self) -> str:
        """Of the files as they are stored; of several, of their digests one after the other."""
        digests = [_sha256(file.path) for file in self.files]
        if len(digests) == 1:
            return digests[0].hex()
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def place(self, number: int, file: int = 0) -> str:
        """`line 3`, or with several files `line 3 of b.jsonl`."""
        where = f"{self.files[file].unit} {number:,}"
        return where if len(self.files) == 1 else f"{where} of {self.files[file].path.name}"

    def parts(self, count: int) -> tuple[Source, ...]:
        """At most `count` sources that give the same rows, in order, with the same numbers.

        JSON lines are split where two lines in a row are a whole object each, so that no row that
        spans lines is cut. Other files stay whole.
        """
        total = sum(file.size_bytes for file in self.files)
        cuts = self._cuts([total * n // count for n in range(1, count)])
        parts: list[list[Segment]] = [[]]
        for index, file in enumerate(self.files):
            begin = 0
            for cut in [offset for at, offset in cuts if at == index]:
                if cut > begin:
                    parts[-1].append(Segment(index, begin, cut))
                    begin = cut
                parts.append([])
            if begin < file.size_bytes:
                parts[-1].append(Segment(index, begin, file.size_bytes if begin else None))
        return tuple(Source(self.files, (), segments) for segments in parts if segments)

    def _cuts(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """(file, offset) between rows, near each wanted offset in all the bytes; ascending."""
        cuts = []
        for offset in wanted:
            for index, file in enumerate(self.files):
                if offset < file.size_bytes:
                    cuts.append((index, self._cut(file, offset)))
                    break
                offset -= file.size_bytes
        return sorted(set(cuts))

    def _cut(self, file: SourceFile, offset: int) -> int:
        found = row_start(file.path, offset) if file.splits else None
        if found is not None:
            return found
        return 0 if offset < file.size_bytes / 2 else file.size_bytes

    def _rows(self, segment: Segment, notes: Notes, progress: Progress | None) -> Iterator[Record]:
        file, index = self.files[segment.file], segment.file
        _refuse_changed(file)
        if file.format == "Parquet" or file.format == "Arrow":
            return column_rows(file.path, file.format, index, file.size_bytes, progress)
        blocks = _blocks(file, segment, progress)
        if file.format == "JSON lines" and file.encoding == "utf-8" and not file.lone_returns:
            first_line = 1 + _lines_before(file.path, segment.begin)
            return iter(JsonLines(blocks, notes, index, first_line))
        text = Text(blocks, file.encoding, lone_returns=file.lone_returns)
        text.drop_byte_order_mark()
        if file.format == "JSON lines":
            return iter(JsonRows(text, notes, index))
        if file.format == "JSON":
            while len(text.text) - text.position < file.array_at and text.more():
                pass
            text.position += file.array_at
            return iter(JsonRows(text, notes, index, array=True, wrapper=file.wrapper))
        if file.format == "text":
            return iter(TextRows(text, notes, index))
        return iter(CsvRows(text, notes, index, delimiter=file.delimiter))


def open_source(paths: Sequence[Path | str]) -> Source:
    """Files, folders, and datasets on the Hub (`org/name`) as one source.

    Nothing is read but the beginning of each file. Raises InputError for a path that is missing,
    for a file without rows or of no known kind, and for a folder without data.
    """
    found, remarks = _expanded(paths)
    files: list[SourceFile] = []
    notes = [Note(remark) for remark in remarks]
    empty: list[EmptyFileError] = []
    for path in found:
        try:
            file, said = look_at(path)
        except EmptyFileError as error:
            empty.append(error)
            continue
        several = f"`{path.name}`: " if len(found) > 1 else ""
        notes += [Note(several + remark, len(files)) for remark in said]
        files.append(file)
    if not files:
        raise empty[0] if empty else InputError("no data file", "give one")
    notes += [Note(f"left out: {error.message}") for error in empty]
    formats = Counter(file.format for file in files)
    if len(formats) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in formats.most_common())
        notes.append(Note(f"the files are of several formats: {counts}"))
    return Source(files, notes)


def row_start(path: Path, offset: int) -> int | None:
    """The first offset behind one where a row of JSON lines begins for certain; None if there is
    none near.

    Two lines in a row that are a whole object each, not indented: within a row of several lines, or
    an array, a comma or a bracket would stand beside them. Only a comment of several lines that
    holds rows deceives it.
    """
    blocks = stored_blocks(path, max(offset - 1, 0), offset + _MOST_SEARCHED_BYTES)
    position, rest, whole_before = max(offset - 1, 0), b"", False
    skipped = False  # the line that the offset stands in
    for block in blocks:
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            whole = skipped and _is_object(line)
            if whole and whole_before:
                return position
            skipped, whole_before = True, whole
            position += len(line) + 1
    return None


def _is_object(line: bytes) -> bool:
    try:
        return line.startswith(b"{") and isinstance(msgspec.json.decode(line), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _expanded(paths: Sequence[Path | str]) -> tuple[list[Path], list[str]]:
    """Plain files, each once, and what is to be said about the choice."""
    found: dict[Path, None] = {}
    remarks: list[str] = []
    for given in paths:
        path = Path(os.path.expanduser(given))
        if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
            chosen = files_below(path)
            new, said = [path / name for name in chosen.paths], chosen.remarks
        elif _may_be_on_hub(str(given)):
            from ftplan.launcher.data.hub import fetch_dataset

            fetched, said = fetch_dataset(str(given))
            new = list(fetched)
        else:
            new, said = [path], ()
        remarks += said
        twice = [p for p in new if p in found]
        if twice:
            remarks.append(f"given twice, read once: `{twice[0]}`")
        found.update(dict.fromkeys(new))
    return list(found), remarks


def _may_be_on_hub(given: str) -> bool:
    """Neither a path here, nor a mistyped one."""
    return (
        _HUB_ID.fullmatch(given) is not None
        and not os.path.exists(given)
        and not os.path.exists(given.split("/")[0])
        and not is_data(given)
    )


def _refuse_changed(file: SourceFile) -> None:
    try:
        status = file.path.stat()
    except OSError as error:
        raise InputError(f"cannot read `{file.path}`: {error.strerror}") from error
    if (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.modified_ns):
        raise InputError(
            f"`{file.path}` changed while it was read", "start again once it is written"
        )


def _blocks(file: SourceFile, segment: Segment, progress: Progress | None) -> Iterator[bytes]:
    if file.compression:
        return unpacked_blocks(file.path, file.compression, progress)
    return stored_blocks(file.path, segment.begin, segment.end, progress)


def _lines_before(path: Path, offset: int) -> int:
    """How many lines end before an offset: some GB a second, so each process counts for itself."""
    if not offset:
        return 0
    return sum(block.count(b"\n") for block in stored_blocks(path, 0, offset))


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    for block in stored_blocks(path):
        digest.update(block)
    return digest.digest()
