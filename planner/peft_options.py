"""Options of PEFT's configurations: how they are written, and which of them change a count.

PEFT's own defaults (0.21) stand here once; a test compares them with its classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from ftplan.planner.errors import InputError, nearest_names

_BIAS = {"bias": "none"}
_SAVED = {"modules_to_save": None}
_LAYERS = {"layers_to_transform": None}
_TARGETS = {"target_modules": None, **_SAVED}
_TARGETS_IN_LAYERS = {**_TARGETS, **_LAYERS}
_COMMON = {**_TARGETS_IN_LAYERS, **_BIAS}
_PROMPT = {"num_virtual_tokens": None, **_SAVED}

# What decides a count, by PEFT's name of the method, with PEFT's default.
COUNTED: dict[str, dict[str, Any]] = {
    "LORA": {
        "r": 8,
        **_COMMON,
        "rank_pattern": {},
        "use_dora": False,
        "lora_bias": False,
        "init_lora_weights": True,
        "trainable_token_indices": None,
    },
    "ADALORA": {"init_r": 12, **_TARGETS, **_BIAS},
    "LOHA": {"r": 8, **_TARGETS_IN_LAYERS, "rank_pattern": {}},
    "LOKR": {
        "r": 8,
        **_TARGETS_IN_LAYERS,
        "rank_pattern": {},
        "decompose_both": False,
        "decompose_factor": -1,
    },
    "IA3": {**_TARGETS, "feedforward_modules": None},
    "VERA": {"r": 256, **_COMMON},
    "PVERA": {"r": 256, **_COMMON},
    "OFT": {"r": 0, "oft_block_size": 32, "block_share": False, **_COMMON},
    "BOFT": {"boft_block_size": 4, "boft_block_num": 0, **_COMMON},
    "PSOFT": {
        "r": 32,
        "psoft_orth": True,
        "psoft_mag_a": True,
        "psoft_mag_b": True,
        **_TARGETS_IN_LAYERS,
    },
    "HRA": {"r": 8, **_COMMON},
    "FOURIERFT": {"n_frequency": 1000, **_COMMON},
    "WAVEFT": {"n_frequency": 2592, "proportional_parameters": False, **_COMMON},
    "C3A": {"block_size": 256, **_COMMON},
    "ROAD": {"variant": "road_1", "group_size": 64, **_TARGETS},
    "MISS": {"r": 64, "mini_r": 1, "init_weights": True, **_COMMON},
    "RANDLORA": {"r": 32, **_COMMON},
    "VBLORA": {"r": 4, "num_vectors": 256, "vector_length": 256, **_COMMON},
    "UNILORA": {"r": 4, "theta_d_length": 256, **_COMMON},
    "TINYLORA": {"r": 2, "u": 64, "weight_tying": 0.0, **_COMMON},
    "HIRA": {"r": 32, **_TARGETS_IN_LAYERS},
    "DELORA": {"r": 8, "rank_pattern": {}, **_COMMON},
    "GRALORA": {"r": 32, "hybrid_r": 0, "gralora_k": 2, **_COMMON},
    "GLORA": {
        "r": 8,
        "config_A_B": "lora",
        "config_C": "lora",
        "config_D_E": "constant",
        **_TARGETS,
        **_BIAS,
    },
    "LILY": {"r": 32, "stride_A": 1, "num_B": 2, **_TARGETS_IN_LAYERS},
    "DEFT": {"r": 8, "para": False, **_COMMON},
    "PEANUT": {"r": 32, "depth": 0, **_TARGETS_IN_LAYERS},
    "SHIRA": {"r": 32, "mask_type": "random", **_TARGETS},
    "SUPERTUNING": {"sparsity": 0.99, "r": None, **_TARGETS},
    "OSF": {"effective_rank": None, **_TARGETS},
    "BEFT": _TARGETS,
    "LN_TUNING": _TARGETS,
    "TRAINABLE_TOKENS": {"token_indices": []},
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": {
        **_PROMPT,
        "encoder_reparameterization_type": "MLP",
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
    },
    "MULTITASK_PROMPT_TUNING": {**_PROMPT, "num_ranks": 1, "num_tasks": 1},
    "PREFIX_TUNING": {**_PROMPT, "prefix_projection": False, "encoder_hidden_size": None},
    "CARTRIDGE": {**_PROMPT, "num_frozen_tokens": 1},
    "ADAPTION_PROMPT": {"adapter_len": None, "adapter_layers": None},
    "POLY": {"r": 8, "n_tasks": 1, "n_skills": 4, "n_splits": 1, **_TARGETS},
    "SHADOW": {
        "r": 8,
        "update_hidden_size": None,
        "shadow_num_hidden_layers": None,
        "share_embeddings": True,
        **_SAVED,
    },
}

# What they train reaches the layers as keys and values in their cache.
CACHE_FILLING = frozenset(("PREFIX_TUNING", "CARTRIDGE"))
# Those that put embeddings in front of a row's own; and all that put something there.
LENGTHENING = frozenset(("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"))
PROMPTING = CACHE_FILLING | LENGTHENING

# What changes no count: scales, dropout, how weights begin, what a checkpoint holds.
NEUTRAL = frozenset(
    (
        *("alpha", "alpha_pattern", "lora_alpha", "lora_dropout", "loftq_config", "use_rslora"),
        *("fan_in_fan_out", "init_weights", "target_r", "tinit", "tfinal", "deltaT", "beta1"),
        *("beta2", "orth_reg_weight", "total_step", "rank_dropout", "module_dropout"),
        *("rank_dropout_scale", "init_ia3_weights", "vera_dropout", "pvera_dropout"),
        *("d_initial", "projection_prng_key", "save_projection", "sample_at_inference"),
        *("generator_seed", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"),
        *("boft_dropout", "psoft_alpha", "psoft_dropout", "ab_svd_init", "psoft_svd"),
        *("psoft_svd_lowrank_niter", "random_seed", "apply_GS", "scaling", "random_loc_seed"),
        *("wavelet_family", "use_idwt", "miss_dropout", "sparse", "very_sparse"),
        *("randlora_dropout", "randlora_alpha", "topk", "save_only_topk_weights"),
        *("vblora_dropout", "init_vector_bank_bound", "init_logits_std", "proj_seed"),
        *("unilora_dropout", "init_theta_d_bound", "save_indices", "projection_seed"),
        *("init_v_bound", "tinylora_dropout", "hira_dropout", "delora_lambda"),
        *("lambda_pattern", "gralora_dropout", "decomposition_method", "init_scale"),
        *("deft_dropout", "act_fn", "select_top", "save_precomputed_indices"),
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
        *("tokenizer_kwargs", "encoder_dropout", "shadow_alpha", "shadow_dropout"),
        *("auxiliary_loss_weight",),
    )
)


class PeftOptions(Struct, frozen=True, kw_only=True):
    """The options of one method that decide its count: given ones, or else PEFT's defaults.

    `num_trained_tokens`: named ones, whose rows are trained.
    """

    method: str
    peft_type: str
    values: Mapping[str, Any]
    num_trained_tokens: int = 0

    def count(self, name: str, least: int = 1) -> int:
        """A whole number; raises InputError for anything else."""
        value = self.values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.refused(name, f"a whole number from {least} up is needed")
        return value

    def optional_count(self, name: str, default: int) -> int:
        return default if self.values[name] is None else self.count(name)

    def flag(self, name: str) -> bool:
        value = self.values[name]
        if not isinstance(value, bool):
            raise self.refused(name, "true or false is needed")
        return value

    def share(self, name: str) -> float:
        """A number from 0 to 1."""
        value = self.values[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise self.refused(name, "a number from 0 to 1 is needed")
        return float(value)

    def one_of(self, name: str, *modelled: Any) -> Any:
        """A value out of a list; raises InputError for one that the closed form does not know."""
        value = self.values[name]
        if value not in modelled:
            raise _unknown(self.method, name, value)
        return value

    def names(self, name: str) -> tuple[str, ...] | None:
        """A list of names; None where it is not given."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise self.refused(name, "the closed form needs a list of names here")
        return tuple(value)

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers, or one; None where it is not given."""
        value = self.values.get(name)
        if value is None:
            return None
        listed = [value] if isinstance(value, int) else value
        if not isinstance(listed, list) or not all(type(v) is int and v >= 0 for v in listed):
            raise self.refused(name, "the closed form needs a list of whole numbers here")
        return tuple(dict.fromkeys(listed))

    def refused(self, name: str, why: str) -> InputError:
        """What is wrong with an option's value."""
        return InputError(
            f"option `{name}` of method `{self.method}` is {self.values[name]!r}: {why}",
            f"give another one with `--peft-config {name}=...`, or other `--target-modules`",
        )


def resolve_options(
    method: str, peft_type: str, settled: Mapping[str, Any], given: Mapping[str, Any]
) -> PeftOptions:
    """PEFT's defaults, what method and plan settle, and what is given, the later over the former.

    Raises InputError for a given option of which the closed form does not know what it changes.
    """
    counted = COUNTED[peft_type]
    for name, value in given.items():
        if name not in counted and name not in NEUTRAL:
            raise _unknown(method, name, value)
    values = {**counted, **settled, **given}
    return PeftOptions(method=method, peft_type=peft_type, values=values)


def _unknown(method: str, name: str, value: Any) -> InputError:
    near = nearest_names(name, [*NEUTRAL, *{n for known in COUNTED.values() for n in known}], 1)
    meant = f"did you mean `{near[0]}`? " if near and near[0] != name else ""
    return InputError(
        f"the closed form does not know what `--peft-config {name}={value}` changes in method "
        f"`{method}`",
        f"{meant}`ftplan estimate MODEL --exact` carries out the step with any option of PEFT",
    )


# --- how options are written

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("null", "~", ""), None),
}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_TOKEN = re.compile(r"""\s*([\[\]{},:]|"[^"]*"|'[^']*'|[^\[\]{},:"'\s][^\[\]{},:]*)\s*""")


def read_options(texts: Iterable[str]) -> dict[str, Any]:
    """`name=value` each, the value as in YAML: `true`, `8`, `all`, `[q_proj, v_proj]`, `{a: 1}`.

    Raises InputError for a text that cannot be read.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(
                f"`--peft-config {text}`: options are written `name=value`",
                "for example `--peft-config use_dora=true`",
            )
        try:
            options[name.strip()] = _value(value.strip())
        except (ValueError, TypeError):  # TypeError: a list as a key
            raise InputError(
                f"`--peft-config {text}` cannot be read",
                "values are written as in YAML: `true`, `8`, `all`, `[q_proj, v_proj]`",
            ) from None
    return options


def _value(text: str) -> Any:
    if text[:1] not in ("[", "{", '"', "'"):
        return _scalar(text)
    tokens, place = [], 0
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            raise ValueError(text)
        tokens.append(token[1].rstrip())
        place = token.end()
    value = _collection(tokens)
    if tokens:
        raise ValueError(text)
    return value


def _collection(tokens: list[str]) -> Any:
    """The value that begins here; its tokens are taken away. Raises ValueError."""
    token = _next(tokens)
    if token == "[":
        return [value for value, _ in _entries(tokens, "]", with_values=False)]
    if token == "{":
        return dict(_entries(tokens, "}", with_values=True))
    if token in ("]", "}", ",", ":"):
        raise ValueError(token)
    return token[1:-1] if token[0] in "\"'" else _scalar(token)


def _entries(tokens: list[str], end: str, *, with_values: bool) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    while tokens and tokens[0] != end:
        key, value = _collection(tokens), None
        if with_values:
            if _next(tokens) != ":":
                raise ValueError(key)
            value = _collection(tokens)
        found.append((key, value))
        if tokens and tokens[0] != end and _next(tokens) != ",":
            raise ValueError(key)
    _next(tokens)
    return found


def _next(tokens: list[str]) -> str:
    if not tokens:
        raise ValueError("ends too soon")
    return tokens.pop(0)


def _scalar(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text
