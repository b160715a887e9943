"""A training step's memory for every batch and length, put together from what plans share.

What a plan holds whatever the batch (`Standing`) and the moments of its step's trace above that
(`TracedStep`) are each worked out once for all plans that agree in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from operator import attrgetter

from msgspec import Struct, structs

from ftplan.planner.adapters import importance_elements, unseen_gradient_bytes
from ftplan.planner.closed_form import check_closed_form
from ftplan.planner.context_parallel import check_rows_divided
from ftplan.planner.disk import (
    DiskNeeds,
    disk_needs,
    final_weight_bytes,
    saved_weight_bytes,
)
from ftplan.planner.generation import with_rollout
from ftplan.planner.hardware_spec import (
    Device,
    DeviceKind,
)
from ftplan.planner.held import Held, held_of_shares, held_under_zero, held_under_zero3
from ftplan.planner.host_memory import HostMemory, HostShare, host_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import keeps_reference, trained_model, trained_part
from ftplan.planner.optimizer_steps import Updated, in_place
from ftplan.planner.phases import COMPONENTS, STEP_PHASES, Phase
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.prequantized import PREQUANTIZED
from ftplan.planner.rewards import reward_bytes
from ftplan.planner.stack import (
    FLASH_CAPABILITY,
    Stack,
    cublas_workspace_bytes,
    kernel_capability,
)
from ftplan.planner.step_settings import Workload, step_settings
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
from ftplan.planner.units import FLOAT32_BYTES
from ftplan.planner.updated import frozen_parameters, updated_parameters
from ftplan.planner.weights import (
    quantized_bytes_per_weight,
    quantized_weights,
    weight_memory_bytes,
)

DEVICE_KINDS: dict[bool, DeviceKind] = {True: "cuda", False: "cpu"}  # by whether it is CUDA

# A plan's settings that a step's memory depends on; batch and length are put in afterwards.
_MEASURES = ("per_device_train_batch_size", "max_length", "gradient_accumulation_steps")
_DECISIVE = [
    item.name
    for item in dataclasses.fields(TrainingPlan)
    if not item.metadata["recipe"] and item.name not in _MEASURES
]
_decisive = attrgetter(*_DECISIVE)
_decisive_for_trace = attrgetter(*(name for name in _DECISIVE if name not in ("optim", "num_gpus")))
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
    capability = kernel_capability(device)
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

    def on(self, capability: tuple[int, int]) -> TracedStep:
        """The same on a card with the same kernels."""
        if self.settings.capability == capability:
            return self
        return TracedStep(structs.replace(self.settings, capability=capability), self.trace)

    def peaks(self, rows: int, length: int) -> Mapping[str, int]:
        """Bytes of the highest of each of `moments`."""
        known = self._known_peaks.get((rows, length))
        if known is None:
            known = self._known_peaks[rows, length] = {
                name: max(value(moment.total, rows, length) for moment in moments)
                for name, moments in self.moments.items()
            }
        return known


class Span(Struct, frozen=True, kw_only=True):
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


class Standing(Struct, frozen=True, kw_only=True, dict=True):
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
            weights = quantized_weights(model, stack)
            scales = round(weights * (quantized_bytes_per_weight(plan) - 0.5))
        return held_of_shares(step_units(model, settings), plan, settings.spread, scales)
    if settings.reduction is not None:
        weights = weight_memory_bytes(model, plan, stack, settings.numerics.weights)
        held = held_under_zero(weights, plan, trained, settings.reduction)
        layers = any(numerics.trains for numerics in settings.numerics_of_layers(model))
        learns = layers or settings.trains_input or settings.trains_head
        return held if learns else structs.replace(held, reducing=None)
    if settings.partition is not None:
        updated = updated_parameters(model, plan, trained)
        return held_under_zero3(model, plan, trained, settings.partition, updated)
    return _held_whole(model, plan, stack, trained, settings)


def _held_whole(
    model: ModelSpec, plan: TrainingPlan, stack: Stack, trained: Trained, settings: StepSettings
) -> Held:
    """Every GPU holds all. DDP's buckets repeat the gradients, FSDP1's `NO_SHARD` sums them where
    they are."""
    optimizer, kind = plan.optimizer, DEVICE_KINDS[settings.on_cuda]
    updated = updated_parameters(model, plan, trained)
    gradients = sum(p.count * p.num_bytes for p in updated)
    with_states = list(updated)
    if optimizer.keeps_frozen:
        with_states += frozen_parameters(model, plan, trained)
    states = optimizer.state_bytes(with_states, kind)
    if plan.trainer != "loop":  # in one's own nobody takes ranks away
        options = plan.resolved_method.options(plan.method_settings)
        states += settings.numerics.adapters * importance_elements(options, trained)
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
        communication=gradients if plan.data_parallel_size > 1 and not stack.sums_in_place else 0,
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
        ("step", plan.method, plan.optim, tuple(updated), kind, by_trainer),
        partial(plan.optimizer.step_moments, updated, kind, by_trainer=by_trainer),
    )


def _unseen_bytes(plan: TrainingPlan, trained: Trained, settings: StepSettings) -> int:
    """What gradients hold beside themselves, beside a base whose adapters are cast."""
    if settings.numerics.weights == FLOAT32_BYTES or plan.optimizer.steps_in_backward:
        return 0
    options = plan.resolved_method.options(plan.method_settings)
    return unseen_gradient_bytes(options, trained, settings.numerics.adapters)


def _of_trace(plan: TrainingPlan) -> tuple[object, ...]:
    """The settings that forward and backward depend on: of optimizers, one that steps there; the
    number of GPUs where they divide something."""
    within = plan.optim if plan.optimizer.steps_in_backward else None
    divides = plan.sharding != "none" or plan.data_parallel_size < plan.num_gpus
    return (*_decisive_for_trace(plan), within, plan.num_gpus if divides else 1)


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
    kernels = min(capability, FLASH_CAPABILITY)  # cuBLAS's workspace is no part of the trace
    traced = model.remembered(
        ("trace", *_of_trace(plan), workload, kind, kernels, stack),
        partial(_traced, model, plan, workload, kind, kernels, stack, trained),
    ).on(capability)
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
    final = final_weight_bytes(trained_model(published, plan), plan, saved)
    return Standing(
        held=held,
        spans=_spans(plan, held, settings, accumulates, reward_bytes(model, plan)),
        host=host_memory(
            published,
            plan,
            kind,
            share=held.on_host,
            trained_own=trained.base_parameters,
            trained_all=trained.num_trainable_parameters,
            saved_bytes=max(saved, final),
        ),
        disk=disk_needs(
            published,
            plan,
            saved_bytes=saved,
            state_bytes=held.saved_states,
            final_bytes=final,
        ),
    )


def _spans(
    plan: TrainingPlan, held: Held, settings: StepSettings, accumulates: bool, judging: int
) -> Sequence[Span]:
    """A run's, in order. `judging`: bytes of the reward model."""
    workspace = cublas_workspace_bytes(settings.capability) if settings.on_cuda else 0
    loaded = {
        "weights": held.weights,
        "reference_model": held.weights if keeps_reference(plan) else 0,
        "reward_model": judging,
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
