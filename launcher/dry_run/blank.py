"""Adapters are built on weights that are not there: answers for what asks for data.

PEFT sizes and places some adapters by drawing numbers, counting or decomposing. Which numbers come
out decides nothing about memory; how many do is known.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PromptTuningConfig, PromptTuningInit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ftplan.launcher.dry_run.operations import REPLACED

_aten = torch.ops.aten


class BlankWeights(TorchDispatchMode):
    """While it is on, tensors of the meta device stay there and answer what needs data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is _aten._to_copy.default and args[0].is_meta:
            kwargs["device"] = torch.device("meta")
        if func is _aten.bincount.default and args[0].is_meta:
            return args[0].new_empty(kwargs.get("minlength", (*args, None, 0)[2]))
        if func in REPLACED and args[0].is_meta:
            return REPLACED[func](*args, **kwargs)
        return func(*args, **kwargs)


def choose_without_weights(peft_config: PeftConfig) -> None:
    """SHiRA takes the places where a mask of its weights is true; here, a mask with as many. A
    prompt that begins as words has the size of any other."""
    if hasattr(peft_config, "mask_fn"):
        peft_config.mask_fn = _mask_of_chosen
    if isinstance(peft_config, PromptTuningConfig):
        peft_config.prompt_tuning_init = PromptTuningInit.RANDOM


def _mask_of_chosen(base_layer: nn.Module, r: int, **_: Any) -> torch.Tensor:
    sides: Any = base_layer
    return torch.empty((r * (sides.in_features + sides.out_features), 1), device="meta")
