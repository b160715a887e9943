"""In which order rows are trained on, and what that costs in padding.

The planner predicts with the order that training uses, so padding is counted, not guessed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

# Rows of this many micro-batches are sorted by length together: enough to make their lengths
# alike, few enough to leave the order random.
BATCHES_SORTED_TOGETHER = 16

# Lengths looked at when padding is predicted; evenly spaced over the sorted lengths.
_SAMPLE_ROWS = 4096


def training_order(
    lengths: Sequence[int], batch_size: int, accumulation_steps: int, seed: int, epoch: int
) -> list[int]:
    """Indices of the rows of one epoch, micro-batch after micro-batch.

    Shuffled, then grouped by length, the groups shuffled again. The micro-batch with the
    longest row comes first, so that what does not fit fails at once; the next longest starts
    the second optimizer step, where optimizer states are in memory too. A last batch that is
    not full stays last. Deterministic in all arguments.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    # In the first group, which leaves no row over: the batch that is not full comes last.
    longest = max(range(len(order)), key=lambda place: lengths[order[place]])
    order[0], order[longest] = order[longest], order[0]
    together = BATCHES_SORTED_TOGETHER * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), together):
        group = sorted(order[start : start + together], key=lambda i: -lengths[i])
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    partial = [batch for batch in batches if len(batch) < batch_size]
    full = [batch for batch in batches if len(batch) == batch_size]
    rng.shuffle(full)
    # Stable: among equals the shuffled order decides.
    by_longest = sorted(range(len(full)), key=lambda b: -lengths[full[b][0]])
    if by_longest:
        first = full[by_longest[0]]
        rest = [batch for b, batch in enumerate(full) if b not in by_longest[:2]]
        second = [full[b] for b in by_longest[1:2]]
        position = accumulation_steps - 1
        full = [first, *rest[:position], *second, *rest[position:]]
    return [index for batch in (*full, *partial) for index in batch]


def padded_batch_tokens(
    lengths: Sequence[int], order: Sequence[int], batch_size: int, max_length: int
) -> list[int]:
    """Tokens of each micro-batch of `order`, every row padded to its batch's longest."""
    tokens = []
    for start in range(0, len(order), batch_size):
        rows = [min(lengths[i], max_length) for i in order[start : start + batch_size]]
        tokens.append(max(rows) * len(rows))
    return tokens


def mean_batch_tokens(lengths: Sequence[int], batch_size: int, max_length: int) -> float:
    """Mean padded tokens of a full micro-batch under `training_order`.

    `lengths` sorted. Above 4,096 rows a sample of evenly spaced ranks stands for all.
    """
    stride = max(1, len(lengths) // _SAMPLE_ROWS)
    sample = lengths[::stride]
    order = training_order(sample, batch_size, 1, seed=0, epoch=0)
    tokens = padded_batch_tokens(sample, order, batch_size, max_length)
    full = tokens[: len(sample) // batch_size] or tokens
    return sum(full) / len(full)


def mean_padded_rows(lengths: Sequence[int], batch_size: int, max_length: int) -> float:
    """Mean length of rows in no order, each padded to the longest of its batch.

    `lengths` sorted from the longest. The longest of B drawn rows is the i-th of N, counted from 0,
    in a share ((N - i) / N)^B - ((N - i - 1) / N)^B of the batches.
    """
    stride = max(1, len(lengths) // _SAMPLE_ROWS)
    sample = lengths[::stride]
    number = len(sample)
    reached = [((number - place) / number) ** batch_size for place in range(number + 1)]
    return sum(
        min(length, max_length) * (reached[place] - reached[place + 1])
        for place, length in enumerate(sample)
    )
