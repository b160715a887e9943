"""Which layers are traced, and the record of all of them from that of a few."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.planner.repeat_layers import (
    NotRepeating,
    RepeatedRecord,
    Run,
    TracedRecord,
    repeat_layers,
    select_layers,
)

OUTSIDE = -1

# --- which layers are traced ---------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [0, 1, 2, 3, 4])
def test_a_short_model_is_traced_whole(num_layers: int) -> None:
    selection = select_layers("e" * num_layers)
    assert selection.kept == tuple(range(num_layers))
    assert selection.runs == ()


def test_of_equal_layers_the_first_three_and_the_last_are_traced() -> None:
    selection = select_layers("e" * 32)
    assert selection.kept == (0, 1, 2, 31)
    assert selection.runs == (Run(first=0, layers_per_unit=1, left_out=28),)
    assert list(selection.runs[0].template) == [2]


def test_one_layer_may_be_left_out() -> None:
    assert select_layers("eeeee").kept == (0, 1, 2, 4)


def test_dense_layers_before_a_mixture_are_traced_by_themselves() -> None:
    selection = select_layers("ddd" + "e" * 58)
    assert selection.kept == (0, 1, 2, 3, 4, 5, 60)
    assert selection.runs == (Run(first=3, layers_per_unit=1, left_out=54),)


def test_five_sliding_layers_and_a_global_one_are_a_unit() -> None:
    selection = select_layers("LLLLLG" * 10 + "LL")
    assert selection.kept == (*range(18), *range(54, 62))
    assert selection.runs == (Run(first=0, layers_per_unit=6, left_out=6),)
    assert list(selection.runs[0].template) == [12, 13, 14, 15, 16, 17]


def test_of_two_patterns_the_one_that_covers_more_layers_counts() -> None:
    """Seven equal layers begin the model, but five units of eight go further."""
    selection = select_layers("LLLLLLLG" * 5)
    assert selection.runs == (Run(first=0, layers_per_unit=8, left_out=1),)


def test_four_units_of_a_pattern_leave_nothing_out() -> None:
    assert select_layers("LLG" * 4).kept == tuple(range(12))


def test_frozen_and_trained_layers_are_two_runs() -> None:
    selection = select_layers("f" * 20 + "t" * 12)
    assert selection.kept == (0, 1, 2, 19, 20, 21, 22, 31)
    assert selection.runs == (
        Run(first=0, layers_per_unit=1, left_out=16),
        Run(first=4, layers_per_unit=1, left_out=8),
    )


def test_a_run_beside_few_others() -> None:
    selection = select_layers("f" * 28 + "t" * 4)
    assert selection.kept == (0, 1, 2, 27, 28, 29, 30, 31)
    assert selection.runs == (Run(first=0, layers_per_unit=1, left_out=24),)


def test_unlike_layers_are_all_traced() -> None:
    selection = select_layers(range(12))
    assert selection.kept == tuple(range(12))
    assert selection.runs == ()


def test_the_unit_of_a_layer() -> None:
    run = Run(first=3, layers_per_unit=2, left_out=5)
    assert [run.unit_of(layer) for layer in range(13)] == [
        *([None] * 3),
        *(0, 0, 1, 1, 2, 2, 3, 3),
        *([None] * 2),
    ]


patterns = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(1, 9)), min_size=1, max_size=3
).map(lambda parts: "".join(unit * times for unit, times in parts))


@given(signatures=patterns)
def test_what_is_left_out_equals_what_is_traced(signatures: str) -> None:
    """From the kept layers and the runs follow all the signatures again."""
    selection = select_layers(signatures)
    kept = [signatures[place] for place in selection.kept]
    assert list(selection.kept) == sorted(set(selection.kept))
    rebuilt = []
    for place, signature in enumerate(kept):
        rebuilt.append(signature)
        for run in selection.runs:
            if place == run.template[-1]:
                rebuilt += [kept[layer] for layer in run.template] * run.left_out
    assert "".join(rebuilt) == signatures


# --- the whole record ----------------------------------------------------------------------------


@dataclass
class Toy:
    """Writes the record of a small made-up run."""

    events: list[int] = field(default_factory=list)
    event_layers: list[int] = field(default_factory=list)
    kinds: list[Hashable] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    def phase(self) -> None:
        self.marks.append(len(self.events))

    def born(self, layer: int, kind: Hashable) -> int:
        self.kinds.append(kind)
        self.events.append(len(self.kinds) - 1)
        self.event_layers.append(layer)
        return len(self.kinds) - 1

    def died(self, layer: int, *storages: int) -> None:
        self.events += [~storage for storage in storages]
        self.event_layers += [layer] * len(storages)

    def record(self) -> TracedRecord:
        return TracedRecord(
            events=self.events, event_layers=self.event_layers, kinds=self.kinds, marks=self.marks
        )


def training(layers: Sequence[str]) -> TracedRecord:
    """Two steps of a model with layers of these kinds, with all that happens to storages.

    Some live within a layer. In forward each layer gives one to the next that dies there, and one
    that the next keeps till its backward; in backward each gives one to the layer before it. What
    forward copied dies in a row outside of the layers, out of order. Gradients die after the
    optimizer's step, whose temporaries live while it goes through all layers.
    """
    toy = Toy()
    everywhere = list(enumerate(layers))
    toy.phase()
    for place, kind in everywhere:
        toy.born(place, (kind, "weight"))
    for _ in range(2):
        toy.phase()
        hidden, handed = toy.born(OUTSIDE, "embedding"), toy.born(OUTSIDE, "mask")
        kept: list[tuple[int, int]] = []
        copies: list[int] = []
        for place, kind in everywhere:
            temporary = toy.born(place, (kind, "temporary"))
            copies.append(toy.born(place, (kind, "copy")))
            saved = toy.born(place, (kind, "saved"))
            toy.died(place, temporary, handed)
            kept.append((saved, hidden))
            hidden, handed = toy.born(place, (kind, "hidden")), toy.born(place, (kind, "handed"))
        logits = toy.born(OUTSIDE, "logits")
        toy.died(OUTSIDE, handed, *copies[::2], *copies[1::2])
        toy.phase()
        gradient = toy.born(OUTSIDE, "gradient")
        toy.died(OUTSIDE, logits, hidden)
        gradients: list[int] = []
        for place, kind in reversed(everywhere):
            saved, entered = kept[place]
            gradients.append(toy.born(place, (kind, "gradient of weight")))
            if place:  # nothing before the first layer is trained
                new = toy.born(place, (kind, "gradient"))
                toy.died(place, gradient)
                gradient = new
            toy.died(place, saved, entered)
        toy.died(OUTSIDE, gradient)
        toy.phase()
        roots = [toy.born(place, (kind, "root")) for place, kind in everywhere]
        norm = toy.born(OUTSIDE, "norm")
        toy.died(OUTSIDE, *roots, norm, *reversed(gradients))
    toy.phase()
    return toy.record()


def whole(traced: TracedRecord) -> RepeatedRecord:
    """A record without anything put in."""
    return repeat_layers(traced, ())


def kinds_of(traced: TracedRecord, repeated: RepeatedRecord) -> list[Hashable]:
    return [traced.kinds[source] for source, _ in repeated.origin]


def layers_of(traced: TracedRecord, repeated: RepeatedRecord) -> list[int]:
    """The model's layer in which each storage was born."""
    born_in = dict(zip(traced.events, traced.event_layers, strict=True))
    return [born_in[source] + further for source, further in repeated.origin]


def assert_stands_for(layers: str) -> None:
    selection = select_layers(layers)
    few = training([layers[place] for place in selection.kept])
    repeated = repeat_layers(few, selection.runs)
    every = training(layers)
    expected = whole(every)
    assert repeated.events == expected.events
    assert repeated.marks == expected.marks
    assert kinds_of(few, repeated) == kinds_of(every, expected)
    assert layers_of(few, repeated) == layers_of(every, expected)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param("e" * 20, id="equal"),
        pytest.param("e" * 5, id="one left out"),
        pytest.param("eee", id="nothing left out"),
        pytest.param("ddd" + "e" * 9, id="after others"),
        pytest.param("e" * 9 + "dd", id="before others"),
        pytest.param("LLLLLG" * 6, id="units of six"),
        pytest.param("LLLLLG" * 5 + "LL", id="half a unit left"),
        pytest.param("LG" * 7, id="units of two"),
        pytest.param("f" * 20 + "t" * 12, id="two runs"),
        pytest.param("f" * 7 + "LG" * 6 + "t" * 8, id="three runs"),
        pytest.param("abcdefgh", id="unlike"),
    ],
)
def test_few_layers_give_the_record_of_all(layers: str) -> None:
    assert_stands_for(layers)


@given(layers=patterns)
@settings(max_examples=60)
def test_few_layers_give_the_record_of_any_pattern(layers: str) -> None:
    assert_stands_for(layers)


def test_storages_are_numbered_by_birth_and_die_oldest_first_when_together() -> None:
    toy = Toy()
    toy.phase()
    first, second, third = (toy.born(OUTSIDE, kind) for kind in "abc")
    toy.died(OUTSIDE, third, first)
    toy.phase()
    toy.died(OUTSIDE, second)
    repeated = whole(toy.record())
    assert repeated.events == [0, 1, 2, ~0, ~2, ~1]
    assert repeated.marks == [0, 5]
    assert repeated.origin == [(0, 0), (1, 0), (2, 0)]


def test_a_small_record_written_out() -> None:
    """Four traced layers stand for six: forward goes up, backward comes down."""
    toy = Toy()
    toy.phase()
    saved = [toy.born(layer, "saved") for layer in range(4)]
    toy.phase()
    for layer in (3, 2, 1, 0):
        toy.died(layer, saved[layer])
        toy.born(layer, "gradient")
    repeated = repeat_layers(toy.record(), (Run(first=0, layers_per_unit=1, left_out=2),))
    assert repeated.events == [
        *(0, 1, 2, 3, 4, 5),
        *(~5, 6, ~4, 7, ~3, 8, ~2, 9, ~1, 10, ~0, 11),
    ]
    assert repeated.marks == [0, 6]
    # (traced storage, layers further): the last traced layer lies two further in the model.
    assert repeated.origin[:6] == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 2)]
    assert repeated.origin[6:] == [(4, 2), (5, 2), (5, 1), (5, 0), (6, 0), (7, 0)]


# --- what does not repeat ------------------------------------------------------------------------

FOUR = (Run(first=0, layers_per_unit=1, left_out=10),)


def refused(toy: Toy) -> None:
    with pytest.raises(NotRepeating):
        repeat_layers(toy.record(), FOUR)


@pytest.mark.parametrize("odd", [1, 2])
def test_second_and_third_unit_must_agree_in_sizes(odd: int) -> None:
    toy = Toy()
    for layer in range(4):
        toy.born(layer, "large" if layer == odd else "small")
    refused(toy)


@pytest.mark.parametrize("odd", [0, 3])
def test_the_outer_units_may_differ(odd: int) -> None:
    toy = Toy()
    for layer in range(4):
        toy.born(layer, "large" if layer == odd else "small")
    record = toy.record()
    repeated = repeat_layers(record, FOUR)
    assert kinds_of(record, repeated).count("small") == 13


@pytest.mark.parametrize("odd", [1, 2])
def test_second_and_third_unit_must_agree_in_deaths(odd: int) -> None:
    toy = Toy()
    for layer in range(4):
        storage = toy.born(layer, "temporary")
        if layer != odd:
            toy.died(layer, storage)
    refused(toy)


def test_second_and_third_unit_must_go_through_as_many_stretches() -> None:
    toy = Toy()
    for layer in (0, 1, 2, 3, 1):
        toy.born(layer, "kind")
    refused(toy)


def test_what_dies_in_a_layer_must_not_come_from_outside() -> None:
    """One such storage for each traced layer: how many there are of all layers is not known."""
    toy = Toy()
    outside = [toy.born(OUTSIDE, "mask") for _ in range(4)]
    for layer in range(4):
        toy.born(layer, "hidden")
        toy.died(layer, outside[layer])
    refused(toy)


def test_what_a_layer_lets_go_must_come_from_it_or_its_neighbours() -> None:
    toy = Toy()
    skipped: list[int] = []
    for layer in range(4):
        skipped.append(toy.born(layer, "residual"))
        if layer > 1:
            toy.died(layer, skipped[layer - 2])
    refused(toy)


def test_nothing_may_happen_between_units() -> None:
    """A model that works on the hidden state between its layers does so for each of them."""
    toy = Toy()
    for layer in range(4):
        toy.born(layer, "hidden")
        toy.born(OUTSIDE, "sum")
    refused(toy)


def test_what_happens_before_and_behind_the_layers_happens_once() -> None:
    toy = Toy()
    toy.born(OUTSIDE, "before")
    for layer in range(4):
        toy.born(layer, "hidden")
    toy.born(OUTSIDE, "behind")
    record = toy.record()
    kinds = kinds_of(record, repeat_layers(record, FOUR))
    assert kinds == ["before", *["hidden"] * 14, "behind"]
