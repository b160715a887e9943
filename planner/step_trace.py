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
from ftplan.planner.losses import Head, LigerLoss, LossShape, StockLoss, TrlFusedLoss
from ftplan.planner.model_spec import Layer, Linear, ModelSpec
from ftplan.planner.modules import DecoderLayer, Numerics, norm_module
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
    per_row,
    per_token,
    subtract_forms,
)

Parts = dict[str, Form]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """All that a step's trace depends on beside the model: a trace serves every plan that agrees
    in these.

    `numerics`: of a layer without adapters whose own parameters are frozen. `trained_names`: of
    the parameters that are trained, for each layer that has some; `adapted`: its linear modules
    that carry an adapter. `input_learns`: the embeddings' result needs a gradient (they are
    trained, or `hooks_input`: a hook asks for it). `trained_outside`: names of trained parameters
    outside of the layers. `embedding_width`, `head_width`: bytes a parameter. `prompts` makes
    embeddings of `tokens_in_front` learned tokens, which rows are counted with;
    `num_trained_tokens`: tokens whose embeddings are trained beside the others. `early_gradients`:
    bytes of gradients that are there from the loss on; `loss_copies`: bytes that are held between
    loss and backward.
    """

    numerics: Numerics
    trained_names: Mapping[int, frozenset[str]]
    adapted: Mapping[int, frozenset[Linear]]
    trains_embeddings: bool
    trains_head: bool
    trained_outside: frozenset[str]
    input_learns: bool
    hooks_input: bool
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
    embedding_width: int
    head_width: int
    prompts: Callable[[Tape], Tensor] | None = None
    tokens_in_front: int = 0
    num_trained_tokens: int = 0
    early_gradients: int = 0
    loss_copies: int = 0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of the step by itself: an embedding, a layer, or the loss.

    Moments are of all that it holds, its input and the gradient that comes back to it included.
    `result_width`: bytes an element of what it hands on.
    `kept_forward`: what it leaves behind until forward ends, its result not counted;
    `kept`: until its backward. `left`: gradients that it leaves, its input's not counted.
    """

    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    result_width: int
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

    FLOPs, and bytes read and written besides parameters and outside of the loss, of one
    micro-batch. Backward's hold what is computed again.
    """

    phases: Mapping[str, tuple[Moment, ...]]
    after_backward: Parts
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
    held_to_backward: Tensor | None = None

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
        left: Parts = {"gradients": constant(self.settings.early_gradients)}
        for index in reversed(range(len(segments))):
            segment = segments[index]
            if index in places and segment.backward:
                phase = "loss" if index == len(segments) - 1 else "backward"
                self._add(phase, segment.backward, _sum(bases[index], left))
            left = _sum(left, segment.left)
        return StepTrace(
            phases={name: tuple(moments) for name, moments in self.phases.items()},
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
        segments, labels = [self._embedding()], ["embedding"]
        known: dict[object, Segment] = {}
        learns = settings.input_learns
        found: list[object] = list(labels)
        for place, layer in enumerate(model.layers):
            trained = settings.trained_names.get(place, frozenset())
            adapted = settings.adapted.get(place, frozenset())
            width = segments[-1].result_width
            key = (id(layer), trained, adapted, learns, width)
            if key not in known:
                numerics = dataclasses.replace(settings.numerics, trained=trained, adapted=adapted)
                known[key] = self._layer(layer, numerics, learns, width)
            segments.append(known[key])
            found.append(key)
            learns = learns or bool(trained) or bool(adapted)
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
            residual=s.embedding_width,
            single_row=s.single_row,
        )

    def _inputs(self) -> Parts:
        """Token numbers, labels and mask, 8 bytes each; rotary cosines and sines; the masks that
        layers share."""
        settings, model = self.settings, self.model
        total = add_forms(per_token(3 * 8), self._masks())
        front = settings.tokens_in_front
        if front:  # labels and an fp32 mask are made anew
            total = added((total, per_row(-3 * 8 * front), per_token(8 + 4)))
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

    def _embedding(self) -> Segment:
        model, settings = self.model, self.settings
        weight = Weight(
            model.embedding_parameters,
            settings.embedding_width,
            trained=settings.trains_embeddings,
        )
        wide = model.embedding_width or model.hidden_size
        norm = (
            norm_module(model.embedding_norm, settings.numerics) if model.embedding_norm else None
        )

        delta = Weight(settings.num_trained_tokens * wide, f.FLOAT32, trained=True)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            hidden = self._embedded(tape, weight, delta)
            if settings.hooks_input and not hidden.requires_grad:
                tape.leaf(hidden)
                if settings.prompts:  # no layer keeps it, only the hook's node
                    tape.hold(hidden)
            if model.scales_embeddings:
                hidden = f.scale(tape, hidden)
            hidden = self._with_prompts(tape, hidden)
            return hidden if norm is None else norm(tape, hidden)

        return self._segment(forward, None, learns=settings.input_learns)

    def _embedded(self, tape: Tape, weight: Weight, delta: Weight) -> Tensor:
        """The row's own tokens. Where some are trained, all embeddings are copied for it
        (PEFT's `TrainableTokensLayer`)."""
        wide, front = self.model.hidden_size, self.settings.tokens_in_front
        elements = add_forms(per_token(wide), per_row(-front * wide))
        if not delta.elements[0]:
            return f.look_up(tape, weight, elements)
        merged = f.merge_rows(tape, weight, f.cast(tape, delta, weight.width))
        return f.look_up(tape, merged, elements)

    def _with_prompts(self, tape: Tape, hidden: Tensor) -> Tensor:
        prompts = self.settings.prompts
        if prompts is None:
            return hidden
        parts = [f.cast(tape, prompts(tape), hidden.width), hidden]
        return f.join(tape, parts)

    def _layer(self, layer: Layer, numerics: Numerics, learns: bool, width: int) -> Segment:
        settings = self.settings
        module = DecoderLayer(layer, numerics)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            if not settings.gradient_checkpointing:
                return module(tape, given[0])

            def call(hidden: Tensor) -> Tensor:
                return module(tape, hidden)

            run = tape.checkpoint_reentrant if settings.use_reentrant else tape.checkpoint
            return run(call, given)

        return self._segment(forward, (per_token(self.model.hidden_size), width), learns=learns)

    def _loss(self, learns: bool, width: int) -> Segment:
        model, settings = self.model, self.settings
        numerics = dataclasses.replace(settings.numerics, trained=settings.trained_outside)
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
        loss = self._loss_module(head, weight)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            hidden = norm(tape, given[0]) if norm is not None else given[0]
            given.clear()
            tape.component = "logits_and_loss"
            result = loss(tape, hidden, self.held)
            self.held_to_backward = tape.empty(constant(settings.loss_copies), 1)
            if not settings.holds_logits:
                self.held.clear()
            return result

        self.held: list[Tensor] = []
        return self._segment(forward, (per_token(model.hidden_size), width), learns=learns)

    def _loss_module(self, head: Head, weight: Weight) -> Callable[..., Tensor]:
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
        )

    def _segment(
        self,
        forward: Callable[[Tape, list[Tensor]], Tensor],
        input_size: tuple[Form, int] | None,
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
        result = forward(tape, given)
        given.clear()
        result_width = result.width
        forward_moments = tape.moments()
        forward_flops, forward_moved = tape.flops, tape.moved
        kept_forward = _without(tape.state(), result)
        tape.end_autocast()
        self.held_to_backward = None
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
    return added(parts.values())
