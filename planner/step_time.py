"""How long an optimizer step takes, in closed form.

A step is the larger of its arithmetic and its memory traffic: FLOPs over what the device
achieves, bytes moved over its bandwidth. The list of operations is the one that memory is
read off (`layers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ftplan.planner.hardware_spec import Device, DeviceKind
from ftplan.planner.layers import FLOAT32_BYTES, LayerTotals, decoder_layer, trained_widths
from ftplan.planner.memory import weight_memory_bytes
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import AUTOCAST_DTYPE, TrainingPlan
from ftplan.planner.trained import Trained

# Share of the dense peak that large matrix products and the work around them reach together.
# Assumed for every GPU: LoRA and full fine-tuning of 7B models with FlashAttention-2 on an A100
# run at 0.50 to 0.60 of 312 TFLOP/s (fms-acceleration's measured rows).
ACHIEVED_SHARE_OF_PEAK = 0.55

# Element-wise work is bound by memory: how often each byte that is kept for backward is moved, in
# (forward, backward). On a GPU it partly hides behind the products, whose achieved share covers the
# rest; assumed. On the processor every read and write of a Llama layer's operations was counted, in
# units of tokens x hidden_size: 55 and 100 beside 20 that are kept, with LoRA on every linear (the
# two products' sum and scaling, and the sums of gradients) 110 and 153 beside 18.7.
PASSES_OVER_KEPT: dict[DeviceKind, tuple[float, float]] = {"cuda": (2, 2), "cpu": (2.8, 5.0)}
PASSES_OVER_KEPT_WITH_ADAPTERS: dict[DeviceKind, tuple[float, float]] = {
    "cuda": (2, 2),
    "cpu": (5.9, 8.2),
}

# How often the loss moves each logit. `stock`: written, log-softmax read and written, both read and
# the gradient's source and result written in backward, read by the product. A fused kernel writes
# and reads a tile in each direction and turns it into its gradient in place. Without a kernel TRL's
# tiles pass through chains of torch operations, whose reads and writes were counted: 20.5 in
# forward, 26.5 in backward (trl.kernels.chunked_logprob, `_forward_tile`, `_backward_tile`).
PASSES_OVER_LOGITS = {"stock": 8, "trl-fused": 6, "liger": 6}
PASSES_OVER_LOGITS_WITHOUT_KERNEL = 47

Bound = Literal["arithmetic", "memory bandwidth"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Time of one optimizer step (all its micro-batches) on one device."""

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
) -> StepTime:
    """Time of one optimizer step.

    `tokens_per_micro_batch`: padded tokens of the mean micro-batch, `mean_length`: of its rows.
    An arithmetic and a memory bound added, since on one stream they seldom overlap.
    """
    trained = plan.resolved_method.count(model, plan.method_settings)
    tokens, length = tokens_per_micro_batch, mean_length
    forward = forward_flops(model, plan, trained, tokens, length)
    step = micro_batch_flops(model, plan, trained, tokens, length)
    arithmetic_seconds = step / achieved_flops_per_second(plan, device)
    moved = _micro_batch_bytes(model, plan, trained, device.kind, tokens, length)
    memory_seconds = moved / device.memory_bandwidth_bytes_per_second
    micro_batches = plan.gradient_accumulation_steps
    optimizer_seconds = _optimizer_bytes(plan, trained) / device.memory_bandwidth_bytes_per_second
    seconds = micro_batches * (arithmetic_seconds + memory_seconds) + optimizer_seconds
    return StepTime(
        step_seconds=seconds,
        tokens_per_step=micro_batches * tokens,
        forward_flops=micro_batches * forward,
        step_flops=micro_batches * step,
        bound_by="arithmetic" if arithmetic_seconds >= memory_seconds else "memory bandwidth",
    )


def achieved_flops_per_second(plan: TrainingPlan, device: Device) -> float:
    """FLOP/s that products in the plan's compute dtype reach on the device."""
    dtype = AUTOCAST_DTYPE[plan.mixed_precision] or plan.dtype
    peaks: Mapping[str, float] = device.peak_flops_per_second
    peak = peaks.get(dtype) or peaks["float32"]
    return peak if device.kind == "cpu" else peak * ACHIEVED_SHARE_OF_PEAK


def _layer(
    model: ModelSpec,
    plan: TrainingPlan,
    trained: Trained,
    *,
    own_weights: bool,
    kind: DeviceKind = "cuda",
) -> LayerTotals:
    operations = decoder_layer(model, plan, trained, own_weights=own_weights, kind=kind)
    return LayerTotals(operations=operations)


def forward_flops(
    model: ModelSpec, plan: TrainingPlan, trained: Trained, tokens: float, length: float
) -> float:
    """FLOPs of one forward pass, output projection included."""
    layer = _layer(model, plan, trained, own_weights=False)
    head = 2 * tokens * model.embedding_parameters
    return model.num_hidden_layers * layer.forward_flops(tokens, length) + head


def micro_batch_flops(
    model: ModelSpec, plan: TrainingPlan, trained: Trained, tokens: float, length: float
) -> float:
    """FLOPs of forward, backward and recomputation of one micro-batch.

    The output projection's backward costs its forward again, once more where its weights are
    trained, and once more where a fused loss computes the logits a second time.
    """
    layer = _layer(model, plan, trained, own_weights=trained.trained_layers > 0)
    reached = trained.reached_layers(model)
    head = 2 * tokens * model.embedding_parameters
    total = forward_flops(model, plan, trained, tokens, length) + head
    total += head if trained.trains_lm_head else 0
    total += head if plan.loss == "trl-fused" else 0
    total += reached * layer.backward_flops(tokens, length)
    if plan.gradient_checkpointing:
        total += reached * layer.forward_flops(tokens, length)
    return total


def _micro_batch_bytes(
    model: ModelSpec,
    plan: TrainingPlan,
    trained: Trained,
    kind: DeviceKind,
    tokens: float,
    length: float,
) -> float:
    """Bytes moved by element-wise work and by reading the weights.

    Layers below the first trained one are computed forward only.
    """
    reached = trained.reached_layers(model)
    unreached = model.num_hidden_layers - reached
    forwards = 2 if plan.gradient_checkpointing else 1
    own = _layer(model, plan, trained, own_weights=trained.trained_layers > 0, kind=kind)
    frozen = _layer(model, plan, trained, own_weights=False, kind=kind)
    table = PASSES_OVER_KEPT_WITH_ADAPTERS if trained.adapted else PASSES_OVER_KEPT
    forward_passes, backward_passes = table[kind]
    passes = forwards * forward_passes + backward_passes
    layers = reached * own.saved_bytes(tokens, length) * passes
    layers += unreached * frozen.saved_bytes(tokens, length) * forward_passes
    logits = passes_over_logits(plan, kind) * tokens * model.vocab_size * FLOAT32_BYTES
    backwards = reached / model.num_hidden_layers
    passes_over_weights = 1 + forwards * backwards
    weights = passes_over_weights * weight_memory_bytes(model, plan)
    expanded = _expanded_bytes(model, plan, passes_over_weights, backwards)
    return layers + logits + weights + expanded


def passes_over_logits(plan: TrainingPlan, kind: DeviceKind) -> int:
    """How often each logit is moved, as fp32."""
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


def _optimizer_bytes(plan: TrainingPlan, trained: Trained) -> float:
    """Bytes an optimizer step moves: parameter, gradient and states read; all but the gradient
    written."""
    moved = 0
    for count, width in trained_widths(plan, trained):
        moved += 3 * count * width + 2 * plan.optimizer.state_bytes(count, width)
    return moved
