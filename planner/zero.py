"""ZeRO-1 and ZeRO-2 as DeepSpeed 0.18 allocates (deepspeed/runtime/zero/stage_1_and_2.py), with the
settings that accelerate leaves at DeepSpeed's defaults (zero/config.py).

Every GPU holds all weights, in the engine's dtype; masters, states and reduced gradients are
divided.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from ftplan.planner.exchange import Exchange, buffer
from ftplan.planner.model_spec import Parameter
from ftplan.planner.tape import Tape, Tensor

# `reduce_bucket_size`: elements of the buffer in which gradients wait to be reduced. This and stage
# 3's figures (`coordinator.py`, `zero3.py`) are DeepSpeed's defaults, compared with 0.19.8.
REDUCE_BUCKET_SIZE = 500_000_000


class Reduction(Struct, frozen=True, kw_only=True):
    """What the gradients' reduction holds, in bytes: the bucket, and a GPU's share of gradients.

    `partitions`: gradients go as they come (ZeRO-2); else they stay to the end of the last
    backward, when the shares are made, and so does the bucket, from the first one on.
    `at_end`: the bucket has room for all of them, so that the share is made when backward ends;
    `accumulates`: there are several micro-batches. `waits`: layers share all that is trained, so
    that its gradient is whole once backward has been through them.
    """

    bucket: int
    share: int
    partitions: bool
    accumulates: bool
    at_end: bool
    waits: bool = False


def share_elements(parameters: Iterable[Parameter], num_gpus: int) -> int:
    """Elements of a GPU's share of the parameters, each divided by itself."""
    return sum(p.count * -(-p.size // num_gpus) for p in parameters)


class ZeroPlace(Struct, frozen=True):
    """A segment; `begins`: the one whose backward makes the first gradient, None for others."""

    begins: Reduction | None

    def exchange(self) -> Exchange:
        return _Zero(self.begins) if self.begins else Exchange()

    def in_forward(self) -> ZeroPlace:
        return self


def zero_places(reduction: Reduction, trains: list[bool]) -> list[ZeroPlace]:
    """Of each segment, of which `trains` says whether it has trained parameters."""
    # None has where all that is trained is beside the text's way, such as a vision tower's biases.
    learning = [place for place, some in enumerate(trains) if some]
    first = (learning[0] if reduction.waits else learning[-1]) if learning else None
    return [ZeroPlace(reduction if place == first else None) for place in range(len(trains))]


class _Zero(Exchange):
    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.made: list[Tensor] = []

    def before_backward(self, tape: Tape, incoming: Tensor) -> None:
        tape.at_first_gradient = self._begin

    def _begin(self, tape: Tape) -> None:
        reduction = self.reduction
        if reduction.partitions or not reduction.accumulates:
            self.made.append(buffer(tape, reduction.bucket))
        if reduction.partitions and not reduction.at_end:
            self.made.append(buffer(tape, reduction.share, "gradients"))
