"""Measured runs as cases to predict: a JSON-lines file, one run a line (docs/accuracy.md).

A line that ftplan cannot model, or that does not say all that matters, becomes a refusal with its
reasons; nothing is guessed, and nothing is fetched.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from msgspec import Struct

from ftplan.launcher.model_source import ModelSource, cached_folder, find_source
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.litgpt import check_litgpt
from ftplan.planner.methods import METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import (
    SETTING_NAMES,
    TRAINERS,
    TrainingPlan,
    check_setting,
    typed_setting,
)
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.sharding import OFFLOADS, SHARDINGS
from ftplan.profiles import find_gpu, find_model

P = ParamSpec("P")
T = TypeVar("T")

# Fields of a case's `config` that are settings of a plan, in the order in which they are looked
# at: the first that fails is the reason a refusal is counted under.
SETTING_OF_FIELD = {
    "trainer": "trainer",
    "method": "method",
    "quantization": "quantization",
    "loss_kernel": "loss",
    "torch_dtype": "dtype",
    "mixed_precision": "mixed_precision",
    "attn_implementation": "attn_implementation",
    "gradient_checkpointing": "gradient_checkpointing",
    "optim": "optim",
    "per_device_train_batch_size": "per_device_train_batch_size",
    "max_length": "max_length",
    "num_gpus": "num_gpus",
}
# What no setting of a plan says, and must be known all the same.
RUN_FIELDS = ("packing", "kbit_prepare", "length_is")
ADAPTER_FIELDS = ("lora_rank", "target_modules")
QUANTIZED_FIELDS = ("double_quant",)
# Left at ftplan's default where a case does not give them, as any further setting is: its runs do
# without.
OPTIONAL_FIELDS = (
    "lora_alpha",
    "lora_dropout",
    "gradient_accumulation_steps",
    "num_trainable_layers",
    "every_n_layers",
    "dp_replicate_size",
)
# Names that a case may give otherwise than a plan. litgpt is a plain loop around models of its own
# (`planner/litgpt.py`), peft-loop PEFT's method_comparison/MetaMathQA/run.py, whose `use_amp` is
# off.
NAME_OF_CASE: dict[str, dict[str, str]] = {
    "trainer": {"peft-loop": "loop", "litgpt": "loop", "fsdp_qlora": "transformers"},
    "method": {
        "prefix": "prefix-tuning",
        "ln_tuning": "ln-tuning",
        "llama-adapter": "adaption-prompt",
    },
    "quantization": {"gptq-int4": "gptq", "awq-int4": "awq"},
}
TRAINERS_OF_CASES = (*TRAINERS, *NAME_OF_CASE["trainer"])
UNKNOWN_TRAINER = "unknown trainer"  # how such a reason begins
# litgpt's second LLaMA-Adapter; plans know the first one only, PEFT's.
SECOND_ADAPTER = "adapter_v2"
# The one loss kernel of litgpt's fine-tuning, which no plan has, and its `lora_dropout` (Gemma's in
# config_hub/finetune is another above 0, which makes no difference).
LITGPT_LOSS = "chunked"
LITGPT_DROPOUT = 0.05
# Absent or null means none.
SPREADING_FIELDS = ("sharding", "offload")
# A case's `sharding` as a plan's, and which FSDP it is: `full_shard` is a word of the first one.
SHARDING_OF_CASE = {
    "none": ("none", 2),
    "ddp": ("none", 2),
    "fsdp_full_shard": ("fsdp", 1),
    **{name: (name, 2) for name in SHARDINGS},
}

CONFIG_FIELDS = (
    *SETTING_OF_FIELD,
    *RUN_FIELDS,
    *ADAPTER_FIELDS,
    *QUANTIZED_FIELDS,
    *OPTIONAL_FIELDS,
    *SPREADING_FIELDS,
)
# What the source's own script shows and its rows leave out. fitcheck-llm's scripts/measure.py
# (0.3.1) is a plain loop: no autocast, in whatever precision a row names; the outputs are held
# until the step is over; grouped heads are repeated before torch's attention kernel.
STACK_OF_SOURCE: dict[str, dict[str, str]] = {
    "fitcheck-llm": {"trainer": "loop", "mixed_precision": "no"},
}
# What a source's files say of all its runs with adapters and its rows leave out: column
# `lora_dropout` of scripts/benchmarks/refs/a100_80gb.csv and a100_80gb_liger.csv, and the same in
# their scenarios.yaml. It counts where a row does not say it itself.
DROPOUT_OF_SOURCE = {"foundation-model-stack/fms-acceleration": 0.1}
# The runs that begin with the longest row of their data (`longest_seq_ix` in the finetune/lora.py
# that they were made with).
LONGEST_FIRST = ("Lightning-AI/litgpt tutorials/resource-tables.md",)
# Whose rows with Liger's or Unsloth's loss fuse norms and rotary embeddings too: framework
# configurations `*-foak-fast-kernels-liger`, `*-foak-liger`, `foak-fast-kernels` and `*-foak` of
# its scenarios-liger.yaml and scenarios.yaml.
FUSED_WITH_LIGER = ("foundation-model-stack/fms-acceleration",)

# AnswerDotAI/fsdp_qlora's train.py (March 2024), a loop of its own around transformers' models:
# FSDP1 also where each GPU holds all (`NO_SHARD`), checkpointing put within its units, no autocast;
# `output` lives until the step is over. Its options say a dropout; bitsandbytes' Linear4bit
# quantizes scales too unless told otherwise (`compress_statistics`), and PEFT before 0.11 made
# adapters in the dtype of the weight beside them, which is bf16 also where 4-bit numbers lie in it.
FSDP_QLORA = "fsdp_qlora"
FSDP_QLORA_DEFAULTS: dict[str, Any] = {
    "lora_dropout": 0.1,
    "double_quant": True,
    "autocast_adapter_dtype": False,
}
FSDP_QLORA_SOFTWARE = "torch 2.2, transformers 4.38"  # the newest then; torch 2.2 is in its README
FSDP_QLORA_OFFLOAD = {"cpu (params+grads+opt)": "parameters"}

# Any other setting of a plan, by its own name.
FURTHER_FIELDS = tuple(
    name
    for name in SETTING_NAMES
    if name not in SETTING_OF_FIELD.values() and name not in CONFIG_FIELDS
)

LENGTH_KINDS = ("exact", "cap")

_SETTINGS_BY_NAME = (*ADAPTER_FIELDS, *QUANTIZED_FIELDS, *OPTIONAL_FIELDS, *FURTHER_FIELDS)

# The processor, which no catalog has. How much memory it has decides nothing here.
PROCESSOR = Device(
    name="cpu",
    kind="cpu",
    total_bytes=0,
    free_bytes=0,
    memory_bandwidth_bytes_per_second=0.0,
    peak_flops_per_second={},
    context_bytes=0,
)

_HINT = (
    "it needs one JSON object a line, with `id`, `source`, `model`, `gpu`, `config` and `measured` "
    "(docs/accuracy.md)"
)


class Case(Struct, frozen=True, kw_only=True):
    """One measured run, as ftplan would plan it.

    `trainer`: the file's own word; the plan's may be another that does the same. `gpu` is None
    where the file names none. `kbit_prepare`: PEFT's k-bit preparation turned embeddings, head and
    norms into fp32. `length_is`: `exact` where every row of the largest micro-batch had
    `max_length` tokens, `cap` where that is only a limit.
    """

    id: str
    source: str
    trainer: str
    software: str
    gpu: Device | None
    model: ModelSource
    plan: TrainingPlan
    measured: Mapping[str, float | None]
    kbit_prepare: bool
    packing: bool
    length_is: str
    method: str
    """The case's own word for it."""
    repeats_key_value: bool = False
    """Grouped heads are repeated before the attention kernel."""
    fused_kernels: bool = False
    """Norms and rotary embeddings are fms-acceleration's."""
    fsdp_version: int = 2
    is_litgpt: bool = False
    second_adapter: bool = False
    """litgpt's `adapter_v2`."""
    longest_first: bool = False
    """The run begins with its longest batch."""
    is_fsdp_qlora: bool = False


class Refusal(Struct, frozen=True, kw_only=True):
    """A line that is no case for ftplan, with every reason found, the weightiest first."""

    id: str
    source: str
    trainer: str
    method: str
    measured: Mapping[str, float | None]
    reasons: tuple[str, ...]


def read_cases(path: Path, environ: Mapping[str, str] = os.environ) -> list[Case | Refusal]:
    """The cases of a file, in its order.

    Raises InputError for a file that is missing or empty, and for one in which no line looks like
    a case.
    """
    lines = _text_of(path).split("\n")
    values = {n: _parsed(line) for n, line in enumerate(lines, start=1) if line.strip()}
    if not any(isinstance(value, Mapping) and "config" in value for value in values.values()):
        number, value = next(iter(values.items()))
        raise InputError(
            f"`{path}` is not a file of cases: line {number} "
            + (value.reason if isinstance(value, _Broken) else "has no `config`"),
            _HINT,
        )
    find_model = _ModelFinder(environ)
    return [_case(number, value, find_model) for number, value in values.items()]


def _text_of(path: Path) -> str:
    """UTF-8, with or without a byte-order mark; raises InputError, with the line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no such file: `{path}`", "check the path") from None
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    if not content.strip():
        raise InputError(f"`{path}` is empty", "it needs one JSON object a line")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"`{path}`, line {line}: not UTF-8 text (byte {error.start})",
            "convert it first, for example `iconv -f UTF-16 -t UTF-8`",
        ) from error


class _Broken(Struct, frozen=True):
    """A line that is no JSON object."""

    reason: str


def _parsed(line: str) -> Mapping[str, Any] | _Broken:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return _Broken(f"is broken JSON: {error.msg.lower()}, column {error.colno}")
    except (ValueError, RecursionError):  # a number of thousands of digits; deep nesting
        return _Broken("is JSON that cannot be read")
    return value if isinstance(value, Mapping) else _Broken("is not a JSON object")


class _Attempts:
    """Runs checks one after the other and keeps the reasons of those that fail."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return check(*args, **kwargs)
        except InputError as error:
            self.reasons.append(error.message)
            return None


def _case(
    number: int, value: Mapping[str, Any] | _Broken, find_model: Callable[[object], ModelSource]
) -> Case | Refusal:
    if isinstance(value, _Broken):
        return _refusal(f"line {number}", {}, {}, [f"the line {value.reason}"])
    attempt = _Attempts()
    id_ = attempt(_text, value, "id")
    source, software = _optional_text(value, "source"), _optional_text(value, "software")
    measured = attempt(_measured, value)
    config = attempt(_config, value)
    if config is None:
        return _refusal(id_ or f"line {number}", value, measured or {}, attempt.reasons)
    name = source.partition(" ")[0]
    stack = STACK_OF_SOURCE.get(name, {})
    is_litgpt = config.get("trainer") == "litgpt"
    is_qlora_script = config.get("trainer") == FSDP_QLORA
    if is_qlora_script:
        config, software = _of_fsdp_qlora(config), FSDP_QLORA_SOFTWARE
    settings = _settings({**config, **stack, **(_litgpt(config) if is_litgpt else {})}, attempt)
    if "lora_rank" in settings and name in DROPOUT_OF_SOURCE:
        settings.setdefault("lora_dropout", DROPOUT_OF_SOURCE[name])
    spread = SHARDING_OF_CASE.get(config.get("sharding") or "none")
    settings |= {"sharding": spread[0]} if spread else {}
    settings["offload"] = config.get("offload") or "none"
    for check in (_check_litgpt, _check_spreading, _check_said, _check_run, _check_fields):
        attempt(check, config)
    gpu = attempt(_gpu, value.get("gpu"))
    model = attempt(find_model, value.get("model"))
    plan = None
    if model and not is_litgpt:
        settings = _with_modules_found(model.spec, settings)
    if model and not attempt.reasons:
        plan = attempt(_plan, model, gpu, settings, check_litgpt if is_litgpt else _check_modules)
    if plan is None or model is None or id_ is None or measured is None:
        return _refusal(id_ or f"line {number}", value, measured or {}, attempt.reasons)
    return Case(
        id=id_,
        source=source,
        trainer=_config_text(value, "trainer"),
        software=software,
        gpu=gpu,
        model=model,
        plan=plan,
        measured=measured,
        kbit_prepare=config["kbit_prepare"],
        packing=config["packing"],
        length_is=config["length_is"],
        method=config["method"],
        repeats_key_value=bool(stack),
        fused_kernels=name in FUSED_WITH_LIGER and config["loss_kernel"] in ("liger", "triton_ce"),
        fsdp_version=SHARDING_OF_CASE[config.get("sharding") or "none"][1],
        is_litgpt=is_litgpt,
        second_adapter=is_litgpt and config["method"] == SECOND_ADAPTER,
        longest_first=source in LONGEST_FIRST,
        is_fsdp_qlora=is_qlora_script,
    )


def _refusal(
    id_: str, value: Mapping[str, Any], measured: Mapping[str, float | None], reasons: list[str]
) -> Refusal:
    return Refusal(
        id=id_,
        source=_optional_text(value, "source"),
        trainer=_config_text(value, "trainer"),
        method=_config_text(value, "method"),
        measured=measured,
        reasons=tuple(reasons),
    )


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"`{key}` is not text")
    return text


def _optional_text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    return text if isinstance(text, str) else ""


def _config_text(value: Mapping[str, Any], key: str) -> str:
    config = value.get("config")
    return _optional_text(config, key) if isinstance(config, Mapping) else ""


def _config(value: Mapping[str, Any]) -> Mapping[str, Any]:
    config = value.get("config")
    if not isinstance(config, Mapping):
        raise InputError("`config` is not a JSON object")
    return config


def _measured(value: Mapping[str, Any]) -> Mapping[str, float | None]:
    """What was measured; nothing need be, the case is predicted all the same."""
    measured = value.get("measured")
    if measured is None:
        return {}
    if not isinstance(measured, Mapping):
        raise InputError("`measured` is not a JSON object")
    for name, number in measured.items():
        if number is not None and not _is_quantity(number):
            raise InputError(f"measured `{name}` is not a finite number above 0")
    return dict(measured)


def _is_quantity(number: object) -> bool:
    return (
        isinstance(number, int | float)
        and not isinstance(number, bool)
        and 0 < number < 1e30  # beyond, a whole number may be too large to divide by
        and math.isfinite(number)
    )


def _settings(config: Mapping[str, Any], attempt: _Attempts) -> dict[str, Any]:
    """The plan's settings that the case gives, each looked at."""
    fields = {
        **SETTING_OF_FIELD,
        **{name: name for name in _SETTINGS_BY_NAME},
    }
    assert set(fields.values()) <= set(SETTING_NAMES)
    given = {name: config[field] for field, name in fields.items() if config.get(field) is not None}
    for name, names in NAME_OF_CASE.items():
        if isinstance(given.get(name), str):
            given[name] = names.get(given[name], given[name])
    return {name: attempt(_setting, name, value) for name, value in given.items()}


def _litgpt(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan says otherwise than a run of litgpt: its loss, its second adapter, its dropout,
    and remarks behind the targets."""
    targets, loss = config.get("target_modules"), config.get("loss_kernel")
    said: dict[str, Any] = {"attn_implementation": None}  # its modelling code decides
    if config.get("lora_dropout") is None:
        said["lora_dropout"] = LITGPT_DROPOUT
    if loss == LITGPT_LOSS:
        said["loss_kernel"] = "stock"
    if config.get("method") == SECOND_ADAPTER:
        said["method"] = "adaption-prompt"
    if isinstance(targets, list):
        said["target_modules"] = [
            _without_remark(name) if isinstance(name, str) else name for name in targets
        ]
    return said


def _of_fsdp_qlora(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what its script does unless told otherwise; `reentrant_checkpointing` is not among a
    case's fields, the script's README asks for it and its benchmarks have it."""
    offload = config.get("offload")
    given = {name: value for name, value in config.items() if value is not None}
    return {
        **FSDP_QLORA_DEFAULTS,
        **given,
        "offload": FSDP_QLORA_OFFLOAD.get(offload, offload)
        if isinstance(offload, str)
        else offload,
    }


def _setting(name: str, value: object) -> Any:
    typed = typed_setting(name, value)
    check_setting(name, typed)
    return typed


def _check_litgpt(config: Mapping[str, Any]) -> None:
    if config.get("trainer") != "litgpt":
        return
    if config.get("num_gpus") not in (None, 1):
        raise InputError("litgpt on several GPUs is not modelled")
    if config.get("loss_kernel") not in (None, LITGPT_LOSS):
        raise InputError(f"litgpt is modelled with the loss `{LITGPT_LOSS}` only")


def _check_said(config: Mapping[str, Any]) -> None:
    """Raises InputError where something that memory depends on is left open."""
    needed = [*SETTING_OF_FIELD, *RUN_FIELDS]
    name = str(config.get("method"))
    method = METHODS.get(NAME_OF_CASE["method"].get(name, name))
    if method and method.adapter:
        needed += [field for field in ADAPTER_FIELDS if field in method.takes.values()]
    if config.get("quantization") in ("nf4", "fp4"):
        needed += QUANTIZED_FIELDS
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise InputError(f"not said: {_listed(missing)}")


def _check_run(config: Mapping[str, Any]) -> None:
    for name in ("packing", "kbit_prepare"):
        if not isinstance(config.get(name), bool | None):
            raise InputError(f"`{name}` is neither true nor false")
    if config.get("length_is") not in (None, *LENGTH_KINDS):
        raise InputError("`length_is` is neither `exact` nor `cap`")


def _check_spreading(config: Mapping[str, Any]) -> None:
    """Raises InputError unless it is said what each GPU holds."""
    sharding, offload = (config.get(name) or "none" for name in SPREADING_FIELDS)
    if sharding not in SHARDING_OF_CASE:
        raise InputError(f"sharding `{sharding}` is not modelled")
    if offload not in OFFLOADS:
        raise InputError(f"offload `{offload}` is not modelled")
    if sharding == "none" and config.get("num_gpus") not in (None, 1):
        raise InputError("several GPUs without `ddp`")


def _check_fields(config: Mapping[str, Any]) -> None:
    """A field that nobody here knows may mean anything; one that is null or false, nothing."""
    known = (*CONFIG_FIELDS, *FURTHER_FIELDS)
    unknown = [name for name, value in config.items() if name not in known and value]
    if unknown:
        raise InputError(f"unknown in `config`: {_listed(unknown)}")


def _gpu(name: object) -> Device | None:
    """The catalogued GPU, or the processor; a remark in parentheses after its name is left out, so
    are how many there are before it (`config` says) and the memory of a card that has one size."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise InputError("`gpu` is not text")
    if name == PROCESSOR.name:
        return PROCESSOR
    one = re.sub(r"^\d+ ?x ", "", _without_remark(name))
    with contextlib.suppress(UnknownNameError):
        return find_gpu(one).device()
    return find_gpu(re.sub(r" \d+ ?GB$", "", one)).device()


def _without_remark(name: str) -> str:
    """The name, without what follows in parentheses."""
    return re.sub(r"\s*\([^()]*\)\s*$", "", name)


class _ModelFinder:
    """`find_source` without the network; each name is looked up once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = {**environ, "HF_HUB_OFFLINE": "1"}
        self.found: dict[str, ModelSource | InputError] = {}

    def __call__(self, name: object) -> ModelSource:
        if not isinstance(name, str) or not name:
            raise InputError("`model` is not text")
        if name not in self.found:
            self.found[name] = self._find(name)
        found = self.found[name]
        if isinstance(found, InputError):
            raise found
        return found

    def _find(self, name: str) -> ModelSource | InputError:
        try:
            source = find_source(_base_of_quantized(_without_remark(name)), self.environ)
        except InputError as error:
            at_hand = os.path.isdir(name) or cached_folder(name, self.environ)
            return error if at_hand else InputError(f"unknown model `{name}`")
        if source.spec.approximate:
            return InputError(f"model `{name}` is a size, not a model")
        return source


def _base_of_quantized(name: str) -> str:
    """`org/Model-GPTQ` has the shape of the catalog's `Model`."""
    base = re.sub(r"-(GPTQ|AWQ)$", "", name.rpartition("/")[2], flags=re.IGNORECASE)
    return base if base != name.rpartition("/")[2] and find_model(base) is not None else name


def _plan(
    model: ModelSource,
    gpu: Device | None,
    settings: Mapping[str, Any],
    check: Callable[[ModelSpec, TrainingPlan], object],
) -> TrainingPlan:
    plan = estimate_recipe(model.spec, gpu, settings).plan
    check(model.spec, plan)
    return plan


def _with_modules_found(model: ModelSpec, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without target modules that the model has not: PEFT adapts those that it finds,
    and complains where it finds none."""
    known = {linear.name for linear in model.linears}
    found = tuple(name for name in settings.get("target_modules") or () if name in known)
    return {**settings, "target_modules": found} if found else settings


def _check_modules(model: ModelSpec, plan: TrainingPlan) -> None:
    """Raises InputError unless every target module is there."""
    plan.resolved_method.count(model, plan.method_settings)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
