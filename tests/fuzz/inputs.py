"""What one try of the fuzzer is: data files, and how they are asked for. Kept in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct


class Options(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the files are read; the defaults are the simplest.

    `tokenizer`: a chat template, plain headings, or lengths by characters. `command`: the command
    line too. `folder`: the files are given as their folder.
    """

    tokenizer: str = ""
    processes: int = 1
    sample: int | None = None
    objective: str | None = None
    columns: dict[str, str] = {}
    command: bool = False
    folder: bool = False

    def simpler(self) -> list[Options]:
        """Each with one thing less."""
        defaults = Options()
        return [
            msgspec.structs.replace(self, **{name: getattr(defaults, name)})
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(defaults, name)
        ]


class Input(Struct, frozen=True):
    """Files by name, and how they are read."""

    files: tuple[tuple[str, bytes], ...]
    options: Options = Options()

    @property
    def size(self) -> int:
        return sum(len(content) for _, content in self.files)

    def save(self, folder: Path) -> None:
        """`folder/options.json`, and the files in `folder/data`; what stood there is gone."""
        data = folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        for old in data.iterdir():
            old.unlink()
        for name, content in self.files:
            (data / name).write_bytes(content)
        (folder / "options.json").write_bytes(msgspec.json.encode(self.options))


def load(folder: Path) -> Input:
    """What `save` wrote."""
    options = msgspec.json.decode((folder / "options.json").read_bytes(), type=Options)
    files = tuple((path.name, path.read_bytes()) for path in sorted((folder / "data").iterdir()))
    return Input(files, options)


def with_file(tried: Input, number: int, content: bytes) -> Input:
    """The input with other content in one of its files."""
    files: list[Any] = list(tried.files)
    files[number] = (files[number][0], content)
    return Input(tuple(files), tried.options)
