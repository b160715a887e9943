"""What a segment of the step exchanges with other GPUs, on its tape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec import Struct

from ftplan.planner.tape import Tape, Tensor, constant

Call = Callable[[Tape, Tensor], Tensor]


class Exchange:
    """What a segment does with other GPUs: nothing, where each holds the whole model.

    `taken_over`: bytes, by component, that are there without it and that its trace counts from the
    beginning of backward, since it gives them back.
    """

    taken_over: Mapping[str, int] = {}

    def before_forward(self, tape: Tape) -> None:
        """Gather."""

    def after_forward(self, tape: Tape) -> None:
        """Free what was gathered."""

    def hand_on(self) -> None:
        """Let go of what the next segment counts."""

    def around(self, call: Call) -> Call:
        """What is checkpointed in the place of a layer."""
        return call

    def watch(self, tape: Tape, result: Tensor) -> Tensor:
        """A module's result, whose gradient begins the module's backward."""
        return result

    def before_backward(self, tape: Tape, incoming: Tensor) -> None:
        """Gather again. `incoming`: the gradient of the result."""

    def after_backward(self, tape: Tape) -> None:
        """Free and reduce."""


class Place(Protocol):
    """A segment among the others, as far as its trace depends on it: equal ones trace alike."""

    def exchange(self) -> Exchange:
        """What it does with other GPUs."""

    def in_forward(self) -> Place:
        """The same as far as a pass without gradients depends on it."""


class Alone(Struct, frozen=True):
    """Where every GPU holds the whole model."""

    def in_forward(self) -> Alone:
        return self

    def exchange(self) -> Exchange:
        return Exchange()


def watched(tape: Tape, x: Tensor, callback: Callable[[Tape], None]) -> Tensor:
    """x, with a call when its gradient is there."""
    if not tape.differentiates(x):
        return x
    result = Tensor(x.storage, x.elements, x.width)

    def backward(
        tape: Tape, gradients: list[Tensor | None], saved: list[Tensor]
    ) -> list[Tensor | None]:
        callback(tape)
        return [gradients[0]]

    tape.attach([result], [x], [], backward)
    return result


def buffer(tape: Tape, num_bytes: int, component: str = "communication") -> Tensor:
    return tape.empty(constant(num_bytes), 1, component)
