"""A full disk among errors, and how much room there is."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from ftplan.launcher.host import existing_parent

# No space; a quota; a limit on the size of files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# safetensors and torch write by code of their own, whose errors have a text and no number:
# `I/O error: No space left on device (os error 28)`; `PytorchStreamWriter failed writing file
# data/0: file write failed`, and `unexpected pos 640 vs 534` when it closes such a file.
_FULL_TEXTS = (
    *(f"(os error {number})" for number in _FULL),
    "PytorchStreamWriter failed writing",
    "file write failed",
    "unexpected pos",
)


def is_disk_full(error: BaseException) -> bool:
    """Whether writing has failed for lack of room; of errors with a cause, any of them."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(text in str(seen) for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def free_bytes(folder: Path) -> int:
    """What this user may still write there."""
    return shutil.disk_usage(existing_parent(folder)).free
