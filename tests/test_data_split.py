"""Which rows are held out: by prompt, always alike."""

from __future__ import annotations

import random
from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ftplan.launcher.data.split import MAX_EVAL_ROWS, rows_of, split_groups
from ftplan.launcher.data.survey import group_of
from ftplan.planner.errors import InputError
from tests.launcher_fixtures import chat


def prompt(number: int) -> int:
    """A prompt's hash."""
    return int.from_bytes(sha256(str(number).encode()).digest()[:8], "little")


def repeated(*counts: int) -> list[int]:
    """`repeated(3, 1)`: three rows with one prompt, one with another."""
    return [prompt(number) for number, count in enumerate(counts) for _ in range(count)]


def different(count: int) -> list[int]:
    return repeated(*[1] * count)


counts_of_prompts = st.lists(st.integers(1, 12), min_size=2, max_size=30)


@settings(max_examples=60)
@given(counts_of_prompts, st.randoms(use_true_random=False))
def test_each_side_has_rows_and_no_more_than_asked_for_but_for_the_rarest_prompt(
    counts: list[int], order: random.Random
) -> None:
    groups = repeated(*counts)
    order.shuffle(groups)
    split = split_groups(groups)
    train, held_out, test = rows_of(groups, split)
    assert train > 0 and held_out > 0 and test == 0
    assert held_out <= max(1, round(len(groups) / 10), min(counts))
    assert split == split_groups(sorted(groups)), "the order of rows makes no difference"


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, 1), (19, 2), (300, 30), (5000, 500), (8000, MAX_EVAL_ROWS)]
)
def test_a_tenth_is_held_out_and_no_more_than_is_worth_evaluating(
    count: int, held_out: int
) -> None:
    groups = different(count)
    assert rows_of(groups, split_groups(groups)) == (count - held_out, held_out, 0)


def test_what_common_prompts_leave_free_is_filled_with_rare_ones() -> None:
    groups = repeated(30, 30, 30, *[1] * 10)
    split = split_groups(groups)
    held = Counter(group for group in groups if group in split.held_out)
    assert len(held) == 10 and set(held.values()) == {1}


@pytest.mark.parametrize("counts", [(99, 1), (1, 99), (40, 1, 1), (1, 40, 1), (1, 1, 40)])
def test_a_prompt_that_most_rows_share_is_trained_on(counts: tuple[int, ...]) -> None:
    """Held out as a whole, it would leave next to nothing to train on."""
    groups = repeated(*counts)
    assert rows_of(groups, split_groups(groups))[0] >= max(counts)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_neither_side_is_empty_whatever_the_share(share: float) -> None:
    groups = different(100)
    train, held_out, _ = rows_of(groups, split_groups(groups, share=share))
    assert train > 0 and held_out == min(99, max(1, round(100 * share)))


def test_a_test_split_is_apart_from_both() -> None:
    groups = different(200)
    split = split_groups(groups, test_share=0.05)
    assert rows_of(groups, split) == (170, 20, 10)
    assert not split.held_out & split.test
    assert split.held_out == split_groups(groups).held_out
    assert not any(split.trains(group) for group in split.held_out | split.test)


@pytest.mark.parametrize("groups", [[], [prompt(1)], [prompt(1)] * 9])
def test_one_prompt_alone_cannot_be_split(groups: list[int]) -> None:
    with pytest.raises(InputError, match="at least two different rows") as raised:
        split_groups(groups)
    assert "`--eval-data FILE`" in raised.value.hint


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), min_size=3, max_size=60),
    st.sampled_from([0.0, 0.05, 0.3, 0.9]),
    st.floats(0.01, 0.9),
)
def test_prompts_that_are_held_out_are_the_smallest_that_there_is_room_for(
    groups: list[int], test_share: float, share: float
) -> None:
    assume(len(set(groups)) > 2)
    counts = sorted(Counter(groups).items())

    def smallest(counts: list[tuple[int, int]], room: int) -> set[int]:
        taken = set()
        for group, count in counts:
            if count <= room:
                taken.add(group)
                room -= count
        return taken or {min(counts, key=lambda one: one[1])[0]}

    def room(share: float) -> int:
        return min(max(1, round(share * len(groups))), len(groups) - 1)

    split = split_groups(groups, share=share, test_share=test_share)
    assert split.held_out == smallest(counts, room(share))
    if test_share:
        left = [one for one in counts if one[0] not in split.held_out]
        assert split.test == smallest(left, room(test_share))


def test_rows_share_a_group_if_they_share_all_that_was_asked() -> None:
    """The training process makes the split again: it must not depend on hashing or Python."""
    asked = chat("question", "one")
    assert group_of(asked) == group_of(chat("question", "two", line=9)) == 18281668339422683665
    assert group_of(asked) != group_of(chat("question", "one", "question", "two"))
    assert group_of(asked) != group_of(chat("question", "one", system="Be brief."))
