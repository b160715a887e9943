"""FSDP2 on a tape: a unit's parameters are gathered into a buffer and copied out of it, the next
unit's buffer is filled meanwhile.

Source: torch/distributed/fsdp/_fully_shard (`_fsdp_param_group.py`, `_fsdp_collectives.py`) of
torch 2.13; the units are those that accelerate 1.15 makes (`fsdp2_prepare_model`).
"""

from __future__ import annotations

from msgspec import Struct, structs

from ftplan.planner.exchange import Exchange, buffer, watched
from ftplan.planner.sharded import NO_UNIT, Spread, Unit, Units
from ftplan.planner.tape import Tape, Tensor


class Fsdp2Place(Struct, frozen=True, kw_only=True):
    """A segment's unit and those whose buffers it meets.

    `gathered_before`: whose buffer is alive until the unit's own copies are made. `fetched_ahead`:
    the one that backward gathers besides. `reduced_after`: whose gradients are being sent when
    backward begins. `stays`: it remains gathered from forward to backward. `met_gradients`: bytes
    of gradients that are there before its backward, from another use of its parameters or from an
    earlier micro-batch. `gathered_by_loss`: not by FSDP, and not through a buffer.
    """

    spread: Spread
    unit: Unit
    gathered_before: Unit = NO_UNIT
    fetched_ahead: Unit = NO_UNIT
    reduced_after: Unit = NO_UNIT
    stays: bool = False
    met_gradients: int = 0
    gathered_by_loss: bool = False

    def exchange(self) -> Exchange:
        return _Fsdp2(self)

    def in_forward(self) -> Fsdp2Place:
        """What is gathered, and the share of it that is cast before. Among how many GPUs makes no
        other difference."""
        spread, before = self.spread, Unit(gathered=self.gathered_before.gathered)
        return Fsdp2Place(
            spread=structs.replace(spread, num_shards=min(2, spread.num_shards)),
            unit=Unit(gathered=self.unit.gathered, cast=self.unit.cast),
            gathered_before=before,
            stays=self.stays,
            gathered_by_loss=self.gathered_by_loss,
        )


def fsdp2_places(units: Units, spread: Spread, *, accumulates: bool, loss: str) -> list[Fsdp2Place]:
    """Of each segment: embeddings, layers, loss. Tied embeddings are gathered with the final norm
    before the first layer, and reduced last.

    TRL's fused loss calls no head: beside PEFT's wrapper, in which accelerate does not find the
    final norm that would gather the head as well, it asks for the whole weight itself
    (`full_tensor` in trl.trainer.utils).
    """
    first, *_ = layers = list(units.layers)
    tied = units.embedding == NO_UNIT

    def met(unit: Unit) -> int:
        return unit.gradients if accumulates else 0

    near = [
        Fsdp2Place(
            spread=spread,
            unit=units.tail if tied else units.embedding,
            reduced_after=first,
            stays=tied,
            met_gradients=units.tail.gradients if tied else met(units.embedding),
        )
    ]
    gathered = [units.tail if tied else units.embedding, *layers]
    reduced = [*layers[1:], NO_UNIT if tied else units.tail]
    for place, unit in enumerate(layers):
        near.append(
            Fsdp2Place(
                spread=spread,
                unit=unit,
                gathered_before=gathered[place],
                fetched_ahead=NO_UNIT if tied and not place else gathered[place],
                reduced_after=reduced[place],
                met_gradients=met(unit),
            )
        )
    tail = Fsdp2Place(
        spread=spread,
        unit=NO_UNIT if tied else units.tail,
        gathered_before=layers[-1],
        fetched_ahead=layers[-1],
        stays=True,
        met_gradients=0 if tied else met(units.tail),
        gathered_by_loss=loss == "trl-fused" and not tied and bool(first.reduced_adapters),
    )
    return [*near, tail]


class _Fsdp2(Exchange):
    def __init__(self, near: Fsdp2Place) -> None:
        self.near, self.unit, self.spread = near, near.unit, near.spread
        self.taken_over = {"gradients": near.met_gradients}
        self.is_watching = False
        self.buffer: Tensor | None = None
        self.parameters: Tensor | None = None
        self.sending: Tensor | None = None
        self.earlier: Tensor | None = None
        self.reduced: Tensor | None = None
        self.all_reduced: Tensor | None = None

    def before_forward(self, tape: Tape) -> None:
        before = buffer(tape, self.near.gathered_before.gathered)
        if self.unit == NO_UNIT or self.near.gathered_by_loss:
            self.buffer = before
            self.parameters = buffer(tape, self.unit.gathered)
            return
        self.buffer = self._gather(tape, self.unit)
        self.parameters = buffer(tape, self.unit.gathered)
        del before

    def after_forward(self, tape: Tape) -> None:
        if not self.near.stays:
            self.parameters = None

    def hand_on(self) -> None:
        self.buffer = self.sending = None

    def watch(self, tape: Tape, result: Tensor) -> Tensor:
        self.is_watching = tape.differentiates(result)
        return watched(tape, result, self._fetch)

    def before_backward(self, tape: Tape, incoming: Tensor) -> None:
        self.earlier = buffer(tape, self.near.met_gradients, "gradients")
        if not self.is_watching:
            self._fetch(tape)

    def _fetch(self, tape: Tape) -> None:
        self.sending = buffer(tape, self.near.reduced_after.gradients)
        if self.parameters is None:
            own = buffer(tape, self.unit.gathered)
            self.parameters = buffer(tape, self.unit.gathered)
            del own
        self.buffer = self._gather(tape, self.near.fetched_ahead)

    def after_backward(self, tape: Tape) -> None:
        if self.unit == NO_UNIT:
            return
        self.parameters = self.sending = None
        if self.near.met_gradients:
            tape.release_gradients()
        self.sending = buffer(tape, self.unit.gradients)
        tape.release_gradients()
        self.earlier = None
        share = buffer(tape, self.unit.gradient_share)
        if self._holds_sent:
            self.all_reduced = share
        if self.unit.reduced != self.unit.gradient_share:
            share = buffer(tape, self.unit.reduced)
        tape.relabel(share, "gradients")
        if not self.spread.offloads:
            self.reduced = share

    @property
    def _holds_sent(self) -> bool:
        """With copies of the model, what is summed over these is held until backward ends, lest the
        next unit write over it (`AllReduceState`); where it is the gradient itself that is no more.
        """
        is_gradient = self.unit.reduced == self.unit.gradient_share and not self.spread.offloads
        return self.spread.replicates and not is_gradient

    def _gather(self, tape: Tape, unit: Unit) -> Tensor:
        """The buffer that a unit is gathered in; on one GPU none is."""
        share = buffer(tape, unit.cast)
        whole = buffer(tape, unit.gathered if self.spread.num_shards > 1 else 0)
        del share
        return whole
