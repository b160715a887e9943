"""How much each number of an AdaLoRA adapter matters, as PEFT remembers it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import AdaLoraModel

# What PEFT's RankAllocator remembers of each parameter.
REMEMBERED = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def is_adalora(model: Any) -> bool:
    """Whether PEFT's AdaLoRA has been put around the model."""
    return isinstance(getattr(model, "base_model", None), AdaLoraModel)


def importance(model: Any) -> Iterator[torch.Tensor]:
    """What is remembered of an AdaLoRA model; nothing of others."""
    if is_adalora(model):
        for remembered in REMEMBERED:
            yield from getattr(model.base_model.rankallocator, remembered).values()
