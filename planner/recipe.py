"""The settings that surround the search: given ones first, then derived, then defaults.

Each setting carries its reason. `estimate_recipe` serves a question about one configuration,
`data_recipe` a run on a data file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.planner import policy
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.hardware_spec import Device
from ftplan.planner.methods import Method, resolve_method
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import SETTING_NAMES, Reason, ReasonedPlan, TrainingPlan

# max_length follows the data: the longest row, rounded up to a multiple of this.
LENGTH_STEP = 64

# Rows of a question without data.
ESTIMATE_LENGTH = 2048

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
            reasons[name] = Reason(origin="default", why="ftplan's default")
    return ReasonedPlan(plan=TrainingPlan(**values), reasons=reasons)


def estimate_recipe(
    model: ModelSpec, device: Device | None, given: Mapping[str, Any]
) -> ReasonedPlan:
    """One configuration of `model`, on `device` or on a GPU that computes bf16."""
    method = resolve_method(str(given.get("method", _method_of(given))))
    length = min(ESTIMATE_LENGTH, model.max_position_embeddings)
    derived: Derived = {
        "method": (method.name, "the default method: adapters on all linear layers"),
        "max_length": (length, "a usual length; data of your own decides it in `ftplan plan`"),
        "learning_rate": _advised(policy.learning_rate(method, model)),
        **_method_settings(method, device),
    }
    return resolve(given, derived)


def _method_of(given: Mapping[str, Any]) -> str:
    return "qlora" if given.get("quantization", "none") != "none" else "lora"


def data_recipe(
    model: ModelSpec, data: DataProfile, device: Device, given: Mapping[str, Any]
) -> ReasonedPlan:
    """All settings of a run on this data but micro-batch and checkpointing."""
    rows = data.num_train_rows
    method = resolve_method(str(given["method"]))
    rounded = -(-data.longest // LENGTH_STEP) * LENGTH_STEP
    length = min(rounded, model.max_position_embeddings)
    rank = policy.lora_rank(rows)
    derived: Derived = {
        "method": (method.name, _why_method(method)),
        "max_length": (length, f"the longest row has {data.longest:,} tokens"),
        "attn_implementation": ("sdpa", "torch's own kernel, which every device has"),
        "loss": ("trl-fused", "TRL's loss in tiles: the full logits never exist"),
        "lora_rank": _advised(rank),
        "lora_alpha": (2 * rank.value, "twice the rank"),
        "learning_rate": _advised(policy.learning_rate(method, model)),
        "num_train_epochs": _advised(policy.num_train_epochs(rows)),
        "num_gpus": (1, f"one device: {device.name}"),
        **_method_settings(method, device),
    }
    if "lora_rank" in given:
        derived["lora_alpha"] = (2 * given["lora_rank"], "twice the rank")
    return resolve(given, derived)


def _advised(advice: policy.Advice) -> tuple[Any, str]:
    return advice.value, advice.why


def _why_method(method: Method) -> str:
    if method.name == "lora":
        return "adapters on all linear layers match full tuning on data of this size"
    if method.name == "qlora":
        return "a 16-bit base does not fit with LoRA, a 4-bit one does"
    return method.trains


def _method_settings(method: Method, device: Device | None) -> Derived:
    """Quantization, dtype and autocast by method and by what the device computes."""
    derived = _precision(device, method.adapter)
    if method.quantized_base:
        derived["quantization"] = ("nf4", "4-bit NormalFloat, the QLoRA paper's choice")
    return derived


def _precision(device: Device | None, adapter: bool) -> Derived:
    if device is not None and device.kind == "cpu":
        why = "a processor computes fp32 natively"
        return {"dtype": ("float32", why), "mixed_precision": ("no", why)}
    if device is None or device.supports_bfloat16:
        who = device.name if device else "a GPU of compute capability 8.0 or above"
        autocast = ("bf16", f"{who} computes bf16 natively")
        if adapter:
            frozen = "the frozen base needs no more than bf16"
            return {"dtype": ("bfloat16", frozen), "mixed_precision": autocast}
        why = "trained weights are kept in fp32, so that small updates are not lost"
        return {"dtype": ("float32", why), "mixed_precision": autocast}
    autocast = ("fp16", f"{device.name} has no bf16 (compute capability below 8.0)")
    if adapter:
        return {"dtype": ("float16", "the frozen base needs no more"), "mixed_precision": autocast}
    why = "weights trained under fp16 autocast must be fp32"
    return {"dtype": ("float32", why), "mixed_precision": autocast}
