"""What judges completions: rules, and a reward model.

A reward model is given the whole conversation as its own template writes it, as it was trained. It
judges so many rows at once as a micro-batch has, so that it needs no more memory than was planned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from ftplan.launcher import remote_code
from ftplan.launcher.data.rows import Message, Row
from ftplan.launcher.data.tokens import RowTokenizer, load_tokenizer
from ftplan.launcher.model_source import check_safetensors

Reward = Callable[..., list[float]]


def exact_match(*, completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where a completion is the row's answer."""
    pairs = zip(completions, answer, strict=True)
    return [float(_plain(made) == _plain(wanted)) for made, wanted in pairs]


def contains_answer(*, completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the row's answer stands in a completion."""
    pairs = zip(completions, answer, strict=True)
    return [float(_plain(wanted) in _plain(made)) for made, wanted in pairs]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


# By the names of `planner.rewards.RULE_REWARDS`.
RULES: Mapping[str, Reward] = {
    "exact-match": exact_match,
    "contains-answer": contains_answer,
}


class RewardModel:
    """A sequence classification model with one score a row, as a reward function of TRL's."""

    __name__ = "reward_model"

    def __init__(self, model: Any, tokenizer: RowTokenizer, *, rows: int, max_length: int) -> None:
        """`rows`: at once. `max_length`: tokens of a conversation, of which the last ones count."""
        self.model, self.tokenizer = model, tokenizer
        self.rows, self.max_length = rows, max_length

    def __call__(
        self, *, completions: Sequence[str], conversation: Sequence[str], **_: Any
    ) -> list[float]:
        """A score of each completion. `conversation`: what came before, messages as JSON."""
        made = zip(conversation, completions, strict=True)
        tokens = [self._tokens(before, completion) for before, completion in made]
        scores: list[float] = []
        for start in range(0, len(tokens), self.rows):
            scores += self._scores(tokens[start : start + self.rows])
        return scores

    def _tokens(self, before: str, completion: str) -> list[int]:
        messages = tuple(Message(**message) for message in json.loads(before))
        row = Row(number=0, messages=(*messages, Message("assistant", completion)))
        (whole,) = self.tokenizer.tokenize([row])
        return whole.input_ids[-self.max_length :]

    def _scores(self, rows: Sequence[list[int]]) -> list[float]:
        """Padded behind, so that the model finds each row's last token by its padding."""
        longest, pad = max(map(len, rows)), self.model.config.get_text_config().pad_token_id
        padded = [row + [pad] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        scores: list[float] = self.judge(torch.tensor(padded), torch.tensor(mask)).tolist()
        return scores

    def judge(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Scores in fp32, (rows,)."""
        device = self.model.device
        with torch.no_grad():
            logits = self.model(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                use_cache=False,
            ).logits
        return logits[:, 0].float()


def reward_functions(settings: Mapping[str, Any], device: torch.device) -> list[Reward]:
    """What train.yaml's `rewards` names, the model loaded."""
    functions = [RULES[name] for name in settings["rules"]]
    if settings["model"] is not None:
        functions.append(_reward_model(settings, device))
    return functions


def _reward_model(settings: Mapping[str, Any], device: torch.device) -> RewardModel:
    """Adapters are merged into their base."""
    adapter, folder = settings["adapter"], settings["model"]
    tokenizer = load_tokenizer(adapter if _has_tokenizer(adapter) else folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=1,
        dtype=getattr(torch, settings["dtype"]),
        attn_implementation=settings["attn_implementation"],
        use_safetensors=True,
        trust_remote_code=remote_code.trusted(folder),
    )
    if adapter is not None:
        check_safetensors(Path(adapter))
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    pad, end = tokenizer.tokenizer.pad_token_id, tokenizer.tokenizer.eos_token_id
    model.config.get_text_config().pad_token_id = end if pad is None else pad
    return RewardModel(
        model.to(device).eval().requires_grad_(False),
        tokenizer,
        rows=settings["rows"],
        max_length=settings["max_length"],
    )


def _has_tokenizer(folder: str | None) -> bool:
    return folder is not None and (Path(folder) / "tokenizer_config.json").is_file()
