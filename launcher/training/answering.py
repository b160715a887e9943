"""The model's own answers: greedy, in batches padded on the left, until it stops."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.training.adapters import tells_tasks_apart
from ftplan.launcher.training.sharded import first_says
from ftplan.planner.evaluating import rows_at_once


@contextlib.contextmanager
def asked(trainer: Any) -> Iterator[nn.Module]:
    """The trained model as it answers: without dropout and gradients, in training's precision."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.autocast_smart_context_manager():
            yield model
    finally:
        model.train(was_training)


def answers(
    trainer: Any,
    tokenizer: RowTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    tasks: Sequence[int] = (),
    max_new_tokens: int,
    tokens_at_once: int,
    seconds: float | None = None,
) -> list[str]:
    """An answer for each prompt in order, of at most `max_new_tokens` tokens.

    `tasks`: the prompts', for models that tell tasks apart; all the first, if empty.
    `tokens_at_once`: of a batch with its answers. `seconds`: no batch is begun later, so that there
    may be fewer answers than prompts; one batch there is.
    """
    longest = max(map(len, prompts), default=0) + max_new_tokens
    size = rows_at_once(tokens_at_once, longest)
    began, found = time.monotonic(), list[str]()
    with asked(trainer) as model:
        for first in range(0, len(prompts), size):
            limited = seconds is not None and bool(found)
            if limited and first_says(trainer, time.monotonic() - began > (seconds or 0.0)):
                break
            batch = prompts[first : first + size]
            of_tasks = list(tasks[first : first + size]) or [0] * len(batch)
            found += _answered(
                model, tokenizer, batch, of_tasks, max_new_tokens, trainer.args.device
            )
    return found


def _answered(
    model: Any,
    tokenizer: RowTokenizer,
    prompts: Sequence[Sequence[int]],
    tasks: Sequence[int],
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    width = max(map(len, prompts))
    stops = stop_tokens(model, tokenizer)
    padding = next(t for t in (tokenizer.tokenizer.pad_token_id, *stops, 0) if t is not None)
    padded = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    tokens = model.generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=stops or None,
        **({"task_ids": torch.tensor(tasks, device=device)} if tells_tasks_apart(model) else {}),
    )
    new = tokens[:, width:].tolist()
    decoded = tokenizer.tokenizer.batch_decode(
        [_until(row, stops) for row in new], skip_special_tokens=True
    )
    return [text.strip() for text in decoded]


def stop_tokens(model: Any, tokenizer: RowTokenizer) -> list[int]:
    """What ends an answer: the model's own end tokens, and what training teaches."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [*(own if isinstance(own, list) else [own]), *tokenizer.end_ids]
    return list(dict.fromkeys(token for token in found if token is not None))


def _until(tokens: list[int], stops: list[int]) -> list[int]:
    """What comes before the first token that ends the answer."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
