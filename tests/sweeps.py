"""Sweeps over many cells: those that stand for a mechanism of their own always run, the others
with `--whole-matrix`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def swept(cells: Iterable[Any], always: Iterable[Any]) -> list[Any]:
    """Parameters of a test, from values or tuples of them; those not in `always` are marked."""
    cells, kept = list(cells), list(always)
    unknown = [cell for cell in kept if cell not in cells]
    assert not unknown, f"no cells of the sweep: {unknown}"
    return [cell if cell in kept else only_whole(cell) for cell in cells]


def named(name: str, *values: Any, joined: Collection[str]) -> Any:
    """A cell with a name; those in `joined` have together what others have one by one, and run
    with `--whole-matrix` alone."""
    marks = (pytest.mark.whole_matrix,) if name in joined else ()
    return pytest.param(*values, id=name, marks=marks)


def only_whole(cell: Any, name: str | None = None) -> Any:
    """A cell that runs with `--whole-matrix` alone."""
    values = cell if isinstance(cell, tuple) else (cell,)
    return pytest.param(*values, id=name, marks=pytest.mark.whole_matrix)
