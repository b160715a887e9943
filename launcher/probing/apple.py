"""Apple's GPUs, which share their memory with the processor, from what macOS tells of the machine.

Metal recommends how much of it a GPU should hold at once; torch counts its limit from that too
(`torch.mps.recommended_max_memory`). Without Metal's own answer the least stands in that was seen
of it: two thirds up to 32 GiB (10.67 of 16 on an M4, exo-explore/exo#1672; 21.3 of 32 on an M2
Max, ollama/ollama#434), three quarters above (48 of 64, ggml-org/llama.cpp#1870). Newer versions
of macOS give more: 107.5 of 128 (antirez/ds4#893). `iogpu.wired_limit_mb`, where it is set,
replaces it.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable, Sequence

from msgspec import Struct, structs

from ftplan.planner.hardware_spec import Device, Host
from ftplan.planner.units import GIB, MIB
from ftplan.profiles import find_gpu_by_driver_name

SMALL_MEMORY_BYTES = 32 * GIB
SMALL_MEMORY_SHARE = 2 / 3
LARGE_MEMORY_SHARE = 3 / 4

_TIMEOUT_SECONDS = 5

# A command's output; empty where it fails.
Run = Callable[[Sequence[str]], str]


class AppleChip(Struct, frozen=True, kw_only=True):
    """What macOS tells: the chip, its memory, and how much of that is free or soon to be had."""

    name: str
    memory_bytes: int
    available_bytes: int | None
    wired_limit_bytes: int | None


def run_command(command: Sequence[str]) -> str:
    """The output of a command of the system; empty where it fails or is missing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def is_apple_silicon() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def read_chip(run: Run = run_command) -> AppleChip | None:
    """The chip; None where macOS does not tell."""
    name = run(["sysctl", "-n", "machdep.cpu.brand_string"]).strip()
    memory = run(["sysctl", "-n", "hw.memsize"]).strip()
    if not name or not memory.isdigit():
        return None
    limit = run(["sysctl", "-n", "iogpu.wired_limit_mb"]).strip()
    return AppleChip(
        name=name,
        memory_bytes=int(memory),
        available_bytes=_available_bytes(run(["vm_stat"])),
        wired_limit_bytes=int(limit) * MIB if limit.isdigit() and int(limit) else None,
    )


def _available_bytes(vm_stat: str) -> int | None:
    """Free pages and inactive ones, as psutil counts them."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    counts = dict(re.findall(r"^Pages (\w+):\s+(\d+)\.$", vm_stat, re.MULTILINE))
    if page is None or "free" not in counts:
        return None
    kinds = ("free", "speculative", "inactive")  # `vm_stat` leaves the second out of the first
    return int(page[1]) * sum(int(counts.get(kind, 0)) for kind in kinds)


def working_set_bytes(chip: AppleChip) -> int:
    """What the GPU may hold at once."""
    if chip.wired_limit_bytes is not None:
        return min(chip.wired_limit_bytes, chip.memory_bytes)
    small = chip.memory_bytes <= SMALL_MEMORY_BYTES
    return round(chip.memory_bytes * (SMALL_MEMORY_SHARE if small else LARGE_MEMORY_SHARE))


def apple_host(chip: AppleChip, host: Host) -> Host:
    """The host with the RAM that macOS tells of, where the standard library cannot."""
    available = chip.available_bytes
    if available is None:
        available = host.ram_available_bytes
    return structs.replace(
        host,
        cpu_name=chip.name,
        ram_total_bytes=chip.memory_bytes,
        ram_available_bytes=min(available, chip.memory_bytes),
    )


def apple_gpu(chip: AppleChip, host: Host, notes: list[str]) -> Device | None:
    """The chip's GPU; None, with a note, where the catalog lacks it."""
    entry = find_gpu_by_driver_name(chip.name)
    if entry is None:
        notes.append(
            f"the GPU of `{chip.name}` is left out: the catalog does not have it; "
            "an entry in profiles/gpus would add it"
        )
        return None
    total = working_set_bytes(chip)
    return structs.replace(
        entry.device(),
        name=chip.name,
        total_bytes=total,
        free_bytes=min(total, host.ram_available_bytes),
    )
