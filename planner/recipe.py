"""The settings that surround the search: given ones first, then derived, then defaults.

Each setting carries its reason. `estimate_recipe` serves a question about one configuration,
`data_recipe` a run on a data file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftplan.planner import policy
from ftplan.planner.default_reasons import WHY_DEFAULT
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.methods import METHODS, Method, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import OBJECTIVES, Objective
from ftplan.planner.plan import AUTOCAST_DTYPE, SETTING_NAMES, Reason, ReasonedPlan, TrainingPlan
from ftplan.planner.refused_steps import MISNAMED_DECODERS, needs_whole_graph
from ftplan.planner.tasks import TaskWeighting, weighting_refused
from ftplan.planner.trained import MethodSettings
from ftplan.planner.vocabulary import saved_for_tokens

if TYPE_CHECKING:
    from ftplan.planner.data_profile import DataProfile

# Rows of a question without data.
ESTIMATE_LENGTH = 2048

# Objectives whose rows are completed by the model, and what decides how many at once.
_GENERATING = tuple(name for name, objective in OBJECTIVES.items() if objective.generates)
_GENERATION_DEFAULTS = {
    name: TrainingPlan.__dataclass_fields__[name].default
    for name in (
        *("num_generations", "max_completion_length", "steps_per_generation"),
        "gradient_accumulation_steps",
    )
}

# Layers that `freeze` trains where the model has as many.
_TRAINED_LAYERS = MethodSettings().num_trainable_layers

# Settings beside the rank that decide what the adapters are.
_ADAPTED = ("target_modules", "modules_to_save", "peft_config")

# How a method that needs a quantized base holds it.
DEFAULT_QUANTIZATION = "nf4"

Derived = dict[str, tuple[Any, str]]


def resolve(given: Mapping[str, Any], derived: Mapping[str, tuple[Any, str]]) -> ReasonedPlan:
    """Given settings first, then derived ones, then defaults; each with its reason."""
    values: dict[str, Any] = {}
    reasons: dict[str, Reason] = {}
    for name in SETTING_NAMES:
        if name in given:
            values[name] = given[name]
            reasons[name] = Reason(origin="given", why="asked for")
        elif name in derived:
            values[name], why = derived[name]
            reasons[name] = Reason(origin="derived", why=why)
        else:
            why = WHY_DEFAULT.get(name, "ftplan's default")
            reasons[name] = Reason(origin="default", why=why)
    return ReasonedPlan(plan=TrainingPlan(**values), reasons=reasons)


def estimate_recipe(
    model: ModelSpec, device: Device | None, given: Mapping[str, Any]
) -> ReasonedPlan:
    """One configuration of `model`, on `device` or on a GPU that computes bf16.

    Raises InputError when the given settings contradict each other or the model.
    """
    _check_attention(model, given)
    quantized = given.get("quantization", "none") != "none"
    method = resolve_method(str(given.get("method", "qlora" if quantized else "lora")))
    why = (
        policy.QUANTIZED_BASE if quantized else "the default method: adapters on all linear layers"
    )
    length = min(ESTIMATE_LENGTH, model.max_position_embeddings)
    derived: Derived = {
        "method": (method.name, why),
        "max_length": (length, "a usual length; data of your own decides it in `ftplan plan`"),
        "attn_implementation": _attention(model),
        "loss": _loss(model, given),
        "learning_rate": _advised(policy.learning_rate(method, model, _objective_of(given))),
        **_method_settings(method, model, device, given),
        **_objective_settings(given),
        **_generation_settings(given, length),
        **_sharding_settings(method, given),
    }
    return resolve(given, derived)


def data_recipe(
    model: ModelSpec, data: DataProfile, device: Device, method: Method, given: Mapping[str, Any]
) -> ReasonedPlan:
    """All settings of a run of `method` on this data but micro-batch and checkpointing.

    Raises InputError when the given settings contradict each other or the model.
    """
    _check_attention(model, given)
    rows = data.num_train_rows
    length = policy.max_length(data.longest, model.max_position_embeddings)
    derived: Derived = {
        "method": (method.name, _why_method(method, model, data, device, given)),
        "max_length": _advised(length),
        "attn_implementation": _attention(model),
        "loss": _loss(model, given),
        "learning_rate": _advised(policy.learning_rate(method, model, OBJECTIVES[data.trains])),
        "num_train_epochs": _advised(policy.num_train_epochs(rows)),
        "num_gpus": (1, f"one device: {device.name}"),
        **_rank_settings(method, model, data, given),
        **_method_settings(method, model, device, given),
        **_sharding_settings(method, given),
        **_objective_of_data(data, given),
        **_completions(model, device, {**given, "objective": data.trains}),
        **_task_settings(method, data, given),
    }
    return resolve(given, derived)


def _rank_settings(
    method: Method, model: ModelSpec, data: DataProfile, given: Mapping[str, Any]
) -> Derived:
    """Rank and scale, where the method's adapters have a rank."""
    if not method.has_rank:
        return {}
    derived: Derived = {}
    if "lora_rank" not in given:
        named = {name: given[name] for name in _ADAPTED if name in given}
        advice = policy.lora_rank(model, data, method, MethodSettings(**named))
        derived["lora_rank"] = _advised(advice)
    rank = given.get("lora_rank") or derived["lora_rank"][0]
    return {**derived, "lora_alpha": (2 * rank, "twice the rank")}


def _objective_of_data(data: DataProfile, given: Mapping[str, Any]) -> Derived:
    """What the rows train, and the settings that go with it."""
    if data.trains == "sft":
        return {}
    named = {**given, "objective": data.trains}
    why = f"the rows are {data.format} rows"
    return {"objective": (data.trains, why), **_objective_settings(named)}


def asks_for_tasks(given: Mapping[str, Any]) -> bool:
    """Whether tasks are to be told apart: then each of several files is one, where rows name
    none."""
    method = METHODS.get(str(given.get("method")))
    tells = method is not None and method.tells_tasks_apart
    return _weighs_tasks(given) or bool(given.get("num_tasks")) or tells


def _weighs_tasks(given: Mapping[str, Any]) -> bool:
    weighting = given.get("task_weighting", "proportional")
    return weighting != "proportional" or bool(given.get("task_weights"))


def _task_settings(method: Method, data: DataProfile, given: Mapping[str, Any]) -> Derived:
    """How tasks are weighted, and how many of them the method tells apart.

    Raises InputError where weights are asked for and rows have no tasks, or have more than the
    method is to tell apart.
    """
    if not data.task_lengths:
        if _weighs_tasks(given):
            raise InputError(
                f"`{data.path}` names no tasks to weigh",
                "give rows a `task`, or give several files, which are then a task each",
            )
        return {}
    derived: Derived = {"task_weighting": _weighting(data, given)}
    if method.tells_tasks_apart:
        count = len(data.task_lengths)
        derived["num_tasks"] = (count, "as many as the data has")
        options = method.options(
            MethodSettings(
                peft_config=tuple(given.get("peft_config", ())),
                num_tasks=given.get("num_tasks", count),
            )
        )
        name = next(name for name, setting in method.takes.items() if setting == "num_tasks")
        if options.count(name) < count:
            raise options.refused(name, f"`{data.path}` has {count} tasks")
    return derived


def task_weighting(data: DataProfile, given: Mapping[str, Any]) -> TaskWeighting:
    """How a run on these data weighs its tasks."""
    return TaskWeighting(
        weighting=given.get("task_weighting", _weighting(data, given)[0]),
        temperature=given.get("task_temperature", TrainingPlan().task_temperature),
        weights=tuple(given.get("task_weights", ())),
    )


def _weighting(data: DataProfile, given: Mapping[str, Any]) -> tuple[str, str]:
    objective = OBJECTIVES.get(str(given.get("objective", data.trains)))
    if given.get("task_weights"):
        return "fixed", "weights are given"
    if objective is not None and (
        why_not := weighting_refused(objective.name, generates=objective.generates)
    ):
        return "proportional", f"{objective.name}: {why_not}"
    return _advised(policy.task_weighting(data.tasks))


def _advised(advice: policy.Advice) -> tuple[Any, str]:
    return advice.value, advice.why


def _why_method(
    method: Method,
    model: ModelSpec,
    data: DataProfile,
    device: Device,
    given: Mapping[str, Any],
) -> str:
    preferred = policy.preferred_methods(model, data, device.kind, given)
    if method.name == preferred.value[0]:
        return preferred.why
    if method.name == "lora":
        return "the next best to full tuning, which takes far more memory"
    if method.name == "qlora":
        return "a 4-bit base takes about a quarter of the memory of LoRA's 16-bit one"
    return method.trains


def _loss(model: ModelSpec, given: Mapping[str, Any]) -> tuple[str, str]:
    if given.get("trainer") == "transformers":
        return "stock", "transformers' own trainer computes the loss on whole logits"
    if given.get("trainer") == "loop":
        return "stock", "in a plain loop the model computes its loss on whole logits"
    if model.model_type in MISNAMED_DECODERS:
        return "stock", f"TRL's fused loss does not find the decoder of {model.model_type}"
    return "trl-fused", "TRL's loss in tiles: no full logits"


def _objective_of(given: Mapping[str, Any]) -> Objective | None:
    """None for a name that the plan's own check refuses."""
    return OBJECTIVES.get(str(given.get("objective", "sft")))


def _objective_settings(given: Mapping[str, Any]) -> Derived:
    """What follows from an objective other than plain fine-tuning."""
    objective = _objective_of(given)
    derived: Derived = {}
    if objective is None:
        return derived
    if objective.only_loss is not None:
        derived["loss"] = (objective.only_loss, f"{objective.name}: {objective.why_only_loss}")
    if objective.min_batch_size > 1:
        why = f"the least that {objective.name} works with"
        derived["per_device_train_batch_size"] = (objective.min_batch_size, why)
    usual = {
        "beta": objective.beta,
        "gamma_beta_ratio": objective.gamma_beta_ratio,
        "loss_type": next(iter(objective.loss_types), None),
    }
    for name, value in usual.items():
        if value is not None:
            derived[name] = (value, f"usual for {objective.name}")
    return derived


def _generation_settings(given: Mapping[str, Any], length: int) -> Derived:
    """Rows that make whole groups of completions, and completions that leave room to the prompt.
    `length`: of rows, where none is given."""
    if given.get("objective") not in _GENERATING:
        return {}
    setting = {**_GENERATION_DEFAULTS, **given}
    steps = setting["steps_per_generation"] or setting["gradient_accumulation_steps"]
    group = setting["num_generations"]
    rows = group // math.gcd(group, steps)
    derived: Derived = {
        "per_device_train_batch_size": (rows, f"the fewest that make whole groups of {group}")
    }
    length = given.get("max_length", length)
    if length <= setting["max_completion_length"]:
        derived["max_completion_length"] = (max(1, length // 2), "half of `max_length`")
    return derived


def _completions(model: ModelSpec, device: Device, given: Mapping[str, Any]) -> Derived:
    """What a run needs whose model completes prompts."""
    if given["objective"] not in _GENERATING:
        return {}
    advice = policy.max_completion_length(model, device.kind)
    derived = _generation_settings(given, model.max_position_embeddings)
    return {**derived, "max_completion_length": _advised(advice)}


def _sharding_settings(method: Method, given: Mapping[str, Any]) -> Derived:
    """What TRL sets for a kind of sharding."""
    checkpointed = given.get("gradient_checkpointing", True)
    if given.get("sharding") == "zero3" and method.adapter and checkpointed:
        return {"use_reentrant": (True, "TRL's choice for adapters under ZeRO-3")}
    return {}


def _attention(model: ModelSpec) -> tuple[str, str]:
    if model.supports_sdpa:
        return "sdpa", "torch's own kernel, which every device has"
    return "eager", _no_sdpa(model)


def _no_sdpa(model: ModelSpec) -> str:
    return f"transformers has no `sdpa` attention for {model.model_type}"


def _check_attention(model: ModelSpec, given: Mapping[str, Any]) -> None:
    if given.get("attn_implementation") == "sdpa" and not model.supports_sdpa:
        raise InputError(
            _no_sdpa(model),
            "use `--attn-implementation eager`, or flash_attention_2 where it is installed",
        )


def _method_settings(
    method: Method, model: ModelSpec, device: Device | None, given: Mapping[str, Any]
) -> Derived:
    """What the method decides: quantization, trained layers; with the device, the dtypes."""
    derived = _joined(_precision(device, method.adapter), given)
    if method.quantized_base:
        why = "4-bit NormalFloat, the QLoRA paper's choice"
        derived["quantization"] = (DEFAULT_QUANTIZATION, why)
    if needs_whole_graph(method.peft_type):
        why = f"PEFT's `{method.name}` does not go with checkpointed layers"
        derived["gradient_checkpointing"] = (False, why)
    tokens = given.get("add_tokens") or given.get("train_tokens")
    if tokens and "modules_to_save" not in given and (saved := saved_for_tokens(method, model)):
        why = f"`{method.name}` trains tokens by copies of both matrices: PEFT has no rows for it"
        derived["modules_to_save"] = (saved, why)
    if method.name == "freeze":
        layers = min(_TRAINED_LAYERS, model.num_hidden_layers)
        why = f"the last {layers} of {model.num_hidden_layers}; more take more memory and time"
        derived["num_trainable_layers"] = (layers, why)
    return derived


def _joined(precision: Derived, given: Mapping[str, Any]) -> Derived:
    """The dtypes, where one of them is given with the other's: torch's autocast does not join both
    16-bit ones."""
    derived = dict(precision)
    dtype, autocast = given.get("dtype"), given.get("mixed_precision")
    autocast_dtype = AUTOCAST_DTYPE.get(str(autocast))
    if dtype is None and autocast_dtype and precision["dtype"][0] != "float32":
        derived["dtype"] = (autocast_dtype, f"what `--mixed-precision {autocast}` computes in")
    same = {held: name for name, held in AUTOCAST_DTYPE.items() if held}.get(str(dtype))
    if autocast is None and same and precision["mixed_precision"][0] != "no":
        derived["mixed_precision"] = (same, f"as `--dtype {dtype}` is held")
    return derived


def _precision(device: Device | None, adapter: bool) -> Derived:
    if device is not None and device.kind == "cpu":
        why = "a processor computes fp32 natively"
        return {"dtype": ("float32", why), "mixed_precision": ("no", why)}
    if device is None or device.supports_bfloat16:
        who = device.name if device else "a GPU of compute capability 8.0 or above"
        autocast = ("bf16", f"{who} computes bf16 natively")
        if adapter:
            frozen = "the frozen base needs no more"
            return {"dtype": ("bfloat16", frozen), "mixed_precision": autocast}
        why = "trained weights are kept in fp32, so that small updates are not lost"
        return {"dtype": ("float32", why), "mixed_precision": autocast}
    autocast = ("fp16", f"{device.name} has no bf16 (compute capability below 8.0)")
    if adapter:
        return {"dtype": ("float16", "the frozen base needs no more"), "mixed_precision": autocast}
    why = "weights trained under fp16 autocast must be fp32"
    return {"dtype": ("float32", why), "mixed_precision": autocast}
