"""One training step on a tape: embeddings, layers, loss, and back.

Each kind of layer runs once, by itself; what a whole model holds follows by addition. Layer `i`
runs above what the layers before it have kept, and its backward besides above the gradients that
later layers have left. Both grow evenly with the layers, so the highest moments of a kind of layer
are those of its first and last one; of checkpointed layers between others, too, since the first of
all is one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from msgspec import Struct, structs

from ftplan.planner import functions as f
from ftplan.planner.called import Called
from ftplan.planner.decoder_layer import DecoderLayer
from ftplan.planner.embeddings import Embeddings
from ftplan.planner.exchange import Alone, Exchange, Place
from ftplan.planner.fsdp1 import fsdp1_places
from ftplan.planner.fsdp2 import fsdp2_places
from ftplan.planner.functions import FLOAT32
from ftplan.planner.kv_cache import CacheKind
from ftplan.planner.losses import Head, LigerLoss, LossShape, Score, StockLoss, TrlFusedLoss
from ftplan.planner.model_spec import Layer, Linear, ModelSpec, Parameter
from ftplan.planner.modules import Module, Numerics, called, linear_module, norm_module
from ftplan.planner.prefixes import KeyValueCache, Prefix
from ftplan.planner.prompts import PromptMaker
from ftplan.planner.rotary import POSITION_NUMBER_BYTES, table_bytes
from ftplan.planner.sharded import Spread, Units, units_of
from ftplan.planner.tape import (
    ZERO,
    Form,
    Moment,
    Stretch,
    Tape,
    Tensor,
    Update,
    Weight,
    add_forms,
    added,
    constant,
    covers,
    is_shared,
    per_pair,
    per_position,
    per_row,
    per_token,
    stretched,
    subtract_forms,
    times,
)
from ftplan.planner.zero import Reduction, zero_places
from ftplan.planner.zero3 import Beside, Gathering, Partition, Reduced

if TYPE_CHECKING:
    from ftplan.planner.generation import LayerCache, Rollout

Parts = dict[str, Form]

# Losses that call the output projection as a module.
_CALL_HEAD = ("stock", "triton_ce")

# Settings that only layers' traces depend on, or other passes; and besides those that a loss's does
# not, or that of embeddings.
_OF_LAYERS = (
    "trained_names",
    "adapted",
    "gradient_checkpointing",
    "every_n_layers",
    "use_reentrant",
    "reference",
    "asks_before",
    "rollout",
    "prompted",
)
_NOT_OF_LOSS = (*_OF_LAYERS, "input_learns", "hooks_input", "prompts", "prefix")
_NOT_OF_EMBEDDINGS = (*_OF_LAYERS, "loss_shape", "single_row")

EVALUATION_PHASE = "evaluation"
# Where a reference's log-probabilities are computed before training.
REFERENCE_PHASE = "reference log-probabilities"
# Where an objective that generates makes completions, and asks for their log-probabilities.
GENERATION_PHASE = "generation"
SCORING_PHASE = "log-probabilities"


class WholeRows(Struct, frozen=True, kw_only=True):
    """What an evaluation has that does not divide rows: `parts` times as long ones."""

    parts: int
    loss_shape: LossShape
    input_bytes: int

    def of(self, settings: StepSettings) -> StepSettings:
        return structs.replace(
            settings,
            numerics=structs.replace(settings.numerics, row_parts=1),
            loss_shape=self.loss_shape,
            input_bytes=self.input_bytes,
            row_stretch=self.parts,
        )


class StepSettings(Struct, frozen=True, kw_only=True):
    """All that a step's trace depends on beside the model: a trace serves every plan that agrees
    in these.

    `numerics`: of a layer without adapters whose own parameters are frozen. `trained_names`: of the
    parameters that are trained, for each layer that has some; `adapted`: its linear modules that
    carry an adapter. `trained_outside`: names of trained parameters outside of the layers.
    `input_learns`: the embeddings' result needs a gradient (they are trained, or `hooks_input`: a
    hook asks for it). `embedding_width`, `head_width`: bytes a parameter. `input_bytes`: of what
    the model is given, a token. `scores`: the model gives scores, not logits. `finds_top1`: the
    loss also tells whether each target is the most probable token.
    `reference`: of the model that a preference is measured against, whose pass comes behind; with
    `asks_before` it comes before training instead.
    `rollout`: what comes before, where the model generates what it trains on.
    `spread`: how several GPUs divide parameters, if they do; `reduction`: how they divide
    gradients alone; `partition`: how ZeRO-3 divides all. `update`: of an optimizer that steps
    within backward.
    `prefix`: learned keys and values in front of each layer's own; `prompted`: places of the layers
    whose attention looks at a prompt.
    `prompts` makes embeddings of `tokens_in_front` learned tokens, which rows are counted with;
    `num_trained_tokens`: tokens whose embeddings are trained beside the others, and, where it
    `trains_head_rows`, their rows of the output projection. `early_gradients`:
    bytes of gradients that are there from the loss on; `cache`: what is filled without
    checkpointing, which is of each `every_n_layers`-th layer. `loss_copies`: bytes that are held
    between loss and backward. `whole_rows`: of an evaluation, where only training divides rows;
    `row_stretch`: rows are so many times as long.
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
    lets_logits_go: bool
    loses_in_16_bits: bool
    embedding_width: int
    head_width: int
    input_bytes: int
    has_dropout: bool = True
    every_n_layers: int = 1
    cache: CacheKind | None = None
    scores: bool = False
    finds_top1: bool = False
    reference: StepSettings | None = None
    asks_before: bool = False
    pairs_rows: bool = False
    spread: Spread | None = None
    reduction: Reduction | None = None
    partition: Partition | None = None
    update: Update | None = None
    prompts: PromptMaker | None = None
    tokens_in_front: int = 0
    num_trained_tokens: int = 0
    trains_head_rows: bool = False
    early_gradients: int = 0
    loss_copies: int = 0
    prefix: Prefix | None = None
    rollout: Rollout | None = None
    prompted: frozenset[int] = frozenset()
    whole_rows: WholeRows | None = None
    row_stretch: int = 1

    @property
    def in_evaluation(self) -> StepSettings:
        """Of an evaluation's pass, which has no dropout."""
        numerics = structs.replace(self.numerics, dropout=0.0, drops=False)
        settings = structs.replace(self, numerics=numerics, has_dropout=False)
        return settings if self.whole_rows is None else self.whole_rows.of(settings)

    @property
    def update_in_backward(self) -> Update | None:
        """What takes each gradient within backward."""
        return self.update if self.partition is None else Reduced()

    @property
    def trains_input(self) -> bool:
        """Something is trained before the first layer."""
        return bool(
            self.trains_embeddings or self.num_trained_tokens or self.tokens_in_front or self.prefix
        )

    def checkpoints(self, place: int) -> bool:
        """Whether the layer at that place is computed again (`_set_gradient_checkpointing` of
        transformers 5)."""
        return self.gradient_checkpointing and place % self.every_n_layers == 0

    def numerics_of_layers(self, model: ModelSpec) -> list[Numerics]:
        """Of each layer; equal ones are one object."""
        known: dict[object, Numerics] = {}
        found = []
        for place, layer in enumerate(model.layers):
            masked = self.numerics.masked_windows.intersection((layer.attention.reach,))
            own = self.numerics.prompt_tokens if place in self.prompted else 0
            trained = self.trained_names.get(place, frozenset())
            again = self.checkpoints(place)
            key = (trained, adapted := self.adapted.get(place, frozenset()), own, again, masked)
            if key not in known:
                known[key] = structs.replace(
                    self.numerics,
                    trained=trained,
                    adapted=adapted,
                    prompt_tokens=own,
                    checkpointed=again,
                    masked_windows=masked,
                    cache=None if again and self.cache == "copies" else self.cache,
                )
            found.append(known[key])
        return found


class SegmentRecord(Struct, frozen=True, kw_only=True, eq=False, dict=True):
    """Births and deaths of a segment's storages, as `Tape.events` has them.

    `forward`; `held`: what goes when the model's forward pass ends, and `autocast` when autocast
    does, with its result; `backward`. `given`: the storage of what the segment before hands on;
    `result`: of what this one does, and whether it `keeps_result` itself; `incoming`: of that
    one's gradient; `gradient`: of what was given.
    """

    sizes: Sequence[Form]
    labels: Sequence[str]
    forward: Sequence[int]
    held: Sequence[int]
    autocast: Sequence[int]
    backward: Sequence[int]
    given: int | None
    result: int
    keeps_result: bool
    incoming: int | None
    gradient: int | None

    @cached_property
    def left(self) -> list[int]:
        """What is alive at the end and not handed on."""
        alive: set[int] = set()
        for events in (self.forward, self.held, self.autocast, self.backward):
            for event in events:
                if event >= 0:
                    alive.add(event)
                else:
                    alive.discard(~event)
        handed_on = {self.given, self.incoming, self.gradient}
        if not self.keeps_result:
            handed_on.add(self.result)
        return sorted(alive.difference(handed_on))

    @cached_property
    def gradients(self) -> list[int]:
        """Of these, gradients of parameters."""
        return [number for number in self.left if self.labels[number] == "gradients"]


class Segment(Struct, frozen=True, kw_only=True, dict=True):
    """A part of the step by itself: an embedding, a layer, or the loss.

    Moments are of all that it holds, its input and the gradient that comes back to it included.
    `result_width`: bytes an element of what it hands on.
    `held`: what the model's forward pass holds on to while later layers run; with `holds_result`
    what it hands on, too.
    `cached`: what the model holds on to until the loss is computed; `given`: learned keys and
    values that are there before and that it counts itself.
    `kept_forward`: what it leaves behind until forward ends, its result not counted;
    `kept`: until its backward. `left`: gradients that it leaves, its input's not counted.
    `taken_over`: of what is there without it, what its backward counts itself.
    `forward_stretches`, `backward_stretches`: the same moments, between the marks of modules.
    `of_any_rows`: it is the same whether the micro-batch is one row or several.
    """

    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    result_width: int
    holds_result: bool
    held: Parts
    cached: Parts
    given: Parts
    kept_forward: Parts
    kept: Parts
    left: Parts
    taken_over: Parts
    forward_flops: Form
    backward_flops: Form
    float32_flops: Form
    recomputed_flops: Form
    forward_moved: Form
    backward_moved: Form
    forward_kernels: int
    backward_kernels: int
    record: SegmentRecord
    of_any_rows: bool
    forward_stretches: tuple[Stretch, ...] = ()
    backward_stretches: tuple[Stretch, ...] = ()

    @cached_property
    def kept_until_loss(self) -> Parts:
        return _sum(self.kept_forward, self.cached)

    @cached_property
    def change_by_forward(self) -> Parts:
        """What the next segment has under it beyond what this one has, while the model's forward
        pass runs."""
        return _less(_sum(self.kept_until_loss, self.held), self.given)

    @cached_property
    def change_by_backward(self) -> Parts:
        return _less(self.left, self.taken_over)


class StepTrace(Struct, frozen=True, kw_only=True):
    """The highest moments of each phase, without what is there all the time (weights, states), and
    the segments that they are sums of: embeddings, layers, loss.

    `inputs`: what the model is given; `tables`, `mask`: what its forward pass makes for all layers;
    `kept_mask`: of which this is there until the end of backward.
    `ties_gradients`: the first segment's largest gradient is added to the last one's, which with
    `updates` (an optimizer that steps within backward) the first segment's own record has.
    `before`, `further`, `evaluation`: the segments of passes without gradients, which come before
    training, within each step, and in an evaluation. `generation`, `scored`: those of the passes
    that generate completions, and that ask for their log-probabilities. `after_backward`: all that
    is left until the step is over.
    `num_passes`: forward, those without gradients included.
    FLOPs, and bytes read and written besides parameters and outside of the loss, of one
    micro-batch. Forward's hold the reference's pass, backward's what is computed again.
    """

    phases: Mapping[str, tuple[Moment, ...]]
    segments: tuple[Segment, ...]
    inputs: Parts
    tables: Parts
    mask: Parts
    kept_mask: Parts
    ties_gradients: bool
    updates: bool
    before: Sequence[Segment]
    further: Sequence[Sequence[Segment]]
    evaluation: Sequence[Sequence[Segment]]
    after_backward: Parts
    num_passes: int
    num_kernels: int
    forward_flops: Form
    backward_flops: Form
    float32_flops: Form
    recomputed_flops: Form
    forward_moved: Form
    backward_moved: Form
    generation: Sequence[Sequence[Segment]] = ()
    scored: Sequence[Sequence[Segment]] = ()

    @property
    def passing_mask(self) -> Parts:
        """What of the mask is gone when forward ends."""
        return _less(self.mask, self.kept_mask)


def step_units(model: ModelSpec, settings: StepSettings) -> Units:
    """What several GPUs divide."""
    assert settings.spread is not None
    numerics = settings.numerics_of_layers(model)
    return units_of(model, settings.spread, numerics, settings.trained_outside)


def trace_step(model: ModelSpec, settings: StepSettings) -> StepTrace:
    return StepTracer(model, settings).trace()


class StepTracer:
    """One pass through the model; passes without gradients have tracers of their own."""

    def __init__(
        self,
        model: ModelSpec,
        settings: StepSettings,
        phases: dict[str, list[Moment]] | None = None,
        *,
        with_gradients: bool = True,
    ) -> None:
        self.model = model
        self.settings = settings
        self.phases: dict[str, list[Moment]] = {} if phases is None else phases
        self.with_gradients = with_gradients
        self.held_to_backward: Tensor | None = None
        self.gathering: Gathering | None = None

    def trace(self) -> StepTrace:
        reference, before = self.settings.reference, list[Segment]()
        if reference is not None and self.settings.asks_before:
            phase = REFERENCE_PHASE
            before = self._pass_forward(reference, self._inputs(), phase, phase)
            reference = None
        segments, labels = self._segments()
        if self.settings.partition is not None:
            self.gathering = Gathering(self.settings.partition)
            self.gathering.learn_order(segments)
            segments, labels = _with_gathered(segments, self.gathering.play_step(segments))
        self._add_forward(segments, labels, self._inputs(), "forward", "loss")
        base = _sum(self._inputs(), self._tables())
        base = _sum(base, self._kept_mask())
        bases = _heights(base, [segment.kept for segment in segments], _extremes(labels))
        passes = [segments, *self._further_passes(reference, bases[len(segments)])]
        left = self._add_backward(segments, bases)
        evaluation = self._evaluate(reference)
        return StepTrace(
            phases={name: tuple(moments) for name, moments in self.phases.items()},
            segments=tuple(segments),
            inputs=self._inputs(),
            tables=self._tables(),
            mask=self._mask(),
            kept_mask=self._kept_mask(),
            ties_gradients=self._tied,
            updates=self.settings.update is not None,
            before=before,
            further=passes[1:],
            evaluation=evaluation,
            after_backward=_sum(_sum(self._inputs(), left), self._first_input(segments[0])),
            num_passes=len(passes),
            forward_flops=added(s.forward_flops for one in passes for s in one),
            backward_flops=added(segment.backward_flops for segment in segments),
            float32_flops=added(s.float32_flops for one in passes for s in one),
            recomputed_flops=added(segment.recomputed_flops for segment in segments),
            forward_moved=added(s.forward_moved for one in passes for s in one[:-1]),
            backward_moved=added(segment.backward_moved for segment in segments[:-1]),
            num_kernels=sum(s.forward_kernels for one in passes for s in one)
            + sum(segment.backward_kernels for segment in segments),
        )

    def _add_backward(self, segments: list[Segment], bases: Mapping[int, Parts]) -> Parts:
        """Add the moments of backward above `bases`, which there are of some segments; what it
        leaves, the inputs aside."""
        end = len(segments)
        early: Parts = {"gradients": constant(self.settings.early_gradients)}
        changes = [segment.change_by_backward for segment in reversed(segments)]
        left = _heights(early, changes, {end - 1 - place for place in bases if place < end})
        before: Parts = {}
        for place in sorted(bases.keys() - {end}, reverse=True):
            segment = segments[place]
            before = _less(left[end - 1 - place], segment.taken_over)
            if place == 0 and self._tied and self.settings.update_in_backward is not None:
                before = {**before, "gradients": ZERO}  # the head's: the embedding has it `beside`
            if segment.backward:
                phase = "loss" if place == end - 1 else "backward"
                self._add(phase, segment.backward, _sum(bases[place], before))
        return _sum(before, segments[0].left)

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

    def _evaluate(self, reference: StepSettings | None) -> list[list[Segment]]:
        """An evaluation's pass, and the reference's where it comes along."""
        of_model = _without_backward(self.settings.in_evaluation)
        if reference is None and self.gathering is None and of_model.rollout is None:
            of_model = structs.replace(of_model, reference=None)  # which was asked before
            key = (EVALUATION_PHASE, *_by_value(of_model))
            evaluation = self.model.remembered(key, partial(self._evaluation, [of_model]))
        else:
            both = [settings for settings in (of_model, reference) if settings is not None]
            evaluation = self._evaluation(both)
        segments, self.phases[EVALUATION_PHASE] = evaluation
        return segments

    def _evaluation(
        self, of_passes: Iterable[StepSettings]
    ) -> tuple[list[list[Segment]], list[Moment]]:
        """Segments and moments of passes with these settings."""
        moments: dict[str, list[Moment]] = {}
        passes = []
        for settings in of_passes:
            tracer = StepTracer(self.model, settings, moments)
            tracer.gathering = self.gathering
            passes.append(tracer.add_pass(tracer._inputs(), EVALUATION_PHASE))
        return passes, moments[EVALUATION_PHASE]

    def _first_input(self, embedding: Segment) -> Parts:
        """The gradient of the embeddings' result, where a hook asked for one: the graph holds it
        until the loss is let go of, and by the older checkpointing rotary tables and masks."""
        settings = self.settings
        trains = settings.trains_embeddings or settings.num_trained_tokens
        if trains or not settings.hooks_input:
            return {}
        size = times(per_token(self.model.hidden_size), embedding.result_width)
        held = {"temporaries": size}
        shared = _sum(self._tables(), self._mask())
        return _sum(held, shared) if settings.use_reentrant else held

    def _pass_forward(
        self, settings: StepSettings, base: Parts, phase: str, loss_phase: str
    ) -> list[Segment]:
        """Add a pass without gradients above `base`; its segments. Autocast's copies are gone at
        its end."""
        settings = _without_backward(settings)
        tracer = StepTracer(self.model, settings, self.phases, with_gradients=False)
        segments, labels = tracer._segments()
        if self.gathering is not None:
            beside = Beside.of(segments)
            self.gathering.play_forward(segments, beside.forward)
            segments, labels = _with_gathered(segments, beside)
        tracer._add_forward(segments, labels, base, phase, loss_phase)
        return segments

    def add_pass(self, base: Parts, phase: str) -> list[Segment]:
        """Add a pass without gradients by itself; its segments."""
        return self._pass_forward(self.settings, base, phase, phase)

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
        of_graph = _sum(self._tables(), self._kept_mask())
        of_loss = of_graph if self.with_gradients else {}
        *before, loss = segments
        end = len(before)
        changes = [segment.change_by_forward for segment in before]
        for place, under in _heights(_sum(base, of_model), changes, places - {end}).items():
            if place < end:
                under = _less(under, before[place].given)
                self._add(phase, before[place].forward, under)
        kept = _heights(_sum(base, of_loss), [segment.kept_until_loss for segment in before], ())
        self._add(loss_phase, loss.forward, kept[end])

    def _mask(self) -> Parts:
        """The masks that layers share."""
        return self._masks_of(self.model.layer_counts)

    def _kept_mask(self) -> Parts:
        """Those that backward needs: checkpointing holds what its layers are given; ALiBi's mask is
        the kernels' bias itself where autocast does not cast it."""
        settings = self.settings
        cast = settings.autocast is not None and settings.autocast != settings.embedding_width
        if any(layer.attention.alibi for layer in self.model.layer_counts) and not cast:
            return self._mask()
        layers = enumerate(self.model.layers)
        return self._masks_of(layer for place, layer in layers if settings.checkpoints(place))

    def _masks_of(self, layers: Iterable[Layer]) -> Parts:
        """The masks of these layers, one of each kind that some layer needs: eager attention adds
        one of the hidden state's width, torch's kernels are given one of a byte, or ALiBi's of one
        number a head."""
        numerics = self.settings.numerics
        if numerics.attn_implementation == "flash_attention_2":
            return {}
        eager, kinds = numerics.attn_implementation == "eager", {}
        width, in_front = self.settings.embedding_width, numerics.keys_in_front
        for layer in layers:
            a = layer.attention
            if eager:
                kinds[a.reach] = width
                continue
            given = numerics.padded or a.picks_heads or in_front
            if given or a.reach in numerics.masked_windows:
                kind = a.reach if a.reach in numerics.masked_windows else None
                kinds[kind] = a.num_heads * width if a.alibi else 1
        each = sum(kinds.values())
        size = add_forms(per_pair(each), per_token(each * in_front))
        return {"temporaries": size} if kinds else {}

    @property
    def _tied(self) -> bool:
        """Whether embeddings and head train one parameter."""
        both = self.settings.trains_head and self.settings.trains_embeddings
        return self.model.tie_word_embeddings and both

    def _add(self, phase: str, moments: Iterable[Moment], base: Parts) -> None:
        """Keep moments above `base`, of those that another covers none."""
        highest = self.phases.setdefault(phase, [])
        below = _total(base)
        for moment in moments:
            total = add_forms(moment.total, below)
            for other in highest:
                if covers(other.total, total):
                    break
            else:
                highest[:] = [other for other in highest if not covers(total, other.total)]
                highest.append(Moment(total, _sum(base, moment.components)))

    def _segments(self) -> tuple[list[Segment], list[object]]:
        """The segments in forward order, and of what kind each is."""
        settings, model = self.settings, self.model
        places = self._places()
        segments, labels = [self._embedding(places[0])], ["embedding"]
        learns, around = settings.input_learns, self._around_layers()
        found: list[object] = list(labels)
        known: dict[object, Segment] = {}
        all_numerics = settings.numerics_of_layers(model)
        for layer, numerics, place in zip(model.layers, all_numerics, places[1:-1], strict=True):
            width = segments[-1].result_width
            holds_input = len(segments) == 1 and segments[0].holds_result
            key = (id(layer), id(numerics), learns, width, holds_input, place)
            if key not in known:
                known[key] = self._remembered(
                    (id(layer), numerics, *key[2:], *around),
                    partial(self._layer, layer, numerics, learns, width, place, holds_input),
                )
            segments.append(known[key])
            found.append(key)
            learns = learns or numerics.learns
        width = segments[-1].result_width
        loss, head_gradient_is_view = model.remembered(
            ("loss", learns, width, places[-1], *self._around(_NOT_OF_LOSS)),
            partial(self._loss, learns, width, places[-1]),
        )
        segments.append(loss)
        found.append("loss")
        if self._tied:
            # A sum is put in the head's gradient where that is no view.
            taken = settings.update_in_backward is not None
            beside = head_gradient_is_view + taken
            segments[0] = self._embedding(places[0], beside)
        return segments, found

    def _remembered(self, key: tuple[object, ...], work_out: Callable[[], Segment]) -> Segment:
        """A segment that depends on the key and, perhaps, on whether there are several rows."""
        single_row = self.settings.single_row
        other: Segment | None = self.model.recalled((*key, not single_row))
        if other is not None and other.of_any_rows:
            return other
        return self.model.remembered((*key, single_row), work_out)

    def _places(self) -> Sequence[Place]:
        """Of each segment, where it is among the others."""
        places = self._all_places()
        return places if self.with_gradients else [place.in_forward() for place in places]

    def _all_places(self) -> Sequence[Place]:
        settings, model = self.settings, self.model
        if settings.reduction is not None:
            trains = [numerics.trains for numerics in settings.numerics_of_layers(model)]
            outside = (settings.trains_input, settings.trains_head)
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

    def _around_layers(self) -> tuple[object, ...]:
        """All that a layer's trace depends on beside the layer, its numerics and its place."""
        s = self.settings
        checkpoints = s.gradient_checkpointing and self.with_gradients
        how = (self.with_gradients, checkpoints and (s.use_reentrant,), s.prefix, s.holds_logits)
        return (*how, *self._options_but_rows())

    def _around(self, excluded: Container[str]) -> tuple[object, ...]:
        """All that the trace of embeddings or loss depends on beside what it is given and its
        place, if not on the settings excluded."""
        settings = self.settings
        own = (value for name, value in structs.asdict(settings).items() if name not in excluded)
        return (*own, bool(settings.adapted), *self._options_but_rows(), self.with_gradients)

    def _options_but_rows(self) -> tuple[object, ...]:
        options = self._tape_options()
        del options["single_row"]
        return tuple(options.values())

    def _tape_options(self) -> dict[str, Any]:
        s = self.settings
        return {
            "autocast": s.autocast,
            "on_cuda": s.on_cuda,
            "capability": s.capability,
            "is_fp16": s.is_fp16,
            "accumulates": (s.accumulates and s.partition is None)
            or (s.reduction is not None and s.reduction.partitions),
            "residual": s.embedding_width,
            "single_row": s.single_row,
            "update": s.update_in_backward,
            "has_dropout": s.has_dropout,
            "partitioned": s.partition is not None,
            "row_stretch": s.row_stretch,
        }

    def _inputs(self) -> Parts:
        """What the model is given. Behind learned tokens, labels and an fp32 mask are made anew."""
        settings = self.settings
        total = per_token(settings.input_bytes)
        front = settings.tokens_in_front
        if front:
            again = per_token(POSITION_NUMBER_BYTES + FLOAT32)
            total = added((total, per_row(-settings.input_bytes * front), again))
        if settings.rollout is not None:
            total = add_forms(total, settings.rollout.kept)
        return {"temporaries": stretched(total, settings.row_stretch)}

    def _tables(self) -> Parts:
        """Rotary cosines and sines, and the numbers of positions."""
        width, sizes = self.settings.embedding_width, dict[int | None, int]()
        for layer in self.model.layer_counts:
            kind = layer.attention.reach if self.model.rotates_by_kind else None
            sizes[kind] = max(sizes.get(kind, 0), table_bytes(layer.attention, width))
        size = sum(sizes.values())
        # Of a divided row the numbers of positions are given, row by row.
        form = per_token if self.settings.numerics.row_parts > 1 else per_position
        return {"temporaries": stretched(form(size), self.settings.row_stretch)} if size else {}

    def _embedding(self, place: Place, beside: int = 0) -> Segment:
        return self._remembered(
            ("embeddings", place, beside, *self._around(_NOT_OF_EMBEDDINGS)),
            partial(self._traced_embedding, place.exchange(), beside),
        )

    def _traced_embedding(self, exchange: Exchange, beside: int) -> Segment:
        model, settings = self.model, self.settings
        module = Embeddings(
            model,
            structs.replace(settings.numerics, trained=settings.trained_outside),
            settings.embedding_width,
            trains=settings.trains_embeddings,
            input_learns=settings.hooks_input and self.with_gradients,
            beside=beside,
            prompts=settings.prompts,
            tokens_in_front=settings.tokens_in_front,
            num_trained_tokens=settings.num_trained_tokens,
        )
        held: list[Tensor] = []

        callers, rotary = self._callers(), Called(_unchanged, name="rotary_emb")
        turns = any(layer.attention.rotary_dim for layer in model.layer_counts)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            for caller in callers:
                caller.begin(tape)
            result = module(tape, held)
            if tape.partitioned and turns:
                rotary.begin(tape)
                rotary.finish(tape)
            return result

        learns, prefix = settings.input_learns, settings.prefix
        if prefix is None:
            return self._segment(forward, None, exchange, learns=learns, held=held)
        embedding = self._segment(forward, None, Exchange(), learns=learns, held=held)
        return self._behind_prefix(embedding, prefix, exchange)

    def _behind_prefix(self, embedding: Segment, prefix: Prefix, exchange: Exchange) -> Segment:
        """The segment that makes keys and values for all layers before it looks tokens up."""

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            return prefix.cached(tape)

        whole = self._segment(forward, None, exchange, learns=True, comes_back=prefix.gradients)
        copies = {"temporaries": prefix.all_bytes}
        masks = {} if self.settings.holds_logits else {"temporaries": prefix.mask_bytes}
        back = {"temporaries": times(prefix.gradients, prefix.width)}
        above = _sum(_sum(copies, masks), whole.kept_forward)
        return structs.replace(
            embedding,
            forward=(*whole.forward, *(with_parts(m, above) for m in embedding.forward)),
            backward=(
                *(with_parts(m, back) for m in embedding.backward),
                *(with_parts(m, embedding.left) for m in whole.backward),
            ),
            held=_sum(embedding.held, copies),
            cached=masks,
            kept_forward=_sum(embedding.kept_forward, whole.kept_forward),
            kept=_sum(embedding.kept, whole.kept),
            left=_sum(embedding.left, whole.left),
            taken_over=_sum(whole.taken_over, back) if whole.backward else {},
            forward_flops=add_forms(embedding.forward_flops, whole.forward_flops),
            backward_flops=add_forms(embedding.backward_flops, whole.backward_flops),
            float32_flops=add_forms(embedding.float32_flops, whole.float32_flops),
            forward_moved=add_forms(embedding.forward_moved, whole.forward_moved),
            backward_moved=add_forms(embedding.backward_moved, whole.backward_moved),
        )

    def _layer(
        self,
        layer: Layer,
        numerics: Numerics,
        learns: bool,
        width: int,
        place: Place,
        holds_input: bool,
        weights_before: Sequence[tuple[Form, int]] = (),
    ) -> Segment:
        """`weights_before`: (elements, width) of what the model's loop still has of the layer
        before."""
        settings, exchange = self.settings, place.exchange()
        cache = self._layer_cache(layer)
        module: Module = DecoderLayer(layer, numerics, cache)
        if numerics.checkpointed and self.with_gradients:
            module = partial(
                _checkpointed, module=exchange.around(module), use_reentrant=settings.use_reentrant
            )
        module = called(module, numerics)
        held: list[Tensor] = []
        weights: list[tuple[Form, int]] = []

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            if holds_input:
                held.append(given[0])
            of_layer_before = [tape.empty(*size) for size in weights_before]
            result = module(tape, given.pop())
            of_layer_before.clear()
            weights[:] = [(x.elements, x.width) for x in tape.returned]
            tape.returned.clear()
            return result

        size = per_token(self.model.hidden_size), width
        segment = self._segment(forward, size, exchange, learns=learns, held=held, cache=cache)
        keeps_none = settings.gradient_checkpointing or not self.with_gradients
        if "weights" in layer.holds and keeps_none and weights and not weights_before:
            return self._layer(layer, numerics, learns, width, place, holds_input, weights)
        return segment

    def _layer_cache(self, layer: Layer) -> KeyValueCache | LayerCache | None:
        """The layer's keys and values beside those that it makes."""
        return KeyValueCache(self.settings.prefix) if self.settings.prefix else None

    def _loss(self, learns: bool, width: int, place: Place) -> tuple[Segment, bool]:
        """The segment, and whether the gradient of the output projection is a view."""
        model, settings, exchange = self.model, self.settings, place.exchange()
        numerics = structs.replace(settings.numerics, trained=settings.trained_outside)
        behind: list[Module] = []
        if model.final_norm is not None:
            behind.append(norm_module(model.final_norm, numerics))
        if model.embedding_linears:
            behind.append(linear_module(model.embedding_linears[-1], numerics))
        weight = Weight(
            model.embedding_parameters,
            settings.head_width,
            trained=settings.trains_head,
            matrix=(model.vocabulary_rows, model.embedding_width or model.hidden_size),
            waits=self._tied,
        )
        rows = settings.num_trained_tokens if settings.trains_head_rows else 0
        wide = model.embedding_width or model.hidden_size
        delta = Weight(rows * wide, FLOAT32, trained=True) if rows else None
        bias = None
        if model.lm_head_bias:
            trained = "lm_head.bias" in settings.trained_outside
            bias = Weight(model.vocabulary_rows, settings.head_width, trained=trained)
        head = Head(
            vocab_size=model.vocab_size,
            hidden_size=model.embedding_width or model.hidden_size,
            softcapped=model.final_logit_softcapping,
            scaled=model.scales_logits,
            parts=model.vocabulary_parts,
        )
        score = settings.scores
        loss = self._score() if score else self._loss_module(head, weight, bias, delta, exchange)
        *outer, inner = self._callers() or (Called(_unchanged),)

        def forward(tape: Tape, given: list[Tensor]) -> Tensor:
            hidden = given.pop()
            for module in behind:
                hidden = module(tape, hidden)
            if tape.partitioned:
                hidden = inner.end(tape, hidden)
            tape.component = "logits_and_loss"
            result = loss(tape, hidden, self.held)
            del hidden
            if settings.returns_fp32 and self.held:
                # accelerate's autocast converts what the model returns.
                self.held.append(f.cast(tape, self.held.pop(), FLOAT32))
            for caller in reversed(outer):
                result = caller.end(tape, result)
            if self.with_gradients:
                self.held_to_backward = tape.empty(constant(settings.loss_copies), 1)
            if not settings.holds_logits:
                self.held.clear()
            return result

        self.held: list[Tensor] = []
        size = per_token(model.hidden_size), width
        segment = self._segment(forward, size, exchange, learns=learns)
        return segment, weight.gradient_is_view

    def _callers(self) -> list[Called]:
        """The modules around the layers, from the outermost. A loss that calls no output projection
        reads its weight within the one that computes it."""
        partition = self.settings.partition
        if partition is None:
            return []
        *_, of_loss, _ = partition.callers
        reads = [] if self.settings.loss in _CALL_HEAD else self._head_parameters()
        return [
            Called(_unchanged, reads if name == of_loss else (), name=name)
            for name in partition.callers
        ]

    def _head_parameters(self) -> list[Parameter]:
        weight = "embed_tokens.weight" if self.model.tie_word_embeddings else "lm_head.weight"
        return [p for p in self.model.outer_parameters if p.name in (weight, "lm_head.bias")]

    def _score(self) -> Score:
        """PEFT trains a copy of it beside adapters."""
        settings, hidden_size = self.settings, self.model.hidden_size
        adapted = bool(settings.adapted)
        width = settings.numerics.adapters if adapted else settings.head_width
        trained = settings.trains_head or adapted
        return Score(hidden_size, Weight(hidden_size, width, trained=trained))

    def _loss_module(
        self,
        head: Head,
        weight: Weight,
        bias: Weight | None,
        delta: Weight | None,
        exchange: Exchange,
    ) -> Callable[..., Tensor]:
        settings = self.settings
        if settings.loss == "liger":
            return LigerLoss(head, weight, settings.loss_shape)
        if settings.loss == "trl-fused":
            top1 = settings.finds_top1
            return TrlFusedLoss(head, weight, settings.loss_shape, delta, finds_top1=top1)
        return self._stock_loss(head, weight, bias, delta, exchange)

    def _stock_loss(
        self,
        head: Head,
        weight: Weight,
        bias: Weight | None,
        delta: Weight | None,
        exchange: Exchange,
    ) -> StockLoss:
        settings = self.settings
        return StockLoss(
            head,
            weight,
            bias,
            delta,
            shifts_logits=settings.shifts_logits,
            lets_logits_go=settings.lets_logits_go,
            in_16_bits=settings.loses_in_16_bits,
            in_place=settings.loss == "triton_ce",
            watch=exchange.watch,
            called=partial(called, numerics=settings.numerics, parameters=self._head_parameters()),
        )

    def _segment(
        self,
        forward: Callable[[Tape, list[Tensor]], Tensor],
        input_size: tuple[Form, int] | None,
        exchange: Exchange,
        *,
        learns: bool,
        held: list[Tensor] | None = None,
        cache: KeyValueCache | LayerCache | None = None,
        comes_back: Form | None = None,
    ) -> Segment:
        """`held` is what the model's forward pass holds on to, once `forward` has run; `cache`:
        the layer's keys and values. `comes_back`: elements of what holds the result's gradient,
        where that is more than the result's."""
        held = [] if held is None else held
        tape = Tape(**self._tape_options())
        recording = _Recording(tape, has_input=input_size is not None)
        tape.grad_enabled = self.with_gradients
        given: list[Tensor] = []
        gradient: list[Tensor | None] = []
        if input_size is not None:
            given = [tape.empty(*input_size)]
            if learns and self.with_gradients:
                gradient = tape.leaf(given[0])
        if cache is not None:
            cache.fill(tape)
        exchange.before_forward(tape)
        result = forward(tape, given)
        exchange.after_forward(tape)
        given.clear()
        result_width = result.width
        forward_stretches = tape.stretches()
        forward_flops, forward_moved = tape.flops, tape.moved
        forward_kernels = tape.num_kernels
        exchange.hand_on()
        recording.end("forward")
        holds_result = any(tensor.storage is result.storage for tensor in held)
        with_held = tape.state()
        held.clear()
        recording.end("held")
        recording.handing_on(result)
        without_held = tape.state()
        if cache is not None and not self.settings.holds_logits:
            cache.held.clear()
        without_cache = tape.state()
        kept_forward = _without(without_cache, result)
        tape.end_autocast()
        tape.release_cached()
        recording.end("autocast")
        self.held_to_backward = None
        kept = _without(tape.state(), result)
        backward_stretches: tuple[Stretch, ...] = ()
        if result.requires_grad:
            of_result = tape.empty(comes_back or result.elements, result.width)
            recording.incoming = _number(of_result)
            exchange.before_backward(tape, of_result)
            incoming: list[Tensor | None] = [of_result]
            del of_result
            roots = [result]
            del result
            tape.backward(roots, incoming)
            exchange.after_backward(tape)
            if tape.update is not None:
                tape.update.end(tape)
            backward_stretches = tape.stretches()
        exchange.hand_on()
        record = recording.finish(gradient)
        gradient.clear()
        taken_over = {part: constant(size) for part, size in exchange.taken_over.items()}
        return Segment(
            forward=_moments_of(forward_stretches),
            backward=_moments_of(backward_stretches),
            result_width=result_width,
            holds_result=holds_result,
            held=_difference(with_held, without_held),
            cached=_difference(without_held, without_cache),
            given={} if cache is None else {"temporaries": cache.layer_bytes},
            kept_forward=kept_forward,
            kept=kept,
            left=tape.state() if backward_stretches else {},
            taken_over=taken_over if backward_stretches else {},
            forward_flops=forward_flops,
            backward_flops=subtract_forms(tape.flops, forward_flops),
            float32_flops=tape.float32_flops,
            recomputed_flops=tape.recomputed_flops,
            forward_moved=forward_moved,
            backward_moved=subtract_forms(tape.moved, forward_moved),
            forward_kernels=forward_kernels,
            backward_kernels=tape.num_kernels - forward_kernels,
            record=record,
            of_any_rows=not tape.asks_for_rows,
            forward_stretches=forward_stretches,
            backward_stretches=backward_stretches,
        )


class _Recording:
    """A segment's record while its tape runs."""

    def __init__(self, tape: Tape, *, has_input: bool) -> None:
        self.tape, self.has_input = tape, has_input
        self.parts: dict[str, list[int]] = {}
        self.begin = 0
        self.result: int = -1
        self.keeps_result = False
        self.incoming: int | None = None

    def end(self, part: str) -> None:
        """What happened since the part before is this one."""
        events = self.tape.events
        self.parts[part] = events[self.begin :]
        self.begin = len(events)

    def handing_on(self, result: Tensor) -> None:
        """The model's forward pass is over: what still refers to the result will keep it."""
        self.result, self.keeps_result = _number(result), is_shared(result)

    def finish(self, gradient: Sequence[Tensor | None]) -> SegmentRecord:
        """`gradient`: of what the segment was given."""
        self.end("backward")
        if not self.keeps_result:  # the next segment's input is what keeps it
            own = self.parts["backward"]
            self.parts["backward"] = [event for event in own if event != ~self.result]
        outgoing = gradient[0] if gradient else None
        return SegmentRecord(
            sizes=self.tape.sizes[:],
            labels=self.tape.labels[:],
            **self.parts,
            given=0 if self.has_input else None,
            result=self.result,
            keeps_result=self.keeps_result,
            incoming=self.incoming,
            gradient=None if outgoing is None else _number(outgoing),
        )


def _number(tensor: Tensor) -> int:
    assert tensor.storage is not None
    return tensor.storage.number


def _checkpointed(tape: Tape, hidden: Tensor, *, module: Module, use_reentrant: bool) -> Tensor:
    def call(hidden: Tensor) -> Tensor:
        return module(tape, hidden)

    run = tape.checkpoint_reentrant if use_reentrant else tape.checkpoint
    return run(call, [hidden])


def _unchanged(tape: Tape, x: Tensor) -> Tensor:
    return x


def _moments_of(stretches: Iterable[Stretch]) -> tuple[Moment, ...]:
    return tuple(moment for stretch in stretches for moment in stretch.moments)


def _without_backward(settings: StepSettings) -> StepSettings:
    """Of a pass without gradients. What only backward asks for makes no difference, so plans that
    differ in it share a pass."""
    return structs.replace(
        settings, accumulates=False, gradient_checkpointing=False, hooks_input=False
    )


def _by_value(settings: StepSettings) -> tuple[Hashable, ...]:
    """The settings as a key. What has no value, such as a function, stands for itself."""
    values = structs.astuple(settings)
    return tuple(frozenset(of.items()) if isinstance(of, Mapping) else of for of in values)


def _with_gathered(
    segments: Sequence[Segment], beside: Beside
) -> tuple[list[Segment], list[object]]:
    """The segments, each with its own moments: of a kind of its own."""
    found = [
        structs.replace(segment, forward=tuple(forward), backward=tuple(backward))
        for segment, forward, backward in zip(
            segments, beside.forward, beside.backward, strict=True
        )
    ]
    return found, list(range(len(found)))


def _heights(base: Parts, changes: Sequence[Parts], places: Iterable[int]) -> dict[int, Parts]:
    """`base` with all changes before each of these places, and at last before the end. Most changes
    are one object that comes again and again: what came is counted, and summed where asked for."""
    found: dict[int, Parts] = {}
    wanted = [*sorted(places), len(changes)]
    numbers: dict[int, int] = {}
    by_id: dict[int, Parts] = {}
    begin = 0
    for place in wanted:
        for change in changes[begin:place]:
            key = id(change)
            by_id[key] = change
            numbers[key] = numbers.get(key, 0) + 1
        begin = place
        height = base
        for key, number in numbers.items():
            height = _sum(height, _repeated(by_id[key], number))
        found[place] = height
    return found


def _repeated(parts: Parts, number: int) -> Parts:
    return {part: times(form, number) for part, form in parts.items()}


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


def _difference(left: Parts, right: Parts) -> Parts:
    """What `left` has beyond `right`, which is a part of it."""
    return {name: subtract_forms(form, right.get(name, ZERO)) for name, form in left.items()}


def _total(parts: Parts) -> Form:
    return added(parts.values())


def with_parts(moment: Moment, parts: Parts) -> Moment:
    """The moment, with parts alive beside what it holds."""
    both = _sum(parts, moment.components)
    return Moment(added(both.values()), both)
