"""How long an optimizer step takes, in closed form, and between which bounds.

A step is its arithmetic and its memory traffic, FLOPs over what the device achieves and bytes over
what it moves; or what it sends to other GPUs or the host, or the host's launching of kernels, where
that takes longer. The operations are those of memory's trace (docs/time-model.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct, structs

from ftplan.planner.achieved import (
    ASSUMED_HOST_LINK_BYTES_PER_SECOND,
    ESTIMATE,
    FASTEST,
    HOST_SECONDS,
    HOST_SECONDS_WITH_HOOKS,
    LAUNCH_SECONDS,
    SHARE_OF_POWER,
    SLOWEST,
    Achieved,
)
from ftplan.planner.calibration import Calibration
from ftplan.planner.collectives import Collective
from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.exchanges import ring_collectives, step_collectives, waited_collectives
from ftplan.planner.hardware_spec import Device, DeviceKind
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import trained_model, trained_part
from ftplan.planner.optimizer_steps import Updated
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.rollout_work import RolloutWork, rollout_work
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_settings import in_front_of_rows
from ftplan.planner.step_trace import StepTrace
from ftplan.planner.tape import value
from ftplan.planner.tensor_parallel import one_rank
from ftplan.planner.trained import Trained
from ftplan.planner.units import FLOAT32_BYTES
from ftplan.planner.updated import updated_parameters
from ftplan.planner.weights import weight_memory_bytes

# How often the loss moves each logit. `stock`: written, log-softmax read and written, both read and
# the gradient's source and result written in backward, read by the product; `triton_ce` has no
# log-softmax, and writes its gradient over the logits. A fused kernel writes
# and reads a tile in each direction and turns it into its gradient in place. Without a kernel TRL's
# tiles pass through chains of torch operations, whose reads and writes were counted: 20.5 in
# forward, 26.5 in backward (trl.kernels.chunked_logprob, `_forward_tile`, `_backward_tile`).
PASSES_OVER_LOGITS = {"stock": 8, "trl-fused": 6, "liger": 6, "triton_ce": 7}
PASSES_OVER_LOGITS_WITHOUT_KERNEL = 47
# Of these, in a pass without gradients.
FORWARD_PASSES_OVER_LOGITS: dict[DeviceKind, float] = {"cuda": 2, "cpu": 20.5}

Bound = Literal[
    "arithmetic",
    "memory bandwidth",
    "links between GPUs",
    "links to the host",
    "launching kernels",
]


class StepWork(Struct, frozen=True, kw_only=True):
    """What an optimizer step, all its micro-batches, asks of a GPU of some kind, however fast.

    `tokens`: the GPU's part of those of GPUs that divide layers or rows. `dtype`: of products.
    `float32_flops`: of `flops`, those of fp32 values; `model_flops`: without what is computed
    again. `moved_bytes`: by the operations of layers and loss and by reading weights.
    `collectives`: exchanges with other GPUs; `overlapping`: the part of the computing that they can
    go on beside; `waited`: those that nothing goes on beside.
    `copied_bytes`: from and to the host's memory, where `host_bytes` are moved by the optimizer of
    all processes, if it is there; `optimizer_bytes` are then none.
    `kernels` and `optimizer_kernels`: launched by the host, `hooked`: while checkpointing's hooks
    see each tensor that micro-batches save.
    """

    kind: DeviceKind
    dtype: str
    tokens: float
    forward_flops: float
    flops: float
    model_flops: float
    float32_flops: float
    moved_bytes: float
    optimizer_bytes: float
    collectives: tuple[Collective, ...]
    overlapping: float
    copied_bytes: float
    host_bytes: float
    kernels: int
    optimizer_kernels: int
    hooked: bool
    waited: tuple[Collective, ...] = ()

    @property
    def exchanged_bytes(self) -> float:
        """What a GPU sends to others, by rings."""
        return sum(c.sent_bytes for c in (*self.collectives, *self.waited))


class StepParts(Struct, frozen=True, kw_only=True):
    """Seconds that each part of an optimizer step takes by itself: Eq. (T1). `overlapping`: the
    share of the computing, the optimizer's left out, that sending can go on beside; `waiting`: for
    exchanges that nothing goes on beside."""

    arithmetic: float
    traffic: float
    optimizer: float
    sending: float
    copying: float
    on_host: float
    launching: float
    overlapping: float = 1.0
    waiting: float = 0.0


class StepTime(Struct, frozen=True, kw_only=True):
    """Time of one optimizer step (all its micro-batches) on one device, which of the tokens of GPUs
    that divide layers or rows has its part.

    `least_step_seconds`, `most_step_seconds`: its bounds. `model_flops`: without what is computed
    again; `mfu`: the share of the data sheet's peak that these are, None on a processor.
    `step_joules`: of the card alone, None where its power is not known. `work`: what takes it.
    """

    step_seconds: float
    least_step_seconds: float
    most_step_seconds: float
    tokens_per_step: float
    forward_flops: float
    step_flops: float
    model_flops: float
    bound_by: Bound
    mfu: float | None
    step_joules: float | None
    work: StepWork | None = None

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def joules_per_token(self) -> float | None:
        return None if self.step_joules is None else self.step_joules / self.tokens_per_step

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STEP_KEYS}


# Of a step, in the JSON of commands.
STEP_KEYS = (
    "step_seconds",
    "least_step_seconds",
    "most_step_seconds",
    "tokens_per_second_per_gpu",
    "bound_by",
    "model_flops",
    "mfu",
    "joules_per_token",
)


def estimate_step_time(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device,
    *,
    tokens_per_micro_batch: float,
    mean_length: float,
    stack: Stack = OWN_STACK,
) -> StepTime:
    """Time of one optimizer step.

    `tokens_per_micro_batch`: padded tokens of the mean micro-batch, `mean_length`: of its rows.
    """
    work = step_work(
        model,
        plan,
        device,
        tokens_per_micro_batch=tokens_per_micro_batch,
        mean_length=mean_length,
        stack=stack,
    )
    return time_of(work, device)


def step_work(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device,
    *,
    tokens_per_micro_batch: float,
    mean_length: float,
    stack: Stack = OWN_STACK,
) -> StepWork:
    """The work of a step on a device of this kind and compute capability."""
    share = one_rank(model, plan.tp_size)
    trained = trained_part(share, plan)
    tokens, length = tokens_per_micro_batch / plan.cp_size, mean_length / plan.cp_size
    trace, rows, length = trace_of(model, plan, device, tokens, length, stack)
    forward = value(trace.forward_flops, rows, length)
    micro_batches = plan.gradient_accumulation_steps
    moved = _micro_batch_bytes(model, plan, trained, device, trace, rows, length)
    flops = forward + value(trace.backward_flops, rows, length)
    made = RolloutWork()
    if plan.resolved_objective.generates:
        made = rollout_work(model, plan, trace, rows, length, forward)
    updated = updated_parameters(share, plan, trained)
    on_host = plan.offload != "none"
    optimizer_bytes = _optimizer_bytes(plan, updated)
    optimizer_flops = plan.optimizer.flops(updated)
    reached = trained.reached_layers(share) / share.num_hidden_layers
    return StepWork(
        kind=device.kind,
        dtype=plan.compute_dtype,
        tokens=micro_batches * tokens / plan.tp_size,
        forward_flops=micro_batches * forward,
        flops=micro_batches * flops + optimizer_flops + made.flops,
        model_flops=micro_batches * (flops - value(trace.recomputed_flops, rows, length)),
        float32_flops=micro_batches * value(trace.float32_flops, rows, length),
        moved_bytes=micro_batches * moved + made.moved_bytes,
        optimizer_bytes=0.0 if on_host else optimizer_bytes,
        collectives=(
            *step_collectives(share, plan, updated),
            *ring_collectives(share, plan, tokens, reached),
        ),
        overlapping=_overlapping(plan, forward, flops),
        copied_bytes=_copied_bytes(share, plan, updated) if on_host else 0.0,
        host_bytes=plan.num_gpus * optimizer_bytes if on_host else 0.0,
        kernels=micro_batches * trace.num_kernels + round(made.kernels),
        optimizer_kernels=0 if on_host else plan.optimizer.num_kernels(updated, device.kind),
        hooked=plan.gradient_checkpointing and not plan.use_reentrant,
        waited=waited_collectives(share, plan, updated, tokens, reached=reached),
    )


def time_of(work: StepWork, device: Device) -> StepTime:
    """The step's time with what devices achieve in the middle, at most and at least."""
    seconds, bound = _seconds(work, device, ESTIMATE)
    peak = device.peak_flops_per_second.get(work.dtype) if device.kind == "cuda" else None
    watts = device.power_watts
    return StepTime(
        step_seconds=seconds,
        least_step_seconds=_seconds(work, device, FASTEST)[0],
        most_step_seconds=_seconds(work, device, SLOWEST)[0],
        tokens_per_step=work.tokens,
        forward_flops=work.forward_flops,
        step_flops=work.flops,
        model_flops=work.model_flops,
        bound_by=bound,
        mfu=work.model_flops / (seconds * peak) if peak else None,
        step_joules=SHARE_OF_POWER * watts * seconds if watts else None,
        work=work,
    )


def _seconds(work: StepWork, device: Device, achieved: Achieved) -> tuple[float, Bound]:
    """The step's time under some assumptions, and what takes it.

    Arithmetic and traffic are added, since on one stream kernels follow one another, unless the
    assumptions have them overlap. Products of fp32 values have a rate of their own: those of
    adapters beside a 16-bit base without autocast, or of the hidden states that k-bit preparation
    makes fp32. A GPU computes beside the host that launches its kernels; a processor is the host.
    """
    return joined_seconds(step_parts(work, device, achieved), device.kind, achieved)


def joined_seconds(
    parts: StepParts, kind: DeviceKind, achieved: Achieved = ESTIMATE
) -> tuple[float, Bound]:
    """What the parts of a step take together, and which of them takes the longest: Eq. (T1)."""
    arithmetic, moving, sending = parts.arithmetic, parts.traffic, parts.sending
    both = max(arithmetic, moving) if achieved.overlaps_traffic else arithmetic + moving
    computing = both + parts.optimizer
    copying = parts.copying
    if achieved.overlaps_links:
        alone = computing - parts.overlapping * both
        together = max(computing, alone + sending, copying)
    else:
        together = computing + sending + copying
    together += parts.on_host + parts.waiting
    launching = parts.launching
    bound: Bound = "arithmetic" if arithmetic >= moving else "memory bandwidth"
    if parts.waiting > computing:
        bound = "links between GPUs"
    elif max(sending, copying) > max(arithmetic, moving) and together > computing:
        bound = "links between GPUs" if sending >= copying else "links to the host"
    if kind == "cpu":
        return together + launching, bound if launching < computing else "launching kernels"
    return max(together, launching), bound if launching < together else "launching kernels"


def step_parts(work: StepWork, device: Device, achieved: Achieved = ESTIMATE) -> StepParts:
    """What each part of a step takes."""
    bandwidth = achieved_bytes_per_second(device, achieved)
    of_float32 = work.float32_flops / achieved_flops_per_second("float32", device, achieved)
    others = work.flops - work.float32_flops
    link = device.link_bytes_per_second
    to_host = device.host_link_bytes_per_second or ASSUMED_HOST_LINK_BYTES_PER_SECOND
    return StepParts(
        arithmetic=of_float32 + others / achieved_flops_per_second(work.dtype, device, achieved),
        traffic=work.moved_bytes / bandwidth,
        optimizer=work.optimizer_bytes / bandwidth,
        sending=sum(c.seconds(link, device.network) for c in work.collectives),
        overlapping=work.overlapping,
        waiting=sum(c.seconds(link, device.network) for c in work.waited),
        copying=work.copied_bytes / to_host,
        on_host=work.host_bytes / achieved.host_bandwidth,
        launching=achieved.host * device.calibration.launching * host_seconds(work),
    )


def corrected(parts: StepParts, calibration: Calibration) -> StepParts:
    """Parts of a step that were predicted without a calibration, with it."""
    return structs.replace(
        parts,
        arithmetic=parts.arithmetic / calibration.arithmetic,
        traffic=parts.traffic / calibration.traffic,
        optimizer=parts.optimizer / calibration.traffic,
        launching=parts.launching * calibration.launching,
    )


def achieved_bytes_per_second(device: Device, achieved: Achieved = ESTIMATE) -> float:
    """Bytes a second that kernels move on the device."""
    share = achieved.bandwidth[device.kind] * device.calibration.traffic
    return device.memory_bandwidth_bytes_per_second * share


def host_seconds(work: StepWork) -> float:
    """What the host takes to call a step's operations, on a GPU to launch their kernels."""
    launch = LAUNCH_SECONDS if work.kind == "cuda" else 0.0
    of_micro_batches = HOST_SECONDS_WITH_HOOKS if work.hooked else HOST_SECONDS
    return work.kernels * (of_micro_batches + launch) + work.optimizer_kernels * (
        HOST_SECONDS + launch
    )


def achieved_flops_per_second(dtype: str, device: Device, achieved: Achieved = ESTIMATE) -> float:
    """FLOP/s that products of training reach on the device."""
    peaks: Mapping[str, float] = device.peak_flops_per_second
    learned = device.calibration.arithmetic
    if device.kind == "cpu":  # measured with training's products
        return learned * achieved.measured * (peaks.get(dtype) or peaks["float32"])
    measured = device.matmul_flops_per_second.get(dtype)
    matmul = measured or achieved.peak * (peaks.get(dtype) or peaks["float32"])
    return learned * achieved.matmul * matmul


def trace_of(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None,
    tokens: float,
    length: float,
    stack: Stack = OWN_STACK,
) -> tuple[StepTrace, float, float]:
    """The step's trace, and (rows, length) to read it at, with the learned tokens in front of rows.

    However many GPUs divide the state, each computes and moves the same, so that one trace, of two,
    is for all numbers.
    """
    if plan.sharding != "none" and plan.data_parallel_size == plan.num_gpus > 2:
        plan = plan.replace(num_gpus=2, num_machines=1, dp_replicate_size=1)
    if plan.offload != "none" and plan.num_gpus > 1:
        plan = plan.replace(offload="none")  # the same is computed on the GPU
    rows = tokens / length
    length += in_front_of_rows(plan)
    whole = max(1, round(rows)), max(1, round(length))
    return compiled_step(model, plan, *whole, device, stack).trace, rows, length


def forward_flops(
    model: ModelSpec, plan: TrainingPlan, tokens: float, length: float, device: Device | None = None
) -> float:
    """FLOPs of one forward pass, output projection included."""
    trace, rows, length = trace_of(model, plan, device, tokens, length)
    return value(trace.forward_flops, rows, length)


def micro_batch_flops(
    model: ModelSpec, plan: TrainingPlan, tokens: float, length: float, device: Device | None = None
) -> float:
    """FLOPs of forward, backward and recomputation of one micro-batch."""
    trace, rows, length = trace_of(model, plan, device, tokens, length)
    both = value(trace.forward_flops, rows, length) + value(trace.backward_flops, rows, length)
    return both


def _micro_batch_bytes(
    model: ModelSpec,
    plan: TrainingPlan,
    trained: Trained,
    device: Device,
    trace: StepTrace,
    rows: float,
    length: float,
) -> float:
    """Bytes moved by element-wise work and by reading the weights.

    Layers below the first trained one are computed forward only.
    """
    # What is there for any micro-batch are copies of weights, which are counted below.
    (_, *forward), (_, *backward) = trace.forward_moved, trace.backward_moved
    moved = value((0, *forward), rows, length) + value((0, *backward), rows, length)
    model = one_rank(trained_model(model, plan), plan.tp_size)
    kind: DeviceKind = device.kind
    forwards = 1 + _recomputed_share(model, plan)
    further = trace.num_passes - 1
    over_logits = passes_over_logits(plan, kind) + further * FORWARD_PASSES_OVER_LOGITS[kind]
    logits = over_logits * rows * length * model.vocab_size * FLOAT32_BYTES
    backwards = trained.reached_layers(model) / model.num_hidden_layers
    passes_over_weights = trace.num_passes + forwards * backwards
    weights = passes_over_weights * weight_memory_bytes(model, plan)
    expanded = expanded_bytes(model, plan, passes_over_weights, backwards)
    return moved + logits + weights + expanded


def _recomputed_share(model: ModelSpec, plan: TrainingPlan) -> float:
    """Of the layers, those that are computed again in backward."""
    recomputed = -(-model.num_hidden_layers // plan.every_n_layers)
    return plan.gradient_checkpointing * recomputed / model.num_hidden_layers


def passes_over_logits(plan: TrainingPlan, kind: DeviceKind) -> int:
    """How often each logit is moved, as fp32."""
    if plan.resolved_objective.scores:
        return 0
    if plan.loss == "trl-fused" and kind == "cpu":
        return PASSES_OVER_LOGITS_WITHOUT_KERNEL
    return PASSES_OVER_LOGITS[plan.loss]


def expanded_bytes(model: ModelSpec, plan: TrainingPlan, passes: float, backwards: float) -> float:
    """Bytes of the 16-bit copies of quantized weights, written and read, beside the reading of
    the quantized weights themselves.

    4 bits: each pass expands each weight and multiplies with the copy. int8: forward multiplies
    integers; backward casts and then scales the copy in place, so it goes by twice
    (bitsandbytes.autograd, `MatMul4Bit` and `MatMul8bitLt`). bitsandbytes 0.50 has a kernel that
    spares forward's copy for up to some hundred tokens, by card and shape; it is not counted.
    """
    if plan.quantization == "none":
        return 0.0
    times = 2 * backwards if plan.quantization == "int8" else passes
    return times * 2 * model.quantizable_weights * plan.compute_bytes


def _optimizer_bytes(plan: TrainingPlan, updated: Sequence[Updated]) -> float:
    """Bytes an optimizer step moves: parameter, gradient and states read; all but the gradient
    written. GPUs that divide states update a part each."""
    parameter_bytes = sum(p.count * p.num_bytes for p in updated)
    parts = 1 if plan.sharding == "none" else plan.dp_shard_size
    return (3 * parameter_bytes + 2 * plan.optimizer.state_bytes(updated)) / parts


def _overlapping(plan: TrainingPlan, forward: float, both: float) -> float:
    """Of a step's computing, what exchanges can go on beside: all of it where layers are gathered
    as they come; else the last micro-batch's backward, which the gradients come from."""
    if plan.shards_parameters or not both:
        return 1.0
    return (both - forward) / both / plan.gradient_accumulation_steps


def _copied_bytes(model: ModelSpec, plan: TrainingPlan, updated: Sequence[Updated]) -> float:
    """What goes between a GPU and the host in a step, one way after the other. Gradients go there
    in each micro-batch; parameters that wait there come for forward and again for backward, else
    the updated ones come once."""
    gradients = sum(p.count * p.num_bytes for p in updated)
    micro_batches = plan.gradient_accumulation_steps
    if plan.offload == "parameters":
        weights = weight_memory_bytes(model, plan)
        return micro_batches * (2 * weights + gradients) / plan.dp_shard_size
    return (micro_batches + 1) * gradients / plan.dp_shard_size
