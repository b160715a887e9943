"""Peak memory of a run in closed form: the maximum over its phases.

Three numbers are kept apart: *allocated* (tensors), *reserved* (what the caching allocator
holds) and *device* (what the driver shows). *Required* decides: the least free memory with
which the run survives. Equations are numbered in docs/memory-model.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

from ftplan.planner.adapters import unseen_gradient_bytes
from ftplan.planner.closed_form import check_closed_form
from ftplan.planner.context_parallel import check_rows_divided
from ftplan.planner.disk import DiskNeeds, disk_needs, saved_weight_bytes
from ftplan.planner.errors import InputError
from ftplan.planner.generation import with_rollout
from ftplan.planner.hardware_spec import (
    ASSUMED_CUDA_CONTEXT_BYTES,
    CPU_HEAP_HOLES,
    CPU_PROCESS_BYTES,
    CPU_WORST_HEAP_HOLES,
    Device,
    DeviceKind,
)
from ftplan.planner.held import Held, held_of_shares, held_under_zero, held_under_zero3
from ftplan.planner.host_memory import HostMemory, HostShare, host_memory
from ftplan.planner.model_spec import Linear, ModelSpec
from ftplan.planner.objectives import keeps_reference, trained_model, trained_part
from ftplan.planner.optimizer_steps import Updated, in_place
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.prequantized import PREQUANTIZED, prequantized_bytes
from ftplan.planner.separate_experts import quantized_linears
from ftplan.planner.stack import DEFAULT_CAPABILITY, OWN_STACK, Stack, cublas_workspace_bytes
from ftplan.planner.step_settings import (
    Workload,
    model_rows,
    row_length,
    step_settings,
)
from ftplan.planner.step_trace import (
    EVALUATION_PHASE,
    GENERATION_PHASE,
    REFERENCE_PHASE,
    SCORING_PHASE,
    StepSettings,
    StepTrace,
    step_units,
    trace_step,
    with_parts,
)
from ftplan.planner.tape import ZERO, Moment, added, constant, value
from ftplan.planner.tensor_parallel import one_rank
from ftplan.planner.trained import Trained, num_elements
from ftplan.planner.updated import frozen_parameters, updated_parameters

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
# launcher turns on; replayed by dry runs of 58 configurations the median was 1.03, and 1.01 of what
# is required (docs/memory-model.md has the whole distribution). People's own stacks seldom do: the
# median of what was measured without them, T4 and RTX 4080 (fitcheck, canifinetune; the highest was
# 1.49).
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

DEVICE_KINDS: dict[bool, DeviceKind] = {True: "cuda", False: "cpu"}  # by whether it is CUDA

# Phases of a micro-batch, in order.
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


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What one GPU (or the processor) holds over a run, and what the host and disk need.

    `list_phases` gives the phases; it is asked once they are looked at.
    """

    allocated_peak_bytes: int
    reserved_peak_bytes: int
    device_peak_bytes: int
    required_bytes: int
    host: HostMemory
    disk: DiskNeeds
    list_phases: Callable[[], tuple[Phase, ...]] = field(compare=False, repr=False)

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
            whole_bytes=whole,
            saved_bytes=saved,
        )
        return host, disk_needs(model, plan, saved_bytes=saved, state_bytes=states)


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
        reserved = round(allocated * (1 + CPU_HEAP_HOLES))
        device_peak = reserved + CPU_PROCESS_BYTES
        required = round(allocated * (1 + CPU_WORST_HEAP_HOLES)) + CPU_PROCESS_BYTES
        host = host.trained_on_processor(device_peak)
    else:
        context = context_bytes(device)
        share = RESERVED_OVER_ALLOCATED[plan.trainer]
        reserved = round(allocated * share) if reserved_bytes is None else reserved_bytes
        device_peak = reserved + context
        required = context + (
            reserved if required_reserved_bytes is None else required_reserved_bytes
        )
    return MemoryEstimate(
        allocated_peak_bytes=allocated,
        reserved_peak_bytes=reserved,
        device_peak_bytes=device_peak,
        required_bytes=required,
        host=host,
        disk=disk,
        list_phases=list_phases,
    )


def context_bytes(device: Device | None) -> int:
    """What a process holds of the GPU beside torch's allocator: kernels, libraries."""
    return device.context_bytes if device else ASSUMED_CUDA_CONTEXT_BYTES


def needed_bytes(memory: MemoryEstimate) -> int:
    """Free memory that a plan is given: what it requires, and the margin."""
    return round(memory.required_bytes * (1 + MEMORY_MARGIN))


def fits(memory: MemoryEstimate, device: Device) -> bool:
    """Whether what is free on the device is enough; `estimate` and `plan` both ask this."""
    return needed_bytes(memory) <= device.free_bytes


def weight_memory_bytes(
    model: ModelSpec, plan: TrainingPlan, stack: Stack = OWN_STACK, width: int | None = None
) -> int:
    """Bytes of the loaded model, eq. (1): quantized matrices, the rest in `dtype` or `width` bytes;
    in fp32 after k-bit preparation."""
    width = width or plan.weight_bytes
    if plan.quantization == "none":
        return model.num_parameters * width + model.buffer_bytes
    linears = list(_quantized_linears(model, stack))
    quantized = sum(count * linear.num_weights for count, linear in linears)
    rest = model.num_parameters - quantized
    rest_bytes = rest * width + model.buffer_bytes
    if stack.kbit_prepare:
        outer = 2 * model.embedding_parameters if not model.tie_word_embeddings else 0
        rest_bytes = rest * FLOAT32_BYTES + model.buffer_bytes
        if stack.casts_back:
            rest_bytes -= outer * (FLOAT32_BYTES - 2)
    if plan.quantization in PREQUANTIZED:
        sizes = (count * prequantized_bytes(linear, plan.quantization) for count, linear in linears)
        return sum(sizes) + rest_bytes
    if plan.quantization == "int8":
        rows = sum(count * linear.out_features for count, linear in linears)
        return quantized + rows * FLOAT32_BYTES + rest_bytes
    return round(quantized * quantized_bytes_per_weight(plan)) + rest_bytes


def quantized_storages(model: ModelSpec, plan: TrainingPlan, stack: Stack) -> Iterator[int]:
    """Bytes of each tensor that quantized matrices are held in: numbers, and scales."""
    for count, linear in _quantized_linears(model, stack):
        if plan.quantization in PREQUANTIZED:
            yield from [prequantized_bytes(linear, plan.quantization)] * count
            continue
        if plan.quantization == "int8":
            numbers, scales = linear.num_weights, linear.out_features * FLOAT32_BYTES
        else:
            numbers = linear.num_weights // 2
            scales = round(linear.num_weights * quantized_bytes_per_weight(plan)) - numbers
        yield from [numbers, scales] * count


def _quantized_linears(model: ModelSpec, stack: Stack) -> Iterator[tuple[int, Linear]]:
    """The modules that are held quantized, how many of each."""
    for layer, count in model.layer_counts.items():
        separate = stack.separates_experts
        for linear, copies in quantized_linears(layer, separate_experts=separate):
            yield count * copies, linear
    for linear in (*model.embedding_linears, *model.other_linears):
        if linear.quantizable:
            yield 1, linear


def quantized_bytes_per_weight(plan: TrainingPlan) -> float:
    """Bytes of one weight of a quantized base, its share of 4 bits' scales included."""
    if plan.quantization == "int8":
        return 1
    return _DOUBLE_QUANT_BYTES if plan.double_quant else _SINGLE_QUANT_BYTES


# A plan's settings that a step's memory depends on; batch and length are put in afterwards.
_MEASURES = ("per_device_train_batch_size", "max_length", "gradient_accumulation_steps")
_DECISIVE = [
    item.name
    for item in dataclasses.fields(TrainingPlan)
    if not item.metadata["recipe"] and item.name not in _MEASURES
]
_decisive = attrgetter(*_DECISIVE)
_decisive_but_optim = attrgetter(*(name for name in _DECISIVE if name != "optim"))
# Of these, what only the trace depends on.
_WITHIN_STEP = (
    *("attn_implementation", "gradient_checkpointing", "every_n_layers", "loss", "packing"),
    "use_reentrant",
)
_of_standing = attrgetter(*(name for name in _DECISIVE if name not in _WITHIN_STEP))


# Of what backward leaves, what is counted by itself or is gone when the optimizer steps.
_REPLACED = ("gradients", "communication")

# Moments of a trace that belong to no phase.
LEFT, INPUTS, KEPT, NOTHING = "left by backward", "inputs", "kept", "nothing"


def compiled_step(
    model: ModelSpec,
    plan: TrainingPlan,
    rows: int,
    length: int,
    device: Device | None,
    stack: Stack,
) -> CompiledStep:
    """The step's memory for any batch and length that agree in what is discrete about these."""
    kind: DeviceKind = device.kind if device else "cuda"
    capability = (device.compute_capability if device else None) or DEFAULT_CAPABILITY
    workload = Workload.of(model, plan, rows, length, kind)
    key = (_decisive(plan), workload, kind, capability, stack)
    return model.remembered(key, partial(_compile, model, plan, workload, kind, capability, stack))


class TracedStep:
    """A step's trace: the moments above what is held throughout. It serves every optimizer.

    `moments`: by phase, and besides of what is alive when backward is over (`LEFT`), while the
    optimizer steps (`INPUTS`), between batches (`KEPT`) and without any (`NOTHING`).
    """

    def __init__(self, settings: StepSettings, trace: StepTrace) -> None:
        self.settings, self.trace = settings, trace
        kept = settings.rollout.kept if settings.rollout else ZERO
        left = {part: form for part, form in trace.after_backward.items() if part not in _REPLACED}
        self.moments: dict[str, Sequence[Moment]] = {
            **trace.phases,
            LEFT: (Moment(added(left.values()), left),),
            INPUTS: (Moment(added(trace.inputs.values()), trace.inputs),),
            KEPT: (Moment(kept, {"temporaries": kept} if any(kept) else {}),),
            NOTHING: (Moment(ZERO, {}),),
        }
        self._known_peaks: dict[tuple[int, int], Mapping[str, int]] = {}

    def peaks(self, rows: int, length: int) -> Mapping[str, int]:
        """Bytes of the highest of each of `moments`."""
        known = self._known_peaks.get((rows, length))
        if known is None:
            known = self._known_peaks[rows, length] = {
                name: max(value(moment.total, rows, length) for moment in moments)
                for name, moments in self.moments.items()
            }
        return known


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of a run: its phase, what is `held` throughout it by component, which moments of a
    trace come on top, and a moment of the optimizer's step, of fixed size."""

    phase: str
    held: Mapping[str, int]
    above: str
    stepping: Moment | None = None

    @property
    def fixed_bytes(self) -> int:
        """All but the trace's moments."""
        stepping = value(self.stepping.total, 0, 0) if self.stepping else 0
        return sum(self.held.values()) + stepping

    def moments(self, traced: TracedStep) -> Sequence[Moment]:
        above = traced.moments[self.above]
        stepping = self.stepping
        return above if stepping is None else [with_parts(stepping, m.components) for m in above]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a plan holds whatever the batch, on the GPU in each span of a run, and elsewhere."""

    held: Held
    spans: Sequence[Span]
    host: HostMemory
    disk: DiskNeeds

    @cached_property
    def fixed_bytes(self) -> list[tuple[str, int]]:
        """Of each span, which moments come on top of how much."""
        return [(span.above, span.fixed_bytes) for span in self.spans]


class CompiledStep:
    """A step's memory for every micro-batch that its trace is of."""

    def __init__(self, traced: TracedStep, standing: Standing) -> None:
        self._traced, self._standing = traced, standing
        self.trace, self.settings = traced.trace, traced.settings
        self.held, self.host, self.disk = standing.held, standing.host, standing.disk

    def peak_bytes(self, rows: int, length: int) -> int:
        """Bytes allocated at the peak."""
        peaks = self._traced.peaks(rows, length)
        return max(
            [fixed + peaks[above] for above, fixed in self._standing.fixed_bytes if above in peaks]
        )

    def phases(self, rows: int, length: int) -> tuple[Phase, ...]:
        """Each phase at its highest moment."""
        highest: dict[str, Phase] = {}
        for span, moment in self._highest(rows, length):
            phase = _phase(span.phase, span.held, moment, rows, length)
            before = highest.get(span.phase)
            if before is None or phase.allocated_peak_bytes > before.allocated_peak_bytes:
                highest[span.phase] = phase
        return tuple(highest.values())

    def peak(self, rows: int, length: int) -> tuple[str, Mapping[str, int], Moment]:
        """The highest moment of all: its phase, and what is held throughout that."""

        def height(found: tuple[Span, Moment]) -> int:
            span, moment = found
            return sum(span.held.values()) + value(moment.total, rows, length)

        span, moment = max(self._highest(rows, length), key=height)
        return span.phase, span.held, moment

    def _highest(self, rows: int, length: int) -> Iterator[tuple[Span, Moment]]:
        """Each span that the trace has, and its highest moment."""
        for span in self._standing.spans:
            if span.above in self._traced.moments:
                moments = span.moments(self._traced)
                yield span, max(moments, key=lambda m: value(m.total, rows, length))


def _phase(name: str, held: Mapping[str, int], moment: Moment, rows: int, length: int) -> Phase:
    """A phase with every component named, absent ones 0."""
    components = {key: held.get(key, 0) for key in COMPONENTS}
    for part, form in moment.components.items():
        components[part] += value(form, rows, length)
    return Phase(name=name, components=components)


def _held(
    model: ModelSpec, plan: TrainingPlan, stack: Stack, trained: Trained, settings: StepSettings
) -> Held:
    if settings.spread is not None:
        scales = 0
        if plan.quantization != "none" and plan.quantization not in PREQUANTIZED:
            weights = sum(
                count * one.num_weights for count, one in _quantized_linears(model, stack)
            )
            scales = round(weights * (quantized_bytes_per_weight(plan) - 0.5))
        return held_of_shares(step_units(model, settings), plan, settings.spread, scales)
    if settings.reduction is not None:
        weights = weight_memory_bytes(model, plan, stack, settings.numerics.weights)
        return held_under_zero(weights, plan, trained, settings.reduction)
    if settings.partition is not None:
        updated = updated_parameters(model, plan, trained)
        return held_under_zero3(model, plan, trained, settings.partition, updated)
    return _held_whole(model, plan, stack, trained, settings)


def _held_whole(
    model: ModelSpec, plan: TrainingPlan, stack: Stack, trained: Trained, settings: StepSettings
) -> Held:
    """Every GPU holds all. DDP's buckets repeat the gradients."""
    optimizer, kind = plan.optimizer, DEVICE_KINDS[settings.on_cuda]
    updated = updated_parameters(model, plan, trained)
    gradients = sum(p.count * p.num_bytes for p in updated)
    with_states = list(updated)
    if optimizer.keeps_frozen:
        with_states += frozen_parameters(model, plan, trained)
    states = optimizer.state_bytes(with_states, kind)
    host_states = optimizer.host_state_bytes(with_states) if kind == "cuda" else 0
    unseen = _unseen_bytes(plan, trained, settings)
    kept = 0 if optimizer.steps_in_backward else gradients + unseen
    others, own = _of_divided_embeddings(model, plan, trained)
    kept += others
    return Held(
        weights=weight_memory_bytes(model, plan, stack),
        adapters=num_elements(trained.adapters) * settings.numerics.adapters
        + num_elements(trained.held_as_base) * plan.weight_bytes
        + trained.frozen_parameters * FLOAT32_BYTES
        + trained.index_bytes,
        carried=kept,
        reduced=kept,
        optimizer_states=states,
        on_host=HostShare(optimizer_states=host_states),
        communication=gradients if plan.data_parallel_size > 1 else 0,
        stepping=[
            with_parts(
                moment, {"gradients": constant(unseen + others), "temporaries": constant(own)}
            )
            for moment in _step_moments(model, plan, updated, kind)
        ],
        saved_states=plan.tp_size * states + host_states,
    )


def _of_divided_embeddings(
    model: ModelSpec, plan: TrainingPlan, trained: Trained
) -> tuple[int, int]:
    """(bytes of the embeddings' gradient that are of other GPUs' rows, of the copy of this GPU's
    rows that a fused step works on). torch's DTensor leaves the gradient whole on each GPU of those
    that divide the rows; one that is summed with the output projection's has its rows. Lists that
    a step makes are larger than such a copy, and come after it is gone."""
    if model.vocabulary_parts == 1 or not trained.trains_embeddings or model.tie_word_embeddings:
        return 0, 0
    own = model.embedding_parameters * plan.weight_bytes
    return (model.vocabulary_parts - 1) * own, own if plan.optimizer.step is in_place else 0


def _step_moments(
    model: ModelSpec, plan: TrainingPlan, updated: Sequence[Updated], kind: DeviceKind
) -> tuple[Moment, ...]:
    by_trainer = plan.trainer != "loop"
    return model.remembered(
        ("step", plan.optim, tuple(updated), kind, by_trainer),
        partial(plan.optimizer.step_moments, updated, kind, by_trainer=by_trainer),
    )


def _unseen_bytes(plan: TrainingPlan, trained: Trained, settings: StepSettings) -> int:
    """What gradients hold beside themselves, beside a base whose adapters are cast."""
    if settings.numerics.weights == FLOAT32_BYTES or plan.optimizer.steps_in_backward:
        return 0
    options = plan.resolved_method.options(plan.method_settings)
    return unseen_gradient_bytes(options, trained, settings.numerics.adapters)


def _of_trace(plan: TrainingPlan) -> tuple[object, ...]:
    """The settings that forward and backward depend on: of optimizers, one that steps there."""
    within = plan.optim if plan.optimizer.steps_in_backward else None
    return (*_decisive_but_optim(plan), within)


def _traced(
    model: ModelSpec,
    plan: TrainingPlan,
    workload: Workload,
    kind: DeviceKind,
    capability: tuple[int, int],
    stack: Stack,
    trained: Trained,
) -> TracedStep:
    model = trained_model(model, plan)
    settings = step_settings(model, plan, workload, kind, capability, stack, trained)
    trace = trace_step(model, settings)
    if settings.rollout is not None:
        trace = with_rollout(model, settings, trace)
    return TracedStep(settings, trace)


def _compile(
    model: ModelSpec,
    plan: TrainingPlan,
    workload: Workload,
    kind: DeviceKind,
    capability: tuple[int, int],
    stack: Stack,
) -> CompiledStep:
    check_closed_form(plan, model)
    check_rows_divided(model, plan, kind, capability)
    published, model = model, one_rank(model, plan.tp_size)
    trained = trained_part(model, plan)
    traced = model.remembered(
        ("trace", *_of_trace(plan), workload, kind, capability, stack),
        partial(_traced, model, plan, workload, kind, capability, stack, trained),
    )
    settings = traced.settings
    widths = settings.numerics.weights, settings.numerics.adapters
    division = settings.spread, settings.reduction, settings.partition
    situation = workload.accumulates, _meets_gradients(settings), kind, capability, stack
    standing = model.remembered(
        ("standing", *_of_standing(plan), *situation, widths, division),
        partial(_standing, model, published, plan, stack, trained, settings, workload.accumulates),
    )
    return CompiledStep(traced, standing)


def _standing(
    model: ModelSpec,
    published: ModelSpec,
    plan: TrainingPlan,
    stack: Stack,
    trained: Trained,
    settings: StepSettings,
    accumulates: bool,
) -> Standing:
    """`model`: what one GPU has of the `published` one; files hold the whole."""
    with_objective, kind = trained_model(model, plan), DEVICE_KINDS[settings.on_cuda]
    held = _held(with_objective, plan, stack, trained, settings)
    whole = trained if model is published else trained_part(published, plan)
    saved = saved_weight_bytes(trained_model(published, plan), plan, whole, stack)
    return Standing(
        held=held,
        spans=_spans(plan, held, settings, accumulates),
        host=host_memory(
            published,
            plan,
            kind,
            share=held.on_host,
            trained_own=trained.base_parameters,
            trained_all=trained.num_trainable_parameters,
            whole_bytes=held.weights + held.adapters,
            saved_bytes=saved,
        ),
        disk=disk_needs(published, plan, saved_bytes=saved, state_bytes=held.saved_states),
    )


def _spans(
    plan: TrainingPlan, held: Held, settings: StepSettings, accumulates: bool
) -> Sequence[Span]:
    """A run's, in order."""
    workspace = cublas_workspace_bytes(settings.capability) if settings.on_cuda else 0
    loaded = {
        "weights": held.weights,
        "reference_model": held.weights if keeps_reference(plan) else 0,
        "adapters": held.adapters,
    }
    resident = {
        **loaded,
        "gradients": held.gradient_buffer,
        "optimizer_states": held.optimizer_states,
        "communication": held.communication,
        "temporaries": 2 * workspace,  # one of the forward pass's thread, one of backward's
    }
    running = {
        **resident,
        "gradients": held.carried if accumulates else held.gradient_buffer,
        "communication": held.communication + held.exchanged,
    }
    # A loop of one's own lets go of gradients at the beginning of the next step.
    kept = held.carried if plan.trainer == "loop" else held.gradient_buffer
    behind = {**resident, "gradients": kept}
    evaluating = {**behind, "communication": running["communication"]}
    before_step = {**resident, "gradients": held.reduced}
    asking = {**loaded, "temporaries": workspace}
    carried = held.carried if _meets_gradients(settings) else held.gradient_buffer
    generating = {**resident, "gradients": carried}
    spans = [
        Span(phase="load", held=loaded, above=NOTHING),
        Span(phase=REFERENCE_PHASE, held=asking, above=REFERENCE_PHASE),
        *(
            Span(phase=name, held=generating, above=name)
            for name in (GENERATION_PHASE, SCORING_PHASE)
        ),
        *(Span(phase=name, held=running, above=name) for name in STEP_PHASES),
        # At its beginning what backward leaves is there.
        Span(phase="optimizer step", held=before_step, above=LEFT),
        *(
            Span(phase="optimizer step", held=resident, above=INPUTS, stepping=moment)
            for moment in _highest_fixed(held.stepping)
        ),
        Span(phase=EVALUATION_PHASE, held=evaluating, above=EVALUATION_PHASE),
        Span(phase="save", held=behind, above=KEPT),
    ]
    if held.reducing is not None:
        reducing = {part: running[part] + held.reducing[part] for part in held.reducing}
        spans.append(Span(phase="backward", held={**running, **reducing}, above=LEFT))
    return spans


def _meets_gradients(settings: StepSettings) -> bool:
    """Whether the model generates within a step."""
    return settings.rollout is not None and settings.rollout.generation.meets_gradients


def _highest_fixed(moments: Sequence[Moment]) -> list[Moment]:
    """The highest of moments that no batch changes."""
    return [max(moments, key=lambda moment: value(moment.total, 0, 0))] if moments else []
