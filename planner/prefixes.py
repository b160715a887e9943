"""Learned keys and values in front of each layer's own on a tape: prefix tuning and Cartridges
(PEFT 0.21, `PeftModel.get_prompt`).

PEFT makes those of all layers at once and puts a copy of each layer's into a cache, which the layer
joins with its own and keeps so until the loss is computed (transformers' `DynamicCache`).
"""

from __future__ import annotations

from msgspec import Struct

from ftplan.planner import functions as f
from ftplan.planner.peft_options import CACHE_FILLING, PeftOptions
from ftplan.planner.tape import (
    Form,
    Tape,
    Tensor,
    Weight,
    add_forms,
    per_row,
    per_token,
    times,
)
from ftplan.planner.trained import Trained


def keys_in_front(options: PeftOptions) -> int:
    """For how many tokens each layer is given keys and values."""
    filling = options.peft_type in CACHE_FILLING
    return options.count("num_virtual_tokens") if filling else 0


class Prefix(Struct, frozen=True, kw_only=True):
    """Keys and values of `num_tokens` in front of each row, for `num_layers` layers.

    `embedding`, `transform`: elements of the table, and of the weights and biases of the network
    that makes them of it, if there is one. `frozen`: elements of the table's part that is not
    trained; `looks_up`: it is asked for tokens, not taken whole. `weight_width`: bytes of these;
    `width`: of a key's value, as the base is held. `key_width`: values of a token's keys.
    """

    num_tokens: int
    num_layers: int
    key_width: int
    embedding: int
    transform: tuple[int, ...]
    frozen: int
    looks_up: bool
    weight_width: int
    width: int

    @property
    def of_layer(self) -> Form:
        """Values of a layer's keys, and as many of its values."""
        return per_row(self.num_tokens * self.key_width)

    @property
    def layer_bytes(self) -> Form:
        return times(self.of_layer, 2 * self.width)

    @property
    def all_bytes(self) -> Form:
        return times(self.layer_bytes, self.num_layers)

    @property
    def mask_bytes(self) -> Form:
        """Of the rows' mask, which ones in front of it turn into fp32."""
        return add_forms(per_token(f.FLOAT32), per_row(self.num_tokens * f.FLOAT32))

    @property
    def gradients(self) -> Form:
        """Values of the gradients of all layers' joined keys and values. What comes back is seen
        through views of them."""
        joined = add_forms(per_token(self.key_width), self.of_layer)
        return times(joined, 2 * self.num_layers)

    def cached(self, tape: Tape) -> Tensor:
        """The copies of all layers, and what made them."""
        made = f.cast(tape, self._made(tape), self.width)
        copies = tape.like(made)
        if tape.differentiates(made):
            sizes = made.elements, times(self.of_layer, 2), self.width

            def backward(tape: Tape, gradients: f.Gradients, saved: list[Tensor]) -> f.Gradients:
                """Layer by layer, the last first: keys beside values, and the rest is let go of."""
                whole, one, width = sizes
                of_layer = tape.empty(one, width)
                gradients.clear()
                del of_layer
                stacked = tape.empty(whole, width)
                joined = tape.empty(whole, width)
                del stacked
                return [tape.like(joined)]

            tape.attach([copies], [made], [], backward)
        return copies

    def _made(self, tape: Tape) -> Tensor:
        """(rows, tokens, keys and values of all layers)."""
        embedding = Weight(self.embedding, self.weight_width, trained=True)
        size = 2 * self.num_layers * self.key_width
        whole = per_row(self.num_tokens * size)
        if not self.looks_up:
            return f.broadcast(tape, self._joined(tape, embedding), whole)
        if not self.transform:
            return f.look_up(tape, embedding, whole)
        inner = self.transform[1]
        wide = self.embedding // self.num_tokens
        weights = [Weight(n, self.weight_width, trained=True) for n in self.transform]
        made = f.look_up(tape, embedding, per_row(self.embedding))
        made = self._product(tape, made, weights[:2], wide, inner)
        return self._product(tape, f.tanh(tape, made), weights[2:], inner, size)

    def _joined(self, tape: Tape, trained: Weight) -> Tensor:
        if not self.frozen:
            return trained
        frozen = Weight(self.frozen, f.FLOAT32, trained=False)
        return f.join(tape, [frozen, trained])

    @staticmethod
    def _product(tape: Tape, x: Tensor, own: list[Weight], deep: int, wide: int) -> Tensor:
        weight, bias = (tape.cast_weight(one) for one in own)
        return f.product(tape, f.to_product(tape, x), weight, deep, wide, bias)


def prefix_of(
    options: PeftOptions, trained: Trained, num_layers: int, weight_width: int, width: int
) -> Prefix | None:
    """The prefix that a method trains; None for a method without. Widths as `Prefix` has them."""
    tokens = keys_in_front(options)
    if not tokens:
        return None
    embedding, *transform = (p.num_elements for p in trained.adapters)
    frozen = trained.frozen_parameters
    last = transform[-1] if transform else (embedding + frozen) // tokens
    return Prefix(
        num_tokens=tokens,
        num_layers=num_layers,
        key_width=last // (2 * num_layers),
        embedding=embedding,
        transform=tuple(transform),
        frozen=frozen,
        looks_up=options.peft_type != "CARTRIDGE",
        weight_width=weight_width,
        width=width,
    )


class KeyValueCache:
    """A layer's keys and values, learned ones in front.

    `held`: what the cache refers to; `gradients` get those of the learned ones.
    """

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.held: list[Tensor] = []
        self.gradients: list[list[Tensor | None]] = []

    @property
    def layer_bytes(self) -> Form:
        """Of the learned ones."""
        return self.prefix.layer_bytes

    def fill(self, tape: Tape) -> None:
        """Put the learned ones in."""
        self.held = [tape.empty(self.prefix.of_layer, self.prefix.width) for _ in "kv"]
        if tape.grad_enabled:
            self.gradients = [tape.leaf(one) for one in self.held]

    def update(self, tape: Tape, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The learned keys and values joined with these."""
        key = self._join(tape, key)
        return key, self._join(tape, value)

    def _join(self, tape: Tape, own: Tensor) -> Tensor:
        joined = f.join(tape, [self.held.pop(0), own])
        joined.by_heads = True
        self.held.append(joined)
        return joined
