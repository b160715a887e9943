"""Configurations drawn at random, on which the closed form is compared with the dry run.

Drawn over everything that `ftplan estimate` takes, whether or not the closed form models it. Half
of the models are the catalog's, half are shapes that nobody released.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from msgspec import Struct

from benchmarks.shapes import FAMILIES, random_config
from ftplan.launcher.exact import case_of
from ftplan.launcher.model_source import ModelSource, find_source
from ftplan.planner.combinations import check_together
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import spec_from_config, stand_in_spec
from ftplan.planner.methods import METHODS, resolve_method
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.plan import (
    ATTENTIONS,
    DTYPES,
    LOSSES,
    MIXED_PRECISIONS,
    QUANTIZATIONS,
    TRAINERS,
    TrainingPlan,
)
from ftplan.planner.prequantized import PREQUANTIZED
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.sharding import OFFLOADS, SHARDINGS
from ftplan.planner.trained import ALL_LINEAR

SEED = 4
COUNT = 420

# In so many configurations each value of each axis is, where the draw is large enough.
EACH_VALUE = 3

# Tokens of a micro-batch: more are not trained at once.
_MOST_TOKENS = 65_536

# Refusals in a row after which nothing goes with a value that is to be covered.
_MOST_HANDS = 10_000

CATALOG_MODELS = (
    "smollm2-135m",
    "smollm2-360m",
    "smollm2-1.7b",
    "tinyllama-1.1b-chat-v1.0",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-2-7b-hf",
    "llama-2-13b-hf",
    "deepseek-coder-1.3b-instruct",
    "yi-6b",
    "mistral-7b-v0.1",
    "mixtral-8x7b-v0.1",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-3b",
    "qwen2.5-14b",
    "qwen2.5-32b",
    "deepseek-r1-distill-qwen-7b",
    "qwen3-0.6b",
    "qwen3-4b",
    "qwen3-14b",
    "qwen3-30b-a3b",
    "gemma-2-2b",
    "gemma-2-9b",
    "phi-2",
    "phi-3-mini-4k-instruct",
    "phi-4",
    "gpt2",
    "gemma-3-1b-it",
    "deepseek-v2-lite",
    "olmo-2-1124-7b",
    "granite-3.1-2b-instruct",
    "pythia-1.4b",
    "starcoder2-3b",
    "stablelm-2-1_6b",
    "smollm3-3b",
    "falcon-7b",
    "bloom-1b7",
    "opt-1.3b",
    "gpt-oss-20b",
    "glm-4-9b-0414",
)

Weights = Mapping[Any, float]


def _weighted(names: Any, rest: float, **common: float) -> Weights:
    """The weights of a closed list: `common` ones, and `rest` for all others together."""
    others = [name for name in names if name not in common]
    return {**common, **dict.fromkeys(others, rest / max(1, len(others)))}


_TRAINED_METHODS = tuple(METHODS)

# Bases that a dry run carries out.
_DRY_QUANTIZATIONS = tuple(name for name in QUANTIZATIONS if name not in PREQUANTIZED)

# The modules of an axis are words here, and the model's own names in the configuration.
_ATTENTION, _HEAD, _ENDS = "attention", "head", "embeddings and head"
_LM_HEAD = "lm_head"

# Values that go with few others weigh more here than they are to have in the draw.
AXES: Mapping[str, Weights] = {
    "method": _weighted(
        _TRAINED_METHODS, 0.2, lora=0.13, qlora=0.25, full=0.2, freeze=0.12, dora=0.1
    ),
    "quantization": _weighted(_DRY_QUANTIZATIONS, 0, none=0.6, nf4=0.2, fp4=0.08, int8=0.12),
    "double_quant": {True: 1, False: 1},
    "dtype": _weighted(DTYPES, 0, bfloat16=0.6, float32=0.3, float16=0.1),
    "mixed_precision": _weighted(MIXED_PRECISIONS, 0, bf16=0.6, no=0.3, fp16=0.1),
    "lora_rank": {4: 1, 8: 2, 16: 3, 32: 1, 64: 1, 128: 1},
    "lora_dropout": {0.0: 3, 0.05: 1, 0.1: 1},
    "target_modules": {ALL_LINEAR: 3, _ATTENTION: 1},
    "modules_to_save": {"": 8, _HEAD: 1, _ENDS: 1},
    "autocast_adapter_dtype": {True: 9, False: 1},
    "num_trainable_layers": {1: 1, 2: 1, 4: 1},
    "optim": _weighted(
        OPTIMIZERS,
        0.3,
        adamw_torch_fused=0.22,
        adamw_torch=0.16,
        adamw_8bit=0.1,
        paged_adamw_8bit=0.08,
        paged_adamw_32bit=0.05,
        adafactor=0.05,
        sgd=0.04,
    ),
    "per_device_train_batch_size": {1: 2, 2: 2, 3: 1, 4: 2, 8: 2, 16: 1, 32: 1},
    "gradient_accumulation_steps": {1: 1, 4: 1},
    "max_length": {128: 1, 256: 1, 512: 2, 777: 1, 1024: 3, 2048: 3, 4096: 3, 8192: 2, 32768: 0.5},
    "packing": {False: 3, True: 1},
    "gradient_checkpointing": {True: 3, False: 2},
    "use_reentrant": {False: 4, True: 1},
    "attn_implementation": _weighted(ATTENTIONS, 0, eager=0.2, sdpa=0.5, flash_attention_2=0.3),
    "loss": _weighted(LOSSES, 0, **{"trl-fused": 0.5, "stock": 0.3, "liger": 0.2}),
    "trainer": _weighted(TRAINERS, 0, trl=0.4, transformers=0.3, loop=0.3),
    "objective": _weighted(OBJECTIVES, 0, sft=0.4, dpo=0.24, kto=0.16, reward=0.2),
    "precompute_ref_log_probs": {False: 1, True: 1},
    "num_gpus": {1: 5, 2: 2, 4: 1, 8: 1},
    "sharding": _weighted(SHARDINGS, 0, none=0.25, zero1=0.1, zero2=0.12, zero3=0.2, fsdp=0.33),
    "offload": _weighted(OFFLOADS, 0, none=0.8, optimizer=0.1, parameters=0.1),
}


class Configuration(Struct, frozen=True, kw_only=True):
    """A model and the settings given for it.

    `model`: a catalog name; None for a random shape, which `config` describes.
    """

    model: str | None
    config: Mapping[str, Any] | None
    given: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A short name that says what is in it: equal configurations have equal keys."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def source(self) -> ModelSource:
        """The model's shape; one that the closed form does not know has a stand-in."""
        if self.model is not None:
            return find_source(self.model)
        assert self.config is not None
        return _source(self.config)

    @property
    def name(self) -> str:
        """The model as a table names it."""
        return self.model or self.source.spec.name

    @property
    def plan(self) -> TrainingPlan:
        """Every setting resolved; raises InputError where they contradict each other."""
        return estimate_recipe(self.source.spec, None, self.given).plan

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "config": self.config, "given": self.given}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Configuration:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in raw["given"].items()}
        return Configuration(model=raw["model"], config=raw["config"], given=given)


def _source(config: Mapping[str, Any]) -> ModelSource:
    name = f"random {config['model_type']}"
    try:
        spec, stand_in = spec_from_config(config, name), False
    except UnknownNameError:
        spec, stand_in = stand_in_spec(config, name), True
    return ModelSource(spec=spec, config=config, origin="drawn", stand_in=stand_in)


class Draw(Struct, frozen=True, kw_only=True):
    """`redrawn`: why hands were refused and drawn again, and how many."""

    configurations: tuple[Configuration, ...]
    redrawn: Mapping[str, int]


def draw(
    seed: int = SEED,
    count: int = COUNT,
    *,
    axes: Mapping[str, Weights] = AXES,
    catalog: Sequence[str] = CATALOG_MODELS,
    families: Sequence[str] = tuple(FAMILIES),
) -> Draw:
    """So many configurations, the same ones for the same seed; more of them begin with the same.

    Each value of each axis comes up a few times, and each model about as often as any other of its
    half (`catalog`, random shapes of `families`); else by the axes' weights. What ftplan refuses
    as impossible is drawn again.
    """
    configurations: list[Configuration] = []
    models: Counter[tuple[bool, str]] = Counter()
    values: Counter[tuple[str, Any]] = Counter()
    redrawn: Counter[str] = Counter()
    for number in range(count):
        rng = Random(f"{seed}/{number}")
        shapes = number % 2 == 1
        names = sorted(families if shapes else catalog)
        rare = _rarest(axes, values, rng)
        for _ in range(_MOST_HANDS):
            # Each time that a model has come up makes it ten times rarer, but never impossible:
            # the last one left may not go with a value to be covered.
            name = rng.choices(names, [0.1 ** models[shapes, n] for n in names])[0]
            config = random_config(name, rng) if shapes else None
            try:
                drawn = _deal(rng, None if shapes else name, config, axes, rare)
                break
            except InputError as error:
                redrawn[reason(error.message)] += 1
        else:
            raise RuntimeError(f"ftplan refuses everything that has {rare}")
        models[shapes, name] += 1
        values.update(axis_values(drawn).items())
        configurations.append(drawn)
    return Draw(configurations=tuple(configurations), redrawn=redrawn)


def _rarest(
    axes: Mapping[str, Weights], values: Counter[tuple[str, Any]], rng: Random
) -> dict[str, Any]:
    """One value of an axis that came up too seldom so far; nothing where all did often enough."""
    counts = {(axis, value): values[axis, value] for axis in axes for value in axes[axis]}
    fewest = min(counts.values())
    if fewest >= EACH_VALUE:
        return {}
    return dict([rng.choice([pair for pair, number in counts.items() if number == fewest])])


def _deal(
    rng: Random,
    model: str | None,
    config: Mapping[str, Any] | None,
    axes: Mapping[str, Weights],
    fixed: Mapping[str, Any],
) -> Configuration:
    """One configuration of a model, with the `fixed` values; raises InputError where ftplan refuses
    it."""
    hand = {axis: rng.choices(list(w), list(w.values()))[0] for axis, w in axes.items()}
    bare = Configuration(model=model, config=config, given={})
    family = FAMILIES[bare.source.spec.model_type]
    given = _spelled_out({**hand, **fixed}, family.attention, family.embeddings)
    drawn = Configuration(model=model, config=config, given=given)
    if drawn.given["attn_implementation"] not in family.attentions:
        raise InputError("transformers has not this attention kernel for the architecture")
    plan = drawn.plan
    if plan.max_length > drawn.source.spec.max_position_embeddings:
        raise InputError("rows longer than the model's positions")
    if plan.per_device_train_batch_size * plan.max_length > _MOST_TOKENS:
        raise InputError("more tokens at once than a draw has")
    check_together(drawn.source.spec, plan)
    case_of(drawn.source, plan, None)
    if not set(fixed) <= set(given):
        raise InputError("a value to be covered that has no effect here")
    return drawn


def _spelled_out(
    hand: Mapping[str, Any], attention: tuple[str, ...], embeddings: str
) -> dict[str, Any]:
    """The settings that have an effect beside the others, modules by their names."""
    method = resolve_method(hand["method"])
    taken = set(method.takes.values())
    applies = {
        "double_quant": hand["quantization"] in ("nf4", "fp4"),
        "lora_rank": "lora_rank" in taken,
        "lora_dropout": "lora_dropout" in taken,
        "target_modules": "target_modules" in taken,
        "modules_to_save": method.peft_type is not None,
        "autocast_adapter_dtype": method.adapter,
        "num_trainable_layers": method.name == "freeze",
        "use_reentrant": hand["gradient_checkpointing"],
        "precompute_ref_log_probs": OBJECTIVES[hand["objective"]].has_reference,
    }
    modules = {
        ALL_LINEAR: (ALL_LINEAR,),
        _ATTENTION: attention,
        "": (),
        _HEAD: (_LM_HEAD,),
        _ENDS: (embeddings, _LM_HEAD),
    }
    given = {axis: value for axis, value in hand.items() if applies.get(axis, True)}
    for axis in {"target_modules", "modules_to_save"} & set(given):
        given[axis] = modules[given[axis]]
    return given


def axis_values(configuration: Configuration) -> dict[str, Any]:
    """The value of each axis that the configuration has, as AXES spells it."""
    given = dict(configuration.given)
    if "target_modules" in given:
        given["target_modules"] = (
            ALL_LINEAR if given["target_modules"] == (ALL_LINEAR,) else _ATTENTION
        )
    if "modules_to_save" in given:
        given["modules_to_save"] = ("", _HEAD, _ENDS)[len(given["modules_to_save"])]
    return given


# Parts of a message that differ from case to case, and what stays of them.
_VARYING = {r"`(--[\w-]+)[^`]*`": r"`\1`", r"method `[^`]*`": "method", r"\d{2,}": "…"}


def reason(message: str) -> str:
    """A message without the values that differ from case to case."""
    for pattern, kept in _VARYING.items():
        message = re.sub(pattern, kept, message)
    return message
