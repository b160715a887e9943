"""A hash table of counts, asked for many chunks of bytes at once.

Keys are the bytes themselves, up to 16 of them as two words, so that no two chunks are taken for
one another. Open addressing with linear steps; nothing is ever taken out but everything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST_KEY = 16
_LANE = 8  # bytes in a word

_MASKS = np.array([(1 << 8 * length) - 1 for length in range(_LANE + 1)], np.uint64)
# Odd numbers that spread keys over the table (Knuth, TAOCP 3, 6.4: multiplicative hashing).
_LOW_FACTOR, _HIGH_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_FULL = 0.5  # share of slots above which the table is emptied

Words = NDArray[np.uint64]


class CountTable:
    """Counts of chunks of at most LONGEST_KEY bytes without a zero byte; an empty one counts 0."""

    def __init__(self, slots_log2: int) -> None:
        self._slots_log2 = slots_log2
        self._mask = (1 << slots_log2) - 1
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        num_slots = self._mask + 1
        self._low, self._high = np.zeros(num_slots, np.uint64), np.zeros(num_slots, np.uint64)
        self._counts = np.zeros(num_slots, np.int64)
        self._num_keys = 0

    def __len__(self) -> int:
        return self._num_keys

    def get(self, low: Words, high: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Counts of keys, 0 for those that are not there, and the places of those in the query."""
        slots = self._slots(low, high)
        there = self._low[slots]
        found = (there == low) & (self._high[slots] == high)
        counts = self._counts[slots]
        counts[~found] = 0
        looked_for = np.flatnonzero(~found)
        missing = []
        while len(looked_for):
            empty = self._low[slots[looked_for]] == 0
            missing.append(looked_for[empty])
            looked_for = looked_for[~empty]
            slots[looked_for] = (slots[looked_for] + 1) & self._mask
            at = slots[looked_for]
            found = (self._low[at] == low[looked_for]) & (self._high[at] == high[looked_for])
            counts[looked_for[found]] = self._counts[at[found]]
            looked_for = looked_for[~found]
        absent = np.concatenate(missing) if missing else np.zeros(0, np.int64)
        return counts, absent[low[absent] != 0]

    def add(self, low: Words, high: Words, counts: NDArray[Any]) -> None:
        """Keys that are not there yet, each once; those that are too many are left out."""
        most = int(_FULL * (self._mask + 1))
        if self._num_keys + len(low) > most:
            self.clear()
            low, high, counts = low[:most], high[:most], counts[:most]
        self._num_keys += len(low)
        slots = self._slots(low, high)
        left = np.arange(len(low))
        while len(left):
            free = left[self._low[slots[left]] == 0]
            _, first = np.unique(slots[free], return_index=True)
            placed = free[first]
            at = slots[placed]
            self._low[at], self._high[at], self._counts[at] = (
                low[placed],
                high[placed],
                counts[placed],
            )
            left = np.setdiff1d(left, placed, assume_unique=True)
            slots[left] = (slots[left] + 1) & self._mask

    def _slots(self, low: Words, high: Words) -> NDArray[np.int64]:
        mixed = low * _LOW_FACTOR ^ high * _HIGH_FACTOR
        return (mixed >> np.uint64(64 - self._slots_log2)).astype(np.int64)


def keys(data: bytes, starts: NDArray[np.int64]) -> tuple[Words, Words, NDArray[np.int64]]:
    """Chunks of `data` from each of `starts` to the next as two words, and their bytes' number.

    Those longer than LONGEST_KEY, and those that are one zero byte, have zeros.
    """
    lengths = np.diff(starts)
    padded = data + bytes(2 * _LANE)
    words = np.ndarray((len(data) + _LANE,), "<u8", padded, strides=(1,))
    begins = starts[:-1]
    low = words[begins] & _MASKS[np.minimum(lengths, _LANE)]
    high = np.zeros_like(low)
    longer = np.flatnonzero(lengths > _LANE)
    high[longer] = (
        words[begins[longer] + _LANE] & _MASKS[np.minimum(lengths[longer] - _LANE, _LANE)]
    )
    too_long = lengths > LONGEST_KEY
    low[too_long] = 0
    high[too_long] = 0
    return low, high, lengths
