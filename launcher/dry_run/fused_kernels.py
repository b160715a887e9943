"""Fused kernels of training stacks that are not installed, as far as they allocate.

fms-acceleration's plugin `fused-ops-and-kernels` puts Unsloth's norms and rotary embeddings in the
place of a model's own, and its fused LoRA on a quantized base
(plugins/fused-ops-and-kernels/src/fms_acceleration_foak, models/llama.py). Adapters are counted as
sharded under FSDP, where the plugin leaves them whole.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn


class FusedNorm(torch.autograd.Function):
    """Unsloth's RMS norm (kernels/unsloth/rms_layernorm.py): what it keeps is its input and a
    number a row, its gradient overwrites the one that comes in, and its weight is not trained."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        scales = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, scales)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class FusedDropout(torch.autograd.Function):
    """Dropout within fused LoRA (`LoRA_QKV`, `LoRA_W` in fused_ops/unsloth_lora/bnb/fast_lora.py):
    the projection's input and what is left of it are kept, no mask."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, probability: float) -> torch.Tensor:
        left = torch.native_dropout(inputs, probability, True)[0]
        ctx.save_for_backward(inputs, left)
        return left

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _, left = ctx.saved_tensors
        return (left != 0) * gradients[0], None


def fuse(model: nn.Module, *, quantized: bool) -> None:
    """Give the model's RMS norms the fused kernel, and adapters of a quantized base its dropout."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_fused_norm, module)
        elif quantized and hasattr(module, "lora_dropout"):
            for dropout in module.lora_dropout.values():
                if isinstance(dropout, nn.Dropout):
                    dropout.forward = partial(_fused_dropout, dropout)


def _fused_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return FusedNorm.apply(hidden, module.weight)


def _fused_dropout(dropout: nn.Dropout, inputs: torch.Tensor) -> torch.Tensor:
    return FusedDropout.apply(inputs, dropout.p) if dropout.training else inputs


def fused_rotary_embeddings(model: nn.Module) -> AbstractContextManager[Any]:
    """Within, queries and keys of that model are turned in place, forward and backward
    (kernels/unsloth/rope_embedding.py); a model that learns positions turns none."""
    modeling = sys.modules[type(model).__module__]
    if not hasattr(modeling, "apply_rotary_pos_emb"):
        return nullcontext()
    return mock.patch.object(modeling, "apply_rotary_pos_emb", _in_place)


def _in_place(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return query, key
