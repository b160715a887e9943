"""Where ftplan keeps what it learns on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import FtplanError


def data_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_DATA_HOME/ftplan`, or `~/.local/share/ftplan`, which may not be there. A relative path
    counts as none (XDG Base Directory Specification)."""
    home = environ.get("XDG_DATA_HOME") or ""
    if not os.path.isabs(home):
        home = os.path.expanduser("~/.local/share")
    return Path(home) / "ftplan"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else who asks for it is in here meanwhile. Makes the folder, for this user alone;
    raises OSError where that cannot be."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remember(ui: Ui, run: RunDir) -> None:
    """Write a finished run into the history. Where that cannot be done it is said, no more."""
    try:
        from ftplan.launcher.history import History, stored_run

        History(data_folder(), ui.warn).add([stored_run(run)])
    except FtplanError as error:
        ui.warn(f"this run is not kept in the history: {error.message}")
    except ImportError as error:  # a Python that was built without SQLite
        ui.warn(f"this run is not kept in the history: {error}")
