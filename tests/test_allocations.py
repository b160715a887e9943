"""What is counted of a profile of the processor's tensors, and when."""

from __future__ import annotations

from ftplan.launcher.training.allocations import (
    Change,
    RangeEnd,
    with_unseen_releases,
    without_exchanges,
)

GATHERED = "FSDP::all_gather_copy_out (layers.0)"


def change(at: int, address: int, num_bytes: int, *within: str) -> Change:
    return Change(nanoseconds=at, address=address, num_bytes=num_bytes, within=within)


def gathered(at: int, address: int, num_bytes: int) -> Change:
    return change(at, address, num_bytes, "FSDP::all_gather (layers.0)", "aten::empty")


def test_copies_of_an_exchange_are_left_out_with_their_releases() -> None:
    kept = [change(1, 10, 400), change(6, 10, -400)]
    copied = [
        change(2, 20, 800, "aten::clone", "c10d::_reduce_scatter_base_"),
        change(5, 20, -800),  # released later, by another thread
        change(3, 30, 800, "aten::empty", "gloo:all_gather"),
        change(4, 30, -800, "gloo:all_gather"),
    ]
    assert without_exchanges([*copied, *kept]) == kept


def test_an_address_of_an_exchange_is_counted_again_once_it_holds_a_tensor() -> None:
    copied = change(1, 20, 800, "c10d::allreduce_")
    kept = [change(2, 20, 400), change(3, 20, -400)]
    assert without_exchanges([copied, *kept]) == kept


def test_an_unseen_release_is_dated_where_what_was_gathered_is_copied_out() -> None:
    changes = [gathered(1, 10, 400), change(9, 10, 100)]
    ends = [RangeEnd(nanoseconds=5, name=GATHERED), RangeEnd(nanoseconds=7, name=GATHERED)]
    found = with_unseen_releases(changes, ends)
    assert [(one.nanoseconds, one.num_bytes) for one in found] == [(1, 400), (5, -400), (9, 100)]


def test_an_unseen_release_of_the_end_of_a_profile_is_found_too() -> None:
    end = RangeEnd(nanoseconds=5, name=GATHERED)
    found = with_unseen_releases([gathered(1, 10, 400)], [end])
    assert [one.num_bytes for one in found] == [400, -400]


def test_what_is_still_held_stays() -> None:
    changes = [change(1, 10, 400), gathered(6, 20, 400)]
    end = RangeEnd(nanoseconds=5, name=GATHERED)
    assert with_unseen_releases(changes, [end]) == changes


def test_an_address_that_is_used_again_was_released() -> None:
    found = with_unseen_releases([change(1, 10, 400), change(4, 10, 100)], [])
    assert [(one.nanoseconds, one.num_bytes) for one in found] == [(1, 400), (4, -400), (4, 100)]
