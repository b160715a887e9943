"""How long an optimizer step takes, in closed form.

A step is its arithmetic and its memory traffic, FLOPs over what the device achieves and bytes over
what it moves, or what it sends to other GPUs where that takes longer. The operations are those of
the trace that memory is read off (docs/time-model.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.hardware_spec import Device, DeviceKind
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import trained_model, trained_part
from ftplan.planner.plan import AUTOCAST_DTYPE, TrainingPlan
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_trace import StepTrace
from ftplan.planner.tape import value
from ftplan.planner.tensor_parallel import one_rank
from ftplan.planner.trained import Trained
from ftplan.planner.units import FLOAT32_BYTES
from ftplan.planner.updated import updated_parameters
from ftplan.planner.weights import weight_memory_bytes

# Of the rate that large square products reach on a card, what those of training reach: their
# shapes leave a part of the last wave of blocks idle, attention's kernel is slower, and the card
# is warm. Assumed for every GPU.
TRAINING_SHARE_OF_MATMUL = 0.85

# Of the dense peak, what large square products reach where nobody measured the card. The middle of
# those that were measured (profiles/matmul_rates.json): 0.74 of an L40S's peak, 0.79 of an H100's,
# 0.85 of an A100's, 1.07 of an RTX 3090's, whose data sheet counts a lower clock.
MATMUL_SHARE_OF_PEAK = 0.85

# Of a GPU's memory bandwidth, what element-wise kernels reach: copies reach 0.85 to 0.92 of it on
# data-centre cards (nvbandwidth, BabelStream). On the processor it is measured with such kernels.
SHARE_OF_BANDWIDTH: dict[DeviceKind, float] = {"cuda": 0.85, "cpu": 1.0}

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

Bound = Literal["arithmetic", "memory bandwidth", "links between GPUs"]


class StepWork(Struct, frozen=True, kw_only=True):
    """What an optimizer step, all its micro-batches, asks of a GPU of some kind, however fast.

    `tokens`: the GPU's part of those of GPUs that divide layers or rows. `dtype`: of products.
    `float32_flops`: of `flops`, those of fp32 values. `moved_bytes`: by the operations of layers
    and loss and by reading weights. `exchanged_bytes`: sent to other GPUs, what tensor and context
    parallelism send not counted.
    """

    kind: DeviceKind
    dtype: str
    tokens: float
    forward_flops: float
    flops: float
    float32_flops: float
    moved_bytes: float
    optimizer_bytes: float
    exchanged_bytes: float


class StepTime(Struct, frozen=True, kw_only=True):
    """Time of one optimizer step (all its micro-batches) on one device, which of the tokens of GPUs
    that divide layers or rows has its part."""

    step_seconds: float
    tokens_per_step: float
    forward_flops: float
    step_flops: float
    bound_by: Bound

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_step / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "step_seconds": self.step_seconds,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "bound_by": self.bound_by,
        }


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
    trace, rows, length = _trace(model, plan, device, tokens, length, stack)
    forward = value(trace.forward_flops, rows, length)
    micro_batches = plan.gradient_accumulation_steps
    moved = _micro_batch_bytes(model, plan, trained, device, tokens, length, stack)
    return StepWork(
        kind=device.kind,
        dtype=AUTOCAST_DTYPE[plan.mixed_precision] or plan.dtype,
        tokens=micro_batches * tokens / plan.tp_size,
        forward_flops=micro_batches * forward,
        flops=micro_batches * (forward + value(trace.backward_flops, rows, length)),
        float32_flops=micro_batches * value(trace.float32_flops, rows, length),
        moved_bytes=micro_batches * moved,
        optimizer_bytes=_optimizer_bytes(share, plan, trained),
        exchanged_bytes=_exchanged_bytes(share, plan, trained),
    )


def time_of(work: StepWork, device: Device) -> StepTime:
    """Arithmetic and traffic are added, since on one stream kernels follow one another; what is
    sent to other GPUs goes on beside them. Products of fp32 values have a rate of their own: those
    of adapters beside a 16-bit base without autocast, or of the hidden states that k-bit
    preparation makes fp32."""
    bandwidth = device.memory_bandwidth_bytes_per_second * SHARE_OF_BANDWIDTH[device.kind]
    of_float32 = work.float32_flops / achieved_flops_per_second("float32", device)
    others = work.flops - work.float32_flops
    arithmetic = of_float32 + others / achieved_flops_per_second(work.dtype, device)
    moving = work.moved_bytes / bandwidth
    computing = arithmetic + moving + work.optimizer_bytes / bandwidth
    link = device.link_bytes_per_second
    sending = work.exchanged_bytes / link if link else 0.0
    bound: Bound = "arithmetic" if arithmetic >= moving else "memory bandwidth"
    return StepTime(
        step_seconds=max(computing, sending),
        tokens_per_step=work.tokens,
        forward_flops=work.forward_flops,
        step_flops=work.flops,
        bound_by="links between GPUs" if sending > computing else bound,
    )


def achieved_flops_per_second(dtype: str, device: Device) -> float:
    """FLOP/s that products of training reach on the device."""
    peaks: Mapping[str, float] = device.peak_flops_per_second
    if device.kind == "cpu":
        return peaks.get(dtype) or peaks["float32"]  # measured with training's products
    measured = device.matmul_flops_per_second.get(dtype)
    matmul = measured or MATMUL_SHARE_OF_PEAK * (peaks.get(dtype) or peaks["float32"])
    return TRAINING_SHARE_OF_MATMUL * matmul


def _trace(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None,
    tokens: float,
    length: float,
    stack: Stack = OWN_STACK,
) -> tuple[StepTrace, float, float]:
    """The step's trace, and (rows, length) to read it at."""
    rows = tokens / length
    whole = max(1, round(rows)), max(1, round(length))
    return compiled_step(model, plan, *whole, device, stack).trace, rows, length


def forward_flops(
    model: ModelSpec, plan: TrainingPlan, tokens: float, length: float, device: Device | None = None
) -> float:
    """FLOPs of one forward pass, output projection included."""
    trace, rows, length = _trace(model, plan, device, tokens, length)
    return value(trace.forward_flops, rows, length)


def micro_batch_flops(
    model: ModelSpec, plan: TrainingPlan, tokens: float, length: float, device: Device | None = None
) -> float:
    """FLOPs of forward, backward and recomputation of one micro-batch."""
    trace, rows, length = _trace(model, plan, device, tokens, length)
    both = value(trace.forward_flops, rows, length) + value(trace.backward_flops, rows, length)
    return both


def _micro_batch_bytes(
    model: ModelSpec,
    plan: TrainingPlan,
    trained: Trained,
    device: Device,
    tokens: float,
    length: float,
    stack: Stack,
) -> float:
    """Bytes moved by element-wise work and by reading the weights.

    Layers below the first trained one are computed forward only.
    """
    trace, rows, length = _trace(model, plan, device, tokens, length, stack)
    # What is there for any micro-batch are copies of weights, which are counted below.
    (_, *forward), (_, *backward) = trace.forward_moved, trace.backward_moved
    moved = value((0, *forward), rows, length) + value((0, *backward), rows, length)
    model = one_rank(trained_model(model, plan), plan.tp_size)
    kind: DeviceKind = device.kind
    forwards = 1 + _recomputed_share(model, plan)
    further = trace.num_passes - 1
    over_logits = passes_over_logits(plan, kind) + further * FORWARD_PASSES_OVER_LOGITS[kind]
    logits = over_logits * tokens * model.vocab_size * FLOAT32_BYTES
    backwards = trained.reached_layers(model) / model.num_hidden_layers
    passes_over_weights = trace.num_passes + forwards * backwards
    weights = passes_over_weights * weight_memory_bytes(model, plan)
    expanded = _expanded_bytes(model, plan, passes_over_weights, backwards)
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


def _expanded_bytes(model: ModelSpec, plan: TrainingPlan, passes: float, backwards: float) -> float:
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


def _optimizer_bytes(model: ModelSpec, plan: TrainingPlan, trained: Trained) -> float:
    """Bytes an optimizer step moves: parameter, gradient and states read; all but the gradient
    written."""
    updated = updated_parameters(model, plan, trained)
    parameter_bytes = sum(p.count * p.num_bytes for p in updated)
    return 3 * parameter_bytes + 2 * plan.optimizer.state_bytes(updated)


def _exchanged_bytes(model: ModelSpec, plan: TrainingPlan, trained: Trained) -> float:
    """What a GPU sends in a step, by rings. Gradients are summed once; GPUs that divide parameters
    gather them for forward and again for backward, and sum gradients, in each micro-batch."""
    num_gpus = plan.data_parallel_size
    if num_gpus == 1:
        return 0.0
    others = (num_gpus - 1) / num_gpus
    updated = updated_parameters(model, plan, trained)
    gradients = sum(p.count * p.num_bytes for p in updated)
    if not plan.shards_parameters:
        return others * 2 * gradients
    gathered = 2 * weight_memory_bytes(model, plan)
    return others * plan.gradient_accumulation_steps * (gathered + gradients)
