"""What a segment of the step exchanges with other GPUs, on its tape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ftplan.planner.sharded import NO_UNIT, Unit
from ftplan.planner.tape import Tape, Tensor, constant

Call = Callable[[Tape, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """A segment's unit and those whose buffers it meets.

    `gathered_before`: whose buffer is alive until the unit's own copies are made. `fetched_ahead`:
    the one that backward gathers besides, `fetched_late`: at its end. `reduced_after`: whose
    gradients are being sent when backward begins. `stays`: it remains gathered from forward to
    backward. `met_gradients`: bytes of gradients that are there before its backward, from another
    use of its parameters or from an earlier micro-batch. `is_last`: of the layers.
    """

    unit: Unit
    gathered_before: Unit = NO_UNIT
    fetched_ahead: Unit = NO_UNIT
    fetched_late: Unit = NO_UNIT
    reduced_after: Unit = NO_UNIT
    stays: bool = False
    met_gradients: int = 0
    is_last: bool = False


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
