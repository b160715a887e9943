"""A plan's settings: which are refused, how they are written down and read back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.cycles import PRUNE_METHODS
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.method_checks import LOFTQ_BASES
from ftplan.planner.methods import METHODS
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.overlong import OVERLONG
from ftplan.planner.plan import (
    ATTENTIONS,
    DTYPES,
    LOSSES,
    MIXED_PRECISIONS,
    QUANTIZATIONS,
    SCHEDULES,
    SETTING_NAMES,
    TRAINERS,
    Reason,
    ReasonedPlan,
    TrainingPlan,
    flag_name,
    parse_setting,
)
from ftplan.planner.sharding import OFFLOADS, SHARDINGS

CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "quantization": QUANTIZATIONS,
    "dtype": DTYPES,
    "mixed_precision": MIXED_PRECISIONS,
    "optim": tuple(OPTIMIZERS),
    "attn_implementation": ATTENTIONS,
    "loss": LOSSES,
    "trainer": TRAINERS,
    "sharding": SHARDINGS,
    "offload": OFFLOADS,
    "lr_scheduler_type": SCHEDULES,
    "overlong": OVERLONG,
    "relora_prune_method": PRUNE_METHODS,
    "task_weighting": ("proportional", "equal", "temperature", "fixed", "dynamic"),
    "objective": ("sft", "dpo", "orpo", "simpo", "kto", "reward", "grpo", "rloo"),
}


def reasoned(plan: TrainingPlan) -> ReasonedPlan:
    return ReasonedPlan(
        plan=plan,
        reasons={name: Reason(origin="default", why=f"why {name}") for name in SETTING_NAMES},
    )


@st.composite
def plans(draw: st.DrawFn) -> TrainingPlan:
    method = draw(st.sampled_from(sorted(METHODS)))
    quantizations = {
        "lora": QUANTIZATIONS,
        "qlora": QUANTIZATIONS[1:],
        "loftq": LOFTQ_BASES,
    }.get(method, ("none",))
    modules = st.lists(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1, unique=True)
    checkpointing = not METHODS[method].fills_cache and draw(st.booleans())
    return TrainingPlan(
        method=method,
        quantization=draw(st.sampled_from(quantizations)),
        double_quant=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),  # autocast is bf16's
        lora_rank=draw(st.integers(1, 1024)),
        lora_dropout=draw(st.floats(0, 0.99)),
        target_modules=tuple(draw(st.just(["all-linear"]) | modules)),
        per_device_train_batch_size=draw(st.integers(1, 512)),
        gradient_checkpointing=checkpointing,
        every_n_layers=draw(st.integers(1, 99)) if checkpointing else 1,
        learning_rate=draw(st.floats(1e-9, 1.0)),
        num_train_epochs=draw(st.integers(1, 9) | st.floats(0.01, 9.0)),
        max_steps=draw(st.none() | st.integers(1, 10**6)),
        seed=draw(st.integers(0, 2**31)),
    )


# --- what is refused


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_value_outside_a_settings_choices_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="`no-such-value`"):
        TrainingPlan(**{name: "no-such-value"})


def test_every_setting_with_choices_is_tested() -> None:
    listed = {f.name: f.metadata["choices"] for f in dataclasses.fields(TrainingPlan)}
    assert {name: choices for name, choices in listed.items() if choices} == CHOICES


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize(
    "name",
    [
        "lora_rank",
        "lora_alpha",
        "loraplus_lr_ratio",
        "num_trainable_layers",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "num_generations",
        "max_completion_length",
        "steps_per_generation",
        "num_gpus",
        "tp_size",
        "cp_size",
        "dp_replicate_size",
        "learning_rate",
        "max_grad_norm",
        "num_train_epochs",
        "max_steps",
        "save_steps",
        "num_tasks",
        "task_temperature",
    ],
)
def test_what_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{flag_name(name)} {value}"):
        TrainingPlan(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "num_train_epochs"])
def test_infinity_is_no_setting(name: str) -> None:
    with pytest.raises(InputError, match=flag_name(name)):
        TrainingPlan(**{name: math.inf})


@pytest.mark.parametrize("value", [-0.01, 1.0, 5.0, math.nan])
@pytest.mark.parametrize("name", ["lora_dropout", "warmup_ratio", "weight_decay"])
def test_what_must_be_a_share(name: str, value: float) -> None:
    with pytest.raises(InputError, match=flag_name(name)):
        TrainingPlan(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_refuses_is_refused(seed: int) -> None:
    """transformers seeds NumPy's generator as well, with 32 bits."""
    with pytest.raises(InputError, match="--seed"):
        TrainingPlan(seed=seed)


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.adapter])
def test_a_quantized_base_is_not_trained_itself(method: str) -> None:
    with pytest.raises(InputError, match="cannot train a base quantized to nf4"):
        TrainingPlan(method=method, quantization="nf4")


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.adapter])
def test_fp16_weights_are_not_trained_under_fp16_autocast(method: str) -> None:
    """torch's GradScaler: `Attempting to unscale FP16 gradients`. Adapters are fp32."""
    with pytest.raises(InputError, match="float16 weights under fp16 autocast") as refused:
        TrainingPlan(method=method, dtype="float16", mixed_precision="fp16")
    assert "--dtype float32" in (refused.value.hint or "")
    assert TrainingPlan(method=method, dtype="float16", mixed_precision="no").compute_bytes == 2
    assert TrainingPlan(method="lora", dtype="float16", mixed_precision="fp16").compute_bytes == 2


def test_target_modules_that_name_nothing_or_too_much_are_refused() -> None:
    with pytest.raises(InputError, match="--target-modules"):
        TrainingPlan(target_modules=())
    with pytest.raises(InputError, match="stands alone") as refused:
        TrainingPlan(target_modules=("all-linear", "q_proj"))
    assert "`q_proj`" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ("lm_head",)}, "`--modules-to-save` would train float16 weights"),
        ({"autocast_adapter_dtype": False}, "float16 adapters cannot be trained"),
    ],
)
def test_nothing_is_trained_in_float16_under_fp16_autocast(
    settings: dict[str, Any], message: str
) -> None:
    fp16 = {"dtype": "float16", "mixed_precision": "fp16"}
    with pytest.raises(InputError, match=message):
        TrainingPlan(**fp16, **settings)
    assert TrainingPlan(**fp16).method == "lora"


def test_qlora_needs_a_quantized_base() -> None:
    with pytest.raises(InputError, match="needs a quantized base"):
        TrainingPlan(method="qlora", quantization="none")
    assert TrainingPlan(method="qlora", quantization="int8").optimizer.name == "adamw_torch_fused"


# --- what follows from the settings


def test_widths_follow_dtype_and_autocast() -> None:
    plain = TrainingPlan(dtype="bfloat16", mixed_precision="no")
    assert (plain.weight_bytes, plain.compute_bytes, plain.autocast) == (2, 2, False)
    mixed = TrainingPlan(dtype="float32", mixed_precision="bf16")
    assert (mixed.weight_bytes, mixed.compute_bytes, mixed.autocast) == (4, 2, True)


def test_effective_batch_size_counts_all_gpus() -> None:
    plan = TrainingPlan(per_device_train_batch_size=4, gradient_accumulation_steps=3, num_gpus=2)
    assert plan.effective_batch_size == 24


def test_replace_checks_again() -> None:
    plan = TrainingPlan()
    assert plan.replace(max_length=512).max_length == 512
    assert plan.max_length == 2048
    with pytest.raises(InputError):
        plan.replace(max_length=0)


# --- written down and read back


@given(plans())
def test_a_plan_survives_being_written_as_json(plan: TrainingPlan) -> None:
    original = reasoned(plan)
    assert ReasonedPlan.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_every_setting_is_written_with_its_reason() -> None:
    written = reasoned(TrainingPlan()).replace("given", "asked for", max_length=512).to_dict()
    assert tuple(written) == SETTING_NAMES
    assert written["max_length"] == {"value": 512, "from": "given", "why": "asked for"}
    assert written["target_modules"]["value"] == ["all-linear"]
    assert written["seed"]["from"] == "default"


def test_a_plan_without_all_reasons_cannot_be() -> None:
    with pytest.raises(AssertionError):
        ReasonedPlan(plan=TrainingPlan(), reasons={})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", "512"),
        ("max_length", 512.5),
        ("max_length", True),
        ("max_length", None),
        ("max_steps", 2.5),
        ("learning_rate", "2e-4"),
        ("learning_rate", False),
        ("gradient_checkpointing", 1),
        ("gradient_checkpointing", "yes"),
        ("target_modules", "q_proj"),
        ("target_modules", ["q_proj", 3]),
        ("method", 5),
        ("method", None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    written = reasoned(TrainingPlan()).to_dict()
    written[name]["value"] = value
    with pytest.raises(InputError, match=f"`{name}`"):
        ReasonedPlan.from_dict(written)


def test_a_whole_number_will_do_for_a_real_one() -> None:
    written = reasoned(TrainingPlan()).to_dict()
    written["num_train_epochs"]["value"] = 3
    epochs = ReasonedPlan.from_dict(written).plan.num_train_epochs
    assert epochs == 3.0 and isinstance(epochs, float)


def test_an_unknown_setting_is_told_the_nearest() -> None:
    written = reasoned(TrainingPlan()).to_dict()
    written["max_lenght"] = written["max_length"]
    with pytest.raises(UnknownNameError, match="`max_lenght`") as refused:
        ReasonedPlan.from_dict(written)
    assert "`max_length`" in (refused.value.hint or "")


@pytest.mark.parametrize("part", ["value", "from", "why"])
def test_a_setting_without_one_of_its_parts_is_refused(part: str) -> None:
    written = reasoned(TrainingPlan()).to_dict()
    del written["seed"][part]
    with pytest.raises(InputError, match="`seed` needs"):
        ReasonedPlan.from_dict(written)


def test_a_missing_setting_is_refused() -> None:
    written = reasoned(TrainingPlan()).to_dict()
    del written["seed"]
    with pytest.raises(InputError, match="`seed`"):
        ReasonedPlan.from_dict(written)


def test_an_unknown_origin_is_refused() -> None:
    written = reasoned(TrainingPlan()).to_dict()
    written["seed"]["from"] = "a dream"
    with pytest.raises(InputError, match="`seed`"):
        ReasonedPlan.from_dict(written)


# --- as typed on the command line


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_length", "512", 512),
        ("max_steps", "10", 10),
        ("learning_rate", "2e-4", 2e-4),
        ("num_train_epochs", "3", 3.0),
        ("gradient_checkpointing", "true", True),
        ("gradient_checkpointing", "No", False),
        ("target_modules", "q_proj, v_proj,", ("q_proj", "v_proj")),
        ("dtype", "bf16", "bfloat16"),
        ("dtype", "float32", "float32"),
        ("mixed_precision", "bf16", "bf16"),
        ("method", "qlora", "qlora"),
    ],
)
def test_parse_setting(name: str, text: str, value: Any) -> None:
    parsed = parse_setting(name, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("max_length", "long", "a whole number"),
        ("max_length", "5.5", "a whole number"),
        ("max_steps", "", "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("gradient_checkpointing", "maybe", "true or false"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_flag(name: str, text: str, expected: str) -> None:
    with pytest.raises(InputError, match=f"{flag_name(name)} {text}`: {expected} is expected"):
        parse_setting(name, text)


@given(plans())
def test_parse_setting_reads_what_a_person_copies_from_a_plan(plan: TrainingPlan) -> None:
    for name in SETTING_NAMES:
        value = getattr(plan, name)
        if value is not None:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            assert parse_setting(name, text) == value


# --- optimizers


def test_reentrant_checkpointing_would_leave_frozen_layers_neighbours_untrained() -> None:
    with pytest.raises(InputError, match="hands no gradients"):
        TrainingPlan(method="freeze", use_reentrant=True)
    TrainingPlan(method="freeze", use_reentrant=True, gradient_checkpointing=False)


@pytest.mark.parametrize("method", ["prefix-tuning", "p-tuning-v2", "cartridge"])
def test_checkpointed_layers_are_given_no_keys_and_values(method: str) -> None:
    with pytest.raises(InputError, match="checkpointed layers are given none"):
        TrainingPlan(method=method)
    TrainingPlan(method=method, gradient_checkpointing=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "galore_adamw", "trainer": "loop", "loss": "stock"}, "transformers' trainer"),
        ({"optim": "lomo", "trainer": "loop", "loss": "stock"}, "transformers' trainer"),
        ({"optim": "galore_adamw_layerwise", "gradient_accumulation_steps": 2}, "accumulate"),
        ({"optim": "apollo_adamw_layerwise", "num_gpus": 2}, "is for one GPU"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingPlan(**settings)


def test_optimizers_and_schedules_have_the_names_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the names are transformers'")
    optimizers = {o.value for o in transformers.training_args.OptimizerNames}
    schedules = {s.value for s in transformers.SchedulerType}
    assert set(OPTIMIZERS) - optimizers == {"muon"}  # torch's, beside AdamW
    assert set(SCHEDULES) <= schedules
