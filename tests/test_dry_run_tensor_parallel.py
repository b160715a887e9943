"""Tensor parallelism in the dry run: against real tensors, few layers against all, refusals."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from ftplan.launcher.dry_run.fsdp import group_of
from ftplan.launcher.dry_run.recorder import local_tensor
from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.dry_run.tensor_parallel import divide
from ftplan.launcher.training.measure import storage_sizes
from ftplan.planner.errors import InputError
from tests.dry_runs import (
    GENERATOR_STATE_BYTES,
    GPT2,
    LLAMA,
    NUM_LAYERS,
    PHASES,
    QWEN3,
    case,
    cuda_case,
    mark_backward,
    phase_peaks,
    real_trainer,
)

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

DIVIDED: dict[str, Any] = {"method": "full", "num_gpus": 2, "tp_size": 2}


def measured_peaks(trainer: Any) -> dict[str, int]:
    """Tensor bytes at the highest moment of each phase, by torch's profiler."""
    mark_backward(trainer.accelerator)
    held = [local_tensor(t) for t in (*trainer.model.parameters(), *trainer.model.buffers())]
    level = sum(storage_sizes(held).values())
    gc.collect()
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    gc.enable()
    return phase_peaks(profiler, level)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        pytest.param(LLAMA, {}, id="llama"),
        pytest.param(LLAMA, {"gradient_checkpointing": True}, id="llama, checkpointing"),
        pytest.param(QWEN3, {"mixed_precision": "bf16"}, id="qwen3, tied, autocast"),
        pytest.param(
            LLAMA, {"trainer": "transformers", "gradient_accumulation_steps": 2}, id="accumulation"
        ),
    ],
)
def test_divided_matrices_take_what_they_take_on_real_tensors(
    config: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """transformers' division in a group that sends nothing, on real tensors."""
    dry_case = case(config, **DIVIDED, **settings)
    trainer = real_trainer(dry_case, tmp_path)
    with group_of(2):
        divide(trainer.model, init_device_mesh("cpu", (2,)))
        measured = measured_peaks(trainer)
    peaks = dry_run(dry_case).record.phase_peaks()
    unseen = GENERATOR_STATE_BYTES * NUM_LAYERS * dry_case.plan.gradient_checkpointing
    for phase in PHASES:
        predicted = peaks[phase].allocated_bytes
        assert predicted + unseen == pytest.approx(measured[phase], rel=0.01), phase


def test_few_layers_stand_for_all() -> None:
    dry_case = cuda_case(LLAMA, **DIVIDED)
    few = dry_run(dry_case)
    every = dry_run(structs.replace(dry_case, few_layers=False))
    assert few.num_layers_traced == 4 < every.num_layers_traced
    assert few.record.phase_peaks() == every.record.phase_peaks()
    assert few.record.events == every.record.events
    assert few.num_parameters == every.num_parameters == few.num_trainable_parameters


def test_each_gpu_has_its_part_and_every_gpu_the_embeddings_gradient() -> None:
    whole, part = (
        dry_run(cuda_case(LLAMA, 2, method="full", **changes)).record
        for changes in ({}, {"num_gpus": 2, "tp_size": 2})
    )

    def at_the_step(record: Any) -> dict[str, int]:
        held: dict[str, int] = record.components_at(record.phase_peaks()["optimizer step"].position)
        return held

    before, after = at_the_step(whole), at_the_step(part)
    for component in ("weights", "optimizer_states"):
        assert after[component] == pytest.approx(before[component] / 2, rel=0.05), component
    others = LLAMA["vocab_size"] * LLAMA["hidden_size"] * 2 // 2
    assert after["gradients"] == pytest.approx(before["gradients"] / 2 + others, rel=0.02)


def test_models_without_a_plan_and_odd_heads_are_refused() -> None:
    with pytest.raises(InputError, match="no plan of tensor parallelism for `gpt2`"):
        dry_run(cuda_case(GPT2, 1, **DIVIDED))
    with pytest.raises(InputError, match="num_key_value_heads 2"):
        dry_run(cuda_case(LLAMA, 1, **{**DIVIDED, "num_gpus": 4, "tp_size": 4}))


def test_it_leaves_nothing_behind() -> None:
    plain = case(method="full")
    before = dry_run(plain).record
    dry_run(cuda_case(LLAMA, 1, **DIVIDED))
    after = dry_run(plain).record
    assert (after.events, after.storages) == (before.events, before.storages)
