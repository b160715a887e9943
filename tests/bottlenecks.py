"""A model with bottleneck adapters, as their authors place them (arXiv 1902.00751, figure 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ftplan.launcher.training.build import Settings, decoder_layers


class Bottleneck(nn.Module):
    def __init__(self, hidden_size: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": "meta"}
        self.down = nn.Linear(hidden_size, rank, **made)
        self.up = nn.Linear(rank, hidden_size, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x if torch.is_autocast_enabled("cpu") else x.to(self.down.weight.dtype)
        return x + self.up(nn.functional.gelu(self.down(own))).to(x.dtype)


def insert_bottlenecks(model: Any, method: str, settings: Settings) -> None:
    """Freeze `model` and put adapters behind attention and feed-forward: in fp32, or in bf16 beside
    a quantized base, as TRL would have them."""
    model.requires_grad_(False)
    model._hf_peft_config_loaded = True  # transformers trains a quantized model with adapters only
    dtype = torch.float32 if settings["quantization"] == "none" else torch.bfloat16
    for layer in decoder_layers(model):
        for name, module in list(layer.named_children()):
            if name in ("attn", "self_attn", "mlp"):
                width = model.config.hidden_size
                module.bottleneck = Bottleneck(width, settings["lora_rank"], dtype)
                module.register_forward_hook(_adapt)


def _adapt(module: Any, arguments: Any, result: Any) -> Any:
    if isinstance(result, tuple):
        return module.bottleneck(result[0]), *result[1:]
    return module.bottleneck(result)
