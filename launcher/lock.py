"""One at a time in a run directory: `flock` on its `run.lock`, which ends with who holds it.

The launcher and the training process both hold it, shared, so that a run whose launcher was killed
still counts as running. Nothing is left of a process that has died: the file may lie there, with
what it says of the last one, and locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ftplan.launcher.run_dir import LOCK_NAME
from ftplan.planner.errors import InputError

# Says to a training process that its launcher holds the lock already.
HELD_BY_LAUNCHER = "FTPLAN_LOCK_HELD"

# Somebody who only looks, or changes from one kind of lock to the other, is gone by then.
_PATIENCE_SECONDS = 1.0
_RETRY_SECONDS = 0.05

# A file system without locks (Lustre mounted without `flock`, some FUSE ones); a folder that cannot
# be written, whose results may be read all the same.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_TAKEN = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def held(root: Path, doing: str = "running") -> Iterator[None]:
    """Hold the folder while the block runs. `doing`: what the next one is told of this one.

    Raises InputError where another process holds it.
    """
    descriptor = _opened(root)
    if descriptor is None:
        yield
        return
    try:
        _take(descriptor, root, fcntl.LOCK_EX)
        _sign(descriptor, doing)
        _take(descriptor, root, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held_for_training(root: Path, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """The same in a training process, beside its launcher where there is one. Of several ranks the
    first one's is enough: torch's launcher ends them together."""
    if environ.get("RANK", "0") != "0":
        yield
    elif environ.get(HELD_BY_LAUNCHER):
        descriptor = _opened(root)
        try:
            if descriptor is not None:
                _take(descriptor, root, fcntl.LOCK_SH)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)
    else:
        with held(root):
            yield


def is_held(root: Path) -> bool:
    """Whether a run goes on in this folder, or its results are being read."""
    path = root / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN
    finally:
        os.close(descriptor)
    return False


def _opened(root: Path) -> int | None:
    path = root / LOCK_NAME
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno not in (*_READ_ONLY, errno.ENOSPC, errno.EDQUOT):
            raise
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def _take(descriptor: int, root: Path, kind: int) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            if error.errno not in _TAKEN:
                raise
        if time.monotonic() > deadline:
            raise _in_use(descriptor, root)
        time.sleep(_RETRY_SECONDS)


def _sign(descriptor: int, doing: str) -> None:
    """Who holds it, for the message of the next one; a lock holds without."""
    who = {
        "doing": doing,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(who).encode() + b"\n", 0)


def _in_use(descriptor: int, root: Path) -> InputError:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        doing, pid = str(who["doing"]), int(who["pid"])
        told = f"process {pid} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return InputError(f"`{root}` is in use by another process", "wait until it has ended")
    return InputError(
        f"`{root}` is {doing}: {told}",
        f"wait until it has ended, or end it with `kill {pid}`"
        if doing == "running"
        else "wait until it has ended",
    )
