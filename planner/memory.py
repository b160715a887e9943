"""Peak memory of a run in closed form: the maximum over its phases.

Three numbers are kept apart: *allocated* (tensors), *reserved* (what the caching allocator
holds) and *device* (what the driver shows). *Required* decides: the least free memory with
which the run survives. Equations are numbered in docs/memory-model.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.disk import DiskNeeds, disk_needs, final_weight_bytes
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import (
    ASSUMED_CUDA_CONTEXT_BYTES,
    CPU_HEAP_HOLES,
    CPU_PROCESS_BYTES,
    CPU_WORST_HEAP_HOLES,
    Device,
)
from ftplan.planner.host_memory import HostMemory, host_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.phases import Phase
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_settings import model_rows, row_length

# Reserved over allocated, by training stack. Ours runs with expandable segments, which the
# launcher turns on; replayed by dry runs of 58 configurations the median was 1.03, and 1.01 of what
# is required (docs/memory-model.md has the whole distribution). People's own stacks seldom do: the
# median of what was measured without them, T4 and RTX 4080 (fitcheck, canifinetune; the highest was
# 1.49).
RESERVED_OVER_ALLOCATED: dict[str, float] = {"trl": 1.04, "transformers": 1.125, "loop": 1.125}

# Kept free on top of `required`, for the estimate's own error, where no runs on the card say how
# large it is (planner/margin.py). `allocated` is within 2.7 % of 198 measured runs, reserved bytes
# of a dry run within 6.5 % in 95 of 100 (docs/accuracy.md). So 5 % is a judgement between the two.
MEMORY_MARGIN = 0.05


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What one GPU (or the processor) holds over a run, and what the host and disk need.

    `list_phases` gives the phases; it is asked once they are looked at.
    `uncalibrated_reserved_bytes`: what would be reserved without the device's calibration.
    """

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    device_peak_bytes: int
    required_bytes: int
    host: HostMemory
    disk: DiskNeeds
    list_phases: Callable[[], tuple[Phase, ...]] = field(compare=False, repr=False)
    uncalibrated_reserved_bytes: int

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        return self.list_phases()

    @property
    def host_ram_peak_bytes(self) -> int:
        return self.host.peak_bytes

    @property
    def disk_bytes(self) -> int:
        return self.disk.total

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.allocated_peak_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {
            "allocated_peak_bytes": self.allocated_peak_bytes,
            "reserved_peak_bytes": self.reserved_peak_bytes,
            "device_peak_bytes": self.device_peak_bytes,
            "required_bytes": self.required_bytes,
            "peak_phase": self.peak_phase.name,
            "components": dict(self.peak_phase.components),
            "phases": [phase.to_dict() for phase in self.phases],
        }


def estimate_memory(
    model: ModelSpec,
    plan: TrainingPlan,
    *,
    device: Device | None = None,
    longest_row: int | None = None,
    stack: Stack = OWN_STACK,
) -> MemoryEstimate:
    """Peak memory per device of training `model` by `plan`.

    `device`: where it runs (its context, its kind); without one, a CUDA GPU.
    `longest_row`: the longest row of the data, where known; rows are cut at `max_length`.
    `stack`: what a training stack does beyond the plan's settings.
    Raises InputError for what only a dry run knows (`planner.closed_form`).
    """
    rows, length = model_rows(plan, row_length(plan, longest_row))
    step = compiled_step(model, plan, rows, length, device, stack)
    return _with_surroundings(
        step.peak_bytes(rows, length),
        partial(step.phases, rows, length),
        plan,
        device,
        host=step.host,
        disk=step.disk,
    )


def memory_from_phases(
    phases: Sequence[Phase],
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None,
    *,
    trained_weight_bytes: int,
    reserved_bytes: int,
    required_reserved_bytes: int,
) -> MemoryEstimate:
    """What device, host and disk must hold of a run with these phases.

    `reserved_bytes`: what CUDA's caching allocator holds, and `required_reserved_bytes` the least
    with which no allocation fails.
    """
    host, disk = _surroundings(phases, model, plan, device, trained_weight_bytes)
    return _with_surroundings(
        max(phase.allocated_peak_bytes for phase in phases),
        lambda: tuple(phases),
        plan,
        device,
        host=host,
        disk=disk,
        reserved_bytes=reserved_bytes,
        required_reserved_bytes=required_reserved_bytes,
    )


def _surroundings(
    phases: Sequence[Phase],
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None,
    trained_weight_bytes: int,
) -> tuple[HostMemory, DiskNeeds]:
    """Host and disk in closed form; where there is none, by what a dry run counted."""
    try:
        step = compiled_step(model, plan, *model_rows(plan, plan.max_length), device, OWN_STACK)
        return step.host, step.disk
    except InputError:
        adapter = plan.resolved_method.adapter
        whole = model.num_parameters * plan.weight_bytes
        saved = trained_weight_bytes if adapter else whole
        trained = trained_weight_bytes // plan.weight_bytes
        states = max(phase.components["optimizer_states"] for phase in phases)
        host = host_memory(
            model,
            plan,
            device.kind if device else "cuda",
            trained_own=0 if adapter else trained,
            trained_all=trained,
            saved_bytes=saved,
        )
        final = final_weight_bytes(model, plan, saved) if adapter else whole
        return host, disk_needs(
            model, plan, saved_bytes=saved, state_bytes=states, final_bytes=final
        )


def _with_surroundings(
    allocated: int,
    list_phases: Callable[[], tuple[Phase, ...]],
    plan: TrainingPlan,
    device: Device | None,
    *,
    host: HostMemory,
    disk: DiskNeeds,
    reserved_bytes: int | None = None,
    required_reserved_bytes: int | None = None,
) -> MemoryEstimate:
    """Tensors, and what the allocator, the process and the host hold around them; where the
    allocator's part is not known, it follows from a share."""
    if device and device.kind == "cpu":
        uncalibrated = reserved = round(allocated * (1 + CPU_HEAP_HOLES))
        device_peak = reserved + CPU_PROCESS_BYTES
        required = round(allocated * (1 + CPU_WORST_HEAP_HOLES)) + CPU_PROCESS_BYTES
        host = host.trained_on_processor(device_peak)
    else:
        context = context_bytes(device)
        share = RESERVED_OVER_ALLOCATED[plan.trainer]
        uncalibrated = round(allocated * share) if reserved_bytes is None else reserved_bytes
        least = uncalibrated if required_reserved_bytes is None else required_reserved_bytes
        reserved, least = calibrated_reserved(device, allocated, uncalibrated, least)
        device_peak, required = reserved + context, least + context
    return MemoryEstimate(
        allocated_peak_bytes=allocated,
        reserved_peak_bytes=reserved,
        device_peak_bytes=device_peak,
        required_bytes=required,
        host=host,
        disk=disk,
        list_phases=list_phases,
        uncalibrated_reserved_bytes=uncalibrated,
    )


def calibrated_reserved(
    device: Device | None, allocated: int, reserved: int, required: int
) -> tuple[int, int]:
    """What the allocator reserves, and what it requires, by what runs on the device reserved.

    A factor under 1 leaves what is required as it is: those runs do not say with how little the
    allocator would have gone on.
    """
    factor = device.calibration.reserved if device else 1.0
    if factor == 1:
        return reserved, required
    return max(allocated, round(factor * reserved)), round(max(1.0, factor) * required)


def context_bytes(device: Device | None) -> int:
    """What a process holds of the GPU beside torch's allocator: kernels, libraries."""
    if device is None:
        return ASSUMED_CUDA_CONTEXT_BYTES
    return round(device.calibration.context * device.context_bytes)


def needed_bytes(memory: MemoryEstimate, margin: float = MEMORY_MARGIN) -> int:
    """Free memory that a plan is given: what it requires, and the margin."""
    return with_margin(memory.required_bytes, margin)


def with_margin(required_bytes: int, margin: float = MEMORY_MARGIN) -> int:
    """What has to be free for a plan that requires so much; `margin`: a share of it."""
    return round(required_bytes * (1 + margin))


def fits(memory: MemoryEstimate, device: Device, margin: float = MEMORY_MARGIN) -> bool:
    """Whether what is free on the device is enough; `estimate` and `plan` both ask this."""
    return needed_bytes(memory, margin) <= device.free_bytes


def least_required_bytes(memory: MemoryEstimate, device: Device) -> int:
    """What a plan would require if the allocator held nothing beyond tensors."""
    return memory.allocated_peak_bytes + context_bytes(device)


def may_fit(memory: MemoryEstimate, device: Device, margin: float = MEMORY_MARGIN) -> bool:
    """Whether it fits if the allocator holds nothing beyond tensors: where not, no replay is
    needed to know that it does not."""
    return with_margin(least_required_bytes(memory, device), margin) <= device.free_bytes
