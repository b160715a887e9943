"""metrics.jsonl, a row at a time: each stands there whole and once, whatever ends the process.

Where the disk is full, rows wait in memory until there is room.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftplan.launcher.disk_full import is_disk_full

# Rows that found no room, by file.
_WAITING: dict[Path, bytes] = {}


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One more line, or none for now where the disk is full. JSON has no number that is not finite:
    such are `null`."""
    line = json.dumps(_as_json(row), allow_nan=False).encode() + b"\n"
    _WAITING[path] = _WAITING.get(path, b"") + line
    write_waiting(path)


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _as_json(each) for name, each in value.items()}
    return [_as_json(each) for each in value] if isinstance(value, list | tuple) else value


def write_waiting(path: Path, *, sync: bool = False) -> bool:
    """Write the rows that wait; whether none does any more. `sync`: bring them to the disk."""
    try:
        _append(path, _WAITING.get(path, b""), sync)
    except OSError as error:
        if not is_disk_full(error):
            raise
        return False
    _WAITING.pop(path, None)
    return True


def num_bytes(path: Path) -> int:
    """How long the file is now; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _append(path: Path, lines: bytes, sync: bool) -> None:
    """All of the lines, or nothing of them."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        if lines and before and os.pread(descriptor, 1, before - 1) != b"\n":
            lines = b"\n" + lines  # below a row that a kill has cut off
        try:
            while lines:
                lines = lines[os.write(descriptor, lines) :]
            if sync:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
