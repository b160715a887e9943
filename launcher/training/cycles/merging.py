"""LoRA's adapters merged into the base in place, and begun anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding, Linear, LoraLayer
from torch import nn

from ftplan.launcher.training.cycles.cycle import ADAPTER
from ftplan.planner.errors import InputError

# An update is computed in so many bytes at a time, in fp32: less than any step's activations.
MERGE_BYTES = 32 * 2**20


class Adapted:
    """A module with an adapter of two matrices. `kind`: its path but for the number of the layer.

    The update of its weight is `scaling * left @ right`.
    """

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.kind = ".".join(part for part in name.split(".") if not part.isdigit())

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        if ADAPTER in self.layer.lora_A:
            return self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight
        return self.layer.lora_embedding_A[ADAPTER], self.layer.lora_embedding_B[ADAPTER]

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        weight: torch.Tensor = self.layer.get_base_layer().weight
        return weight

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[ADAPTER])

    def merge(self, first: torch.Tensor, second: torch.Tensor, share: float) -> None:
        """Add this share of the update that A and B of these values make to the base's weight."""
        lies = isinstance(self.layer, Embedding) or self.layer.fan_in_fan_out
        left, right = (first.T, second.T) if lies else (second, first)
        add_product(self.weight.data, left, right, share * self.scaling)


def adapted_modules(model: nn.Module) -> list[Adapted]:
    """Those with adapters, in order. Raises InputError for a kind that cannot be merged so."""
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, (Linear, Embedding)):
            raise InputError(
                f"the adapter of `{name}` is a {type(layer).__name__}, which cannot be merged "
                "while it trains",
                "name other `--target-modules`, or use `--method lora`",
            )
        found.append(Adapted(name, layer))
    return found


def add_product(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float
) -> None:
    """weight += scale * left @ right, in fp32, rounded once. Shapes (n, m), (n, r), (r, m)."""
    rows = max(1, MERGE_BYTES // (4 * weight.shape[1]))
    right = right.detach().float()
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        update = (left[start : start + rows].detach().float() @ right).mul_(scale)
        part.copy_(update.add_(part))


def matrices(modules: Iterable[Adapted]) -> dict[str, torch.Tensor]:
    """A and B of each, by name, as they are now."""
    values = {}
    for module in modules:
        for part, value in zip("AB", module.parameters, strict=True):
            values[f"{module.name}.{part}"] = value.detach().cpu().contiguous().clone()
    return values


def merge(modules: Iterable[Adapted], values: Mapping[str, torch.Tensor], share: float) -> None:
    """Add this share of what the matrices make to the base."""
    for module in modules:
        first, second = (values[f"{module.name}.{part}"].to(module.weight.device) for part in "AB")
        module.merge(first, second, share)


def begin_anew(model: PeftModel, modules: Sequence[Adapted], seed: int) -> None:
    """A random and B zero, or whatever `init_lora_weights` says; the same on every rank."""
    begin = model.peft_config[ADAPTER].init_lora_weights
    device = modules[0].weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for module in modules:
            module.layer.reset_lora_parameters(ADAPTER, begin)


def merged_state_dict(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base's weights under its own names, whole copies in the place of what they replace."""
    base = model.get_base_model()
    weights: dict[str, torch.Tensor] = {}
    for name, value in base.state_dict().items():
        if ".lora_" in name or ".original_module." in name:
            continue
        name = name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        weights[name] = value
    return weights
