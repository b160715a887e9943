"""One training step on a tape: embeddings, layers, loss, and back.

Each kind of layer runs once, by itself; what a whole model holds follows by addition. Layer `i`
runs above what the layers before it have kept, and its backward besides above the gradients that
later layers have left. Both grow evenly with the layers, so the highest moments of a kind of layer
are those of its first and last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ftplan.planner import functions as f
from ftplan.planner.losses import Head, LigerLoss, LossShape, Score, StockLoss, TrlFusedLoss
from ftplan.planner.model_spec import Layer, ModelSpec
from ftplan.planner.modules import DecoderLayer, Numerics, norm_module
from ftplan.planner.tape import (
    ZERO,
    Form,
    Moment,
    Tape,
    Tensor,
    Weight,
    add_forms,
    covers,
    per_pair,
    per_position,
    per_token,
    subtract_forms,
    times,
)

Parts = dict[str, Form]

EVALUATION_PHASE = "evaluation"
# Where a reference's log-probabilities are computed before training.
REFERENCE_PHASE = "reference log-probabilities"


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """All that a step's trace depends on beside the model: a trace serves every plan that agrees
    in these.

    `numerics`: of frozen layers; trained ones differ in `trains_own`. `trained_layers`: from the
    last. `input_learns`: the embeddings' result needs a gradient (they are trained, or a hook asks
    for it). `embedding_width`, `head_width`: bytes a parameter. `input_bytes`: of what the model
    is given, a token. `scores`: the model gives scores, not logits. `finds_top1`: the loss also
    tells whether each target is the most probable token. `reference`: of the model that a
    preference is measured against, whose pass comes behind; with `asks_before` it comes before
    training instead. `pairs_rows`: both models also read as many other rows, without gradients.
    """

    numerics: Numerics
    trained_layers: int
    trains_embeddings: bool
    trains_head: bool
    input_learns: bool
    autocast: int | None
    is_fp16: bool
    on_cuda: bool
    capability: tuple[int, int]
    gradient_checkpointing: bool
    use_reentrant: bool
    accumulates: bool
    loss: str
    loss_shape: LossShape
    shifts_logits: bool
    holds_logits: bool
    returns_fp32: bool
    embedding_width: int
    head_width: int
    input_bytes: int
    scores: bool = False
    finds_top1: bool = False
    reference: StepSettings | None = None
    asks_before: bool = False
    pairs_rows: bool = False

    @property
    def in_evaluation(self) -> StepSettings:
        """Of an evaluation's pass, which has no dropout."""
        numerics = dataclasses.replace(self.numerics, dropout=0.0)
        return dataclasses.replace(self, numerics=numerics)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of the step by itself: an embedding, a layer, or the loss.

    Moments are of all that it holds, its input and the gradient that comes back to it included.
    `result_width`: bytes an element of what it hands on.
    `keeps_input`: its backward needs its input as it came.
    `kept_forward`: what it leaves behind until forward ends, its result not counted;
    `kept`: until its backward. `left`: gradients that it leaves, its input's not counted.
    """

    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    result_width: int
    keeps_input: bool
    kept_forward: Parts
    kept: Parts
    left: Parts
    forward_flops: Form
    backward_flops: Form
    forward_moved: Form
    backward_moved: Form


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """The highest moments of each phase, without what is there all the time (weights, states).

    `inputs`: what the model is given; `after_backward`: all that is left until the step is over.
    `num_passes`: forward, those without gradients included.
    FLOPs, and bytes read and written besides parameters and outside of the loss, of one
    micro-batch. Forward's hold the reference's pass, backward's what is computed again.
    """

    phases: Mapping[str, tuple[Moment, ...]]
    inputs: Parts
    after_backward: Parts
    num_passes: int
    forward_flops: Form
    backward_flops: Form
    forward_moved: Form
    backward_moved: Form


def trace_step(model: ModelSpec, settings: StepSettings) -> StepTrace:
    return _StepTracer(model, settings).trace()


@dataclass
class _StepTracer:
    model: ModelSpec
    settings: StepSettings
    phases: dict[str, list[Moment]] = field(default_factory=dict)
    with_gradients: bool = True

    def trace(self) -> StepTrace:
        reference = self.settings.reference
        if reference is not None and self.settings.asks_before:
            self._pass_forward(reference, self._inputs(), REFERENCE_PHASE, REFERENCE_PHASE)
            reference = None
        segments, labels = self._segments()
        self._add_forward(segments, labels, self._inputs(), "forward", "loss")
        base, bases = _sum(self._inputs(), self._tables()), []
        if self.settings.gradient_checkpointing:  # which holds what layers are given
            base = _sum(base, self._mask())
        for segment in segments:
            bases.append(base)
            base = _sum(base, segment.kept)
        passes = [segments, *self._further_passes(reference, base)]
        places, left = _extremes(labels), Parts()
        for index in reversed(range(len(segments))):
            segment = segments[index]
            if index in places and segment.backward:
                phase = "loss" if index == len(segments) - 1 else "backward"
                self._add(phase, segment.backward, _sum(bases[index], left))
            left = _sum(left, segment.left)
        self._evaluate(reference)
        return StepTrace(
            phases={name: tuple(moments) for name, moments in self.phases.items()},
            inputs=self._inputs(),
            after_backward=_sum(_sum(self._inputs(), left), self._first_input(segments[0])),
            num_passes=len(passes),
            forward_flops=_added(s.forward_flops for one in passes for s in one),
            backward_flops=_added(segment.backward_flops for segment in segments),
            forward_moved=_added(s.forward_moved for one in passes for s in one[:-1]),
            backward_moved=_added(segment.backward_moved for segment in segments[:-1]),
        )

    def _further_passes(self, reference: StepSettings | None, base: Parts) -> list[list[Segment]]:
        """The segments of each of a step's passes without gradients. A pass over other rows holds
        no more than the same model's over its own."""
        passes = []
        if reference is not None:
            passes.append(self._pass_forward(reference, base, "forward", "loss"))
        if self.settings.pairs_rows:
            own = self._pass_forward(self.settings, self._inputs(), "forward", "loss")
            passes += [*passes, own]
        return passes

    def _evaluate(self, reference: StepSettings | None) -> None:
        """An evaluation's pass, and the reference's where it comes along."""
        for settings in (self.settings.in_evaluation, reference):
            if settings is not None:
                self._pass_forward(settings, self._inputs(), EVALUATION_PHASE, EVALUATION_PHASE)

    def _first_input(self, embedding: Segment) -> Parts:
        """The gradient of the embeddings' result, where a hook asked for one: the graph holds it
        until the loss is let go of, and by the older checkpointing the rotary tables."""
        if not self.settings.input_learns or self.settings.trains_embeddings:
            return {}
        size = times(per_token(self.model.hidden_size), embedding.result_width)
        held = {"temporaries": size}
        return _sum(held, self._tables()) if self.settings.use_reentrant else held

    def _pass_forward(
        self, settings: StepSettings, base: Parts, phase: str, loss_phase: str
    ) -> list[Segment]:
        """Add a pass without gradients above `base`; its segments. Autocast's copies are gone at
        its end."""
        tracer = _StepTracer(self.model, settings, self.phases, with_gradients=False)
        segments, labels = tracer._segments()
        tracer._add_forward(segments, labels, base, phase, loss_phase)
        return segments

    def _add_forward(
        self,
        segments: list[Segment],
        labels: list[object],
        base: Parts,
        phase: str,
        loss_phase: str,
    ) -> None:
        """Add the moments of a forward pass above `base`."""
        places = _extremes(labels)
        of_model = _sum(self._tables(), self._mask())  # what its forward holds to its end
        of_graph = of_model if self.settings.gradient_checkpointing else self._tables()
        embedded = self._embedded(segments[0])
        learns = self.with_gradients and self.settings.input_learns
        from_table = self.model.positions > 0 and not learns  # else it is held by its node
        for index, segment in enumerate(segments):
            is_loss = index == len(segments) - 1
            if index in places:
                under = base if is_loss else _sum(base, of_model)
                if not is_loss and (from_table or (index > 1 and not segments[1].keeps_input)):
                    under = _sum(under, embedded)
                if is_loss and self.with_gradients:
                    under = _sum(base, of_graph)
                self._add(loss_phase if is_loss else phase, segment.forward, under)
            base = _sum(base, segment.kept_forward)

    def _mask(self) -> Parts:
        """What eager attention adds to its scores, for full and for sliding windows."""
        if self.settings.numerics.attn_implementation != "eager":
            return {}
        windows = {layer.attention.sliding_window for layer in self.model.layer_counts}
        return {"temporaries": per_pair(len(windows) * self.settings.embedding_width)}

    def _embedded(self, embedding: Segment) -> Parts:
        """What the embeddings gave, which the model's forward holds to its end: the first layer's
        input, or what a table of positions was added to."""
        elements = per_token(self.model.hidden_size)
        if self.model.positions:
            elements = add_forms(elements, per_position(self.model.hidden_size))
        return {"temporaries": times(elements, embedding.result_width)}

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
        segments, labels = [self._embedding()], ["embedding"]
        known: dict[tuple[int, bool, bool, int], Segment] = {}
        first_trained = model.num_hidden_layers - settings.trained_layers
        learns = settings.input_learns
        found: list[object] = list(labels)
        for place, layer in enumerate(model.layers):
            trained = place >= first_trained
            width = segments[-1].result_width
            key = (id(layer), trained, learns, width)
            if key not in known:
                known[key] = self._layer(layer, trained, learns, width)
            segments.append(known[key])
            found.append(key)
            learns = learns or trained or bool(settings.numerics.adapted)
        segments.append(self._loss(learns, segments[-1].result_width))
        found.append("loss")
        return segments, found

    def _tape(self) -> Tape:
        s = self.settings
        return Tape(
            autocast=s.autocast,
            on_cuda=s.on_cuda,
            capability=s.capability,
            is_fp16=s.is_fp16,
            accumulates=s.accumulates,
        )

    def _inputs(self) -> Parts:
        """What the model is given."""
        return {"temporaries": per_token(self.settings.input_bytes)}

    def _tables(self) -> Parts:
        """Rotary cosines and sines, and the numbers of positions."""
        rotary = max(layer.attention.rotary_dim for layer in self.model.layer_counts)
        if not rotary:
            return {}
        return {"temporaries": per_position(2 * rotary * self.settings.embedding_width + 8)}

    def _embedding(self) -> Segment:
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
            if model.scales_embeddings:
                hidden = f.scale(tape, hidden)
            if settings.input_learns and self.with_gradients and not hidden.requires_grad:
                tape.leaf(hidden)
                tape.hold(hidden)  # by the node that gathers its gradient
            if model.positions:
                place = tape.empty(per_position(model.hidden_size), settings.embedding_width)
                hidden = f.add(tape, hidden, place)
                del place
            return hidden if norm is None else norm(tape, hidden)

        return self._segment(forward, None, learns=settings.trains_embeddings)

    def _layer(self, layer: Layer, trained: bool, learns: bool, width: int) -> Segment:
        settings = self.settings
        numerics = dataclasses.replace(settings.numerics, trains_own=trained)
        module = DecoderLayer(layer, numerics)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            if not (settings.gradient_checkpointing and self.with_gradients):
                return module(tape, given[0])

            def call(hidden: Tensor) -> Tensor:
                return module(tape, hidden)

            run = tape.checkpoint_reentrant if settings.use_reentrant else tape.checkpoint
            return run(call, given)

        return self._segment(forward, (per_token(self.model.hidden_size), width), learns=learns)

    def _loss(self, learns: bool, width: int) -> Segment:
        model, settings = self.model, self.settings
        numerics = dataclasses.replace(settings.numerics, trains_own=settings.trains_head)
        norm = norm_module(model.final_norm, numerics) if model.final_norm else None
        weight = Weight(
            model.embedding_parameters, settings.head_width, trained=settings.trains_head
        )
        head = Head(
            vocab_size=model.vocab_size,
            hidden_size=model.embedding_width or model.hidden_size,
            softcapped=model.final_logit_softcapping,
            scaled=model.scales_logits,
        )
        loss = self._score() if settings.scores else self._loss_module(head, weight)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            hidden = norm(tape, given[0]) if norm is not None else given[0]
            given.clear()
            tape.component = "logits_and_loss"
            result = loss(tape, hidden, self.held)
            if not settings.holds_logits:
                self.held.clear()
            return result

        self.held: list[Tensor] = []
        return self._segment(forward, (per_token(model.hidden_size), width), learns=learns)

    def _score(self) -> Score:
        """PEFT trains a copy of it beside adapters."""
        settings, hidden_size = self.settings, self.model.hidden_size
        adapted = bool(settings.numerics.adapted)
        width = settings.numerics.adapters if adapted else settings.head_width
        trained = settings.trains_head or adapted
        return Score(hidden_size, Weight(hidden_size, width, trained=trained))

    def _loss_module(self, head: Head, weight: Weight) -> Callable[..., Tensor]:
        settings = self.settings
        if settings.loss == "liger":
            return LigerLoss(head, weight, settings.loss_shape)
        if settings.loss == "trl-fused":
            return TrlFusedLoss(head, weight, settings.loss_shape, finds_top1=settings.finds_top1)
        return StockLoss(
            head,
            weight,
            None,
            shifts_logits=settings.shifts_logits,
            returns_fp32=settings.returns_fp32,
        )

    def _segment(
        self,
        forward: Callable[[Tape, list[Tensor]], Tensor],
        input_size: tuple[Form, int] | None,
        *,
        learns: bool,
    ) -> Segment:
        tape = self._tape()
        tape.grad_enabled = self.with_gradients
        given: list[Tensor] = []
        gradient: list[Tensor | None] = []
        if input_size is not None:
            given = [tape.empty(*input_size)]
            if learns and self.with_gradients:
                gradient = tape.leaf(given[0])
        result = forward(tape, given)
        before = tape.state()
        given.clear()
        keeps_input = tape.state() == before
        result_width = result.width
        forward_moments = tape.moments()
        forward_flops, forward_moved = tape.flops, tape.moved
        kept_forward = _without(tape.state(), result)
        tape.end_autocast()
        kept = _without(tape.state(), result)
        backward_moments: tuple[Moment, ...] = ()
        if result.requires_grad:
            incoming: list[Tensor | None] = [tape.like(result)]
            roots = [result]
            del result
            tape.backward(roots, incoming)
            backward_moments = tape.moments()
        gradient.clear()
        return Segment(
            forward=forward_moments,
            backward=backward_moments,
            result_width=result_width,
            keeps_input=keeps_input,
            kept_forward=kept_forward,
            kept=kept,
            left=tape.state() if backward_moments else {},
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


def _total(parts: Parts) -> Form:
    return _added(parts.values())


def _added(forms: Iterable[Form]) -> Form:
    total = ZERO
    for form in forms:
        total = add_forms(total, form)
    return total
