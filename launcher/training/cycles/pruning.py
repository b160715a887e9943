"""Optimizer states of adapters that are begun anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Moments of Adam and its kin by torch and by bitsandbytes, the first one first.
_MOMENTS = ("exp_avg", "state1", "exp_avg_sq", "state2", "max_exp_avg_sq")


def prune_states(
    optimizer: Any, parameters: Iterable[nn.Parameter], ratio: float, method: str, seed: int
) -> None:
    """Set a share of the moments to 0: where the first one is smallest (`magnitude`), or anywhere
    (`random`).

    The same entries of each moment, or Adam would divide a first moment that is left by a second
    one of 0. Steps are counted from 0 again: Adam corrects moments that began as zeros by their
    number, and without that its first steps would be some times too long (the average of k
    gradients is 1 - beta^k of what it stands for).

    `reset`, and states that are no such numbers (quantized ones, Adafactor's factors), are
    forgotten, and the optimizer makes them anew.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if not state:
            continue
        moments = _moments(state, parameter)
        if method == "reset" or not moments:
            state.clear()
            continue
        if method == "random":
            if parameter.device not in generators:
                generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
            kept = _any(moments[0], ratio, generators[parameter.device])
        else:
            kept = _largest(moments[0], ratio)
        for moment in moments:
            moment.mul_(kept)
        _count_anew(state)


def _moments(state: dict[str, Any], parameter: nn.Parameter) -> list[torch.Tensor]:
    """The moments of a parameter; none where the state holds other tensors too."""
    large = {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    }
    plain = all(
        name in _MOMENTS and value.shape == parameter.shape and value.is_floating_point()
        for name, value in large.items()
    )
    return [large[name] for name in _MOMENTS if name in large] if plain else []


def _largest(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """Where the largest ones are, but for this share of all."""
    count = int(ratio * values.numel())
    sizes = values.abs()
    if not count:
        return torch.ones_like(sizes, dtype=torch.bool)
    return sizes > sizes.flatten().float().kthvalue(count).values


def _any(values: torch.Tensor, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Anywhere, but for this share."""
    return torch.rand(values.shape, generator=generator, device=values.device) >= ratio


def _count_anew(state: dict[str, Any]) -> None:
    steps = state.get("step")
    if isinstance(steps, torch.Tensor):
        steps.zero_()
    elif steps is not None:
        state["step"] = 0
