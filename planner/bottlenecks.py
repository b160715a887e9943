"""Bottleneck adapters on a tape: Houlsby et al. 2019 (arXiv 1902.00751), section 2.1, figure 2."""

from __future__ import annotations

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Linear
from ftplan.planner.modules import Numerics, PlainLinear
from ftplan.planner.tape import Tape, Tensor


class Bottleneck:
    """Two linear modules with GELU between, as in the authors' code, whose result is added to their
    input."""

    def __init__(self, hidden_size: int, numerics: Numerics) -> None:
        self.width, rank = numerics.adapters, numerics.rank
        down = Linear(name="down", in_features=hidden_size, out_features=rank, bias=True)
        up = Linear(name="up", in_features=rank, out_features=hidden_size, bias=True)
        self.down, self.up = (
            PlainLinear(one, self.width, (f"{one.name}.weight", f"{one.name}.bias"))
            for one in (down, up)
        )

    def __call__(self, tape: Tape, x: Tensor) -> Tensor:
        own = f.cast(tape, x, self.width) if tape.autocast is None else x
        change = self.up(tape, f.activate(tape, self.down(tape, own), "gelu"))
        return f.add(tape, x, f.cast(tape, change, x.width))
