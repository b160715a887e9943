"""Which files of a folder, or of a repository on the Hub, hold the rows to train on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from msgspec import Struct

from ftplan.launcher.data.detect import (
    COLUMN_SUFFIXES,
    COMPRESSED_SUFFIXES,
    JSON_SUFFIXES,
    TABLE_SUFFIXES,
)
from ftplan.planner.errors import InputError

_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *COLUMN_SUFFIXES)

# What `datasets` and the Hub write beside the rows.
_DESCRIPTIONS = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    *("config.json", "tokenizer.json", "tokenizer_config.json", "package.json"),
)

_HELD_OUT = {"test", "tests", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
_TRAINING = {"train", "training"}


class Chosen(Struct, frozen=True):
    """Paths in natural order, and what was left out and why."""

    paths: tuple[str, ...]
    remarks: tuple[str, ...]


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that puts `part-2` before `part-10`."""
    pieces = re.split(r"(\d+)", name.casefold())
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in pieces if p]


def is_data(path: str) -> bool:
    """By its name: what a folder may hold besides is not looked into."""
    name = PurePosixPath(path).name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name_of_json = name.removesuffix(suffix)
        if name_of_json != name:
            return name_of_json.endswith(_SUFFIXES)
    return name.endswith(_SUFFIXES) and name not in _DESCRIPTIONS


def choose(names: Iterable[str]) -> Chosen:
    """The files to train on, of those in a folder: data files, and where some are named for
    training and others for evaluation, only the former.
    """
    ordered = sorted(names, key=natural_order)
    data = [name for name in ordered if is_data(name)]
    others = [name for name in ordered if not is_data(name)]
    remarks = []
    held_out = [name for name in data if _words(name) & _HELD_OUT and not _words(name) & _TRAINING]
    if held_out and len(held_out) < len(data):
        data = [name for name in data if name not in held_out]
        remarks.append(f"left out, by their names not for training: {_listed(held_out)}")
    if others and data:
        remarks.append(f"left out, not data files: {_listed(others)}")
    return Chosen(tuple(data), tuple(remarks))


def files_below(folder: Path) -> Chosen:
    """The data files in a folder and those below it. Raises InputError where there are none."""
    names = []
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in files:
            if not name.startswith("."):
                names.append((Path(parent) / name).relative_to(folder).as_posix())
    chosen = choose(names)
    if not chosen.paths:
        held = f"it holds {_listed(sorted(names, key=natural_order))}" if names else "it is empty"
        raise InputError(
            f"no data file in the folder `{folder}`: {held}",
            f"a data file ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}",
        )
    return chosen


def _refuse(error: OSError) -> None:
    raise InputError(f"cannot read the folder `{error.filename}`: {error.strerror}") from error


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
