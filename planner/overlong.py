"""Rows longer than `max_length`, and what becomes of them.

Elsewhere: axolotl's `excess_length_strategy` (drop, truncate, raise), ms-swift's
`truncation_strategy` (delete, left, right, split, raise; split for plain text only), TRL's
`truncation_mode` (keep_start, keep_end) and `packing_strategy` bfd_split, LLaMA-Factory's
`cutoff_len` (truncates).
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, structs

from ftplan.planner.errors import InputError

# `truncate`: the end is cut off. `drop`: left out. `split`: several rows are made of one.
# `refuse`: nothing is planned.
OVERLONG = ("truncate", "drop", "split", "refuse")


class RowCounts(Struct, frozen=True, kw_only=True):
    """What became of rows at a `max_length`: of those that are trained on, or those held out.

    `num_rows`: before. `num_too_long`: of these, longer. `num_split` of those became `num_pieces`.
    Of rows and pieces, `num_cut` lost their end, `num_cut_tokens` together; `num_dropped` were left
    out as too long and `num_without_answer` because nothing that carries loss was left.
    `num_rows_left` with `num_tokens` go into training.
    """

    num_rows: int = 0
    num_too_long: int = 0
    num_split: int = 0
    num_pieces: int = 0
    num_cut: int = 0
    num_cut_tokens: int = 0
    num_dropped: int = 0
    num_without_answer: int = 0
    num_rows_left: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        made = self.num_rows - self.num_split + self.num_pieces
        left = made - self.num_dropped - self.num_without_answer
        assert self.num_rows_left == left, "every row is accounted for"

    @property
    def changes(self) -> bool:
        """Whether any row is not taken whole."""
        return bool(self.num_too_long or self.num_without_answer)


def overlong_to_dict(
    mode: str, max_length: int, trained: RowCounts, held_out: RowCounts
) -> dict[str, Any]:
    """For JSON, of a profile as of a run."""
    return {
        "mode": mode,
        "max_length": max_length,
        "train": structs.asdict(trained),
        "held_out": structs.asdict(held_out),
    }


def said_counts(counts: RowCounts, limit: int | None) -> str:
    """`12 rows longer than 512 tokens: 10 cut (340 tokens), 2 ...`; empty where nothing is
    changed."""
    done = [
        words
        for count, words in (
            (counts.num_dropped, f"{counts.num_dropped:,} left out"),
            (counts.num_split, f"{counts.num_split:,} made into {counts.num_pieces:,}"),
            (counts.num_cut, f"{counts.num_cut:,} cut by {counts.num_cut_tokens:,} tokens"),
            (
                counts.num_without_answer,
                f"{counts.num_without_answer:,} without an answer left, left out",
            ),
        )
        if count
    ]
    if not done:
        return ""
    than = "" if limit is None else f" longer than {limit:,} tokens"
    return f"{counts.num_too_long:,} of {counts.num_rows:,} rows{than}: " + ", ".join(done)


def refuse_overlong(num_too_long: int, max_length: int, where: str) -> InputError:
    """The error of `--overlong refuse`."""
    rows = "row is" if num_too_long == 1 else "rows are"
    return InputError(
        f"{num_too_long:,} {rows} longer than {max_length:,} tokens ({where})",
        "shorten them, raise `--max-length`, or take `--overlong truncate`, `drop` or `split`",
    )
