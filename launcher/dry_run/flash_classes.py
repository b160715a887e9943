"""FlashAttention-2 in models that have a class of their own for it (Falcon, GPT-J, GPT-Neo).

transformers chooses the class when it builds the model, and wants flash-attn installed for this
one; its parameters are those of the plain class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from ftplan.launcher.dry_run.attention import FlashAttention

# What modelling code calls its classes by kernel, and the function, which it imports only where
# flash-attn is installed.
_CLASSES = "_ATTENTION_CLASSES"
_FLASH_FUNCTION = "_flash_attention_forward"


@contextmanager
def flash_classes(*models: nn.Module) -> Iterator[None]:
    """Within, attention of these models runs by FlashAttention-2, where a class decides it."""
    with ExitStack() as stack:
        modules: list[Any] = [module for model in models for module in model.modules()]
        for module in modules:
            plain = type(module)
            modelling = sys.modules[plain.__module__]
            flash = _flash_class(modelling, plain)
            if flash is None:
                continue
            module.__class__, module._flash_attn_uses_top_left_mask = flash, False
            stack.callback(setattr, module, "__class__", plain)
            attend = mock.patch.object(modelling, _FLASH_FUNCTION, _attend, create=True)
            stack.enter_context(attend)
        yield


def _flash_class(modelling: ModuleType, plain: type) -> type | None:
    """The class that takes the place of `plain`; None where there is none."""
    for name, classes in vars(modelling).items():
        if name.endswith(_CLASSES) and classes.get("eager") is plain:
            flash: type | None = classes.get("flash_attention_2")
            return flash
    return None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    """A stand-in for transformers' function, on (batch, length, heads, head_dim)."""
    return FlashAttention.apply(query, key, value)
