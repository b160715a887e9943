"""Model and tokenizer fitted to each other: rows for new tokens, and the tokens at which answers
end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ftplan.launcher.data.tokens import RowTokenizer

_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def add_rows(model: PreTrainedModel, tokenizer: RowTokenizer) -> None:
    """A row for each token that the vocabulary got, where the model has none to spare.

    New rows begin as the mean of the others, so that new tokens are as likely as the old ones are
    on average (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
    transformers' own mean resizing adds a billionth of their covariance as noise, for which it
    holds the whole matrix in fp32; without it what is made anew from the base is always the same.
    """
    known = model.get_input_embeddings().weight.shape[0]
    wanted = len(tokenizer.tokenizer)
    if not tokenizer.added or wanted <= known:
        return
    model.resize_token_embeddings(wanted, mean_resizing=False)
    for module in _ends(model):
        _begin_as_mean(module.weight, known)
        if getattr(module, "bias", None) is not None:
            _begin_as_mean(module.bias, known)


def _ends(model: PreTrainedModel) -> list[Any]:
    """Embeddings, and an output projection of its own."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is None or outputs.weight is inputs.weight
    return [inputs] if tied else [inputs, outputs]


def _begin_as_mean(weight: torch.Tensor, known: int) -> None:
    with torch.no_grad():
        weight[known:] = weight[:known].mean(dim=0, dtype=torch.float32).to(weight.dtype)


def settle_ends(model: PreTrainedModel, tokenizer: RowTokenizer) -> None:
    """Generation stops at the token that the rows' answers end with, and at those that the model
    stopped at before; rows are filled up with the tokenizer's padding."""
    config = getattr(model, "generation_config", None)  # not where the model gives a score
    if config is None:
        return
    before = config.eos_token_id
    kept = before if isinstance(before, list) else [] if before is None else [before]
    ends = list(dict.fromkeys([*tokenizer.end_ids, *kept]))
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    config.pad_token_id = tokenizer.tokenizer.pad_token_id


def save_rows_alone(model: nn.Module) -> None:
    """Adapters are saved with their trained rows, not with both whole matrices, which PEFT saves as
    well where the vocabulary has grown: the others follow from the base."""
    if not isinstance(model, PeftModel):
        return
    config: Any = model.active_peft_config
    if getattr(config, "trainable_token_indices", None):
        save: Any = model.save_pretrained
        model.save_pretrained = _without_embeddings(save)


def _without_embeddings(save: Any) -> Any:
    def save_pretrained(folder: str, **options: Any) -> Any:
        return save(folder, **{**options, "save_embedding_layers": False})

    return save_pretrained


def save_tokenizer(model: PreTrainedModel, tokenizer: RowTokenizer, folder: Path) -> None:
    """The tokenizer as rows were rendered with it, which fills up on the left, where generating
    wants it; beside it what ends an answer, which adapters are saved without."""
    core = copy.deepcopy(tokenizer.tokenizer)
    core.padding_side = core.init_kwargs["padding_side"] = "left"
    core.save_pretrained(folder)
    config = getattr(model, "generation_config", None)
    if config is not None and not (folder / "generation_config.json").exists():
        ends = {name: getattr(config, name) for name in _ENDS}
        GenerationConfig(**ends).save_pretrained(folder)
