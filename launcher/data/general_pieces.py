"""The general text that ftplan brings, in pieces of tokens."""

from __future__ import annotations

from ftplan.launcher.data.survey import CHARACTERS_PER_TOKEN
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.planner.evaluating import PIECE_TOKENS
from ftplan.profiles.text_facts import general_text


def general_pieces(tokenizer: RowTokenizer) -> list[list[int]]:
    """The text in pieces of equal length, in its order; what is left at the end is dropped."""
    (ids,) = tokenizer.ids([_whole()])
    ends = range(PIECE_TOKENS, len(ids) + 1, PIECE_TOKENS)
    return [ids[end - PIECE_TOKENS : end] for end in ends]


def num_general_pieces(tokenizer: RowTokenizer | None) -> int:
    """How many there are; without a tokenizer by characters."""
    if tokenizer is None:
        return int(len(_whole()) / CHARACTERS_PER_TOKEN) // PIECE_TOKENS
    return len(general_pieces(tokenizer))


def _whole() -> str:
    return "\n\n".join(passage.text for passage in general_text().texts)
