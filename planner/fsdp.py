"""What fully sharded data parallelism holds while a unit of parameters is gathered and its gradients
are reduced, on a tape.

FSDP2: torch.distributed.fsdp._fully_shard (`_fsdp_param_group.py`, `_fsdp_collectives.py`) of
torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.planner.sharded import NO_UNIT, Unit, Units
from ftplan.planner.tape import Tape, Tensor, constant


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """A segment's unit and those whose buffers it meets.

    `gathered_before`: whose buffer is alive until the unit's own copies are made. `fetched_ahead`:
    the one that backward gathers besides. `reduced_after`: whose gradients are being sent when
    backward begins. `stays`: it remains gathered from forward to backward.
    `meets_gradients`: its parameters have gradients before its backward, from another use or an
    earlier micro-batch.
    """

    unit: Unit
    gathered_before: Unit = NO_UNIT
    fetched_ahead: Unit = NO_UNIT
    reduced_after: Unit = NO_UNIT
    stays: bool = False
    meets_gradients: bool = False


def fsdp2_neighbours(units: Units, *, accumulates: bool) -> list[Neighbours]:
    """Of each segment: embeddings, layers, loss. Tied embeddings are gathered with the final norm
    before the first layer, and reduced last."""
    first, *_ = layers = list(units.layers)
    tied = units.embedding == NO_UNIT
    near = [
        Neighbours(
            unit=units.tail if tied else units.embedding,
            reduced_after=first,
            stays=tied,
            meets_gradients=tied or accumulates,
        )
    ]
    gathered = [units.tail if tied else units.embedding, *layers]
    reduced = [*layers[1:], NO_UNIT if tied else units.tail]
    for place, unit in enumerate(layers):
        near.append(
            Neighbours(
                unit=unit,
                gathered_before=gathered[place],
                fetched_ahead=NO_UNIT if tied and not place else gathered[place],
                reduced_after=reduced[place],
                meets_gradients=accumulates,
            )
        )
    tail = Neighbours(
        unit=NO_UNIT if tied else units.tail,
        gathered_before=layers[-1],
        fetched_ahead=layers[-1],
        stays=True,
        meets_gradients=accumulates,
    )
    return [*near, tail]


class Exchange:
    """What a segment does with other GPUs: nothing, where each holds the whole model.

    `taken_over`: bytes of gradients that later segments left and this one's trace counts.
    """

    taken_over = 0

    def before_forward(self, tape: Tape) -> None:
        """Gather."""

    def after_forward(self, tape: Tape) -> None:
        """Free what was gathered."""

    def hand_on(self) -> None:
        """Let go of what the next segment counts."""

    def watch(self, tape: Tape, result: Tensor) -> Tensor:
        """A module's result, whose gradient begins the module's backward."""
        return result

    def before_backward(self, tape: Tape) -> None:
        """Gather again."""

    def after_backward(self, tape: Tape) -> None:
        """Free and reduce."""


class Fsdp2(Exchange):
    def __init__(self, neighbours: Neighbours, num_gpus: int, *, offloads: bool) -> None:
        self.near, self.unit = neighbours, neighbours.unit
        self.num_gpus, self.offloads = num_gpus, offloads
        self.taken_over = self.unit.gradients if neighbours.meets_gradients else 0
        self.is_watching = False
        self.buffer: Tensor | None = None
        self.parameters: Tensor | None = None
        self.sending: Tensor | None = None
        self.earlier: Tensor | None = None
        self.reduced: Tensor | None = None

    def before_forward(self, tape: Tape) -> None:
        before = _buffer(tape, self.near.gathered_before.gathered)
        if self.unit == NO_UNIT:
            self.buffer = before
            return
        self.buffer = self._gather(tape, self.unit)
        self.parameters = _buffer(tape, self.unit.gathered)
        del before

    def after_forward(self, tape: Tape) -> None:
        if not self.near.stays:
            self.parameters = None

    def hand_on(self) -> None:
        self.buffer = self.sending = None

    def watch(self, tape: Tape, result: Tensor) -> Tensor:
        if not tape.differentiates(result):
            return result
        self.is_watching = True
        watched = Tensor(result.storage, result.elements, result.width)
        tape.attach([watched], [result], [], self._begin_backward)
        return watched

    def _begin_backward(
        self, tape: Tape, gradients: list[Tensor | None], saved: list[Tensor]
    ) -> list[Tensor | None]:
        self._fetch(tape)
        return [gradients[0]]

    def before_backward(self, tape: Tape) -> None:
        if not self.is_watching:
            self._fetch(tape)

    def _fetch(self, tape: Tape) -> None:
        self.sending = _buffer(tape, self.near.reduced_after.gradients)
        self.earlier = tape.empty(constant(self.taken_over), 1, "gradients")
        if self.parameters is None:
            self.buffer = _buffer(tape, self.unit.gathered)
            self.parameters = _buffer(tape, self.unit.gathered)
        self.buffer = self._gather(tape, self.near.fetched_ahead)

    def after_backward(self, tape: Tape) -> None:
        if self.unit == NO_UNIT:
            return
        self.parameters = self.sending = None
        if self.near.meets_gradients:
            tape.release_gradients()
        self.sending = _buffer(tape, self.unit.gradients)
        tape.release_gradients()
        self.earlier = None
        share = tape.empty(constant(self.unit.gradient_share), 1, "communication")
        if self.unit.reduced != self.unit.gradient_share:
            share = tape.empty(constant(self.unit.reduced), 1, "communication")
        tape.relabel(share, "gradients")
        if not self.offloads:
            self.reduced = share

    def _gather(self, tape: Tape, unit: Unit) -> Tensor:
        """The buffer that a unit is gathered in; on one GPU none is."""
        share = _buffer(tape, unit.cast)
        buffer = _buffer(tape, unit.gathered if self.num_gpus > 1 else 0)
        del share
        return buffer


def _buffer(tape: Tape, num_bytes: int) -> Tensor:
    return tape.empty(constant(num_bytes), 1, "communication")
