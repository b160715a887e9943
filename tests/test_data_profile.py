"""Lengths of a data set, the order rows are trained in, and the padding that follows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.batching import mean_batch_tokens, padded_batch_tokens, training_order
from ftplan.planner.data_profile import DataProfile, percentile
from ftplan.planner.errors import InputError

MakeData = Callable[[Iterable[int]], DataProfile]
lengths_lists = st.lists(st.integers(1, 4096), min_size=1, max_size=200)


# --- the profile


def test_a_profile_knows_its_lengths(make_data: MakeData) -> None:
    data = make_data([12, 70, 31, 31])
    assert data.num_train_rows == 4
    assert data.longest == 70
    assert data.mean_length == 36.0
    assert [data.cut_rows(n) for n in (70, 69, 31, 30, 12, 11)] == [0, 1, 1, 3, 3, 4]


@given(lengths_lists, st.integers(1, 4200))
def test_what_is_cut_is_what_stands_beyond(
    make_data: MakeData, lengths: list[int], max_length: int
) -> None:
    data = make_data(lengths)
    beyond = [length - max_length for length in lengths if length > max_length]
    assert data.cut_rows(max_length) == len(beyond)
    assert data.cut_tokens(max_length) == sum(beyond)


def test_summary(make_data: MakeData) -> None:
    summary = make_data(range(1, 201)).summary()
    assert summary == {
        "min": 1,
        "median": 100,
        "mean": 100.5,
        "p95": 190,
        "p99": 198,
        "max": 200,
        "exact": True,
    }


def test_no_usable_row_is_refused(make_data: MakeData) -> None:
    with pytest.raises(InputError, match=r"`rows\.jsonl` has no usable training row"):
        make_data([])


def test_lengths_must_come_longest_first(make_data: MakeData) -> None:
    ordered = make_data([1, 2])
    with pytest.raises(AssertionError):
        DataProfile(
            **{
                name: getattr(ordered, name)
                for name in ("path", "sha256", "format", "objective", "exact")
            },
            num_rows=2,
            num_usable_rows=2,
            num_eval_rows=0,
            lengths=(1, 2),
        )


@given(lengths_lists, st.sampled_from(["0.01", "0.25", "0.5", "0.95", "0.99", "1"]))
def test_percentile_is_the_smallest_value_that_the_share_does_not_exceed(
    lengths: list[int], share: str
) -> None:
    ascending = sorted(lengths)
    exact = Fraction(share)
    enough = [
        value
        for value in ascending
        if Fraction(sum(1 for x in ascending if x <= value), len(ascending)) >= exact
    ]
    assert percentile(ascending, float(share)) == min(enough)


# --- the order of training


@given(lengths_lists, st.integers(1, 16), st.integers(1, 8), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_row_once(
    lengths: list[int], batch: int, accumulation: int, seed: int, epoch: int
) -> None:
    order = training_order(lengths, batch, accumulation, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == training_order(lengths, batch, accumulation, seed, epoch)


@given(lengths_lists, st.integers(1, 16), st.integers(1, 8))
def test_the_batch_with_the_longest_row_comes_first(
    lengths: list[int], batch: int, accumulation: int
) -> None:
    """So that what does not fit in memory fails at once."""
    order = training_order(lengths, batch, accumulation, seed=0, epoch=0)
    assert max(lengths[i] for i in order[:batch]) == max(lengths)


def test_the_longest_row_comes_first_even_where_batches_do_not_come_out_even() -> None:
    """33 rows in batches of 2: the row that is left over must not be the longest."""
    lengths = [1000] + [10] * 32
    for seed in range(100):
        assert 0 in training_order(lengths, 2, 1, seed, epoch=0)[:2], f"seed {seed}"


def test_the_next_longest_batch_starts_the_second_optimizer_step() -> None:
    lengths = list(range(1, 1025))
    order = training_order(lengths, batch_size=4, accumulation_steps=8, seed=0, epoch=0)
    longest = [
        max(lengths[i] for i in order[start : start + 4]) for start in range(0, len(order), 4)
    ]
    assert longest[0] == 1024
    assert longest[8] == max(longest[1:])


def test_seeds_and_epochs_change_the_order() -> None:
    lengths = [5] * 100
    orders = {
        tuple(training_order(lengths, 4, 1, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


# --- padding


def test_rows_are_padded_to_the_longest_of_their_batch() -> None:
    lengths, order = [10, 3, 7, 100, 1], [0, 1, 2, 3, 4]
    assert padded_batch_tokens(lengths, order, 2, 4096) == [20, 200, 1]
    assert padded_batch_tokens(lengths, order, 2, max_length=50) == [20, 100, 1]
    assert padded_batch_tokens(lengths, order, 1, 4096) == lengths


@given(lengths_lists, st.integers(1, 16), st.integers(1, 4096))
def test_padding_never_removes_tokens_nor_exceeds_the_longest(
    lengths: list[int], batch: int, max_length: int
) -> None:
    order = training_order(lengths, batch, 1, seed=0, epoch=0)
    tokens = padded_batch_tokens(lengths, order, batch, max_length)
    capped = [min(length, max_length) for length in lengths]
    assert len(tokens) == -(-len(lengths) // batch)
    assert sum(capped) <= sum(tokens) <= len(lengths) * max(capped)


def test_equal_lengths_need_no_padding() -> None:
    assert mean_batch_tokens([64] * 50, 4, 4096) == 256
    assert mean_batch_tokens([64] * 50, 4, 32) == 128


def test_batches_of_one_are_not_padded() -> None:
    lengths = sorted(range(1, 501), reverse=True)
    assert mean_batch_tokens(lengths, 1, 4096) == pytest.approx(statistics.mean(lengths))


def test_fewer_rows_than_a_batch() -> None:
    assert mean_batch_tokens([30, 20, 10], 8, 4096) == 90


def brute_force_mean(lengths: list[int], batch: int) -> float:
    """Mean padded tokens over all the batches that random order could draw."""
    batches = list(itertools.combinations(lengths, batch))
    return sum(batch * max(rows) for rows in batches) / len(batches)


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_grouping_by_length_pads_less_than_chance_does(batch: int) -> None:
    """Chance by enumeration: every way to draw a batch out of 24 rows."""
    lengths = sorted((10 + 97 * i % 500 for i in range(24)), reverse=True)
    grouped = mean_batch_tokens(lengths, batch, 4096)
    assert statistics.mean(lengths) * batch <= grouped < brute_force_mean(lengths, batch)


def test_a_sample_stands_for_many_rows() -> None:
    """80,000 rows, of which about 4,096 are looked at."""
    lengths = sorted((50 + 7919 * i % 1000 for i in range(80_000)), reverse=True)
    order = training_order(lengths, 8, 1, seed=3, epoch=0)
    tokens = padded_batch_tokens(lengths, order, 8, 4096)
    assert mean_batch_tokens(lengths, 8, 4096) == pytest.approx(statistics.mean(tokens), rel=0.02)
