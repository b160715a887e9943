"""LoftQ: adapters that begin as what 4 bits took from the weights.

Li et al. 2023 (arXiv 2310.08659), algorithm 1 with one iteration: the base is quantized as ever,
and the difference from the model's own weights is decomposed. So the saved adapter goes with the
model as bitsandbytes quantizes it anywhere. PEFT's `replace_lora_weights_loftq` does the same on
CUDA, for adapters that are not scaled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear4bit
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftplan.planner.errors import InputError

_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"

# Passes of the randomized decomposition (torch.svd_lowrank, after Halko et al. 2009). What 4 bits
# take is much like noise, whose singular values hardly fall: with so many passes over a subspace of
# twice the rank, what is left is within a hundredth of the exact decomposition's.
_PASSES = 8


def begin_with_what_is_lost(model: nn.Module, folder: str | Path) -> None:
    """Set the adapters of each 4-bit module of a PEFT `model`, whose weights are in `folder`.

    Raises InputError where a weight is not found there.
    """
    weights = _Weights(Path(folder), model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                lost = _lost(module.get_base_layer(), weights.of(name))
                _set_product(module, module.active_adapters[0], lost)


def _lost(base: Any, weight: torch.Tensor) -> torch.Tensor:
    """(out, in) in fp32: the weight without its quantized form."""
    from bitsandbytes.functional import dequantize_4bit

    held = dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    whole = weight.to(held.device, torch.float32)
    return (whole.T if base.source_cls is Conv1D else whole) - held


def _set_product(module: Any, adapter: str, wanted: torch.Tensor) -> None:
    """The adapter's matrices such that what it adds is nearest to `wanted`."""
    rank = module.r[adapter]
    left, values, right = torch.svd_lowrank(wanted, q=min(2 * rank, *wanted.shape), niter=_PASSES)
    roots = values[:rank].sqrt()
    first = (right[:, :rank] * roots).T
    second = left[:, :rank] * roots / module.scaling[adapter]
    for matrices, made in ((module.lora_A, first), (module.lora_B, second)):
        weight = matrices[adapter].weight
        weight[: made.shape[0], : made.shape[1]] = made.to(weight.dtype)


class _Weights:
    """Weights of a model's folder, one at a time."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        base = model.get_base_model()
        self.prefix = f"{base.base_model_prefix}."
        # A PEFT model holds the causal one, and that one's modules have names of their own.
        self.names = {id(module): name for name, module in base.named_modules()}
        self.modules = dict(model.named_modules())
        self.files = self._files()

    def of(self, path: str) -> torch.Tensor:
        """The weight of the module at `path` of the PEFT model."""
        own = self.names[id(self.modules[path])] + ".weight"
        for name in (own, own.removeprefix(self.prefix)):
            if name in self.files:
                with safe_open(self.files[name], framework="pt") as file:
                    return file.get_tensor(name)
        raise InputError(
            f"method `loftq` finds no `{own}` in `{self.folder}`",
            "it needs the model's weights by the names of its modules: use `--method qlora`",
        )

    def _files(self) -> dict[str, Path]:
        index = self.folder / _INDEX_FILE
        if index.is_file():
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.folder / file for name, file in placed.items()}
        whole = self.folder / _WEIGHTS_FILE
        with safe_open(whole, framework="pt") as file:
            return dict.fromkeys(file.keys(), whole)
