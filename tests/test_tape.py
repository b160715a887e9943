"""The symbolic tape beside torch itself: what a function keeps, and how high it rises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from ftplan.planner import functions as f
from ftplan.planner.model_spec import Linear
from ftplan.planner.modules import PlainLinear
from ftplan.planner.tape import (
    Tape,
    Tensor,
    Weight,
    constant,
    covers,
    per_pair,
    per_position,
    per_row,
    per_token,
    scaled,
    value,
)

torch = pytest.importorskip("torch", reason="the reference is torch")

ROWS, LENGTH, WIDTH, WIDER = 4, 64, 256, 512
TOKENS = ROWS * LENGTH


def linear(name: str, inputs: int, outputs: int, *, trained: bool) -> PlainLinear:
    names = (f"{name}.weight",) if trained else ()
    return PlainLinear(Linear(name=name, in_features=inputs, out_features=outputs), 4, names)


class Pair:
    """A feed-forward block with a residual addition, as a tape's function and as torch's."""

    def __init__(self, *, trained: bool) -> None:
        self.up = linear("up", WIDTH, WIDER, trained=trained)
        self.down = linear("down", WIDER, WIDTH, trained=trained)
        self.up_weight = torch.randn(WIDER, WIDTH, requires_grad=trained)
        self.down_weight = torch.randn(WIDTH, WIDER, requires_grad=trained)

    def on_tape(self, tape: Tape, hidden: Tensor) -> Tensor:
        residual = hidden
        hidden = self.up(tape, hidden)
        hidden = f.activate(tape, hidden, "silu")
        hidden = self.down(tape, hidden)
        return f.add(tape, residual, hidden)

    def in_torch(self, hidden: Any) -> Any:
        residual = hidden
        hidden = torch.nn.functional.linear(hidden, self.up_weight)
        hidden = torch.nn.functional.silu(hidden)
        hidden = torch.nn.functional.linear(hidden, self.down_weight)
        return residual + hidden


def gated(tape: Tape, x: Tensor) -> Tensor:
    return f.multiply(tape, f.activate(tape, x, "silu"), f.scale(tape, x))


def gated_in_torch(x: Any) -> Any:
    return torch.nn.functional.silu(x) * (x * 0.5)


def normalized(tape: Tape, x: Tensor) -> Tensor:
    root = f.reciprocal_root(tape, f.mean_of_squares(tape, x, WIDTH))
    return f.multiply(tape, x, root)


def normalized_in_torch(x: Any) -> Any:
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * root


def three_times(tape: Tape, x: Tensor) -> Tensor:
    """Three gradients meet, which torch adds up in place."""
    both = f.add(tape, f.scale(tape, x), f.scale(tape, x))
    return f.add(tape, both, f.scale(tape, x))


def three_times_in_torch(x: Any) -> Any:
    both = x * 2 + x * 3
    return both + x * 4


def softmaxed(tape: Tape, x: Tensor) -> Tensor:
    return f.cross_entropy(tape, x)


def rises_on_tape(function: Callable[[Tape, Tensor], Tensor]) -> tuple[int, int, int]:
    """(forward's highest level, what it keeps, backward's highest level), the input not counted,
    and in backward the gradient that comes in not either. Both are held."""
    tape = Tape(autocast=None, on_cuda=False)
    x = tape.empty(per_token(WIDTH), 4)
    tape.leaf(x)
    given = value(x.num_bytes, ROWS, LENGTH)
    result = function(tape, x)
    forward = max(value(m.total, ROWS, LENGTH) for m in tape.moments())
    kept = sum(value(form, ROWS, LENGTH) for form in tape.state().values())
    gradient = tape.like(result)
    incoming = value(gradient.num_bytes, ROWS, LENGTH)
    tape.backward([result], [gradient])
    backward = max(value(m.total, ROWS, LENGTH) for m in tape.moments())
    return forward - given, kept - given, backward - given - incoming


def rises_in_torch(function: Callable[[Any], Any]) -> tuple[int, int, int]:
    """The same of torch, by its profiler. Parameters have no gradients yet."""
    x = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
    for weight in vars(getattr(function, "__self__", x)).values():
        if isinstance(weight, torch.Tensor):
            weight.grad = None
    made: list[Any] = []
    forward = levels(lambda: made.append(function(x)))
    gradient = torch.ones_like(made[0])

    def run_backward() -> None:
        made[0].backward(gradient)
        made.clear()

    backward = levels(run_backward)
    return max(forward), forward[-1], forward[-1] + max(backward)


def levels(work: Callable[[], None]) -> list[int]:
    """Bytes above the beginning, after each allocation and release."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return [0, *itertools.accumulate(size for _, size in memory)]


FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "gated product": (gated, gated_in_torch),
    "norm": (normalized, normalized_in_torch),
    "three gradients": (three_times, three_times_in_torch),
}
for _trained in (False, True):
    _pair = Pair(trained=_trained)
    _name = f"feed-forward, {'trained' if _trained else 'frozen'}"
    FUNCTIONS[_name] = (_pair.on_tape, _pair.in_torch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_rises_as_it_does_in_torch(name: str) -> None:
    """Within 1 %: scalars and the like are left out."""
    on_tape, in_torch = FUNCTIONS[name]
    predicted, real = rises_on_tape(on_tape), rises_in_torch(in_torch)
    assert predicted == pytest.approx(real, rel=0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_checkpointing_keeps_the_input_and_computes_again(
    use_reentrant: bool, trained: bool
) -> None:
    """The newer function stops at the last thing that backward needs, the older one does not."""
    pair = Pair(trained=trained)

    def on_tape(tape: Tape, x: Tensor) -> Tensor:
        run = tape.checkpoint_reentrant if use_reentrant else tape.checkpoint
        return run(lambda hidden: pair.on_tape(tape, hidden), [x])

    class Checkpointed:
        def __init__(self) -> None:
            self.up, self.down = pair.up_weight, pair.down_weight

        def run(self, x: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(
                pair.in_torch, x, use_reentrant=use_reentrant, preserve_rng_state=False
            )

    predicted, real = rises_on_tape(on_tape), rises_in_torch(Checkpointed().run)
    assert predicted == pytest.approx(real, rel=0.01)


def test_forms_are_read_at_a_batch_and_a_length() -> None:
    """2 bytes + 3 a row + 5 a place + 7 a token + 11 a pair of tokens, for 4 rows of 10."""
    form = tuple(
        sum(parts)
        for parts in zip(
            constant(2), per_row(3), per_position(5), per_token(7), per_pair(11), strict=True
        )
    )
    assert value(form, 4, 10) == 2 + 3 * 4 + 5 * 10 + 7 * 40 + 11 * 4 * 10 * 10
    assert scaled(per_token(6), 2, 3) == per_token(4)


def test_a_moment_covers_another_if_it_is_as_high_for_every_batch() -> None:
    assert covers(per_token(3), per_token(3))
    assert covers((1, 0, 0, 3, 0), per_token(3))
    assert not covers(per_token(3), constant(1))


def test_what_dies_is_given_back() -> None:
    tape = Tape()
    first = tape.empty(per_token(8), 2)
    second = tape.empty(constant(5), 4, "gradients")
    assert tape.state() == {"temporaries": per_token(16), "gradients": constant(20)}
    del first
    assert tape.state() == {"gradients": constant(20)}
    assert [moment.total for moment in tape.moments()] == [(20, 0, 0, 16, 0)]
    del second
    assert tape.state() == {}


def test_autocast_caches_copies_of_trained_fp32_weights_until_it_ends() -> None:
    tape = Tape(autocast=2)
    trained, frozen = Weight(10, 4, trained=True), Weight(10, 4, trained=False)
    assert tape.cast_weight(trained) is tape.cast_weight(trained)
    tape.cast_weight(frozen)
    assert tape.state() == {"autocast_copies": constant(20)}
    tape.end_autocast()
    assert tape.state() == {}


def test_later_micro_batches_add_to_the_gradients_of_earlier_ones() -> None:
    """A new gradient is gone as soon as it has been added."""
    for accumulates, left in ((False, constant(4 * WIDTH * WIDER)), (True, None)):
        tape = Tape(accumulates=accumulates)
        module = linear("up", WIDTH, WIDER, trained=True)
        x = tape.empty(per_token(WIDTH), 4)
        tape.leaf(x)
        roots = [module(tape, x)]
        del x
        tape.backward(roots, [tape.empty(per_token(WIDER), 4)])
        assert tape.state().get("gradients") == left
