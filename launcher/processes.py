"""Processes by Linux's own account: whether one still runs, what is below it, what it holds.

A number alone does not name a process, as numbers are given again: the moment of its start and
the boot of the machine go with it. The host goes with it, too: a run directory may lie on a disk
that several machines share, and only its own machine can tell whether a process lives.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftplan.planner.units import KIB

_PROC = Path("/proc")

# Of /proc/PID/stat behind the name in parentheses (proc(5) counts from 1, and these from 3).
_STATE, _PARENT, _USER_TICKS, _SYSTEM_TICKS, _START_TICKS = 0, 1, 11, 12, 19

_DEAD_STATES = ("Z", "X")


def named_process(pid: int | None = None) -> dict[str, Any]:
    """What names a process for good, by default this one: for status.json."""
    pid = pid or os.getpid()
    return {"pid": pid, "host": platform.node(), "started": _started(pid)}


def is_here(told: Mapping[str, Any]) -> bool:
    """Whether a process, as `named_process` told of it, is one of this machine."""
    return told.get("host") == platform.node()


def lives(told: Mapping[str, Any]) -> bool:
    """Whether a process of this machine, as `named_process` told of it, still runs."""
    pid = told.get("pid")
    if type(pid) is not int or pid < 1:
        return False
    if not _PROC.joinpath("self").exists():
        return _answers(pid)
    fields = _stat(pid)
    if fields is None or fields[_STATE] in _DEAD_STATES:
        return False
    return told.get("started") in (None, _started(pid))


def parent_of(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[_PARENT]) if fields else None


def children(pid: int) -> list[int]:
    """The processes that one has started, by Linux's own list."""
    found: list[int] = []
    for path in _PROC.glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            found += [int(child) for child in path.read_text().split()]
    return found


def descendants(pid: int) -> list[int]:
    """All processes below one: torchrun gives each worker a session of its own, so that a signal
    to the group does not reach it."""
    below = children(pid)
    return [*below, *(each for child in below for each in descendants(child))]


def resident_bytes(pid: int) -> int | None:
    """What a process holds of the host's RAM now; None where that is not told."""
    with contextlib.suppress(OSError, ValueError):
        for line in _PROC.joinpath(str(pid), "status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * KIB
    return None


def processor_seconds(pid: int) -> float | None:
    """Seconds of all cores that a process has used so far."""
    fields = _stat(pid)
    if fields is None:
        return None
    ticks = int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
    return ticks / os.sysconf("SC_CLK_TCK")


def running_seconds(pid: int) -> float | None:
    """How long a process has been running."""
    fields = _stat(pid)
    with contextlib.suppress(OSError, ValueError):
        up_seconds = float(_PROC.joinpath("uptime").read_text().split()[0])
        ticks = os.sysconf("SC_CLK_TCK")
        return up_seconds - int(fields[_START_TICKS]) / ticks if fields else None
    return None


def _started(pid: int) -> str | None:
    """The boot and the clock ticks from it to the process's start; None where Linux is not."""
    fields = _stat(pid)
    with contextlib.suppress(OSError):
        boot = _PROC.joinpath("sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{fields[_START_TICKS]}" if fields else None
    return None


def _stat(pid: int) -> list[str] | None:
    try:
        text = _PROC.joinpath(str(pid), "stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another person
    return True
