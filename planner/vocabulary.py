"""Tokens that a vocabulary gets, and tokens of it whose rows alone are trained.

A row more of the embeddings for each new token, and of the output projection where that has its
own: no row to spare, as `resize_token_embeddings(len(tokenizer))` and PEFT's `AutoPeftModel` size
them, so that what is saved loads in plain transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs

from ftplan.planner.errors import InputError
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.peft_options import PROMPTING, read_options
from ftplan.planner.trained import LM_HEAD, embedding_name

if TYPE_CHECKING:
    from ftplan.planner.methods import Method
    from ftplan.planner.plan import TrainingPlan

# PEFT's methods that train rows of the embeddings beside adapters (`trainable_token_indices` of
# PEFT 0.21).
_TRAINS_ROWS = "LORA"

# In `--train-tokens`: those that the chat template writes.
OF_TEMPLATE = "template"

TRAINS_THEM = (
    "`--method lora` trains their rows alone, and `--method full` everything; with other adapters "
    "`--modules-to-save embed_tokens,lm_head` trains both matrices whole"
)


def with_vocabulary(model: ModelSpec, num_tokens: int) -> ModelSpec:
    """The model with a row for each token, where it has not as many."""
    if num_tokens <= model.vocab_size:
        return model
    return structs.replace(model, vocab_size=num_tokens)


def config_with_vocabulary(config: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """A config.json's content with that many; of a model of several parts, in its text's."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" not in config:
        return {**config, "text_config": {**text, "vocab_size": num_tokens}}
    return {**config, "vocab_size": num_tokens}


def named_tokens(*lists: Sequence[str]) -> tuple[str, ...]:
    """Each once, in order."""
    return tuple(dict.fromkeys(token for tokens in lists for token in tokens))


def trains_rows(method: Method) -> bool:
    """Whether the method trains rows of the embeddings beside the frozen others."""
    return method.peft_type == _TRAINS_ROWS


def saved_for_tokens(method: Method, model: ModelSpec) -> tuple[str, ...]:
    """The modules that are trained whole for some tokens' sake; none where that is not needed or
    not to be had."""
    if method.peft_type is None or trains_rows(method) or method.peft_type in PROMPTING:
        return ()
    return (embedding_name(model), LM_HEAD)


def check_tokens(plan: TrainingPlan) -> None:
    """Raises InputError where tokens are named that the method would not train."""
    tokens, method = plan.trained_tokens, plan.resolved_method
    for token in tokens:
        if not token.strip():
            raise InputError("a token without letters or signs cannot be trained", "name another")
    if not tokens:
        return
    given = read_options(plan.peft_config)
    if "trainable_token_indices" in given:
        raise InputError(
            "`--peft-config trainable_token_indices=...` and named tokens are two lists of what is "
            "trained",
            "name all tokens with `--train-tokens`",
        )
    if plan.method == "full" or trains_rows(method) or plan.modules_to_save:
        return
    if plan.method == "freeze" and plan.trainable_modules:
        return
    raise InputError(
        f"method `{plan.method}` does not train the tokens {shown_tokens(tokens)}", TRAINS_THEM
    )


def check_named_tokens(given: Mapping[str, Any]) -> None:
    """Raises InputError for tokens that only a tokenizer could name, where none is at hand."""
    if OF_TEMPLATE in given.get("train_tokens", ()):
        raise InputError(
            f"`--train-tokens {OF_TEMPLATE}`: which tokens the chat template writes, the model's "
            "tokenizer says, and it is not read here",
            "name them, such as `--train-tokens '<|im_start|>,<|im_end|>'`; `ftplan plan` and "
            "`ftplan auto` read the tokenizer where the model's files are at hand",
        )


def shown_tokens(tokens: Sequence[str], most: int = 3) -> str:
    """For a person: the first of them."""
    named = ", ".join(f"`{token}`" for token in tokens[:most])
    return named if len(tokens) <= most else f"{named} and {len(tokens) - most} more"
