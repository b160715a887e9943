"""FSDP1 on a tape: a layer's parameters are one flat one, gathered as a whole; embeddings, final
norm and head are the root's, which stays gathered from the first forward to the end of backward.

Source: torch/distributed/fsdp (`_flat_param.py`, `_runtime_utils.py`) of torch 2.13, with
`use_orig_params`, as `accelerate launch` sets it. Adapters are units of their own, each gathered
while it computes (`fsdp_auto_wrap_policy` of PEFT): no more than one of them at a time, they are
left out beside the layers.
"""

from __future__ import annotations

from msgspec import Struct

from ftplan.planner.exchange import Call, Exchange, buffer, watched
from ftplan.planner.sharded import NO_UNIT, Unit, Units
from ftplan.planner.tape import Tape, Tensor


class Fsdp1Place(Struct, frozen=True, kw_only=True):
    """A segment's unit and those whose buffers it meets.

    `fetched_ahead`: the unit that backward gathers besides, `fetched_late`: at its end. `stays`: it
    is gathered throughout. `met_gradients`: bytes of gradients that are there before its backward,
    from another segment or from an earlier micro-batch. `is_last`: of the layers; `around`:
    checkpointing is around its unit.
    """

    unit: Unit
    fetched_ahead: Unit = NO_UNIT
    fetched_late: Unit = NO_UNIT
    stays: bool = False
    met_gradients: int = 0
    is_last: bool = False
    around: bool = False

    def exchange(self) -> Exchange:
        return _Checkpointed(self) if self.around else _Fsdp1(self)

    def in_forward(self) -> Fsdp1Place:
        return self


def fsdp1_places(
    units: Units, *, accumulates: bool, checkpoints: bool, around: bool
) -> list[Fsdp1Place]:
    """Of each segment: embeddings, layers, loss. The root is reduced with the embeddings.

    Backward gathers a layer ahead; adapters' units come between layers: the layer before is fetched
    from the first adapter, and not at all where checkpointing has run the adapters again since.
    `around`: checkpointing is around FSDP, so that no order of layers is known.
    """
    outside = units.outside
    before = [NO_UNIT, *units.layers[:-1]]
    layers = []
    for place, (unit, earlier) in enumerate(zip(units.layers, before, strict=True)):
        adapted = bool(unit.reduced_adapters)
        layers.append(
            Fsdp1Place(
                unit=unit,
                fetched_ahead=NO_UNIT if adapted or around else earlier,
                fetched_late=earlier if adapted and not checkpoints else NO_UNIT,
                met_gradients=unit.gradients if accumulates else 0,
                is_last=place == len(units.layers) - 1,
                around=around,
            )
        )
    root = Fsdp1Place(
        unit=outside,
        stays=True,
        met_gradients=(outside if accumulates else units.tail).gradients,
    )
    loss = Fsdp1Place(unit=NO_UNIT, fetched_ahead=NO_UNIT if around else units.layers[-1])
    return [root, *layers, loss]


class _Fsdp1(Exchange):
    def __init__(self, near: Fsdp1Place) -> None:
        self.near, self.unit = near, near.unit
        self.taken_over = {"gradients": near.met_gradients}
        if near.stays:
            self.taken_over["communication"] = self.unit.gathered
        self.parameters: Tensor | None = None
        self.ahead: Tensor | None = None
        self.earlier: Tensor | None = None
        self.reduced: Tensor | None = None

    def before_forward(self, tape: Tape) -> None:
        if not self.near.stays:
            self.parameters = _gather(tape, self.unit)

    def after_forward(self, tape: Tape) -> None:
        self.parameters = None

    def hand_on(self) -> None:
        self.ahead = None

    def before_backward(self, tape: Tape, incoming: Tensor) -> None:
        self.earlier = buffer(tape, self.near.met_gradients, "gradients")
        self.parameters = buffer(tape, self.unit.gathered)
        self.ahead = _gather(tape, self.near.fetched_ahead)

    def after_backward(self, tape: Tape) -> None:
        if self.unit == NO_UNIT:
            return
        if self.near.fetched_late != NO_UNIT:
            self.ahead = _gather(tape, self.near.fetched_late)
        flat = buffer(tape, self.unit.gradients)
        tape.release_gradients()
        self.earlier = self.parameters = None
        share = buffer(tape, self.unit.gradient_share)
        if self.unit.reduced != self.unit.gradient_share:
            share = buffer(tape, self.unit.reduced)
        tape.relabel(share, "gradients")
        self.reduced = share
        del flat


class _Checkpointed(_Fsdp1):
    """A layer whose unit checkpointing is around: what is computed again gathers, frees, and
    gathers once more for backward.

    If the layer's own parameters are frozen, hooks on its input hold that and its gradient to the
    end of backward (`_register_post_backward_reshard_only_hook`).
    """

    def __init__(self, near: Fsdp1Place) -> None:
        super().__init__(near)
        self.is_frozen = self.unit.reduced == self.unit.reduced_adapters
        self.held: list[Tensor] = []

    def around(self, call: Call) -> Call:
        def gathered(tape: Tape, hidden: Tensor) -> Tensor:
            if self.is_frozen and tape.differentiates(hidden):
                self.held.append(Tensor(hidden.storage, hidden.elements, hidden.width))
            self.parameters = _gather(tape, self.unit)
            result = call(tape, watched(tape, hidden, super(_Checkpointed, self).after_backward))
            self.parameters = None
            return watched(tape, result, self._gather_again)

        return gathered

    def _gather_again(self, tape: Tape) -> None:
        self.parameters = _gather(tape, self.unit)

    def before_forward(self, tape: Tape) -> None:
        """Within what is checkpointed."""

    def before_backward(self, tape: Tape, incoming: Tensor) -> None:
        self.earlier = buffer(tape, self.near.met_gradients, "gradients")
        if self.is_frozen and not self.near.is_last:
            self.held.append(Tensor(incoming.storage, incoming.elements, incoming.width))

    def after_backward(self, tape: Tape) -> None:
        """Within as well."""


def _gather(tape: Tape, unit: Unit) -> Tensor:
    share = buffer(tape, unit.cast)
    whole = buffer(tape, unit.gathered)
    del share
    return whole
