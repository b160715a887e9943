"""A module whose parameters ZeRO-3 gathers: marks on a tape where it begins and ends."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Literal

from msgspec import Struct

from ftplan.planner.exchange import Call, watched
from ftplan.planner.model_spec import Parameter
from ftplan.planner.tape import Tape, Tensor


class ModuleEvent(Struct, frozen=True):
    """A module is about to run, or has run: forward or backward.

    `module`: its number among what the tape met, or its name where several tapes meet it.
    `parameters`: each with its number.
    """

    kind: Literal["fetch", "release"]
    module: Hashable
    parameters: tuple[tuple[int, Parameter], ...]


class Called:
    """A module with the hooks around it (`_register_deepspeed_module` of DeepSpeed 0.18,
    deepspeed/runtime/zero/parameter_offload.py): before and behind it, and in backward where the
    gradients of its result and of its input come. An input passed `by_name` has no hook."""

    def __init__(
        self,
        module: Call,
        parameters: Iterable[Parameter] = (),
        *,
        by_name: bool = False,
        name: str | None = None,
    ) -> None:
        self.module, self.parameters = module, tuple(parameters)
        self.by_name, self.name = by_name, name

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        self.begin(tape)
        if not self.by_name:
            x = watched(tape, x, self.finish)
        return self.end(tape, self.module(tape, x))

    def begin(self, tape: Tape) -> None:
        tape.mark(self._event(tape, "fetch"))

    def end(self, tape: Tape, result: Tensor) -> Tensor:
        """The result, whose gradient begins the module's backward."""
        self.finish(tape)
        return watched(tape, result, self.begin)

    def finish(self, tape: Tape) -> None:
        tape.mark(self._event(tape, "release"))

    def _event(self, tape: Tape, kind: Literal["fetch", "release"]) -> ModuleEvent:
        name: Hashable = self.name
        if name is None:
            name = tape.number_of(self)
        own = tuple((tape.number_of(parameter), parameter) for parameter in self.parameters)
        return ModuleEvent(kind, name, own)
