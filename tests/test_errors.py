"""The tree of errors, their exit statuses, and what an unknown name is told."""

from __future__ import annotations

import pytest

from ftplan.planner import errors
from ftplan.planner.errors import (
    DoesNotFitError,
    FtplanError,
    InputError,
    InterruptedRunError,
    RunFailedError,
    UnknownNameError,
    nearest_names,
)

GPUS = ("l4", "l40", "l40s", "rtx-4090", "rtx-4080", "a100-80gb-sxm", "t4")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FtplanError("x"), 2),
        (InputError("x"), 2),
        (UnknownNameError("GPU", "x", GPUS), 2),
        (DoesNotFitError("x"), 1),
        (RunFailedError("x"), 1),
        (InterruptedRunError("x"), 130),
    ],
)
def test_exit_statuses(error: FtplanError, status: int) -> None:
    assert error.exit_status == status


def test_every_error_stands_in_the_drawn_tree() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, FtplanError)
    }
    drawn = {
        word for word in (errors.__doc__ or "").replace("─", " ").split() if word.endswith("Error")
    }
    assert drawn == classes


def test_message_and_hint_are_kept_apart() -> None:
    error = InputError("row 3 has no text", "give the column with `--text-column`")
    assert str(error) == error.message == "row 3 has no text"
    assert error.hint == "give the column with `--text-column`"
    assert InputError("x").hint is None


def test_an_unknown_name_is_told_the_nearest() -> None:
    error = UnknownNameError("GPU", "RTX4090", GPUS)
    assert error.message == "unknown GPU `RTX4090`"
    assert (error.hint or "").startswith("did you mean `rtx-4090`")


def test_a_short_list_is_given_where_nothing_is_near() -> None:
    error = UnknownNameError("method", "zzz", ["qlora", "lora"], "see `ftplan methods`")
    assert error.hint == "known: lora, qlora. see `ftplan methods`"


def test_a_long_list_is_not_given_where_nothing_is_near() -> None:
    assert UnknownNameError("model", "zzz", [f"name-{i}" for i in range(25)]).hint is None


def test_nearest_names_come_best_first_and_ignore_case() -> None:
    assert nearest_names("L40s", GPUS)[0] == "l40s"
    assert nearest_names("RTX-4090", ["RTX-4080", "RTX-4090"]) == ["RTX-4090", "RTX-4080"]
    assert nearest_names("a100", GPUS) == ["a100-80gb-sxm"]  # a part of a name is near
    assert nearest_names("", GPUS) == []
    assert nearest_names("zzzzzz", GPUS) == []


def test_no_more_nearest_names_than_asked_for() -> None:
    names = [f"qwen-{i}b" for i in range(9)]
    assert len(nearest_names("qwen", names)) == 3
    assert len(nearest_names("qwen", names, count=1)) == 1
