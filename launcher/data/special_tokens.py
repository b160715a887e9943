"""Tokens of a tokenizer that end answers and fill rows up."""

from __future__ import annotations

from typing import Any

# Made to fill rows up, in vocabularies whose tokenizers do not say so: Llama 3's, and common ones.
_PADS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<PAD>")


def answer_end_ids(tokenizer: Any, tail: str) -> list[int]:
    """The token that ends an answer, of the text that a template writes behind one: the first that
    stands for itself, such as `<|im_end|>`. Empty where there is none."""
    special = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return [token for token in ids if token in special][:1]


def pad_token_of(tokenizer: Any) -> str | None:
    """What fills rows up where the tokenizer does not say: a token that is there already, so that
    the model keeps its size. Loss and attention leave padding out by its place, not by its token,
    so the end token will do."""
    known = tokenizer.get_vocab()
    named = next((token for token in _PADS if token in known), None)
    last: str | None = tokenizer.convert_ids_to_tokens(0)
    return named or tokenizer.unk_token or tokenizer.eos_token or last
