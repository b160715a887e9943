"""Peak memory of a run in closed form: the maximum over its phases.

Three numbers are kept apart: *allocated* (tensors), *reserved* (what the caching allocator
holds) and *device* (what the driver shows). *Required* decides: the least free memory with
which the run survives. Equations are numbered in docs/memory-model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftplan.planner.hardware_spec import (
    ASSUMED_CUDA_CONTEXT_BYTES,
    CPU_PROCESS_BYTES,
    Device,
    DeviceKind,
)
from ftplan.planner.layers import (
    FLOAT32_BYTES,
    LayerTotals,
    adapter_weight_bytes,
    decoder_layer,
)
from ftplan.planner.methods import Trained
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan

COMPONENTS: dict[str, str] = {
    "weights": "model weights",
    "adapters": "adapter weights",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "autocast_copies": "16-bit copies by autocast",
    "activations": "activations kept for backward",
    "logits_and_loss": "logits and loss",
    "communication": "gradient buckets between GPUs",
    "temporaries": "temporaries",
}

# Reserved over allocated. Assumed: with expandable segments the allocator grows a segment by
# 2 MiB pages, which leaves rounding only; without them measurements show a median of 1.125
# (fitcheck, canifinetune). The launcher turns expandable segments on.
RESERVED_OVER_ALLOCATED = 1.04

# Weight quantization of bitsandbytes: 4 bits a weight and an fp32 scale for each block of 64;
# double quantization holds the scales in 8 bits with an fp32 scale for each 256 of them
# (arXiv 2305.14314, section 3).
_BLOCK_SIZE = 64
_SCALES_PER_BLOCK = 256
_SINGLE_QUANT_BYTES = 0.5 + 4 / _BLOCK_SIZE
_DOUBLE_QUANT_BYTES = 0.5 + 1 / _BLOCK_SIZE + 4 / (_BLOCK_SIZE * _SCALES_PER_BLOCK)

# TRL's fused loss works on tiles of so many tokens and vocabulary entries
# (trl.kernels.chunked_logprob, trl.trainer.utils in TRL 1.16).
_FUSED_TOKENS = 4096
_FUSED_VOCABULARY = 32768
# Without Triton the tile's backward is a chain of torch operations: the tile, its fp32 copy or
# scaled logits, log-probabilities, probabilities, gradient, and the one-hot difference with its
# product are alive at once: eight fp32 arrays and a bool one.
_FUSED_TORCH_BYTES = 8 * FLOAT32_BYTES + 1

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
    """
    kind: DeviceKind = device.kind if device else "cuda"
    trained = plan.resolved_method.count(model, plan.method_settings)
    length = min(plan.max_length, longest_row or plan.max_length)
    workload = Workload(rows=plan.per_device_train_batch_size, length=length)
    phases = _Model(model, plan, trained, workload, kind).phases()
    allocated = max(phase.allocated_peak_bytes for phase in phases)
    if kind == "cpu":
        reserved = allocated
        device_peak = required = allocated + CPU_PROCESS_BYTES
        host = device_peak
    else:
        context = device.context_bytes if device else ASSUMED_CUDA_CONTEXT_BYTES
        reserved = round(allocated * RESERVED_OVER_ALLOCATED)
        device_peak = reserved + context
        required = device_peak
        host = host_loading_bytes(model, plan)
    return MemoryEstimate(
        phases=tuple(phases),
        reserved_peak_bytes=reserved,
        device_peak_bytes=device_peak,
        required_bytes=required,
        host_ram_peak_bytes=host,
        disk_bytes=disk_bytes(plan, trained),
    )


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
    """Host RAM of one process that loads the model onto a GPU.

    Safetensors are mapped, not read; at most one file (5 GB by `save_pretrained`'s default
    shard size) is resident while its tensors are copied.
    """
    stored = model.num_parameters * plan.weight_bytes
    return CPU_PROCESS_BYTES + min(stored, 5 * 10**9)


def disk_bytes(plan: TrainingPlan, trained: Trained) -> int:
    """Checkpoints (trained weights and optimizer states) and the final trained weights."""
    parameters = trained.num_trainable_parameters
    width = adapter_weight_bytes(plan) if trained.added_parameters else plan.weight_bytes
    weights = parameters * width
    states = plan.optimizer.state_bytes(parameters, width)
    return CHECKPOINTS_KEPT * (weights + states) + weights


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
        self.own = LayerTotals(operations=decoder_layer(model, plan, trained, own_weights=True))
        self.frozen = LayerTotals(operations=decoder_layer(model, plan, trained, own_weights=False))
        self.adapter_bytes = adapter_weight_bytes(plan)

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
        first_layer_kept = kept // self.layers_with_activations()
        return [
            _phase("load", loaded),
            _phase(
                "forward",
                resident,
                gradients=carried,
                activations=kept,
                autocast_copies=self.autocast_copy_bytes(),
                logits_and_loss=self.loss_forward_bytes(),
            ),
            _phase(
                "loss backward",
                resident,
                gradients=max(carried, self.head_gradient_bytes()),
                activations=kept,
                autocast_copies=self.kept_autocast_copy_bytes(),
                logits_and_loss=self.loss_backward_bytes(),
            ),
            _phase(
                "backward, first layer",
                resident,
                gradients=max(carried, self.head_gradient_bytes()),
                activations=kept + layer_saved,
                autocast_copies=self.kept_autocast_copy_bytes(),
                temporaries=layer_rise + self.dequantized_bytes(),
            ),
            _phase(
                "backward, last layer",
                resident,
                gradients=gradients,
                activations=first_layer_kept + layer_saved,
                autocast_copies=self.layer_autocast_copy_bytes(),
                temporaries=layer_rise + self.dequantized_bytes(),
            ),
            _phase(
                "optimizer step",
                resident,
                gradients=gradients,
                temporaries=self.optimizer_step_bytes(),
            ),
            _phase(
                "evaluation",
                resident,
                logits_and_loss=self.loss_forward_bytes(),
                temporaries=layer_saved + self.dequantized_bytes(),
            ),
            _phase("save", resident),
        ]

    def trained_widths(self) -> tuple[tuple[int, int], ...]:
        """(count, bytes a parameter) of the model's own trained parameters and the adapters'."""
        return (
            (self.trained.base_parameters, self.plan.weight_bytes),
            (self.trained.added_parameters, self.adapter_bytes),
        )

    def gradient_bytes(self) -> int:
        """Eq. (2): one gradient for each trained parameter, in its dtype."""
        return sum(count * width for count, width in self.trained_widths())

    def optimizer_state_bytes(self) -> int:
        """Eq. (3)."""
        optimizer = self.plan.optimizer
        return sum(optimizer.state_bytes(count, width) for count, width in self.trained_widths())

    def optimizer_step_bytes(self) -> int:
        """Eq. (4)."""
        optimizer = self.plan.optimizer
        return sum(
            optimizer.step_temporary_bytes(count, width) for count, width in self.trained_widths()
        )

    def layers_with_activations(self) -> int:
        """Layers whose activations backward reaches: all, or the trained ones at the end."""
        own = self.trained.trained_layers
        return self.model.num_hidden_layers if self.trained.adapted else max(own, 1)

    def layer_totals(self) -> LayerTotals:
        return self.frozen if self.trained.adapted else self.own

    def kept_activation_bytes(self) -> int:
        """Eq. (5): what forward leaves for backward.

        With gradient checkpointing only each layer's input; without, all that the layer saves.
        """
        tokens, length = self.workload.tokens, self.workload.length
        hidden = tokens * self.model.hidden_size * self.plan.weight_bytes
        layers = self.layers_with_activations()
        final_norm = tokens * self.model.hidden_size * (FLOAT32_BYTES + self.plan.weight_bytes)
        if self.plan.gradient_checkpointing:
            return layers * hidden + final_norm
        return layers * self.layer_totals().saved_bytes(tokens, length) + final_norm

    def layer_backward_bytes(self) -> tuple[int, int]:
        """Eq. (6): what recomputing a layer saves again, and how far backward rises above it."""
        tokens, length = self.workload.tokens, self.workload.length
        totals = self.layer_totals()
        again = totals.saved_bytes(tokens, length) if self.plan.gradient_checkpointing else 0
        residual_gradient = tokens * self.model.hidden_size * self.plan.weight_bytes
        return again, totals.backward_temporary_bytes(tokens, length) + residual_gradient

    def _cast_weights(self, layers: int) -> int:
        """Bytes of autocast's copies of the trained matrices of so many layers."""
        if not self.plan.autocast or self.plan.compute_bytes == self.plan.weight_bytes:
            return 0
        return layers * self.model.layer_matrix_parameters * self.plan.compute_bytes

    def autocast_copy_bytes(self) -> int:
        """Eq. (7): autocast keeps its copies of trained weights until forward ends."""
        return self._cast_weights(self.trained.trained_layers)

    def kept_autocast_copy_bytes(self) -> int:
        """Copies that backward still needs: all of them unless layers are recomputed."""
        if self.plan.gradient_checkpointing:
            return self.layer_autocast_copy_bytes()
        return self.autocast_copy_bytes()

    def layer_autocast_copy_bytes(self) -> int:
        return self._cast_weights(min(1, self.trained.trained_layers))

    def dequantized_bytes(self) -> int:
        """Eq. (8): a quantized matrix is expanded for its product, the largest at a time."""
        if self.plan.quantization == "none" or not self.model.layer_linears:
            return 0
        return max(m.num_weights for m in self.model.layer_linears) * self.plan.compute_bytes

    def head_gradient_bytes(self) -> int:
        """Gradient of the output projection, which exists from the start of backward."""
        if not self.trained.trains_lm_head:
            return 0
        return self.model.embedding_parameters * self.plan.weight_bytes

    def loss_forward_bytes(self) -> int:
        """Eq. (9): logits, their fp32 copy and log-softmax; or a fused kernel's tile."""
        if self.plan.loss != "stock":
            return self._fused_tile_bytes(backward=False)
        entries = self.workload.tokens * self.model.vocab_size
        compute = self.plan.compute_bytes
        copy = FLOAT32_BYTES if compute != FLOAT32_BYTES else 0
        return entries * (compute + copy + FLOAT32_BYTES)

    def loss_backward_bytes(self) -> int:
        """Eq. (10): logits, log-softmax, and the gradients of both sides of the log-softmax.

        14 bytes an entry in 16 bits; a difference of 14.8 was measured for Mistral-7B LoRA at
        4 x 4096 on an A100 (fms-acceleration), temporaries included.
        """
        if self.plan.loss != "stock":
            return self._fused_tile_bytes(backward=True)
        entries = self.workload.tokens * self.model.vocab_size
        return entries * (self.plan.compute_bytes + 3 * FLOAT32_BYTES)

    def _fused_tile_bytes(self, *, backward: bool) -> int:
        """Eq. (11): one tile of logits, and gradients of the hidden states and the head."""
        tokens, model, compute = self.workload.tokens, self.model, self.plan.compute_bytes
        hidden_gradient = tokens * model.hidden_size * FLOAT32_BYTES if backward else 0
        head_gradient = (
            model.embedding_parameters * FLOAT32_BYTES
            if backward and self.trained.trains_lm_head
            else 0
        )
        if self.plan.loss == "liger":
            # Chunks of tokens so that a chunk's logits take about the hidden states' size
            # (liger_kernel.ops.fused_linear_cross_entropy).
            chunks = max(1, -(-model.vocab_size // model.hidden_size))
            tile = -(-tokens // chunks) * model.vocab_size * compute
            return tile + hidden_gradient // 2 + head_gradient
        entries = min(tokens, _FUSED_TOKENS) * min(model.vocab_size, _FUSED_VOCABULARY)
        if self.kind == "cpu":
            per_entry = _FUSED_TORCH_BYTES if backward else 5 * FLOAT32_BYTES
            return entries * per_entry + hidden_gradient + head_gradient
        return entries * compute + hidden_gradient + head_gradient


def _phase(name: str, resident: Mapping[str, int], **parts: int) -> Phase:
    """A phase with every component named, absent ones 0."""
    return Phase(
        name=name,
        components={key: parts.get(key, resident.get(key, 0)) for key in COMPONENTS},
    )
