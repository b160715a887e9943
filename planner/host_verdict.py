"""Whether the machine around the GPUs has what a run takes of its RAM and disk."""

from __future__ import annotations

import math

from ftplan.planner.cycles import num_restarts, restart_steps
from ftplan.planner.hardware_spec import Device, Host
from ftplan.planner.memory import MemoryEstimate
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.units import format_bytes


def lacking_ram(memory: MemoryEstimate, host: Host, device: Device) -> str | None:
    """What is missing of the machine's RAM; None where it does, or where it is the device that
    trains and has been asked already."""
    needed = memory.host.required_bytes
    if device.kind == "cpu" or needed <= host.ram_available_bytes:
        return None
    phase = max(memory.host.phases, key=lambda phase: phase.required_bytes)
    return (
        f"{phase.name} takes {format_bytes(needed)} of the host's RAM, and this machine has "
        f"{format_bytes(host.ram_available_bytes)} available"
    )


# Of each token, for each process: 32 bits of its number and of its label, or of a second answer.
TOKEN_FILE_BYTES = 8


def run_disk_bytes(
    memory: MemoryEstimate, plan: TrainingPlan, steps: int | None = None, num_tokens: int = 0
) -> int:
    """What a run directory comes to. `steps`: optimizer steps of the run, where known;
    `num_tokens`: of its rows, which lie there while it trains."""
    saves = math.inf if steps is None else math.ceil(steps / plan.save_steps)
    merges = {}
    if steps is not None and plan.resolved_method.merges:
        merges["num_merges"] = num_restarts(steps, restart_steps(plan, steps))
    return memory.disk.run_bytes(saves, **merges) + plan.num_gpus * TOKEN_FILE_BYTES * num_tokens


def lacking_disk(
    memory: MemoryEstimate,
    host: Host,
    plan: TrainingPlan,
    steps: int | None = None,
    num_tokens: int = 0,
) -> str | None:
    """What is missing on the run's disk; see `run_disk_bytes`."""
    needed = run_disk_bytes(memory, plan, steps, num_tokens)
    if needed <= host.disk_free_bytes:
        return None
    return (
        f"checkpoints, the trained model and the rows take {format_bytes(needed)}, and "
        f"`{host.disk_path}` has {format_bytes(host.disk_free_bytes)} free"
    )
