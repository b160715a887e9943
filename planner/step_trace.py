"""One training step on a tape: embeddings, layers, loss, and back.

Each kind of layer runs once, by itself; what a whole model holds follows by addition. Layer `i`
runs above what the layers before it have kept, and its backward besides above the gradients that
later layers have left. Both grow evenly with the layers, so the highest moments of a kind of layer
are those of its first and last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ftplan.planner import functions as f
from ftplan.planner.exchange import Alone, Exchange, Place
from ftplan.planner.fsdp1 import fsdp1_places
from ftplan.planner.fsdp2 import fsdp2_places
from ftplan.planner.losses import Head, LigerLoss, LossShape, StockLoss, TrlFusedLoss
from ftplan.planner.model_spec import Layer, ModelSpec
from ftplan.planner.modules import DecoderLayer, Numerics, norm_module
from ftplan.planner.sharded import Spread, Units, units_of
from ftplan.planner.tape import (
    ZERO,
    Form,
    Moment,
    Tape,
    Tensor,
    Weight,
    add_forms,
    added,
    constant,
    covers,
    per_pair,
    per_position,
    per_token,
    subtract_forms,
)
from ftplan.planner.zero import Reduction, zero_places

Parts = dict[str, Form]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """All that a step's trace depends on beside the model: a trace serves every plan that agrees
    in these.

    `numerics`: of a layer without adapters whose own parameters are frozen. `trained_names`: of the
    parameters that are trained in the last `trained_layers` layers; `adapted`: names of the linear
    modules that carry an adapter, for each layer that has some. `trained_outside`: names of trained
    parameters outside of the layers. `input_learns`: the embeddings' result needs a gradient (they
    are trained, or a hook asks for it). `embedding_width`, `head_width`: bytes a parameter.
    `spread`: how several GPUs divide parameters, `reduction`: how they divide gradients alone; None
    where they do not.
    """

    numerics: Numerics
    trained_layers: int
    trained_names: frozenset[str]
    adapted: Mapping[int, frozenset[str]]
    trains_embeddings: bool
    trains_head: bool
    trained_outside: frozenset[str]
    input_learns: bool
    autocast: int | None
    is_fp16: bool
    on_cuda: bool
    capability: tuple[int, int]
    gradient_checkpointing: bool
    use_reentrant: bool
    accumulates: bool
    single_row: bool
    loss: str
    loss_shape: LossShape
    shifts_logits: bool
    holds_logits: bool
    returns_fp32: bool
    lets_logits_go: bool
    loses_in_16_bits: bool
    embedding_width: int
    head_width: int
    spread: Spread | None = None
    reduction: Reduction | None = None

    def numerics_of(self, model: ModelSpec, place: int) -> Numerics:
        """Of the layer at that place."""
        first_trained = model.num_hidden_layers - self.trained_layers
        return dataclasses.replace(
            self.numerics,
            trained=self.trained_names if place >= first_trained else frozenset(),
            adapted=self.adapted.get(place, frozenset()),
        )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of the step by itself: an embedding, a layer, or the loss.

    Moments are of all that it holds, its input and the gradient that comes back to it included.
    `result_width`: bytes an element of what it hands on.
    `kept_forward`: what it leaves behind until forward ends, its result not counted;
    `kept`: until its backward. `left`: gradients that it leaves, its input's not counted.
    `taken_over`: of what is there without it, what its backward counts itself.
    """

    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    result_width: int
    kept_forward: Parts
    kept: Parts
    left: Parts
    taken_over: Parts
    forward_flops: Form
    backward_flops: Form
    forward_moved: Form
    backward_moved: Form


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """The highest moments of each phase, without what is there all the time (weights, states), and
    the segments that they are sums of: embeddings, layers, loss.

    FLOPs, and bytes read and written besides parameters and outside of the loss, of one
    micro-batch. Backward's hold what is computed again.
    """

    phases: Mapping[str, tuple[Moment, ...]]
    segments: tuple[Segment, ...]
    after_backward: Parts
    forward_flops: Form
    backward_flops: Form
    forward_moved: Form
    backward_moved: Form


def step_units(model: ModelSpec, settings: StepSettings) -> Units:
    """What several GPUs divide."""
    assert settings.spread is not None
    numerics = [settings.numerics_of(model, place) for place in range(model.num_hidden_layers)]
    return units_of(model, settings.spread, numerics, settings.trained_outside)


def trace_step(model: ModelSpec, settings: StepSettings) -> StepTrace:
    return _StepTracer(model, settings).trace()


@dataclass
class _StepTracer:
    model: ModelSpec
    settings: StepSettings
    phases: dict[str, list[Moment]] = field(default_factory=dict)

    def trace(self) -> StepTrace:
        segments, labels = self._segments()
        forward_base = self._inputs()
        base = dict(forward_base)
        places = _extremes(labels)
        bases = []
        for index, segment in enumerate(segments):
            if index in places:
                phase = "loss" if index == len(segments) - 1 else "forward"
                self._add(phase, segment.forward, forward_base)
            bases.append(base)
            base = _sum(base, segment.kept)
            forward_base = _sum(forward_base, segment.kept_forward)
        left: Parts = {}
        for index in reversed(range(len(segments))):
            segment = segments[index]
            left = _less(left, segment.taken_over)
            if index in places and segment.backward:
                phase = "loss" if index == len(segments) - 1 else "backward"
                self._add(phase, segment.backward, _sum(bases[index], left))
            left = _sum(left, segment.left)
        return StepTrace(
            phases={name: tuple(moments) for name, moments in self.phases.items()},
            segments=tuple(segments),
            after_backward=_sum(self._inputs(), left),
            forward_flops=added(segment.forward_flops for segment in segments),
            backward_flops=added(segment.backward_flops for segment in segments),
            forward_moved=added(segment.forward_moved for segment in segments[:-1]),
            backward_moved=added(segment.backward_moved for segment in segments[:-1]),
        )

    def _add(self, phase: str, moments: Iterable[Moment], base: Parts) -> None:
        """Keep moments above `base`, of those that another covers none."""
        highest = self.phases.setdefault(phase, [])
        for moment in moments:
            parts = _sum(base, moment.components)
            total = _total(parts)
            if any(covers(other.total, total) for other in highest):
                continue
            highest[:] = [other for other in highest if not covers(total, other.total)]
            highest.append(Moment(total, parts))

    def _segments(self) -> tuple[list[Segment], list[object]]:
        """The segments in forward order, and of what kind each is."""
        settings, model = self.settings, self.model
        places = self._places()
        segments, labels = [self._embedding(places[0].exchange())], ["embedding"]
        known: dict[object, Segment] = {}
        learns = settings.input_learns
        found: list[object] = list(labels)
        for place, layer in enumerate(model.layers):
            numerics = settings.numerics_of(model, place)
            width = segments[-1].result_width
            key = (id(layer), numerics, learns, width, places[place + 1])
            if key not in known:
                exchange = places[place + 1].exchange()
                known[key] = self._layer(layer, numerics, learns, width, exchange)
            segments.append(known[key])
            found.append(key)
            learns = learns or bool(numerics.trained or numerics.adapted)
        segments.append(self._loss(learns, segments[-1].result_width, places[-1].exchange()))
        found.append("loss")
        return segments, found

    def _places(self) -> Sequence[Place]:
        """Of each segment, where it is among the others."""
        settings, model = self.settings, self.model
        if settings.reduction is not None:
            learn = [settings.numerics_of(model, place) for place in range(model.num_hidden_layers)]
            trains = [bool(numerics.trained or numerics.adapted) for numerics in learn]
            outside = (settings.trains_embeddings, settings.trains_head)
            return zero_places(settings.reduction, [outside[0], *trains, outside[1]])
        if settings.spread is None:
            return [Alone()] * (model.num_hidden_layers + 2)
        units, spread = step_units(model, settings), settings.spread
        if spread.kind == "fsdp2":
            return fsdp2_places(units, spread, accumulates=settings.accumulates, loss=settings.loss)
        return fsdp1_places(
            units,
            accumulates=settings.accumulates,
            checkpoints=settings.gradient_checkpointing,
            around=spread.checkpointed_around,
        )

    def _tape(self) -> Tape:
        s = self.settings
        return Tape(
            autocast=s.autocast,
            on_cuda=s.on_cuda,
            capability=s.capability,
            is_fp16=s.is_fp16,
            accumulates=s.accumulates or (s.reduction is not None and s.reduction.partitions),
            residual=s.embedding_width,
            single_row=s.single_row,
        )

    def _inputs(self) -> Parts:
        """Token numbers, labels and mask, 8 bytes each; rotary cosines and sines; the masks that
        layers share."""
        settings, model = self.settings, self.model
        total = add_forms(per_token(3 * 8), self._masks())
        rotary = max(layer.attention.rotary_dim for layer in model.layer_counts)
        if rotary:
            total = add_forms(total, per_position(2 * rotary * settings.embedding_width + 8))
        return {"temporaries": total}

    def _masks(self) -> Form:
        """Of each kind that some layer needs: eager attention adds one of the hidden state's
        width, torch's kernels are given one of a byte."""
        numerics, kinds = self.settings.numerics, set()
        for layer in self.model.layer_counts:
            window = layer.attention.sliding_window
            masked = window in numerics.masked_windows
            if numerics.attn_implementation == "eager" or masked or numerics.padded:
                kinds.add(window if masked else None)
        if numerics.attn_implementation == "flash_attention_2":
            return ZERO
        eager = numerics.attn_implementation == "eager"
        return per_pair(len(kinds) * (self.settings.embedding_width if eager else 1))

    def _embedding(self, exchange: Exchange) -> Segment:
        model, settings = self.model, self.settings
        weight = Weight(
            model.embedding_parameters,
            settings.embedding_width,
            trained=settings.trains_embeddings,
        )
        norm = (
            norm_module(model.embedding_norm, settings.numerics) if model.embedding_norm else None
        )

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            hidden = f.look_up(tape, weight, per_token(model.hidden_size))
            if settings.input_learns and not hidden.requires_grad:
                tape.leaf(hidden)
            if model.scales_embeddings:
                hidden = f.scale(tape, hidden)
            return hidden if norm is None else norm(tape, hidden)

        return self._segment(forward, None, exchange, learns=settings.trains_embeddings)

    def _layer(
        self, layer: Layer, numerics: Numerics, learns: bool, width: int, exchange: Exchange
    ) -> Segment:
        settings = self.settings
        module = DecoderLayer(layer, numerics)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            if not settings.gradient_checkpointing:
                return module(tape, given[0])

            layer = exchange.around(module)

            def call(hidden: Tensor) -> Tensor:
                return layer(tape, hidden)

            run = tape.checkpoint_reentrant if settings.use_reentrant else tape.checkpoint
            return run(call, given)

        size = per_token(self.model.hidden_size), width
        return self._segment(forward, size, exchange, learns=learns)

    def _loss(self, learns: bool, width: int, exchange: Exchange) -> Segment:
        model, settings = self.model, self.settings
        numerics = dataclasses.replace(settings.numerics, trained=settings.trained_outside)
        norm = norm_module(model.final_norm, numerics) if model.final_norm else None
        weight = Weight(
            model.embedding_parameters, settings.head_width, trained=settings.trains_head
        )
        weight.waits = model.tie_word_embeddings
        head = Head(
            vocab_size=model.vocab_size,
            hidden_size=model.embedding_width or model.hidden_size,
            softcapped=model.final_logit_softcapping,
            scaled=model.scales_logits,
        )
        loss = self._loss_module(head, weight, exchange)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            hidden = norm(tape, given[0]) if norm is not None else given[0]
            given.clear()
            tape.component = "logits_and_loss"
            result = loss(tape, hidden, self.held)
            if not settings.holds_logits:
                self.held.clear()
            return result

        self.held: list[Tensor] = []
        size = per_token(model.hidden_size), width
        return self._segment(forward, size, exchange, learns=learns)

    def _loss_module(self, head: Head, weight: Weight, exchange: Exchange) -> Callable[..., Tensor]:
        settings = self.settings
        if settings.loss == "liger":
            return LigerLoss(head, weight, settings.loss_shape)
        if settings.loss == "trl-fused":
            return TrlFusedLoss(head, weight, settings.loss_shape)
        return StockLoss(
            head,
            weight,
            None,
            shifts_logits=settings.shifts_logits,
            returns_fp32=settings.returns_fp32,
            watch=exchange.watch,
            lets_logits_go=settings.lets_logits_go,
            in_16_bits=settings.loses_in_16_bits,
            in_place=settings.loss == "triton_ce",
        )

    def _segment(
        self,
        forward: Callable[[Tape, list[Tensor]], Tensor],
        input_size: tuple[Form, int] | None,
        exchange: Exchange,
        *,
        learns: bool,
    ) -> Segment:
        tape = self._tape()
        given: list[Tensor] = []
        gradient: list[Tensor | None] = []
        if input_size is not None:
            given = [tape.empty(*input_size)]
            if learns:
                gradient = tape.leaf(given[0])
        exchange.before_forward(tape)
        result = forward(tape, given)
        exchange.after_forward(tape)
        given.clear()
        result_width = result.width
        forward_moments = tape.moments()
        forward_flops, forward_moved = tape.flops, tape.moved
        exchange.hand_on()
        kept_forward = _without(tape.state(), result)
        tape.end_autocast()
        kept = _without(tape.state(), result)
        backward_moments: tuple[Moment, ...] = ()
        if result.requires_grad:
            of_result = tape.like(result)
            exchange.before_backward(tape, of_result)
            incoming: list[Tensor | None] = [of_result]
            del of_result
            roots = [result]
            del result
            tape.backward(roots, incoming)
            exchange.after_backward(tape)
            backward_moments = tape.moments()
        exchange.hand_on()
        gradient.clear()
        taken_over = {part: constant(size) for part, size in exchange.taken_over.items()}
        return Segment(
            forward=forward_moments,
            backward=backward_moments,
            result_width=result_width,
            kept_forward=kept_forward,
            kept=kept,
            left=tape.state() if backward_moments else {},
            taken_over=taken_over if backward_moments else {},
            forward_flops=forward_flops,
            backward_flops=subtract_forms(tape.flops, forward_flops),
            forward_moved=forward_moved,
            backward_moved=subtract_forms(tape.moved, forward_moved),
        )


def _extremes(labels: list[object]) -> set[int]:
    """First and last place of each kind."""
    first: dict[object, int] = {}
    last: dict[object, int] = {}
    for place, label in enumerate(labels):
        first.setdefault(label, place)
        last[label] = place
    return {*first.values(), *last.values()}


def _without(state: Parts, result: Tensor) -> Parts:
    storage = result.storage
    assert storage is not None
    rest = subtract_forms(state[storage.component], storage.size)
    return {**state, storage.component: rest}


def _sum(left: Parts, right: Parts) -> Parts:
    result = dict(left)
    for name, form in right.items():
        result[name] = add_forms(result[name], form) if name in result else form
    return result


def _less(left: Parts, right: Parts) -> Parts:
    result = dict(left)
    for name, form in right.items():
        result[name] = subtract_forms(result.get(name, ZERO), form)
    return result


def _total(parts: Parts) -> Form:
    return added(parts.values())
