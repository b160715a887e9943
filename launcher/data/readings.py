"""Rows that fit two formats: which is taken, what another one would train, and how to say so.

A reading is told apart by fields: without `label`, a labelled answer is an answer to be learned.
`--columns label=` leaves a field out, `--columns label=label` says that it counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, islice

from msgspec import Struct

from ftplan.launcher.data.records import Record
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.shapes import (
    FIELDS,
    TRAINS,
    Shape,
    Unusable,
    Value,
    other_shapes,
    renamed,
    row_of,
    shape_of,
)

# Rows that are looked at before a person is asked; what most of them are counts.
_ROWS_LOOKED_AT = 1000

_MOST_FIELDS = 3
# Fields that make a format, before those that it may have besides: a row without `output` asks
# only, however it asks.
_TELLING = ("label", "kto_tag", "task", "chosen", "rejected")
_TELLING_NAMES = dict.fromkeys((*_TELLING, "output", "completion", "response", "answer", *FIELDS))
_SHOWN_CHARACTERS = 36


class Reading(Struct, frozen=True, kw_only=True):
    """One way to read rows. `objective`: what it trains; `example`: what a row asks and teaches
    so; `columns`: what `--columns` says to have it."""

    format: str
    objective: str
    example: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.format}: trains {self.objective}, {self.example}"


def readings(
    records: Iterable[Record], columns: Mapping[str, str], objective: str | None = None
) -> tuple[Reading, ...]:
    """The reading that most rows have, then others that they could have and that would train
    something else. Empty where there is one only, or where `columns` tells them apart.

    `objective`: a plan's, where a person names one; readings that cannot train it do not count.
    """
    found: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], tuple[Reading, Reading]] = {}
    looked_at = 0
    for record in islice(records, _ROWS_LOOKED_AT):
        try:
            value = renamed(record.value, columns)
            shape = shape_of(value)
            row = row_of(record.number, value, shape)
        except Unusable:
            continue
        looked_at += 1
        for other in other_shapes(value, shape):
            key = (shape.name, other.name)
            if key not in first:
                pair = _pair(value, shape, row, other, columns, objective)
                if pair is None:
                    continue
                first[key] = pair
            found[key] += _is_without(value, tuple(first[key][1].columns), other)
    often = [first[key] for key, count in found.most_common() if count > looked_at // 2]
    if not often:
        return ()
    taken = often[0][0]
    return (taken, *(other for one, other in often if one.format == taken.format))


def said_columns(columns: Mapping[str, str]) -> str:
    """As `--columns` takes them."""
    return ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())


def _pair(
    value: Value,
    shape: Shape,
    row: Row,
    other: Shape,
    columns: Mapping[str, str],
    objective: str | None,
) -> tuple[Reading, Reading] | None:
    """A row's reading and another one; None where they train alike, or a person has decided."""
    fields = fields_between(value, other)
    if not fields or all(field in columns for field in fields):
        return None
    try:
        other_row = row_of(row.number, _without(value, fields), other)
    except Unusable:
        return None
    trained = [_trained(one, objective) for one in (shape, other)]
    if not all(trained) or (trained[0] == trained[1] and row == other_row):
        return None
    kept = {field: columns.get(field, field) for field in fields}
    left_out = dict.fromkeys(fields, "")
    one, two = (
        Reading(
            format=reading.name,
            objective=objective,
            example=_example(read),
            columns=told,
        )
        for reading, objective, read, told in (
            (shape, trained[0], row, kept),
            (other, trained[1], other_row, left_out),
        )
    )
    return one, two


def fields_between(value: Value, other: Shape) -> tuple[str, ...]:
    """The fewest fields without which a row has the other shape; none where there are no such."""
    known = [field for field in _TELLING_NAMES if value.get(field) is not None]
    for number in range(1, _MOST_FIELDS + 1):
        for fields in combinations(known, number):
            if _is_without(value, fields, other):
                return fields
    return ()


def _is_without(value: Value, fields: Sequence[str], shape: Shape) -> bool:
    """Whether a row without the fields has a shape."""
    try:
        return shape_of(_without(value, fields)) is shape
    except Unusable:
        return False


def _without(value: Value, fields: Sequence[str]) -> Value:
    return {name: item for name, item in value.items() if name not in fields}


def _trained(shape: Shape, objective: str | None) -> str:
    """What rows of a shape train; empty where that is not what a person asks for."""
    trains = TRAINS[shape.objective]
    if objective is None:
        return trains[0]
    return objective if objective in trains else ""


def _example(row: Row) -> str:
    parts = [row.prompt[-1].content] if row.prompt else []
    return " -> ".join(f"`{_shown(part)}`" for part in (*parts, row.answer) if part)


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
