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
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.sharded import Spread
from ftplan.planner.stack import DEFAULT_CAPABILITY, OWN_STACK, Stack, cublas_workspace_bytes
from ftplan.planner.step_settings import (
    adapter_weight_bytes,
    step_settings,
    traced_step,
    trained_widths,
)
from ftplan.planner.step_trace import StepSettings
from ftplan.planner.tape import Moment, value

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
    kind: DeviceKind = device.kind if device else "cuda"
    capability = (device.compute_capability if device else None) or DEFAULT_CAPABILITY
    trained = plan.resolved_method.count(model, plan.method_settings)
    length = min(plan.max_length, longest_row or plan.max_length)
    workload = Workload(rows=plan.per_device_train_batch_size, length=length)
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
    return round(quantized * _bytes_per_4bit_weight(plan)) + rest_bytes


def _bytes_per_4bit_weight(plan: TrainingPlan) -> float:
    return _DOUBLE_QUANT_BYTES if plan.double_quant else _SINGLE_QUANT_BYTES


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
    """What a run holds from beginning to end, whatever the batch.

    `carried`: gradients that wait for further micro-batches.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer_states: int
    step_temporaries: int
    carried: int


@lru_cache(maxsize=1024)
def _held(model: ModelSpec, plan: TrainingPlan, stack: Stack, settings: StepSettings) -> _Held:
    if settings.spread is not None:
        return _held_of_shares(model, plan, settings, settings.spread)
    trained = plan.resolved_method.count(model, plan.method_settings)
    optimizer, widths = plan.optimizer, trained_widths(plan, trained)
    embeddings = model.embedding_parameters if trained.trains_embeddings else 0
    gradients = sum(count * width for count, width in widths)
    return _Held(
        weights=weight_memory_bytes(model, plan, stack),
        adapters=trained.added_parameters * adapter_weight_bytes(plan),
        gradients=gradients,
        optimizer_states=sum(
            optimizer.state_bytes(count, width, min(count, embeddings)) for count, width in widths
        ),
        step_temporaries=sum(
            optimizer.step_temporary_bytes(count, width) for count, width in widths
        ),
        carried=gradients,
    )


def _held_of_shares(
    model: ModelSpec, plan: TrainingPlan, settings: StepSettings, spread: Spread
) -> _Held:
    """What one GPU holds of what several divide. Scales of 4-bit weights are not divided."""
    whole, optimizer = settings.units(model).whole, plan.optimizer
    widths = [
        ((whole.reduced - whole.reduced_adapters) // spread.trained, spread.trained),
        (whole.reduced_adapters // spread.adapters, spread.adapters),
    ]
    on_gpu = 0 if spread.offloads else 1
    scales = 0
    if plan.quantization != "none":
        scales = round(model.quantizable_weights * (_bytes_per_4bit_weight(plan) - 0.5))
    return _Held(
        weights=whole.weights + scales,
        adapters=whole.adapters,
        gradients=on_gpu * whole.reduced,
        optimizer_states=on_gpu
        * sum(optimizer.state_bytes(count, width) for count, width in widths),
        step_temporaries=on_gpu
        * sum(optimizer.step_temporary_bytes(count, width) for count, width in widths),
        carried=whole.gradients,
    )


def _phases(
    model: ModelSpec,
    plan: TrainingPlan,
    workload: Workload,
    kind: DeviceKind,
    capability: tuple[int, int],
    stack: Stack,
) -> list[Phase]:
    settings = step_settings(model, plan, workload, kind, capability, stack)
    held, trace = _held(model, plan, stack, settings), traced_step(model, settings)
    workspace = cublas_workspace_bytes(capability) if kind == "cuda" else 0
    carried = held.carried if plan.gradient_accumulation_steps > 1 else 0
    resident = {
        "weights": held.weights,
        "adapters": held.adapters,
        "optimizer_states": held.optimizer_states,
        "communication": held.gradients if plan.num_gpus > 1 and plan.sharding == "none" else 0,
        "temporaries": 2 * workspace,  # one of the forward pass's thread, one of backward's
        "gradients": carried,
    }
    loaded = {"weights": held.weights, "adapters": held.adapters}
    phases = [_phase("load", loaded)]
    rows, length = workload.rows, workload.length
    for name, moments in trace.phases.items():
        phases.append(_highest(name, moments, resident, rows, length))
    after = {part: value(form, rows, length) for part, form in trace.after_backward.items()}
    step = {**resident, "gradients": held.gradients}
    step["temporaries"] += held.step_temporaries + after.get("temporaries", 0)
    phases.append(_phase("optimizer step", step))
    resident["gradients"] = 0
    phases.append(_phase("save", resident))
    return phases


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
