"""Matrices that several GPUs divide, in closed form: beside dry runs and transformers' own plans,
and what holds of any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.planner.errors import InputError
from ftplan.planner.families import spec_from_config
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.rules_of_thumb import tutorial_bytes
from ftplan.planner.stack import DEFAULT_CAPABILITY, cublas_workspace_bytes
from ftplan.planner.tensor_parallel import METHODS, MODEL_TYPES, OPTIMIZERS, one_rank

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
}
LLAMA = {"model_type": "llama", **SHAPE}
QWEN2 = {"model_type": "qwen2", **SHAPE, "tie_word_embeddings": True}
QWEN3 = {"model_type": "qwen3", **SHAPE, "head_dim": 32}
SMALL_VOCABULARY: dict[str, Any] = {"vocab_size": 128}
PLAIN: dict[str, Any] = {"gradient_checkpointing": False}

# Storages are rounded up to 512 bytes, which counts in models this small; the workspaces of a
# constant size, which nothing here could get wrong, are taken off both numbers.
TOLERANCE = 0.003
OF_ANY_SIZE = 2 * cublas_workspace_bytes(DEFAULT_CAPABILITY)


def divided_plan(**changes: Any) -> TrainingPlan:
    size = changes.setdefault("tp_size", 2)
    return TrainingPlan(
        **{
            "method": "full",
            "num_gpus": size,
            "max_length": 128,
            "per_device_train_batch_size": 2,
            "loss": "stock",
            **changes,
        }
    )


def estimate(model: ModelSpec, **changes: Any) -> MemoryEstimate:
    return estimate_memory(model, divided_plan(**changes))


# --- beside dry runs -----------------------------------------------------------------------------


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        pytest.param(LLAMA, {}, id="llama"),
        pytest.param({**LLAMA, **SMALL_VOCABULARY}, PLAIN, id="layers at the peak"),
        pytest.param(
            {**LLAMA, **SMALL_VOCABULARY}, {"dtype": "float32", "tp_size": 4}, id="fp32, 4 GPUs"
        ),
        pytest.param(LLAMA, {"loss": "trl-fused", "optim": "adamw_torch"}, id="fused loss"),
        pytest.param(
            {**LLAMA, **SMALL_VOCABULARY},
            {"use_reentrant": True, "attn_implementation": "eager"},
            id="reentrant, eager",
        ),
        pytest.param(QWEN2, {"gradient_accumulation_steps": 2}, id="qwen2, tied, accumulation"),
        pytest.param({**QWEN3, **SMALL_VOCABULARY}, PLAIN, id="qwen3"),
        pytest.param(LLAMA, {"method": "freeze", "num_trainable_layers": 1}, id="freeze"),
        pytest.param({**LLAMA, "model_type": "starcoder2"}, {}, id="biases on what is summed"),
    ],
)
def test_the_closed_form_equals_the_dry_run(
    config: Mapping[str, Any], changes: dict[str, Any]
) -> None:
    pytest.importorskip("trl", reason="needs the `train` extra")
    from ftplan.launcher.dry_run.case import DryRunCase
    from ftplan.launcher.dry_run.step import dry_run

    plan = divided_plan(**changes)
    case = DryRunCase(config=config, plan=plan, kind="cuda", row_length=plan.max_length)
    peaks = dry_run(case).record.phase_peaks()
    found = estimate(spec_from_config(config, "tiny"), **changes)
    expected = max(peak.allocated_bytes for peak in peaks.values()) - OF_ANY_SIZE
    assert found.allocated_peak_bytes - OF_ANY_SIZE == pytest.approx(expected, rel=TOLERANCE)
    step = next(phase for phase in found.phases if phase.name == "optimizer step")
    at_step = peaks["optimizer step"].allocated_bytes - OF_ANY_SIZE
    assert step.allocated_peak_bytes - OF_ANY_SIZE == pytest.approx(at_step, rel=0.01)


@pytest.mark.train
@pytest.mark.parametrize("family", sorted(MODEL_TYPES))
def test_transformers_divides_these_families_so(
    family: str, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    """Every linear module of a layer, by columns or by rows, and the vocabulary."""
    torch = pytest.importorskip("torch", reason="needs the `train` extra")
    transformers = pytest.importorskip("transformers", reason="needs the `train` extra")

    config = tiny_config(family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config), attn_implementation="eager"
        )
    plan = {name.rpartition(".")[2]: style for name, style in model.tp_plan.items()}
    (layer, *_) = one_rank(spec_from_config(config, family), 2).layers
    styles = {linear.name: linear.parallel for linear in layer.linears}
    outside = {"embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}
    norms = dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")
    assert {**norms, **plan} == {**norms, **styles, **outside}


# --- what must hold of any model -----------------------------------------------------------------

plans = st.fixed_dictionaries(
    {
        "method": st.sampled_from(METHODS),
        "gradient_checkpointing": st.booleans(),
        "gradient_accumulation_steps": st.sampled_from((1, 2)),
        "optim": st.sampled_from(OPTIMIZERS),
        "loss": st.sampled_from(("stock", "trl-fused")),
        "per_device_train_batch_size": st.integers(1, 4),
        "max_length": st.integers(8, 256),
        "num_trainable_layers": st.just(1),
    }
)
models = st.sampled_from([spec_from_config(config, "tiny") for config in (LLAMA, QWEN2, QWEN3)])


@given(models, plans, st.sampled_from((2, 4)))
@settings(max_examples=60, deadline=None)
def test_more_gpus_take_less_of_the_model(
    model: ModelSpec, changes: dict[str, Any], tp_size: int
) -> None:
    few, many = (estimate(model, **{**changes, "tp_size": n}) for n in (tp_size // 2, tp_size))
    for before, after in zip(few.phases, many.phases, strict=True):
        for part in ("weights", "optimizer_states"):
            assert after.components[part] <= before.components[part], (after.name, part)
    for memory in (few, many):
        for phase in memory.phases:
            assert all(size >= 0 for size in phase.components.values()), phase.name
            assert sum(phase.components.values()) == phase.allocated_peak_bytes


@given(models, plans)
@settings(max_examples=30, deadline=None)
def test_more_gpus_never_take_more_memory(model: ModelSpec, changes: dict[str, Any]) -> None:
    two, four = (estimate(model, **{**changes, "tp_size": n}) for n in (2, 4))
    assert four.allocated_peak_bytes <= two.allocated_peak_bytes


@given(models, st.sampled_from((2, 4)))
@settings(max_examples=10, deadline=None)
def test_shares_together_are_the_model(model: ModelSpec, tp_size: int) -> None:
    """But for norms, which each GPU has."""
    share = one_rank(model, tp_size)
    norms = sum(
        norm.num_parameters
        for layer in model.layers
        for norm in (*layer.norms, *layer.attention.norms)
    ) + sum(p.num_elements for p in (model.final_norm.parameters() if model.final_norm else ()))
    assert tp_size * (share.num_parameters - norms) + norms == model.num_parameters


def test_one_gpu_has_the_model_itself() -> None:
    model = spec_from_config(LLAMA, "tiny")
    assert one_rank(model, 1) is model
    one = TrainingPlan(method="full")
    assert one.replace(tp_size=1, cp_size=1) == one


def test_gpus_that_divide_a_model_see_the_same_rows() -> None:
    plan = divided_plan(tp_size=4, gradient_accumulation_steps=3)
    assert plan.data_parallel_size == 1
    assert plan.effective_batch_size == 2 * 3
    assert TrainingPlan(num_gpus=4).effective_batch_size == 4


def test_a_rules_total_is_divided_too() -> None:
    model = spec_from_config(LLAMA, "tiny")
    whole = tutorial_bytes(model, TrainingPlan(method="full"))
    assert whole is not None
    assert tutorial_bytes(model, divided_plan()) == whole // 2


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"num_gpus": 4}, "all GPUs divide the one model", "--num-gpus 2"),
        ({"sharding": "fsdp"}, "with `--sharding fsdp` is not modelled", "leave out one"),
        ({"method": "lora"}, "method `lora`", "--method full"),
        ({"method": "qlora", "quantization": "nf4"}, "quantized to nf4", "--sharding fsdp"),
        ({"loss": "liger"}, "reads the weight", "--loss trl-fused"),
        ({"trainer": "loop"}, "trains on one GPU", "--trainer trl"),
        ({"objective": "dpo", "loss": "trl-fused"}, "--objective dpo", "leave out"),
        ({"optim": "adamw_8bit"}, "--optim adamw_8bit", "adamw_torch_fused"),
        ({"tp_size": 0}, "must be a finite number above 0", ""),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(InputError, match=said) as raised:
        divided_plan(**changes)
    assert hint in str(raised.value.hint or "")


def test_heads_that_do_not_divide_are_refused() -> None:
    model = spec_from_config({**LLAMA, "num_key_value_heads": 2}, "tiny")
    with pytest.raises(InputError, match="num_key_value_heads 2") as raised:
        estimate(model, tp_size=4)
    assert "divisor of 2" in str(raised.value.hint)


def test_other_families_are_left_to_the_dry_run() -> None:
    model = spec_from_config({"model_type": "phi3", **SHAPE}, "tiny")
    with pytest.raises(InputError, match="`--tp-size 2` with `phi3`") as raised:
        estimate(model)
    assert "--exact" in str(raised.value.hint)
