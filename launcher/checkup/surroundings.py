"""Checks of what a run finds around it: driver, GPUs, Hub, disk, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ftplan.launcher.checkup.facts import Facts, Finding, Folder, Status, dotted
from ftplan.launcher.probing.nvml import NO_DRIVER, is_fault
from ftplan.planner.hardware_spec import Device, Vendor
from ftplan.planner.units import GIB, format_bytes

# The default model's LoRA on a processor needs 5.94 GiB (README), and less on a GPU.
LITTLE_RAM_BYTES = 6 * GIB

# A 7B model in 16 bits is 12.6 GiB, to be fetched or saved; below the smaller number not even the
# default model and one checkpoint of it fit.
LITTLE_DISK_BYTES = 20 * GIB
NO_DISK_BYTES = GIB

# Containers have 64 MiB unless told otherwise; NCCL passes data between processes there.
LITTLE_SHARED_MEMORY_BYTES = GIB

# The share of a GPU in others' hands that is worth a word: a desktop's own windows hold less.
BUSY_SHARE = 0.1

_DRIVERS: Mapping[Vendor, str] = {
    "nvidia": "NVIDIA's, of unknown version",
    "amd": "the kernel's amdgpu",
    "apple": "macOS",
}


def driver(facts: Facts) -> Iterator[Finding]:
    machine = facts.machine
    if machine.driver_version:
        cuda = machine.cuda_version
        runs = f", runs CUDA up to {dotted(cuda)}" if cuda else ""
        yield Finding(name="driver", status="ok", found=f"NVIDIA {machine.driver_version}{runs}")
    elif machine.gpus:
        found = _DRIVERS[machine.gpus[0].vendor]
        yield Finding(name="driver", status="ok", found=found)
    elif NO_DRIVER in machine.notes:
        yield Finding(name="driver", status="ok", found=f"{NO_DRIVER}, and no NVIDIA GPU to drive")


def gpus(facts: Facts) -> Iterator[Finding]:
    """The visible ones, and what the probe noted."""
    machine = facts.machine
    if facts.machine_error is not None:
        found, mend = facts.machine_error
        yield Finding(name="gpus", status="problem", found=found, mend=mend)
    notes = [note for note in machine.notes if note != NO_DRIVER]
    if not machine.gpus and not notes and facts.machine_error is None:
        yield Finding(name="gpus", status="ok", found="none: small models train on the processor")
    for gpu in machine.gpus:
        yield _gpu(gpu)
    for note in notes:
        status: Status = "problem" if is_fault(note) else "warning"
        found, _, mend = note.rpartition("; ")
        yield Finding(name="gpus", status=status, found=found or note, mend=mend if found else None)


def _gpu(gpu: Device) -> Finding:
    free = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
    found = f"GPU {gpu.index}, {gpu.name}: {free}"
    held = sum(holder.used_bytes or 0 for holder in gpu.holders)
    busy = max(held, gpu.total_bytes - gpu.free_bytes) > BUSY_SHARE * gpu.total_bytes
    if gpu.vendor == "apple" or not busy:
        return Finding(name="gpus", status="ok", found=found)
    names = ", ".join(
        f"{holder.name} {format_bytes(holder.used_bytes) if holder.used_bytes else ''}".strip()
        for holder in gpu.holders
    )
    return Finding(
        name="gpus",
        status="warning",
        found=f"{found}; held by {names or 'processes that this user may not see'}",
        mend="end them before a run, or let ftplan plan with what is free",
    )


def hub(facts: Facts) -> Iterator[Finding]:
    if facts.hub_offline:
        found = "not asked: HF_HUB_OFFLINE is set; models in the local cache and folders serve"
        yield Finding(name="hub", status="ok", found=found)
        return
    if not facts.hub_reachable:
        yield Finding(
            name="hub",
            status="warning",
            found=f"{facts.hub_endpoint} does not answer: only models in the cache and in folders",
            mend="check the network and its proxy (HTTPS_PROXY), set HF_ENDPOINT to a mirror, or "
            "HF_HUB_OFFLINE=1 so that nothing waits for it",
        )
        return
    token = (
        f"; token: {facts.hub_token}"
        if facts.hub_token
        else ("; no token, which only gated models need (`hf auth login`)")
    )
    yield Finding(name="hub", status="ok", found=f"{facts.hub_endpoint} answers{token}")


def disk(facts: Facts) -> Iterator[Finding]:
    yield _folder("disk for runs", facts.runs, "write elsewhere with `--runs-dir`")
    yield _folder("disk for models", facts.cache, "set HF_HOME to a folder with more room")


def _folder(name: str, folder: Folder, elsewhere: str) -> Finding:
    found = f"{format_bytes(folder.free_bytes)} free in {folder.path}"
    if not folder.writable:
        found = f"{folder.path} cannot be written"
        return Finding(name=name, status="problem", found=found, mend=elsewhere)
    if folder.free_bytes < NO_DISK_BYTES:
        return Finding(name=name, status="problem", found=found, mend=f"free some, or {elsewhere}")
    if folder.free_bytes < LITTLE_DISK_BYTES:
        found += ": a 7B model does not fit twice"
        return Finding(name=name, status="warning", found=found, mend=f"free some, or {elsewhere}")
    return Finding(name=name, status="ok", found=found)


def memory(facts: Facts) -> Iterator[Finding]:
    host = facts.machine.host
    found = (
        f"{format_bytes(host.ram_available_bytes)} available of "
        f"{format_bytes(host.ram_total_bytes)}"
    )
    if facts.ram_limit_bytes is not None:
        found += ", the container's limit"
    if host.ram_available_bytes < LITTLE_RAM_BYTES:
        yield Finding(
            name="ram",
            status="warning",
            found=f"{found}: too little for the default model on the processor",
            mend="end other programs, or raise the container's limit (`docker run --memory`)",
        )
    else:
        yield Finding(name="ram", status="ok", found=found)
    shared = facts.shared_memory_bytes
    if shared is None:
        return
    found = f"{format_bytes(shared)} in /dev/shm"
    if len(facts.machine.gpus) > 1 and shared < LITTLE_SHARED_MEMORY_BYTES:
        yield Finding(
            name="shared memory",
            status="problem",
            found=f"{found}: too little for NCCL between {len(facts.machine.gpus)} GPUs",
            mend="start the container with `--ipc=host` or `--shm-size=8g`",
        )
    else:
        yield Finding(name="shared memory", status="ok", found=found)
