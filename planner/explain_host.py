"""The formulas behind host RAM and disk, with their numbers put in.

Equations carry the numbers of docs/memory-model.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftplan.planner.cycles import DEFAULT_CYCLES
from ftplan.planner.disk import CHECKPOINTS_KEPT
from ftplan.planner.hardware_spec import CPU_PROCESS_BYTES, CUDA_HOST_BYTES
from ftplan.planner.host_memory import HOST_COMPONENTS
from ftplan.planner.memory import MemoryEstimate
from ftplan.planner.plan import TrainingPlan

HOST_EQUATION, OFFLOAD_EQUATION, DISK_EQUATION = 9, 10, 11

_OFFLOADED = ("weights", "gradients", "optimizer_states", "buffers")


def explain_host(memory: MemoryEstimate, plan: TrainingPlan) -> list[dict[str, Any]]:
    """The terms of the host's peak, which sum to it, then those of the disk, which sum to that."""
    return [*_host_terms(memory, plan), *_disk_terms(memory, plan)]


def _host_terms(memory: MemoryEstimate, plan: TrainingPlan) -> Iterator[dict[str, Any]]:
    phase = memory.host.peak_phase
    for name, size in phase.components.items():
        if not size:
            continue
        if name == "processes":
            with_cuda = size > CPU_PROCESS_BYTES
            cuda = f" + {CUDA_HOST_BYTES:,} of CUDA)" if with_cuda else ")"
            formula = f"{plan.gpus_per_machine} x ({CPU_PROCESS_BYTES:,} B{cuda}"
        else:
            formula = HOST_COMPONENTS[name]
        equation = OFFLOAD_EQUATION if name in _OFFLOADED else HOST_EQUATION
        yield _term(f"host RAM, {phase.name}", equation, formula, size)


def _disk_terms(memory: MemoryEstimate, plan: TrainingPlan) -> Iterator[dict[str, Any]]:
    disk = memory.disk
    states = "weights of the trained adapter" if plan.resolved_method.adapter else "the model"
    kept = f"({CHECKPOINTS_KEPT} + 1) x {disk.checkpoint:,} B: {states} and optimizer states"
    if disk.merged_adapter:
        kept += f"; {DEFAULT_CYCLES - 1} x {disk.merged_adapter:,} B: adapters merged before"
    left = "the model" if plan.resolved_method.merges else states
    for formula, size in (
        ("the model as it is published", disk.weights),
        (kept, disk.checkpoints),
        (f"{left}, trained", disk.final_model),
    ):
        yield _term("disk", DISK_EQUATION, formula, size)


def _term(where: str, equation: int, formula: str, num_bytes: int) -> dict[str, Any]:
    return {"where": where, "equation": equation, "formula": formula, "num_bytes": num_bytes}
