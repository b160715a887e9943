"""Answers that are labels: few different ones, over and over. A model that is tuned on them
classifies by what it writes."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

# Distinct answers that are labels: no more of them, and each twice in the mean.
MAX_LABELS = 20


class LabelRows(Struct, frozen=True, kw_only=True):
    """How many rows have a label."""

    num_train_rows: int
    num_eval_rows: int


def are_labels(num_distinct: int, num_rows: int) -> bool:
    """Whether so many different answers of so many rows are labels."""
    return num_distinct <= min(MAX_LABELS, num_rows // 2)


def said_labels(labels: Mapping[str, LabelRows]) -> str:
    """`3 labels, most often `positive`, 62 % of rows`; empty for no labels."""
    if not labels:
        return ""
    total = sum(rows.num_train_rows for rows in labels.values())
    most = max(labels, key=lambda name: labels[name].num_train_rows)
    share = labels[most].num_train_rows / max(1, total)
    return f"{len(labels)} labels, most often `{most}`, {100 * share:.0f} % of the training rows"
