"""What an evaluation asks of a model besides the loss on the held-out rows: some answers, and
general text. How much of it, and for how long at most."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from msgspec import Struct

# Held-out rows that the model is asked, at most.
ASKED_ROWS = 64

# Answers that are shown, and how long one may be.
SHOWN_ROWS = 3
SHOWN_NEW_TOKENS = 64

# A scored answer: no longer than the longest that the data have and a little, nor than this.
MOST_SCORED_TOKENS = 32
SPARE_TOKENS = 4

# Before training, no batch of scored answers is begun later. Afterwards it is the same rows.
SCORING_SECONDS = 30.0

# Answers are short where half of them are no longer. SQuAD's are spans of three words in the mean;
# labels are shorter still, and what explains itself is longer.
SHORT_ANSWER_TOKENS = 8

# Where the objective sets no length of a row.
MOST_PROMPT_TOKENS = 1024

# Tokens of a piece of general text; each is computed alone, so that its logits take less than a
# training step's.
PIECE_TOKENS = 128

# On a slow machine there are fewer pieces, though some of each kind of text.
LEAST_PIECES = 8
GENERAL_TEXT_SECONDS = 15.0


def are_short(answer_tokens: Sequence[int]) -> bool:
    """Whether answers of so many tokens can be scored by what they say."""
    return bool(answer_tokens) and statistics.median(answer_tokens) <= SHORT_ANSWER_TOKENS


def tokens_at_once(rows: int, max_length: int) -> int:
    """Of a batch of questions with their answers: half of what an evaluation batch of so many rows
    has. Keys and values of a layer are two, what checkpointing keeps of it is one."""
    return rows * max_length // 2


def rows_at_once(tokens: int, longest: int) -> int:
    """Questions in a batch of so many tokens; the longest has `longest` with its answer."""
    return max(1, tokens // longest) if longest else 1


class Questions(Struct, frozen=True, kw_only=True):
    """The held-out rows that a model is asked, in tokens. `prompt_tokens`: of the mean prompt,
    `shown_prompt_tokens`: of those that are shown, which are the shortest; `answer_tokens`: of the
    longest answer."""

    num_rows: int = 0
    prompt_tokens: float = 0.0
    shown_prompt_tokens: float = 0.0
    longest_prompt_tokens: int = 0
    answer_tokens: int = 0
    are_short: bool = False
