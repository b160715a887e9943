"""Results that are written whole or not at all, and that wait for room where the disk is full."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ftplan.launcher.disk_full import free_bytes, is_disk_full
from ftplan.launcher.manifest import sync_folder
from ftplan.planner.units import format_bytes

# How often room is looked for.
_WAIT_SECONDS = 2.0


def write_whole(
    target: Path,
    write: Callable[[Path], None],
    notice: Callable[[str], None],
    make_room: Callable[[], None] = lambda: None,
) -> None:
    """A file or a folder: written beside, brought to the disk, and renamed.

    Where there is no room it waits, as what is written exists nowhere else: `notice` tells of it
    once, `make_room` removes what can be spared.
    """
    beside = target.with_name(f".{target.name}.tmp")
    waited = False
    while not _written(beside, write):
        make_room()
        if _written(beside, write):
            break
        if not waited:
            waited = True
            notice(
                f"no room for `{target}`: {format_bytes(free_bytes(target.parent))} is free. "
                "The run waits, with the weights in memory: make room, and it goes on by itself"
            )
        time.sleep(_WAIT_SECONDS)
    if target.is_dir():
        shutil.rmtree(target)
    beside.replace(target)
    sync_folder(target.parent)
    if waited:
        notice(f"there is room again: `{target}` is saved")


def _written(beside: Path, write: Callable[[Path], None]) -> bool:
    """Whether there was room for all of it; nothing is left otherwise."""
    _remove(beside)
    try:
        write(beside)
        for path in (beside, *beside.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            else:
                sync_folder(path)
    except BaseException as error:
        _remove(beside)
        if isinstance(error, Exception) and is_disk_full(error):
            return False
        raise
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
