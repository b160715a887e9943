"""Rows that several GPUs divide: the closed form beside dry runs, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.launcher.emit import check_launched
from ftplan.planner.context_parallel import LOSSES
from ftplan.planner.errors import InputError
from ftplan.planner.families import spec_from_config
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import DEFAULT_CAPABILITY, cublas_workspace_bytes
from ftplan.planner.step_settings import model_rows
from ftplan.planner.step_time import estimate_step_time
from ftplan.profiles import find_gpu

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
}
LLAMA = {"model_type": "llama", **SHAPE}
QWEN2 = {"model_type": "qwen2", **SHAPE, "vocab_size": 2048, "tie_word_embeddings": True}
QWEN3 = {"model_type": "qwen3", **SHAPE, "head_dim": 64}
OWN: dict[str, Any] = {"trainer": "transformers"}
PLAIN: dict[str, Any] = {"gradient_checkpointing": False}

# See test_sharded.
TOLERANCE = 0.005
OF_ANY_SIZE = 2 * cublas_workspace_bytes(DEFAULT_CAPABILITY)


def divided_plan(**changes: Any) -> TrainingPlan:
    return TrainingPlan(
        **{
            "method": "full",
            "sharding": "fsdp",
            "num_gpus": changes.get("cp_size", 2),
            "cp_size": 2,
            "max_length": 512,
            "per_device_train_batch_size": 2,
            "loss": "stock",
            **changes,
        }
    )


def estimate(model: ModelSpec, **changes: Any) -> MemoryEstimate:
    return estimate_memory(model, divided_plan(**changes))


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        pytest.param(LLAMA, {}, id="llama, evaluated on whole rows"),
        pytest.param(LLAMA, {**OWN, **PLAIN}, id="transformers' trainer"),
        pytest.param(LLAMA, {**OWN, "cp_size": 4, "num_gpus": 8}, id="4 of 8 GPUs"),
        pytest.param(QWEN2, {"loss": "trl-fused", "dtype": "float32"}, id="qwen2, fused loss"),
        pytest.param(QWEN3, {**OWN, "gradient_accumulation_steps": 2}, id="qwen3, accumulation"),
        pytest.param(LLAMA, {**OWN, "method": "lora"}, id="lora"),
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
    evaluation = next(phase for phase in found.phases if phase.name == "evaluation")
    in_dry_run = peaks["evaluation"].allocated_bytes - OF_ANY_SIZE
    assert evaluation.allocated_peak_bytes - OF_ANY_SIZE == pytest.approx(in_dry_run, rel=0.04)


@pytest.mark.train
@pytest.mark.usefixtures("on_the_processor")
def test_windows_are_refused_in_the_dry_run_too() -> None:
    pytest.importorskip("trl", reason="needs the `train` extra")
    from ftplan.launcher.dry_run.case import DryRunCase
    from ftplan.launcher.dry_run.step import dry_run

    config = {"model_type": "mistral", **SHAPE, "sliding_window": 128}
    case = DryRunCase(config=config, plan=divided_plan(), kind="cuda", row_length=512)
    with pytest.raises(InputError, match="sliding_attention"):
        dry_run(case)


plans = st.fixed_dictionaries(
    {
        "method": st.sampled_from(("full", "lora")),
        "trainer": st.sampled_from(("trl", "transformers")),
        "gradient_checkpointing": st.booleans(),
        "gradient_accumulation_steps": st.sampled_from((1, 2)),
        "loss": st.sampled_from(LOSSES),
        "per_device_train_batch_size": st.integers(1, 4),
        "max_length": st.integers(1, 64).map(lambda number: 16 * number),
    }
)
models = st.sampled_from([spec_from_config(config, "tiny") for config in (LLAMA, QWEN2, QWEN3)])


@given(models, plans)
@settings(max_examples=40, deadline=None)
def test_more_gpus_to_a_row_never_take_more_memory(
    model: ModelSpec, changes: dict[str, Any]
) -> None:
    two, four, eight = (estimate(model, **changes, num_gpus=8, cp_size=n) for n in (2, 4, 8))
    assert eight.allocated_peak_bytes <= four.allocated_peak_bytes <= two.allocated_peak_bytes
    for memory in (two, four, eight):
        for phase in memory.phases:
            assert all(size >= 0 for size in phase.components.values()), phase.name
            assert sum(phase.components.values()) == phase.allocated_peak_bytes


def test_long_rows_take_less_on_each_gpu() -> None:
    model = spec_from_config(LLAMA, "tiny")
    one, two = (
        estimate(model, **OWN, **PLAIN, num_gpus=2, cp_size=n, max_length=2048) for n in (1, 2)
    )
    assert two.peak_phase.components["activations"] < 0.6 * one.peak_phase.components["activations"]
    assert two.allocated_peak_bytes < one.allocated_peak_bytes


def test_gpus_that_divide_a_row_see_one_batch() -> None:
    plan = divided_plan(num_gpus=8, cp_size=4)
    assert plan.data_parallel_size == 2
    assert plan.effective_batch_size == 2 * 2
    assert model_rows(plan, 512) == (2, 128)


def test_the_products_are_divided_evenly() -> None:
    """Attention's too, whose scores are of a part of the queries and all the keys."""
    model, device = spec_from_config(LLAMA, "tiny"), find_gpu("h200").device()
    whole, half = (
        estimate_step_time(
            model,
            divided_plan(**OWN, num_gpus=2, cp_size=n),
            device,
            tokens_per_micro_batch=1024,
            mean_length=512,
        )
        for n in (1, 2)
    )
    assert half.step_flops == pytest.approx(whole.step_flops / 2, rel=0.01)
    assert half.tokens_per_step == whole.tokens_per_step / 2


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"num_gpus": 3}, "does not divide `--num-gpus 3`", "--num-gpus 2"),
        ({"sharding": "none"}, "FSDP2 alone", "--sharding fsdp"),
        ({"sharding": "zero2"}, "FSDP2 alone", "--sharding fsdp"),
        ({"attn_implementation": "eager"}, "torch's attention alone", "sdpa"),
        ({"max_length": 510}, "no 4 equal ones", "pad_to_multiple_of"),
        ({"method": "qlora", "quantization": "nf4"}, "quantized to nf4", "--quantization none"),
        ({"offload": "parameters"}, "with `--offload`", "leave out"),
        ({"loss": "liger"}, "--loss liger", "--loss stock"),
        ({"mixed_precision": "no", "dtype": "float32"}, "in fp32", "--mixed-precision bf16"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(InputError, match=said) as raised:
        divided_plan(**changes)
    assert hint in str(raised.value.hint)


def test_windows_and_old_cards_are_refused() -> None:
    windowed = spec_from_config({"model_type": "mistral", **SHAPE, "sliding_window": 128}, "tiny")
    with pytest.raises(InputError, match="has windows"):
        estimate(windowed)
    model = spec_from_config(LLAMA, "tiny")
    with pytest.raises(InputError, match="compute capability"):
        estimate_memory(model, divided_plan(), device=find_gpu("t4").device())


def test_it_is_not_launched() -> None:
    with pytest.raises(InputError, match="does not launch runs with `--cp-size 2`"):
        check_launched({"cp_size": 2})


@pytest.mark.train
def test_torch_has_no_ring_attention_for_processors() -> None:
    """Why it is not launched: once it has, runs can be tried there."""
    attention = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel")
    kernels = {str(kernel) for kernel in attention._attention.custom_ops}
    assert "aten._scaled_dot_product_flash_attention.default" in kernels
    assert not any("for_cpu" in kernel for kernel in kernels)
