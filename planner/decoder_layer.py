"""One decoder layer on a tape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ftplan.planner import functions as f
from ftplan.planner.adaption_prompts import prompted
from ftplan.planner.bottlenecks import Bottleneck
from ftplan.planner.falcon_attention import FalconAttention
from ftplan.planner.kv_cache import Cache
from ftplan.planner.latent_attention import LatentAttention
from ftplan.planner.mixtures import EveryExpert, MixtureOfExperts
from ftplan.planner.model_spec import Attention, FeedForward, Layer
from ftplan.planner.modules import (
    Mlp,
    Module,
    Numerics,
    PlainLinear,
    SelfAttention,
    base_linear,
    called,
    norm_module,
)
from ftplan.planner.separate_experts import SeparateExperts
from ftplan.planner.tape import Tape, Tensor


def attention_module(
    attention: Attention, numerics: Numerics, prefix: Cache | None = None
) -> Module:
    module: Module
    if attention.picks_heads:
        module = FalconAttention(attention, numerics)
    elif attention.latents:
        module = LatentAttention(attention, numerics)
    else:
        module = SelfAttention(attention, numerics, prefix)
    return called(module, numerics, by_name=True)


def feed_forward_module(block: FeedForward, numerics: Numerics) -> Module:
    if block.experts is None:
        return Mlp(block, numerics)
    if numerics.separate_experts:
        router = PlainLinear(block.experts.router, numerics.weights, numerics.trained)
        return SeparateExperts(block, router, partial(base_linear, numerics=numerics))
    kind = EveryExpert if block.experts.every_expert else MixtureOfExperts
    return kind(block, numerics)


class DecoderLayer:
    """One layer, built once and run as often as it is computed."""

    def __init__(self, layer: Layer, numerics: Numerics, cache: Cache | None = None) -> None:
        self.layer = layer
        width = layer.attention.output.out_features
        attention = attention_module(layer.attention, numerics, cache)
        self.attention = prompted(attention, width, numerics)
        self.feed_forward = feed_forward_module(layer.feed_forward, numerics)
        self.feeding = [called(self.feed_forward, numerics)]
        if layer.feeds_by_itself:
            assert isinstance(self.feed_forward, Mlp)
            self.feeding = self.feed_forward.steps
        self.behind_attention, self.behind_feed_forward = (
            [Bottleneck(width, numerics)] if numerics.has_bottlenecks else [] for _ in range(2)
        )
        places = (
            layer.attention_norm,
            layer.post_attention_norm,
            layer.feed_forward_norm,
            layer.post_feed_forward_norm,
        )
        self.norms = [norm_module(norm, numerics) if norm else None for norm in places]

    def __call__(self, tape: Tape, hidden: Tensor) -> Tensor:
        try:
            return self._forward(tape, hidden)
        finally:
            tape.release_locals(returns="weights" in self.layer.holds)

    def _forward(self, tape: Tape, hidden: Tensor) -> Tensor:
        if self.layer.parallel:
            return self._in_parallel(tape, hidden)
        before, behind, before_second, behind_second = self.norms
        held: dict[str, Tensor] = {}
        attend, feed = [self.attention], self.feeding
        hidden = self._block(tape, hidden, before, attend, self.behind_attention, behind, held)
        return self._block(
            tape, hidden, before_second, feed, self.behind_feed_forward, behind_second, {}
        )

    def _block(
        self,
        tape: Tape,
        hidden: Tensor,
        before: Module | None,
        modules: Sequence[Module],
        bottlenecks: Sequence[Bottleneck],
        behind: Module | None,
        held: dict[str, Tensor],
    ) -> Tensor:
        """`held` gets what stays a local variable until the layer ends."""
        residual = hidden
        if before is not None:
            hidden = before(tape, hidden)
        if "normalized" in self.layer.holds:
            held["normalized"] = hidden
        for module in modules:
            hidden = module(tape, hidden)
        hidden = f.dropout(tape, hidden, self.layer.dropout)
        for bottleneck in bottlenecks:
            hidden = bottleneck(tape, hidden)
        if "attended" in self.layer.holds:
            held["attended"] = hidden
        if self.layer.normalizes_sums:
            hidden = f.add(tape, residual, hidden)
            return hidden if behind is None else behind(tape, hidden)
        if behind is not None:
            hidden = behind(tape, hidden)
        if self.layer.scales_residual:
            hidden = f.scale(tape, hidden)
        return f.add(tape, residual, hidden)

    def _in_parallel(self, tape: Tape, hidden: Tensor) -> Tensor:
        residual = hidden
        before, _, before_second, _ = self.norms
        normalized = before(tape, hidden) if before else hidden
        first = self.layer.normalizes_first
        second = before_second(tape, hidden) if first and before_second else None
        held = normalized if "normalized" in self.layer.holds else None
        attended = f.dropout(tape, self.attention(tape, normalized), self.layer.dropout)
        for bottleneck in self.behind_attention:
            attended = bottleneck(tape, attended)
        if second is not None:
            normalized = second
        elif before_second is not None:
            normalized = before_second(tape, hidden)
        fed = f.dropout(tape, self.feeding[0](tape, normalized), self.layer.dropout)
        for bottleneck in self.behind_feed_forward:
            fed = bottleneck(tape, fed)
        if self.layer.adds_in_place:
            result = f.add(tape, f.add_in_place(tape, fed, attended), residual)
            del held
            return result
        return f.add(tape, f.add(tape, attended, fed), residual)
