"""A data file's bytes, block by block: unpacked, as text.

Nothing but a few blocks is held in memory, however well a file is compressed.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from ftplan.launcher.data.records import MAX_ROW_CHARACTERS
from ftplan.planner.errors import InputError

# Short: what is in the processor's cache is read faster, and Python counts the lines of a whole
# window for each JSON error.
BLOCK_BYTES = 2**16

_UNPACKED_BYTES = 2**20

Compression = Literal["", "gzip", "zstd", "bzip2", "xz"]
Encoding = Literal["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]

Progress = Callable[[int], None]
"""Told how many more bytes of a file, as it is stored, were read."""

_MAGIC: tuple[tuple[bytes, Compression], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
)

# UTF-32's little-endian mark begins with UTF-16's.
BYTE_ORDER_MARKS: tuple[tuple[bytes, Encoding], ...] = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class Damaged(Exception):
    """Compressed data that ends early or is wrong from here on."""


def compression_of(head: bytes) -> Compression:
    """By a file's first bytes."""
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


def stored_blocks(
    path: Path, begin: int = 0, end: int | None = None, progress: Progress | None = None
) -> Iterator[bytes]:
    """A file's bytes from `begin` to `end` as they are stored. Raises InputError."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            left = None if end is None else end - begin
            while block := file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
                if left is not None:
                    left -= len(block)
                if progress is not None:
                    progress(len(block))
                yield block
    except FileNotFoundError:
        raise InputError(f"no such file: `{path}`", "check the path") from None
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror or error}") from error


def unpacked_blocks(
    path: Path, compression: Compression, progress: Progress | None = None
) -> Iterator[bytes]:
    """A file's bytes without its compression.

    Raises Damaged, after what could be unpacked, for a file that is cut off or corrupt; InputError
    where the package for a compression is missing.
    """
    stored = stored_blocks(path, progress=progress)
    if not compression:
        return stored
    if compression == "zstd" and (reader := _zstd_reader()) is not None:
        return _read_through(reader(_File(stored)))
    return _decompressed(stored, _decompressor(compression, path), compression)


def _decompressor(compression: Compression, path: Path) -> Callable[[], Any]:
    """What makes a decompressor in the manner of `bz2.BZ2Decompressor`."""
    if compression == "gzip":
        return _Gzip
    if compression == "bzip2":
        import bz2

        return bz2.BZ2Decompressor
    if compression == "xz":
        import lzma

        return lzma.LZMADecompressor
    try:
        from compression import zstd  # type: ignore[import-not-found]  # Python 3.14
    except ImportError:
        raise InputError(
            f"`{path}` is compressed with zstd, which needs a package here",
            "`pip install pyarrow`, or unpack it: `zstd -d FILE`",
        ) from None
    made: Callable[[], Any] = zstd.ZstdDecompressor
    return made


class _Gzip:
    """zlib's decompressor with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        import zlib

        self._zlib = zlib.decompressobj(wbits=31)
        self._input = b""

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._input

    def decompress(self, data: bytes, max_length: int) -> bytes:
        unpacked = self._zlib.decompress(self._input + data, max_length)
        self._input = self._zlib.unconsumed_tail
        return unpacked


def _decompressed(
    stored: Iterator[bytes], make: Callable[[], Any], compression: str
) -> Iterator[bytes]:
    """Unpacks any number of streams one after the other, a few MiB at a time."""
    unpacker, begun = make(), False
    for block in stored:
        data = block
        while True:
            try:
                unpacked = unpacker.decompress(data, _UNPACKED_BYTES)
            except Exception as error:  # each library has its own
                raise Damaged(f"its {compression} data is corrupt ({error})") from error
            begun = begun or bool(data)
            if unpacked:
                yield unpacked
            data = b""
            if unpacker.eof:
                # Zeros may pad the end, as tapes and some servers write it.
                data = unpacker.unused_data.lstrip(b"\x00")
                unpacker, begun = make(), False
                if not data:
                    break
            elif unpacker.needs_input or not unpacked:
                break
    if begun:
        raise Damaged(f"the file ends early: its {compression} data is cut off")


def _zstd_reader() -> Callable[[Any], Any] | None:
    """pyarrow's reader of zstd; None leaves it to the standard library."""
    try:
        import pyarrow
    except ImportError:
        return None
    return lambda file: pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


class _File:
    """Blocks as the file that pyarrow wants."""

    closed = False

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        size = len(self._rest) if size < 0 else size
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _read_through(file: Any) -> Iterator[bytes]:
    while True:
        try:
            block = file.read(BLOCK_BYTES)
        except InputError:
            raise
        except Exception as error:  # pyarrow's, of many kinds
            raise Damaged(f"its zstd data is cut off or corrupt ({error})") from error
        if not block:
            return
        yield block


class Text:
    """A window on a file's text: `text` from `position` on, lengthened by `more`.

    `final`: the file ends with it. `damage`: why it ends early. `escaped`: bytes that are not
    UTF-8 stand in it as lone surrogates (PEP 383).
    """

    def __init__(
        self,
        blocks: Iterator[bytes],
        encoding: Encoding = "utf-8",
        *,
        first_line: int = 1,
        lone_returns: bool = False,
    ) -> None:
        self.text = ""
        self.position = 0
        self.final = False
        self.damage = ""
        self.escaped = False
        self._blocks = blocks
        self._decode = getattr(codecs, encoding.replace("-", "_") + "_decode")
        self._errors = "surrogateescape" if encoding == "utf-8" else "backslashreplace"
        self._rest = b""
        self._line = first_line
        self._counted = 0
        self._dropped = 0  # characters of the window's first line that stood before it
        self._lone_returns = lone_returns

    def line(self, position: int) -> int:
        """The number of the line of a position that is not before `position`."""
        return self._line + self.text.count("\n", self._counted, position)

    def column(self, position: int) -> int:
        """The column of a position that is not before `position`, from 1."""
        line_begin = self.text.rfind("\n", 0, position) + 1
        return position - line_begin + 1 + (0 if line_begin else self._dropped)

    def advance(self, position: int) -> int:
        """Move to a position; returns its line."""
        self._line += self.text.count("\n", self._counted, position)
        self._counted = self.position = position
        return self._line

    def more(self) -> bool:
        """Forget what is before `position`, and read at least as much again; False at the end."""
        if self.final:
            return False
        self.advance(self.position)
        self._dropped = self.column(self.position) - 1
        pieces = [self.text[self.position :]]
        wanted = len(pieces[0])
        added = 0
        while not self.final and added <= wanted:
            pieces.append(self._block())
            added += len(pieces[-1])
        self.text = "".join(pieces)
        self.position = self._counted = 0
        return True

    def drop_byte_order_mark(self) -> None:
        if not self.text:
            self.more()
        if self.text.startswith("\ufeff"):
            self.position = self._counted = 1

    @property
    def too_long(self) -> bool:
        """What is left is longer than any row may be."""
        return len(self.text) - self.position > MAX_ROW_CHARACTERS

    @property
    def at_line_end(self) -> bool:
        return self.text.startswith("\n", self.position)

    def rest(self) -> bytes:
        """The bytes of the window from `position` on; of UTF-8 only."""
        return self.text[self.position :].encode("utf-8", "surrogateescape") + self._rest

    def _block(self) -> str:
        try:
            block = next(self._blocks, None)
        except Damaged as damage:
            self.damage = str(damage)
            block = None
        self.final = block is None
        data = self._rest + (block or b"")
        try:
            text, used = self._decode(data, "strict", self.final)
        except UnicodeDecodeError:
            self.escaped = True
            text, used = self._decode(data, self._errors, self.final)
        self._rest = data[used:]
        return text.replace("\r", "\n") if self._lone_returns else str(text)
