"""The machine around the devices: processor, cores, RAM and disk, within a container's limits.

Linux tells all of it in `/proc` and `/sys/fs/cgroup`; elsewhere `os.sysconf` tells how much RAM
there is. Every function takes the root of the file system, so that a test can build its own.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from ftplan.planner.hardware_spec import Host
from ftplan.planner.units import KIB

# Share of the RAM taken for free where the system tells only how much there is (macOS). Assumed.
ASSUMED_AVAILABLE_SHARE = 0.5

# Threads that wait for each other sleep instead of spinning: beside one busy process, training on
# two cores took 35 s a step so and 90 s with spinning, alone there was no difference.
CPU_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}


def read_host(run_dir: Path, root: Path = Path("/")) -> Host:
    """The machine as a process started now would find it. Needs no driver and no torch."""
    total, available = ram_bytes(root)
    disk = existing_parent(run_dir)
    return Host(
        cpu_name=cpu_name(root),
        num_cores=usable_cores(root),
        ram_total_bytes=total,
        ram_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(disk).free,
        disk_path=str(disk),
    )


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists: where the path would be created."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name; its architecture where nothing names it (many Arm machines)."""
    return _cpuinfo_value(root, "model name") or platform.processor() or platform.machine()


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction sets as Linux spells them (`avx2`, `amx_bf16`); empty elsewhere."""
    return frozenset(
        f"{_cpuinfo_value(root, 'flags')} {_cpuinfo_value(root, 'Features')}".casefold().split()
    )


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on: its affinity, and its group's quota rounded down."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quotas = [_quota_cores(folder) for folder in _cgroup_folders(root, "cpu")]
    return max(1, int(min([cores, *(quota for quota in quotas if quota is not None)])))


def ram_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Total and available RAM: the machine's, or what the group's limits leave of it."""
    total, available = _meminfo_bytes(root) or _sysconf_bytes()
    for folder in _cgroup_folders(root, "memory"):
        limit, used = _memory_limit_and_use(folder)
        if limit is not None:
            total = min(total, limit)
            available = min(available, max(0, limit - used))
    return total, available


def ram_limit_bytes(root: Path = Path("/")) -> int | None:
    """The group's limit where it is below the machine's RAM; None where there is none."""
    machine = _meminfo_bytes(root)
    total, _ = ram_bytes(root)
    return total if machine is not None and total < machine[0] else None


def _meminfo_bytes(root: Path) -> tuple[int, int] | None:
    fields = dict(
        line.split(":", 1) for line in read_text(root / "proc/meminfo").splitlines() if ":" in line
    )
    try:
        total, available = (int(fields[k].split()[0]) for k in ("MemTotal", "MemAvailable"))
    except (KeyError, IndexError, ValueError):
        return None
    return total * KIB, available * KIB


def _sysconf_bytes() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    try:
        return total, page * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return total, round(total * ASSUMED_AVAILABLE_SHARE)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's control group and those above it, for each version that is mounted.

    A limit counts wherever it stands above the process. In a container the group's path may
    name a folder that only the host sees; the top folder then holds the container's limits.
    """
    mount = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        own = top / group.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return folders


def _quota_cores(folder: Path) -> float | None:
    quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota = read_text(folder / "cpu.cfs_quota_us").strip()
        period = read_text(folder / "cpu.cfs_period_us").strip()
    if not (quota.isdigit() and period.isdigit()):  # `max`, or -1: no limit
        return None
    return int(quota) / int(period)


def _memory_limit_and_use(folder: Path) -> tuple[int | None, int]:
    """A group's limit, and what it uses less the file cache that the kernel would give back.

    Version 1 spells "no limit" as a number larger than any machine.
    """
    if (limit := _number(folder / "memory.max")) is not None:
        used, cache = _number(folder / "memory.current"), "inactive_file"
    elif (limit := _number(folder / "memory.limit_in_bytes")) is not None:
        used, cache = _number(folder / "memory.usage_in_bytes"), "total_inactive_file"
    else:
        return None, 0
    statistics = dict(
        line.split(" ", 1)
        for line in read_text(folder / "memory.stat").splitlines()
        if line.count(" ") == 1
    )
    return limit, max(0, (used or 0) - int(statistics.get(cache, 0)))


def _cpuinfo_value(root: Path, key: str) -> str:
    for line in read_text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None


def read_text(path: Path) -> str:
    """The file's text; empty where it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
