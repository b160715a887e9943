"""Models of real shapes with random weights, on the device that they train on: nothing is loaded.

A quantized base is quantized weight by weight, so that it never stands there in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ftplan.launcher.dry_run.fakes import is_4bit, is_8bit
from ftplan.launcher.training.build import meta_model

# transformers' own where a configuration does not say otherwise.
_SPREAD = 0.02


def random_model(config: Mapping[str, Any], settings: Mapping[str, Any], device: str) -> Any:
    """What `launcher.training.build.load_model` gives, with random weights.

    `config`: what config.json holds. `settings`: `launcher.emit.method_settings` of a plan.
    """
    model = meta_model(config, settings)
    made: dict[int, Any] = {}  # so that tied weights stay tied
    for module in model.modules():
        # Set while the model was built without data.
        module.__dict__.pop("_is_hf_initialized", None)
        if is_4bit(module) or is_8bit(module):
            module.weight = _quantized(module, model.dtype, device)
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        made[id(tensor)] = _empty(tensor, device)
                    holder[name] = made[id(tensor)]
    model.initialize_weights()
    return model


def _empty(tensor: torch.Tensor, device: str) -> torch.Tensor:
    empty = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _quantized(module: Any, dtype: torch.dtype, device: str) -> Any:
    """bitsandbytes' own parameter of random weights; marked, so that no one initializes it."""
    from bitsandbytes.nn import Int8Params, Params4bit

    former = module.weight
    dense = torch.randn(former.shape, dtype=dtype, device=device) * _SPREAD
    if is_8bit(module):
        weight = Int8Params(dense, requires_grad=False, has_fp16_weights=False)
    else:
        weight = Params4bit(
            dense,
            requires_grad=False,
            quant_type=former.quant_type,
            compress_statistics=former.compress_statistics,
            quant_storage=former.quant_storage,
            module=module,
        )
    weight = weight.to(device)
    weight._is_hf_initialized = True
    return weight
