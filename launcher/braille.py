"""A curve in braille: each character cell is two dots wide and four high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_DOTS_WIDE, _DOTS_HIGH = 2, 4
_BLANK = 0x2800

# The bit of each dot, by column and row from the top (Unicode chapter 21.1).
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def curve(values: Sequence[float], width: int, height: int) -> tuple[list[str], float, float]:
    """`height` lines of `width` cells, with the values of the lower and the upper edge.

    Values stand at equal distances over the whole width: the mean of those that share a column of
    dots, a straight line where there are fewer than columns. What is no number leaves a gap.
    """
    columns = _columns(values, _DOTS_WIDE * width)
    known = [value for value in columns if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    bits = [[0] * width for _ in range(height)]
    before: int | None = None
    for x, value in enumerate(columns):
        if value is None:
            before = None
            continue
        y = _row(value, low, high, _DOTS_HIGH * height)
        for dot in _from_to(before, y):
            bits[dot // _DOTS_HIGH][x // _DOTS_WIDE] |= _BITS[x % _DOTS_WIDE][dot % _DOTS_HIGH]
        before = y
    return ["".join(chr(_BLANK + cell) for cell in line) for line in bits], low, high


def _columns(values: Sequence[float], count: int) -> list[float | None]:
    """One value for each column of dots."""
    if len(values) >= count:
        edges = [len(values) * x // count for x in range(count + 1)]
        return [_mean(values[start:end]) for start, end in pairwise(edges)]
    if len(values) < 2:
        return [_mean(values), *[None] * (count - 1)]
    return [_between(values, x * (len(values) - 1) / (count - 1)) for x in range(count)]


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def _between(values: Sequence[float], place: float) -> float | None:
    left = int(place)
    share = place - left
    one, other = values[left], values[min(left + 1, len(values) - 1)]
    value = one if share == 0 else (1 - share) * one + share * other
    return value if math.isfinite(value) else None


def _row(value: float, low: float, high: float, dots: int) -> int:
    """Dots from the top; the middle where all values are one."""
    if high == low:
        return dots // 2
    return round((high - value) / (high - low) * (dots - 1))


def _from_to(before: int | None, y: int) -> range:
    """The dots of a column that join it to the one on its left."""
    if before is None or abs(before - y) < 2:
        return range(y, y + 1)
    return range(before + 1, y + 1) if before < y else range(y, before)
