"""Peak memory of a run in closed form: the maximum over its phases.

Three numbers are kept apart: *allocated* (tensors), *reserved* (what the caching allocator
holds) and *device* (what the driver shows). *Required* decides: the least free memory with
which the run survives. Equations are numbered in docs/memory-model.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ftplan.planner.closed_form import check_closed_form
from ftplan.planner.hardware_spec import (
    ASSUMED_CUDA_CONTEXT_BYTES,
    CPU_HEAP_HOLES,
    CPU_PROCESS_BYTES,
    CPU_WORST_HEAP_HOLES,
    Device,
    DeviceKind,
)
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import keeps_reference, trained_model, trained_part
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.processor_step import one_by_one_bytes
from ftplan.planner.stack import DEFAULT_CAPABILITY, OWN_STACK, Stack, cublas_workspace_bytes
from ftplan.planner.step_settings import (
    adapter_weight_bytes,
    step_settings,
    traced_step,
    trained_widths,
)
from ftplan.planner.step_trace import EVALUATION_PHASE, REFERENCE_PHASE, StepTrace
from ftplan.planner.tape import ZERO, Moment, value
from ftplan.planner.trained import Trained

FLOAT32_BYTES = 4

COMPONENTS: dict[str, str] = {
    "weights": "model weights",
    "reference_model": "reference model",
    "adapters": "adapter weights",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "autocast_copies": "16-bit copies by autocast",
    "activations": "activations kept for backward",
    "logits_and_loss": "logits and loss",
    "communication": "buffers between GPUs",
    "temporaries": "temporaries",
}

# Reserved over allocated, by training stack. Ours runs with expandable segments, which the
# launcher turns on: the allocator grows a segment by 2 MiB pages, which leaves rounding only
# (assumed). People's own stacks seldom do: the median of what was measured without them, T4 and
# RTX 4080 (fitcheck, canifinetune; the highest was 1.49).
RESERVED_OVER_ALLOCATED: dict[str, float] = {"trl": 1.04, "transformers": 1.125, "loop": 1.125}

# Kept free on top of `required`, for the estimate's own error. Of the nine measured runs that it is
# compared with (docs/memory-model.md: A100 cards, checkpointing, a stack that is not ours)
# `allocated` is within 3 %; with eager attention on a long row it was once 19 % too low. `device`
# was between 9 % too low (the stock loss's cache) and 12 % too high. So 5 % is a judgement.
MEMORY_MARGIN = 0.05

# Weight quantization of bitsandbytes: 4 bits a weight and an fp32 scale for each block of 64;
# double quantization holds the scales in 8 bits with an fp32 scale for each 256 of them
# (arXiv 2305.14314, section 3).
QUANT_BLOCK_SIZE = 64
QUANT_SCALES_PER_BLOCK = 256
_SINGLE_QUANT_BYTES = 0.5 + 4 / QUANT_BLOCK_SIZE
_DOUBLE_QUANT_BYTES = 0.5 + 1 / QUANT_BLOCK_SIZE + 4 / (QUANT_BLOCK_SIZE * QUANT_SCALES_PER_BLOCK)

CHECKPOINTS_KEPT = 2

# What a micro-batch goes through.
STEP_PHASES = ("forward", "loss", "backward")


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of a run and what is allocated at its highest point."""

    name: str
    components: Mapping[str, int]

    @property
    def allocated_peak_bytes(self) -> int:
        return sum(self.components.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "allocated_peak_bytes": self.allocated_peak_bytes,
            "components": dict(self.components),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """What one GPU (or the processor) holds over a run, and what the host and disk need."""

    phases: tuple[Phase, ...]
    reserved_peak_bytes: int
    device_peak_bytes: int
    required_bytes: int
    host_ram_peak_bytes: int
    disk_bytes: int

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.allocated_peak_bytes)

    @property
    def allocated_peak_bytes(self) -> int:
        return self.peak_phase.allocated_peak_bytes

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The largest micro-batch: `rows` rows of `length` tokens, padding included."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def largest_micro_batch(plan: TrainingPlan, length: int) -> Workload:
    """What goes through the model at once, its rows being of that length; packed rows are one."""
    rows = plan.per_device_train_batch_size * plan.resolved_objective.sequences_per_row
    return (
        Workload(rows=1, length=rows * length)
        if plan.packing
        else Workload(rows=rows, length=length)
    )


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

    `stack`: what a training stack does beyond the plan's settings. Raises InputError for what only a dry run knows (`planner.closed_form`).
    """
    check_closed_form(plan)
    model = trained_model(model, plan)
    kind: DeviceKind = device.kind if device else "cuda"
    capability = (device.compute_capability if device else None) or DEFAULT_CAPABILITY
    trained = trained_part(model, plan)
    length = min(plan.max_length, longest_row or plan.max_length)
    workload = largest_micro_batch(plan, length)
    phases = _phases(model, plan, workload, kind, capability, stack)
    weights = sum(count * width for count, width in trained_widths(plan, trained))
    return memory_from_phases(phases, model, plan, device, trained_weight_bytes=weights)


def memory_from_phases(
    phases: Sequence[Phase],
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None,
    *,
    trained_weight_bytes: int,
    reserved_bytes: int | None = None,
    required_reserved_bytes: int | None = None,
) -> MemoryEstimate:
    """What device, host and disk must hold of a run with these phases.

    `reserved_bytes`: what CUDA's caching allocator holds, and `required_reserved_bytes` the least
    with which no allocation fails, where they are known; else they follow from shares.
    """
    allocated = max(phase.allocated_peak_bytes for phase in phases)
    if device and device.kind == "cpu":
        reserved = round(allocated * (1 + CPU_HEAP_HOLES))
        device_peak = reserved + CPU_PROCESS_BYTES
        required = round(allocated * (1 + CPU_WORST_HEAP_HOLES)) + CPU_PROCESS_BYTES
        host = device_peak
    else:
        context = device.context_bytes if device else ASSUMED_CUDA_CONTEXT_BYTES
        share = RESERVED_OVER_ALLOCATED[plan.trainer]
        reserved = round(allocated * share) if reserved_bytes is None else reserved_bytes
        device_peak = reserved + context
        required = context + (
            reserved if required_reserved_bytes is None else required_reserved_bytes
        )
        host = host_loading_bytes(model, plan)
    return MemoryEstimate(
        phases=tuple(phases),
        reserved_peak_bytes=reserved,
        device_peak_bytes=device_peak,
        required_bytes=required,
        host_ram_peak_bytes=host,
        disk_bytes=disk_bytes(trained_weight_bytes, _state_bytes(phases)),
    )


def needed_bytes(memory: MemoryEstimate) -> int:
    """Free memory that a plan is given: what it requires, and the margin."""
    return round(memory.required_bytes * (1 + MEMORY_MARGIN))


def fits(memory: MemoryEstimate, device: Device) -> bool:
    """Whether what is free on the device is enough; `estimate` and `plan` both ask this."""
    return needed_bytes(memory) <= device.free_bytes


def weight_memory_bytes(model: ModelSpec, plan: TrainingPlan, stack: Stack = OWN_STACK) -> int:
    """Bytes of the loaded model, eq. (1): quantized matrices, the rest in `dtype`; in fp32 after
    k-bit preparation."""
    if plan.quantization == "none":
        return model.num_parameters * plan.weight_bytes
    quantized = model.quantizable_weights
    rest = model.num_parameters - quantized
    rest_bytes = rest * plan.weight_bytes
    if stack.kbit_prepare:
        outer = 2 * model.embedding_parameters if not model.tie_word_embeddings else 0
        rest_bytes = rest * FLOAT32_BYTES
        if stack.casts_back:
            rest_bytes -= outer * (FLOAT32_BYTES - 2)
    if plan.quantization == "int8":
        rows = sum(m.out_features for m in model.linears) * model.num_hidden_layers
        return quantized + rows * FLOAT32_BYTES + rest_bytes
    per_weight = _DOUBLE_QUANT_BYTES if plan.double_quant else _SINGLE_QUANT_BYTES
    return round(quantized * per_weight) + rest_bytes


def host_loading_bytes(model: ModelSpec, plan: TrainingPlan) -> int:
    """Host RAM while the processes, one a GPU, load the model.

    Safetensors are mapped, not read; at most one file (5 GB by `save_pretrained`'s default
    shard size) is resident in each process while its tensors are copied.
    """
    stored = model.num_parameters * plan.weight_bytes
    return plan.num_gpus * (CPU_PROCESS_BYTES + min(stored, 5 * 10**9))


def disk_bytes(weight_bytes: int, state_bytes: int) -> int:
    """Checkpoints (trained weights and optimizer states) and the final trained weights."""
    return CHECKPOINTS_KEPT * (weight_bytes + state_bytes) + weight_bytes


def _state_bytes(phases: Sequence[Phase]) -> int:
    return max(phase.components["optimizer_states"] for phase in phases)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a run holds from beginning to end, whatever the batch."""

    weights: int
    reference_model: int
    adapters: int
    gradients: int
    optimizer_states: int
    step_temporaries: int


@lru_cache(maxsize=1024)
def _held(model: ModelSpec, plan: TrainingPlan, kind: DeviceKind, stack: Stack) -> _Held:
    trained = trained_part(model, plan)
    optimizer, widths = plan.optimizer, trained_widths(plan, trained)
    embeddings = model.embedding_parameters if trained.trains_embeddings else 0
    weights = weight_memory_bytes(model, plan, stack)
    return _Held(
        weights=weights,
        reference_model=weights if keeps_reference(plan) else 0,
        adapters=trained.added_parameters * adapter_weight_bytes(plan),
        gradients=sum(count * width for count, width in widths),
        optimizer_states=sum(
            optimizer.state_bytes(count, width, min(count, embeddings)) for count, width in widths
        ),
        step_temporaries=_step_temporary_bytes(model, plan, trained, kind),
    )


def _step_temporary_bytes(
    model: ModelSpec, plan: TrainingPlan, trained: Trained, kind: DeviceKind
) -> int:
    """What exists only while the optimizer steps."""
    optimizer = plan.optimizer
    if kind == "cpu" and optimizer.tensor_copies is not None:
        return one_by_one_bytes(model, plan, trained, optimizer.tensor_copies)
    widths = trained_widths(plan, trained)
    return sum(optimizer.step_temporary_bytes(count, width) for count, width in widths)


def _phases(
    model: ModelSpec,
    plan: TrainingPlan,
    workload: Workload,
    kind: DeviceKind,
    capability: tuple[int, int],
    stack: Stack,
) -> list[Phase]:
    held = _held(model, plan, kind, stack)
    trace = traced_step(model, step_settings(model, plan, workload, kind, capability, stack))
    workspace = cublas_workspace_bytes(capability) if kind == "cuda" else 0
    carried = held.gradients if plan.gradient_accumulation_steps > 1 else 0
    resident = {
        "weights": held.weights,
        "reference_model": held.reference_model,
        "adapters": held.adapters,
        "optimizer_states": held.optimizer_states,
        "communication": held.gradients if plan.num_gpus > 1 else 0,
        "temporaries": 2 * workspace,  # one of the forward pass's thread, one of backward's
        "gradients": carried,
    }
    loaded = {part: resident[part] for part in ("weights", "reference_model", "adapters")}
    bases = {
        REFERENCE_PHASE: {**loaded, "temporaries": workspace},
        # A loop of one's own lets go of gradients at the beginning of the next step.
        EVALUATION_PHASE: {
            **resident,
            "gradients": held.gradients if plan.trainer == "loop" else 0,
        },
    }
    phases = [_phase("load", loaded)]
    rows, length = workload.rows, workload.length
    for name in (REFERENCE_PHASE, *STEP_PHASES):
        if moments := trace.phases.get(name):
            phases.append(_highest(name, moments, bases.get(name, resident), rows, length))
    phases.append(_optimizer_step(held, trace, resident, rows, length))
    after_step = bases[EVALUATION_PHASE]
    moments = trace.phases[EVALUATION_PHASE]
    phases.append(_highest(EVALUATION_PHASE, moments, after_step, rows, length))
    phases.append(_phase("save", after_step))
    return phases


def _optimizer_step(
    held: _Held, trace: StepTrace, resident: Mapping[str, int], rows: int, length: int
) -> Phase:
    """At its beginning, where what backward leaves is there, or within, whichever is more."""
    step = {**resident, "gradients": held.gradients}
    left = {**trace.after_backward, "gradients": ZERO}
    beginning = _highest("optimizer step", [Moment(ZERO, left)], step, rows, length)
    within = {**step, "temporaries": step["temporaries"] + held.step_temporaries}
    given = value(trace.inputs["temporaries"], rows, length)
    within["temporaries"] += given
    return max(beginning, _phase("optimizer step", within), key=lambda p: p.allocated_peak_bytes)


def _highest(
    name: str, moments: Sequence[Moment], resident: Mapping[str, int], rows: int, length: int
) -> Phase:
    """The phase at the highest of its moments."""
    highest = max(moments, key=lambda moment: value(moment.total, rows, length))
    parts = dict(resident)
    for part, form in highest.components.items():
        parts[part] = parts.get(part, 0) + value(form, rows, length)
    return _phase(name, parts)


def _phase(name: str, parts: Mapping[str, int]) -> Phase:
    """A phase with every component named, absent ones 0."""
    return Phase(name=name, components={key: parts.get(key, 0) for key in COMPONENTS})
