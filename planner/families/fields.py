"""Reading the fields of a `config.json`: their types, their defaults, their other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ftplan.planner.units import resolve_dtype

Config = Mapping[str, Any]


class FieldError(ValueError):
    """What is wrong with a field of a config.json, without the model's name."""


def require(config: Config, field: str) -> Any:
    """The field's value, null included."""
    if field not in config:
        raise FieldError(f"is incomplete: no `{field}`")
    return config[field]


def count(config: Config, field: str, least: int = 1) -> int:
    """A field that counts something: a whole number of at least `least`."""
    value = require(config, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FieldError(
            f"has `{field}`: {value!r}, where a whole number from {least} up is needed"
        )
    return value


def optional_count(config: Config, field: str) -> int | None:
    """The same for a field that may be missing or null."""
    return None if config.get(field) is None else count(config, field)


def flag(config: Config, field: str) -> bool:
    """A field that is true or false; null is false."""
    value = require(config, field)
    if value is not None and not isinstance(value, bool):
        raise FieldError(f"has `{field}`: {value!r}, where true or false is needed")
    return bool(value)


def number(config: Config, field: str) -> float:
    """A field that holds a number."""
    value = require(config, field)
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        raise FieldError(f"has `{field}`: {value!r}, where a number is needed")
    return value


def share(config: Config, field: str) -> float:
    """A field between 0 and 1, such as a dropout rate."""
    value = number(config, field)
    if not 0 <= value <= 1:
        raise FieldError(f"has `{field}`: {value!r}, where a number from 0 to 1 is needed")
    return value


def text(config: Config, field: str) -> str:
    """A field that holds a name."""
    value = require(config, field)
    if not isinstance(value, str):
        raise FieldError(f"has `{field}`: {value!r}, where a name is needed")
    return value


def section(config: Config, field: str) -> Config:
    """A field that holds a configuration of its own; left out or null: an empty one."""
    value = config.get(field)
    if value is not None and not isinstance(value, Mapping):
        raise FieldError(f"has `{field}`: {value!r}, where an object is needed")
    return value or {}


def whole_numbers(config: Config, field: str) -> list[int] | None:
    """A field that lists whole numbers; None where it is missing or null."""
    value = config.get(field)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(v, int) for v in value):
        raise FieldError(f"has `{field}`: {value!r}, where a list of whole numbers is needed")
    return list(value)


def layer_types(config: Config, derived: Callable[[int], str]) -> list[str]:
    """What kind of attention each layer has: as `layer_types` lists it, or as `derived` says."""
    depth = count(config, "num_hidden_layers")
    listed = config.get("layer_types")
    if listed is None:
        return [derived(index) for index in range(depth)]
    known = ("full_attention", "sliding_attention", "chunked_attention")
    if not isinstance(listed, list | tuple) or not all(kind in known for kind in listed):
        raise FieldError(f"has `layer_types`: {listed!r}, where a list of {known} is needed")
    if len(listed) < depth:
        raise FieldError(f"has {len(listed)} `layer_types` for {depth} `num_hidden_layers`")
    return list(listed[:depth])


def native_dtype(config: Config) -> str:
    """The dtype that the weights are stored in; fp32 where the file does not say."""
    dtype = config.get("torch_dtype") or config.get("dtype")
    return resolve_dtype(dtype) if isinstance(dtype, str) else "float32"


def architecture(config: Config, default: str) -> str:
    """The model class that the file names."""
    listed = config.get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else default


def head_dim(config: Config) -> int:
    """`head_dim`; left out or null, the width over the heads."""
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    if heads > hidden:
        raise FieldError(f"has `num_attention_heads`: {heads}, more than `hidden_size`: {hidden}")
    return optional_count(config, "head_dim") or hidden // heads


def divided_head_dim(config: Config, width: str, heads: str) -> int:
    """The width over the heads, in architectures that have no other."""
    hidden, num_heads = count(config, width), count(config, heads)
    if hidden % num_heads:
        raise FieldError(f"has `{heads}`: {num_heads}, which does not divide `{width}`: {hidden}")
    return hidden // num_heads


def key_value_heads(config: Config) -> int:
    """`num_key_value_heads`; left out or null, every head."""
    heads = count(config, "num_attention_heads")
    kv_heads = optional_count(config, "num_key_value_heads") or heads
    if heads % kv_heads:
        raise FieldError(
            f"has `num_key_value_heads`: {kv_heads}, which does not divide the {heads} heads of "
            "`num_attention_heads`"
        )
    return kv_heads


def rotary_dim(config: Config, width: int) -> int:
    """How much of a head of that width is rotated: transformers 5 keeps the share of it in
    `rope_parameters`, earlier versions beside it."""
    parameters = section(config, "rope_parameters")
    inside = parameters.get("partial_rotary_factor") is not None
    return int(width * share(parameters if inside else config, "partial_rotary_factor"))


def refuse_dropout(config: Config, field: str) -> None:
    """Raises FieldError for dropout at a place of its own, where no released model has any."""
    if share(config, field):
        raise FieldError(f"has `{field}`: {config[field]!r}, which the closed form does not model")
