"""Tokens of a tokenizer that end answers, that fill rows up, and that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.vocabulary import OF_TEMPLATE

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


def add_tokens_to(tokenizer: Any, tokens: Sequence[str], marks: Sequence[str]) -> tuple[str, ...]:
    """Put in those that are not there yet, which are returned. A template's marks are special:
    they are left out of decoded answers, where other new tokens are shown."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    lacking = tuple(token for token in tokens if token not in known)
    for token in lacking:
        special = token in marks
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=special)], special_tokens=special
        )
    return lacking


def known_marks(tokenizer: Any, marks: Sequence[str]) -> tuple[str, ...]:
    """Marks of a template that are tokens of the vocabulary."""
    known = tokenizer.get_vocab()
    return tuple(mark for mark in marks if mark in known)


def written_tokens(tokenizer: Any, marks: Sequence[str]) -> tuple[str, ...]:
    """Those, where they are to be trained; raises InputError where there are none."""
    found = known_marks(tokenizer, marks)
    if not found:
        raise InputError(
            f"`--train-tokens {OF_TEMPLATE}`: the template writes words only, and no token of its "
            "own",
            "leave it out, or name another template with `--chat-template`",
        )
    return found


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Raises UnknownNameError for a token that the vocabulary has not."""
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            near = [name for name in tokenizer.added_tokens_encoder if name]
            raise UnknownNameError(
                "token to train", token, near, "`--add-tokens` puts new ones into the vocabulary."
            )
    return [int(known[token]) for token in tokens]
