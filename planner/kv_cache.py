"""Keys and values that a layer caches: what the cache asks of it, and those that a model caches
while it trains, though no one asks for them."""

from __future__ import annotations

from typing import Literal, Protocol

from ftplan.planner import functions as f
from ftplan.planner.tape import Tape, Tensor

# `copies` of keys and values (transformers' DynamicLayer), or the `product` whose views they are.
CacheKind = Literal["copies", "product"]


class Cache(Protocol):
    """What a layer's keys and values are joined with."""

    def update(self, tape: Tape, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


def fill(tape: Tape, kind: CacheKind, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as attention gets them back from the cache."""
    if kind == "copies":
        width = max(key.width, value.width)  # the cache has the keys' dtype
        key, value = _copied(tape, key, width), _copied(tape, value, width)
    tape.cache(key, value)
    return key, value


def _copied(tape: Tape, x: Tensor, width: int) -> Tensor:
    """x joined to what was cached before: nothing."""
    result = f.join(tape, [f.cast(tape, x, width)])
    result.by_heads = True
    return result
