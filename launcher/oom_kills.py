"""How many processes Linux has killed for lack of memory, by its own count."""

from __future__ import annotations

import re
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def oom_kills(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> int | None:
    """Of this process's control group (version 2, then 1), else of the whole machine; None where
    nothing counts them."""
    try:
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for line in groups:
        _, _, path = line.rpartition(":")
        for folder in (cgroups / path.lstrip("/"), cgroups / "memory" / path.lstrip("/"), cgroups):
            for name in ("memory.events", "memory.oom_control"):
                if (count := _count(folder / name)) is not None:
                    return count
    return _count(proc / "vmstat")


def _count(file: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
