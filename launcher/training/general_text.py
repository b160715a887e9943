"""Perplexity of general text that ftplan brings: what a model forgets shows there."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from msgspec import Struct
from torch.nn import functional

from ftplan.launcher.data.general_pieces import general_pieces
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.training.answering import asked
from ftplan.launcher.training.sharded import first_says
from ftplan.planner.evaluating import GENERAL_TEXT_SECONDS, LEAST_PIECES


class GeneralLoss(Struct, frozen=True, kw_only=True):
    """`loss`: mean over the tokens, in nats."""

    loss: float
    num_pieces: int
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Of a mean loss in nats."""
    return math.exp(min(loss, 700.0))  # beyond, a float overflows


def general_loss(
    trainer: Any,
    tokenizer: RowTokenizer,
    *,
    num_pieces: int | None = None,
    most_seconds: float = GENERAL_TEXT_SECONDS,
) -> GeneralLoss:
    """The trained model's loss on the general text, without a chat template.

    `num_pieces`: as many as were taken before training; None takes what there is time for.
    """
    pieces = general_pieces(tokenizer)[:num_pieces]
    opening, began = tokenizer.first_token, time.monotonic()
    losses: list[float] = []
    with asked(trainer) as model:
        for piece in pieces:
            enough = num_pieces is None and len(losses) >= LEAST_PIECES
            if enough and first_says(trainer, time.monotonic() - began > most_seconds):
                break
            losses.append(_piece_loss(model, opening, piece, trainer.args.device))
    tokens = sum(_num_predicted(opening, piece) for piece in pieces[: len(losses)])
    return GeneralLoss(loss=sum(losses) / max(tokens, 1), num_pieces=len(losses), num_tokens=tokens)


def _num_predicted(opening: list[int], piece: list[int]) -> int:
    """Tokens that have another one before them."""
    return len(piece) - (not opening)


def _piece_loss(model: Any, opening: list[int], piece: list[int], device: torch.device) -> float:
    """The sum over the piece's tokens."""
    tokens = torch.tensor([opening + piece], device=device)
    output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    # Learned prompts stand before the tokens, and have logits too.
    logits = output.logits[0, -tokens.shape[1] :]
    predicted = _num_predicted(opening, piece)
    wanted = tokens[0, -predicted:]
    loss = functional.cross_entropy(logits[-predicted - 1 : -1].float(), wanted, reduction="sum")
    return float(loss)
