"""Model specifications from `config.json`, one reader for each family of architectures.

Input is the mapping that the Hub's `config.json` holds, under Hugging Face's field names; readers
follow the modelling code of transformers 5.23. Counts, shapes and names that follow from it are
compared with transformers' own in `tests/`.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import structs

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families.blocks import Reader
from ftplan.planner.families.defaults import with_defaults
from ftplan.planner.families.falcon import FALCON
from ftplan.planner.families.fields import (
    Config,
    FieldError,
    architecture,
    count,
    native_dtype,
)
from ftplan.planner.families.gemma import GEMMA
from ftplan.planner.families.gpt_like import GPT_LIKE
from ftplan.planner.families.llama_like import LLAMA_LIKE, llama
from ftplan.planner.families.mixtures import MIXTURES
from ftplan.planner.families.multimodal import MULTIMODAL
from ftplan.planner.families.remote import REMOTE
from ftplan.planner.families.sizes import (
    MIN_SIZE_PARAMETERS,
    SIZE_ANCHORS,
    config_of_size,
    spec_from_size,
)
from ftplan.planner.model_spec import ModelSpec

FAMILIES: dict[str, Reader] = {
    **LLAMA_LIKE,
    **GEMMA,
    **GPT_LIKE,
    **FALCON,
    **MIXTURES,
    **MULTIMODAL,
    **REMOTE,
}
"""The reader of each `model_type`."""


def spec_from_config(config: Config, name: str) -> ModelSpec:
    """The specification of the model that `config` (a parsed `config.json`) describes.

    Raises InputError when fields are missing or of the wrong type, UnknownNameError when
    the family is not known.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"model `{name}`: config.json does not hold an object")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(
            f"model `{name}`: config.json has no `model_type`",
            "is this the folder of a transformers model?",
        )
    if config.get("is_encoder_decoder"):
        raise InputError(
            f"model `{name}` (`{model_type}`) is an encoder-decoder",
            "ftplan plans decoder-only language models",
        )
    reader = FAMILIES.get(model_type)
    if reader is None:
        raise UnknownNameError("architecture", model_type, FAMILIES, EXACT_ADVICE)
    try:
        return _with_biased(reader, with_defaults(config), name)
    except FieldError as error:
        raise InputError(f"model `{name}`: config.json {error}") from None


# Flags of configs that give linear modules a bias, where they are there.
_BIAS_SWITCHES = ("attention_bias", "mlp_bias")


def _with_biased(reader: Reader, config: Config, name: str) -> ModelSpec:
    """The model, and beside it the one with the biases that it has not but could have."""
    spec = reader(config, name)
    switches = tuple(switch for switch in _BIAS_SWITCHES if config.get(switch) is False)
    if not switches or spec.has_biases:
        return spec
    biased = reader({**config, **dict.fromkeys(switches, True)}, name)
    if not biased.has_biases:
        return spec
    return structs.replace(spec, biased=biased, bias_switches=switches)


EXACT_ADVICE = "`ftplan estimate --exact` takes any decoder that transformers builds."


def stand_in_spec(config: Config, name: str) -> ModelSpec:
    """A Llama-shaped decoder in the place of an architecture that the closed form does not know.

    It serves the settings of a plan that is then run dry; its counts are no one's. Raises
    InputError where not even width, depth, heads and vocabulary are said.
    """
    said = config.get("text_config", config)
    model_type = str(config.get("model_type"))
    try:
        shape = {
            field: next(count(said, other) for other in (field, *others) if other in said)
            for field, others in _OTHER_NAMES.items()
        }
    except (StopIteration, FieldError):
        raise InputError(
            f"model `{name}`: ftplan does not know `{model_type}`, nor does its config.json say "
            + ", ".join(f"`{field}`" for field in _OTHER_NAMES)
        ) from None
    shape["intermediate_size"] = 4 * shape["hidden_size"]
    heads = shape["num_attention_heads"]
    shape["head_dim"] = max(1, shape["hidden_size"] // heads)
    shape["max_position_embeddings"] = int(said.get("max_position_embeddings") or 2048)
    return structs.replace(
        llama({**with_defaults({"model_type": "llama"}), **shape}, name),
        model_type=model_type,
        architecture=architecture(config, model_type),
        native_dtype=native_dtype(said),
    )


# What architectures call the fields that every one has.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "vocab_size": ("padded_vocab_size",),
}


__all__ = [
    "EXACT_ADVICE",
    "FAMILIES",
    "MIN_SIZE_PARAMETERS",
    "SIZE_ANCHORS",
    "config_of_size",
    "spec_from_config",
    "spec_from_size",
    "stand_in_spec",
]
