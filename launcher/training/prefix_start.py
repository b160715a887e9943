"""Learned keys and values that begin as those of real words.

Random ones drown what a model knows, and it takes many steps to get back to it. Li and Liang 2021
(arXiv 2101.00190, section 7.4) find activations of real words far better, and words of the task
hardly better than others. So the words are neutral and the same for any data: nothing of a row is
in an adapter before it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, initialize_kv_prefix_from_past_key_values
from torch import nn

from ftplan.planner.peft_options import CACHE_FILLING, read_options

# Said again until there are words for all tokens of a prefix.
WORDS = (
    "Read what is asked with care and then write an answer that is clear, correct and complete. "
)


def begin_with_words(model: nn.Module, tokenizer: Any, settings: Mapping[str, Any]) -> bool:
    """Fill a PEFT `model`'s prefix with keys and values of `WORDS`; whether there was one to fill.

    Prefixes that a network makes are left as they are, as are those with `init_weights` given and
    those of models whose layers differ in the shape of their keys.
    """
    if not isinstance(model, PeftModel) or "init_weights" in read_options(settings["peft_config"]):
        return False
    config: Any = model.active_peft_config
    if config.peft_type.value not in CACHE_FILLING or getattr(config, "prefix_projection", False):
        return False
    base: Any = model.get_base_model()
    words = _words(tokenizer, config.num_virtual_tokens).to(base.device)
    with torch.no_grad():
        cache = base(input_ids=words, use_cache=True).past_key_values
    shape = (1, config.num_attention_heads, config.num_virtual_tokens)
    if len(cache) != config.num_layers or any(keys.shape[:3] != shape for keys, *_ in cache):
        return False
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    return True


def _words(tokenizer: Any, count: int) -> torch.Tensor:
    """(1, count) tokens, the first of which is what the tokenizer begins rows with."""
    ids: list[int] = []
    text = WORDS
    while len(ids) < count:
        ids = tokenizer(text)["input_ids"]
        text += WORDS
    return torch.tensor([ids[:count]])
