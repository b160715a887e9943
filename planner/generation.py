"""Completions that a model generates while it trains: a pass over the prompts, and the last token.

A step of transformers' `generate` holds the keys and values of all tokens before, and joins each
layer's with those of the new token: a layer has both for a moment. So the last step is the highest
of its kind, and beside it only the prompts' pass can be as high. Both are run on a tape like any
pass, of other rows and tokens than a micro-batch; their sizes are then written in a micro-batch's
(`Change`). Equation (14) of docs/memory-model.md.

Sources: transformers 5.23, generation/utils.py (`_sample`, `_prefill`) and cache_utils.py
(`DynamicLayer.update`); trl.GRPOTrainer of TRL 1.16 (`_generate_single_turn`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from ftplan.planner import functions as f
from ftplan.planner.losses import Head
from ftplan.planner.step_trace import (
    EVALUATION_PHASE,
    GENERATION_PHASE,
    SCORING_PHASE,
    Parts,
    Segment,
    SegmentRecord,
    StepSettings,
    StepTrace,
    StepTracer,
)
from ftplan.planner.tape import (
    ZERO,
    Form,
    Moment,
    Tape,
    Tensor,
    Weight,
    add_forms,
    added,
    per_pair,
    per_row,
    per_token,
    subtract_forms,
    times,
)

if TYPE_CHECKING:
    from ftplan.planner.exchange import Exchange, Place
    from ftplan.planner.model_spec import Layer, ModelSpec

# Bytes of a token's number and mask, and of its label.
NUMBERS_BYTES, LABEL_BYTES = 16, 8

# Numbers of 8 bytes that `generate` has for each token so far: itself, whether it is one, its
# place; in the pass over the prompts its own copy besides.
_NUMBERS_BYTES = 24
_COPY_BYTES = 8

Change = Callable[[Form], Form]


class Generation(Struct, frozen=True):
    """How completions come about; with this, sizes are still linear in a micro-batch.

    `completion_length`: tokens that are generated. `micro_batches`: of which rows are generated at
    once. `meets_gradients`: those of a step's earlier micro-batches are there. `scores_policy`: the
    model is asked for the log-probabilities of its completions before it trains on them.
    """

    completion_length: int
    micro_batches: int
    meets_gradients: bool
    scores_policy: bool

    def of_prompts(self, form: Form) -> Form:
        """A size in a pass of all prompts, in a micro-batch's rows r and length l: these are m r
        rows of l - c tokens."""
        a, b, c, d, e = form
        m, less = self.micro_batches, self.completion_length
        return (
            a - c * less,
            m * (b - d * less + e * less * less),
            c,
            m * (d - 2 * e * less),
            m * e,
        )

    def of_last_token(self, form: Form) -> Form:
        """The same of a step for the last token, which attends to l - 1: pairs are m r (l - 1)."""
        a, b, c, d, e = form
        m = self.micro_batches
        return (a + c, m * (b + d - e), 0, m * e, 0)


class Rollout(Struct, frozen=True, kw_only=True):
    """What comes before a micro-batch of completions. `model`: settings of the model as it
    generates; `scored`: of those that are then asked for log-probabilities, of which `keeps_sums`
    keeps each row's sum alone; `judge`: of the reward model, where there is one."""

    generation: Generation
    model: StepSettings
    scored: tuple[StepSettings, ...]
    keeps_sums: bool = False
    judge: tuple[ModelSpec, StepSettings] | None = None

    @property
    def kept(self) -> Form:
        """Bytes of what was generated, and its log-probabilities, until others are."""
        rows = per_token(NUMBERS_BYTES)
        numbers = 1 if self.keeps_sums else len(self.scored) * self.generation.completion_length
        scores = per_row(numbers * f.FLOAT32)
        return times(add_forms(rows, scores), self.generation.micro_batches)


def with_rollout(model: ModelSpec, settings: StepSettings, trace: StepTrace) -> StepTrace:
    """The step's trace with the phases of generating and scoring, and none of evaluation: TRL
    evaluates by generating, on no more rows."""
    rollout = settings.rollout
    assert rollout is not None
    phases: dict[str, list[Moment]] = {}
    caches: dict[int, LayerCache] = {}
    generation = rollout.generation
    passes = (
        _Generating(model, rollout.model, phases, caches, generation.of_prompts),
        _LastToken(model, rollout.model, phases, caches, generation.of_last_token),
    )
    # The rows of before are still there, and when it comes to scores the new ones and a copy.
    before = {"temporaries": rollout.kept}
    new = per_token(2 * NUMBERS_BYTES * generation.micro_batches + LABEL_BYTES)
    beside = {"temporaries": add_forms(rollout.kept, new)}
    generated = [one.add(before) for one in passes]
    scored = [
        StepTracer(model, one, phases).add_pass(beside, SCORING_PHASE) for one in rollout.scored
    ]
    if rollout.judge is not None:  # after that, as many rows at a time
        judge, judging = rollout.judge
        scored.append(StepTracer(judge, judging, phases).add_pass(beside, SCORING_PHASE))
    kept = {name: of for name, of in trace.phases.items() if name != EVALUATION_PHASE}
    return structs.replace(
        trace,
        phases={**{name: tuple(of) for name, of in phases.items()}, **kept},
        evaluation=(),
        generation=generated,
        scored=scored,
    )


class LayerCache:
    """A layer's keys and values: none before the prompts, then all but the last token's.

    `held`: what the cache refers to.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self.sizes: list[tuple[Form, int]] = []
        self.is_full = False

    @property
    def layer_bytes(self) -> Form:
        """Of what was there before the pass."""
        return added(times(elements, width) for elements, width in self._before())

    def fill(self, tape: Tape) -> None:
        """Put in what was there before the pass."""
        self.held = [tape.empty(elements, width) for elements, width in self._before()]

    def update(self, tape: Tape, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values joined with those before, in the dtype of keys where that is wider."""
        width = max(key.width, value.width)
        if not self.is_full:
            self.sizes = [(one.elements, width) for one in (key, value)]
        return self._join(tape, key, width), self._join(tape, value, width)

    def _before(self) -> list[tuple[Form, int]]:
        """Elements and width of keys and of values: a token's for each pair but the last."""
        if not self.is_full:
            return []
        return [
            (subtract_forms(per_pair(elements[3]), elements), width)
            for elements, width in self.sizes
        ]

    def _join(self, tape: Tape, own: Tensor, width: int) -> Tensor:
        """What was there is let go of once the joined ones are."""
        before = [self.held.pop(0)] if self.is_full else []
        joined = f.join(tape, [*before, f.cast(tape, own, width)])
        joined.by_heads = True
        self.held.append(joined)
        return joined


class _Generating(StepTracer):
    """The pass over the prompts, which fills the cache."""

    def __init__(
        self,
        model: ModelSpec,
        settings: StepSettings,
        phases: dict[str, list[Moment]],
        caches: dict[int, LayerCache],
        change: Change,
    ) -> None:
        # Each row has places of its own, rotary or learned. And what a layer's trace is remembered
        # by does not tell one cache from another: this copy of the model remembers nothing yet.
        model = structs.replace(model, counts_positions=True)
        super().__init__(model, settings, phases, with_gradients=False)
        self.caches, self.change = caches, change

    def add(self, base: Parts) -> list[Segment]:
        segments, labels = self._segments()
        changed = {id(one): _changed(one, self.change) for one in segments}
        segments = [changed[id(one)] for one in segments]
        under = _added_parts(base, self._changed_parts(self._numbers()))
        self._add_forward(segments, labels, under, GENERATION_PHASE, GENERATION_PHASE)
        return segments

    def _numbers(self) -> Parts:
        return {"temporaries": per_token(_NUMBERS_BYTES + _COPY_BYTES)}

    def _layer_cache(self, layer: Layer) -> LayerCache:
        return self.caches.setdefault(id(layer), LayerCache())

    def _tables(self) -> Parts:
        tables = super()._tables()
        return self._changed_parts({part: per_token(form[2]) for part, form in tables.items()})

    def _mask(self) -> Parts:
        return self._changed_parts(super()._mask())

    def _changed_parts(self, parts: Parts) -> Parts:
        return {part: self.change(form) for part, form in parts.items()}

    def _loss_module(
        self,
        head: Head,
        weight: Weight,
        bias: Weight | None,
        delta: Weight | None,
        exchange: Exchange,
    ) -> Callable[..., Tensor]:
        logits = self._stock_loss(head, weight, bias, delta, exchange).logits
        return partial(_sample, logits=logits, head=head, returns_fp32=self.settings.returns_fp32)


class _LastToken(_Generating):
    """The step for the last token. A pair is a token and one that it attends to: what is cached
    is counted in pairs."""

    def _numbers(self) -> Parts:
        return {"temporaries": per_pair(_NUMBERS_BYTES)}

    def _layer_cache(self, layer: Layer) -> LayerCache:
        cache = super()._layer_cache(layer)
        cache.is_full = True
        return cache

    def _embedding(self, place: Place, beside: int = 0) -> Segment:
        """With the caches of all layers, each of which then counts its own."""
        segment = super()._embedding(place, beside)
        cached = added(self._layer_cache(layer).layer_bytes for layer in self.model.layers)
        held = _added_parts(segment.held, {"temporaries": cached})
        forward = tuple(_beside(moment, cached) for moment in segment.forward)
        return structs.replace(segment, held=held, forward=forward)


def _sample(
    tape: Tape,
    hidden: Tensor,
    held: list[Tensor],
    *,
    logits: Callable[[Tape, Tensor], Tensor],
    head: Head,
    returns_fp32: bool,
) -> Tensor:
    """The next token of each row: logits at its last place, their fp32 copy and its softmax, and
    random numbers to draw by (ATen/native/Distributions.cpp, `multinomial`)."""
    last = Tensor(hidden.storage, per_row(head.hidden_size), hidden.width)
    scores = logits(tape, last)
    del last
    if returns_fp32:
        scores = f.cast(tape, scores, f.FLOAT32)
    size = per_row(head.vocab_size)
    copy, probabilities, drawn = (tape.empty(size, f.FLOAT32) for _ in range(3))
    del copy, probabilities, drawn
    return scores


def _beside(moment: Moment, temporaries: Form) -> Moment:
    parts = _added_parts(moment.components, {"temporaries": temporaries})
    return Moment(add_forms(moment.total, temporaries), parts)


def _added_parts(left: Parts, right: Parts) -> Parts:
    names = {**left, **right}
    return {name: add_forms(left.get(name, ZERO), right.get(name, ZERO)) for name in names}


def _changed(segment: Segment, change: Change) -> Segment:
    """The segment with other rows and tokens."""

    def parts(of: Parts) -> Parts:
        return {name: change(form) for name, form in of.items()}

    def moments(of: tuple[Moment, ...]) -> tuple[Moment, ...]:
        return tuple(Moment(change(one.total), parts(one.components)) for one in of)

    return structs.replace(
        segment,
        forward=moments(segment.forward),
        held=parts(segment.held),
        cached=parts(segment.cached),
        given=parts(segment.given),
        kept_forward=parts(segment.kept_forward),
        kept=parts(segment.kept),
        forward_flops=change(segment.forward_flops),
        forward_moved=change(segment.forward_moved),
        record=_changed_record(segment.record, change),
        forward_stretches=(),
    )


def _changed_record(record: SegmentRecord, change: Change) -> SegmentRecord:
    return structs.replace(record, sizes=[change(size) for size in record.sizes])
