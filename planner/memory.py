"""Peak memory of a run in closed form: the maximum over its phases.

Three numbers are kept apart: *allocated* (tensors), *reserved* (what the caching allocator
holds) and *device* (what the driver shows). *Required* decides: the least free memory with
which the run survives. Equations are numbered in docs/memory-model.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ftplan.planner.layers import (
    FLOAT32_BYTES,
    LayerTotals,
    adapter_weight_bytes,
    decoder_layer,
    trained_widths,
)
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.trained import Trained

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

# TRL's fused loss works on tiles of so many tokens and vocabulary entries
# (trl.kernels.chunked_logprob, trl.trainer.utils in TRL 1.16).
_FUSED_TOKENS = 4096
_FUSED_VOCABULARY = 32768
# Without Triton a tile is folded by a chain of torch operations. Alive at once beside the buffer,
# in fp32: scaled logits, their difference from the maximum and its exponential in forward; scaled
# logits twice, log-probabilities, probabilities, gradient, the one-hot difference and its product,
# and a bool array, in backward.
_FUSED_TORCH_FORWARD_BYTES = 3 * FLOAT32_BYTES
_FUSED_TORCH_BACKWARD_BYTES = 7 * FLOAT32_BYTES + 1

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
) -> MemoryEstimate:
    """Peak memory per device of training `model` by `plan`.

    `device`: where it runs (its context, its kind); without one, a CUDA GPU.
    `longest_row`: the longest row of the data, where known; rows are cut at `max_length`.

    Not modelled: kernel workspaces, and padding of grouped key-value heads under SDPA masks.
    Raises InputError for what only a dry run knows (`planner.closed_form`).
    """
    check_closed_form(plan)
    kind: DeviceKind = device.kind if device else "cuda"
    trained = plan.resolved_method.count(model, plan.method_settings)
    length = min(plan.max_length, longest_row or plan.max_length)
    workload = Workload(rows=plan.per_device_train_batch_size, length=length)
    phases = _Model(model, plan, trained, workload, kind).phases()
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


def weight_memory_bytes(model: ModelSpec, plan: TrainingPlan) -> int:
    """Bytes of the loaded model, eq. (1): quantized matrices, the rest in `dtype`."""
    if plan.quantization == "none":
        return model.num_parameters * plan.weight_bytes
    quantized = model.quantizable_weights
    rest = (model.num_parameters - quantized) * plan.weight_bytes
    if plan.quantization == "int8":
        rows = sum(m.out_features for m in model.layer_linears) * model.num_hidden_layers
        return quantized + rows * FLOAT32_BYTES + rest
    per_weight = _DOUBLE_QUANT_BYTES if plan.double_quant else _SINGLE_QUANT_BYTES
    return round(quantized * per_weight) + rest


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


class _Model:
    """The terms of one configuration; each method is one equation of the docs."""

    def __init__(
        self,
        model: ModelSpec,
        plan: TrainingPlan,
        trained: Trained,
        workload: Workload,
        kind: DeviceKind,
    ) -> None:
        self.model, self.plan, self.trained = model, plan, trained
        self.workload, self.kind = workload, kind
        self.layer = LayerTotals(
            operations=decoder_layer(
                model, plan, trained, own_weights=trained.trained_layers > 0, kind=kind
            )
        )
        self.adapter_bytes = adapter_weight_bytes(plan)
        self.trained_widths = trained_widths(plan, trained)
        self.reached_layers = trained.reached_layers(model)

    def phases(self) -> list[Phase]:
        gradients = self.gradient_bytes()
        carried = gradients if self.plan.gradient_accumulation_steps > 1 else 0
        resident = {
            "weights": weight_memory_bytes(self.model, self.plan),
            "adapters": self.trained.added_parameters * self.adapter_bytes,
            "optimizer_states": self.optimizer_state_bytes(),
            "communication": gradients if self.plan.num_gpus > 1 else 0,
        }
        loaded = {**resident, "optimizer_states": 0, "communication": 0}
        kept = self.kept_activation_bytes()
        layer_saved, layer_rise = self.layer_backward_bytes()
        held = self.held_logits_bytes()
        return [
            _phase("load", loaded),
            _phase(
                "forward",
                resident,
                gradients=carried,
                activations=kept,
                autocast_copies=self.forward_copy_bytes() + self.head_copy_bytes(),
                logits_and_loss=self.loss_forward_bytes(),
            ),
            _phase(
                "loss backward",
                resident,
                gradients=carried + self.handed_on_gradient_bytes(),
                activations=kept,
                autocast_copies=self.kept_copy_bytes() + self.head_copy_bytes(),
                logits_and_loss=held + self.loss_backward_bytes(),
            ),
            _phase(
                "backward, first layer",
                resident,
                gradients=max(carried, self.head_gradient_bytes()),
                activations=kept + layer_saved,
                autocast_copies=max(self.kept_copy_bytes(), self.layer_copy_bytes()),
                logits_and_loss=held,
                temporaries=layer_rise + self.dequantized_bytes(),
            ),
            _phase(
                "backward, last layer",
                resident,
                gradients=gradients,
                activations=self.kept_layer_bytes() + layer_saved,
                autocast_copies=self.layer_copy_bytes(),
                logits_and_loss=held,
                temporaries=layer_rise + self.dequantized_bytes(),
            ),
            _phase(
                "optimizer step",
                resident,
                gradients=gradients,
                logits_and_loss=held,
                temporaries=self.optimizer_step_bytes(),
            ),
            _phase("evaluation", resident, **self.evaluation_parts()),
            _phase("save", resident),
        ]

    def gradient_bytes(self) -> int:
        """Eq. (2): one gradient for each trained parameter, in its dtype."""
        return sum(count * width for count, width in self.trained_widths)

    def optimizer_state_bytes(self) -> int:
        """Eq. (3)."""
        optimizer = self.plan.optimizer
        embeddings = self.model.embedding_parameters if self.trained.trains_embeddings else 0
        return sum(
            optimizer.state_bytes(count, width, min(count, embeddings))
            for count, width in self.trained_widths
        )

    def optimizer_step_bytes(self) -> int:
        """Eq. (4)."""
        optimizer = self.plan.optimizer
        return sum(
            optimizer.step_temporary_bytes(count, width) for count, width in self.trained_widths
        )

    def kept_activation_bytes(self) -> int:
        """Eq. (5): what forward leaves for backward, the final norm's fp32 copy and result
        included."""
        width = FLOAT32_BYTES + self.plan.weight_bytes
        final_norm = self.workload.tokens * self.model.hidden_size * width
        return self.reached_layers * self.kept_layer_bytes() + final_norm

    def kept_layer_bytes(self) -> int:
        """One layer's part: its input with gradient checkpointing, else all that it saves."""
        if self.plan.gradient_checkpointing:
            return self.hidden_state_bytes()
        return self.layer.saved_bytes(self.workload.tokens, self.workload.length)

    def hidden_state_bytes(self) -> int:
        """What one layer hands to the next."""
        return self.workload.tokens * self.model.hidden_size * self.plan.weight_bytes

    def layer_backward_bytes(self) -> tuple[int, int]:
        """Eq. (6): what recomputing a layer saves again, and how far backward rises above it."""
        tokens, length = self.workload.tokens, self.workload.length
        again = self.layer.saved_bytes(tokens, length) if self.plan.gradient_checkpointing else 0
        residual_gradient = self.hidden_state_bytes()
        return again, self.layer.backward_temporary_bytes(tokens, length) + residual_gradient

    def evaluation_parts(self) -> dict[str, int]:
        """Eq. (12): the fuller of two moments, inside a layer and in the loss.

        Nothing is kept for a backward pass. Autocast's cache holds the copies of trained weights
        all the same.
        """
        tokens, length = self.workload.tokens, self.workload.length
        # Beneath each operation: the layer's input, the sum after attention, and the norm's result
        # that the feed-forward reads.
        held = 3 * self.hidden_state_bytes()
        rise = held + self.layer.inference_bytes(tokens, length)
        in_layer = {
            "autocast_copies": self.cached_copy_bytes(),
            "temporaries": rise + self.dequantized_bytes(),
        }
        in_loss = {
            "autocast_copies": self.cached_copy_bytes() + self.head_copy_bytes(),
            "logits_and_loss": self.loss_forward_bytes(),
            "temporaries": self.hidden_state_bytes(),
        }
        return max(in_layer, in_loss, key=lambda parts: sum(parts.values()))

    def weight_copy_bytes(self) -> int:
        """Autocast's copies of one layer's own matrices; stacked experts are not cast."""
        if not self.plan.casts_weights or self.plan.quantization != "none":
            return 0
        cast = sum(m.num_parameters for m in self.model.layer_linears)
        return (cast + self.model.router_parameters) * self.plan.compute_bytes

    def adapter_copy_bytes(self) -> int:
        """Autocast's copies of one layer's adapters."""
        if not self.plan.autocast or self.plan.compute_bytes == self.adapter_bytes:
            return 0
        per_layer = self.trained.added_parameters // self.model.num_hidden_layers
        return per_layer * self.plan.compute_bytes

    def layer_copy_bytes(self) -> int:
        """Eq. (7): 16-bit copies that a layer's backward needs.

        Each product keeps the copy of its weight for its input's gradient, frozen or not.
        """
        return self.weight_copy_bytes() + self.adapter_copy_bytes()

    def forward_copy_bytes(self) -> int:
        """Copies alive at the end of the layers' forward.

        Those of frozen weights live as long as the products that keep them: with checkpointing
        until the layer is computed again.
        """
        return max(self.kept_copy_bytes(), self.cached_copy_bytes())

    def cached_copy_bytes(self) -> int:
        """Copies of trained weights, which autocast's cache holds until forward ends
        (at::autocast, cached_cast: leaves that require a gradient)."""
        adapters = self.reached_layers * self.adapter_copy_bytes()
        return self.trained.trained_layers * self.weight_copy_bytes() + adapters

    def kept_copy_bytes(self) -> int:
        """Copies that wait for backward: all layers', or none where they are computed again."""
        if self.plan.gradient_checkpointing:
            return 0
        return self.reached_layers * self.layer_copy_bytes()

    def head_copy_bytes(self) -> int:
        """The output projection's 16-bit copy; TRL's fused loss casts a tile's rows at a time."""
        if not self.plan.casts_weights:
            return 0
        entries = self.model.vocab_size
        if self.plan.loss == "trl-fused":
            entries = min(entries, _FUSED_VOCABULARY)
        return entries * self.model.hidden_size * self.plan.compute_bytes

    def dequantized_bytes(self) -> int:
        """Eq. (8): a quantized matrix is expanded for its product, the largest at a time."""
        if self.plan.quantization == "none" or not self.model.layer_linears:
            return 0
        return max(m.num_weights for m in self.model.layer_linears) * self.plan.compute_bytes

    def head_gradient_bytes(self) -> int:
        """Gradient of the output projection, which exists from the end of the loss's backward."""
        if not self.trained.trains_lm_head:
            return 0
        return self.model.embedding_parameters * self.plan.weight_bytes

    def handed_on_gradient_bytes(self) -> int:
        """The head's 16-bit gradient beside the fp32 sum that TRL's fused loss made of it."""
        if self.plan.loss != "trl-fused" or self.plan.weight_bytes == FLOAT32_BYTES:
            return 0
        return self.head_gradient_bytes()

    def loss_forward_bytes(self) -> int:
        """Eq. (9): logits, their fp32 copy and log-softmax; or a fused kernel's tile."""
        if self.plan.loss == "liger":
            return self._liger_bytes()
        if self.plan.loss == "trl-fused":
            return self._tile_bytes(_FUSED_TORCH_FORWARD_BYTES)
        compute = self.plan.compute_bytes
        copy = FLOAT32_BYTES if compute != FLOAT32_BYTES else 0
        return self._logit_entries() * (compute + copy + FLOAT32_BYTES + self._softcap_bytes())

    def loss_backward_bytes(self) -> int:
        """Eq. (10): log-softmax, the gradients on both sides of it, and their 16-bit cast.

        The logits themselves are gone: the trainer keeps the loss only. 14 bytes an entry in
        16 bits; a difference of 14.8 was measured for Mistral-7B LoRA at 4 x 4096 on an A100
        (fms-acceleration), temporaries included.
        """
        if self.plan.loss == "liger":
            return self._liger_bytes()
        if self.plan.loss == "trl-fused":
            return self._tile_bytes(_FUSED_TORCH_BACKWARD_BYTES) + self._fused_gradient_bytes()
        compute = self.plan.compute_bytes
        cast = compute if compute != FLOAT32_BYTES else 0
        return self._logit_entries() * (cast + 3 * FLOAT32_BYTES + self._softcap_bytes())

    def held_logits_bytes(self) -> int:
        """The logits that a plain loop's variable holds until the step is over; trainers hand on
        the loss only."""
        if self.plan.trainer != "loop" or self.plan.loss != "stock":
            return 0
        return self._logit_entries() * self.plan.compute_bytes

    def _logit_entries(self) -> int:
        return self.workload.tokens * self.model.vocab_size

    def _softcap_bytes(self) -> int:
        """The tanh of a capped logit, kept for backward."""
        return self.plan.compute_bytes if self.model.final_logit_softcapping else 0

    def _tile_bytes(self, torch_bytes_per_entry: int) -> int:
        """Eq. (11): the buffer for a tile of logits, as wide as a tile may be; where torch folds
        the tile, its intermediates besides. A row's last position predicts nothing."""
        tokens = min(self.workload.tokens - self.workload.rows, _FUSED_TOKENS)
        buffer = tokens * _FUSED_VOCABULARY * self.plan.compute_bytes
        if self.kind != "cpu":
            return buffer
        entries = tokens * min(self.model.vocab_size, _FUSED_VOCABULARY)
        return buffer + entries * torch_bytes_per_entry

    def _fused_gradient_bytes(self) -> int:
        """Gradients of the hidden states and the head, added up in fp32; the former handed on in
        the weights' dtype (trl.kernels.chunked_logprob, `ChunkedLogProbFunction.backward`)."""
        handed_on = 0 if self.plan.weight_bytes == FLOAT32_BYTES else self.plan.weight_bytes
        hidden = self.workload.tokens * self.model.hidden_size * (FLOAT32_BYTES + handed_on)
        head = self.model.embedding_parameters if self.trained.trains_lm_head else 0
        return hidden + head * FLOAT32_BYTES

    def _liger_bytes(self) -> int:
        """A chunk of logits, and both gradients, which Liger computes in forward already.

        Chunks of tokens so that a chunk's logits take about the hidden states' size
        (liger_kernel.ops.fused_linear_cross_entropy).
        """
        tokens, model = self.workload.tokens, self.model
        chunks = -(-model.vocab_size // model.hidden_size)
        chunk = min(tokens, _next_power_of_2(-(-tokens // chunks)))
        hidden_gradient = tokens * model.hidden_size * self.plan.weight_bytes
        logits = chunk * model.vocab_size * self.plan.compute_bytes
        return logits + hidden_gradient + self.head_gradient_bytes()


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _phase(name: str, resident: Mapping[str, int], **parts: int) -> Phase:
    """A phase with every component named, absent ones 0."""
    return Phase(
        name=name,
        components={key: parts.get(key, resident.get(key, 0)) for key in COMPONENTS},
    )
