"""Sharded state in the dry run: against real tensors, few layers against all, what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

from torch.profiler import ProfilerActivity, profile

from ftplan.launcher.dry_run.fsdp import enable, group_of
from ftplan.launcher.dry_run.recorder import local_tensor
from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.training.measure import storage_sizes
from ftplan.planner.memory_record import MemoryRecord
from ftplan.planner.zero import REDUCE_BUCKET_SIZE
from tests.dry_runs import (
    GENERATOR_STATE_BYTES,
    LLAMA,
    NUM_LAYERS,
    PHASES,
    QLORA,
    case,
    cuda_case,
    mark_backward,
    phase_peaks,
    real_trainer,
)
from tests.sweeps import only_whole

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

FULL: dict[str, Any] = {"method": "full", "dtype": "float32"}
FSDP: dict[str, Any] = {"sharding": "fsdp", "num_gpus": 2}
HYBRID: dict[str, Any] = {"sharding": "fsdp", "num_gpus": 4, "dp_replicate_size": 2}
# What clipping holds for each traced gradient: a number of four bytes.
NORMS = {"aten.stack.default", "aten.pow.Tensor_Scalar"}
NORMS |= {"_c10d_functional.all_reduce.default"}


def measured_peaks(trainer: Any) -> dict[str, int]:
    """As for one process; measured from when the model is sharded."""
    mark_backward(trainer.accelerator)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    prepare, levels = trainer.accelerator.prepare, []

    def prepared(*objects: Any) -> Any:
        result = prepare(*objects)
        if not levels and trainer.accelerator._models:
            model = trainer.accelerator._models[-1]
            held = [local_tensor(t) for t in (*model.parameters(), *model.buffers())]
            levels.append(sum(storage_sizes(held).values()))
            gc.collect()
            gc.disable()
            profiler.start()
        return result

    trainer.accelerator.prepare = prepared
    trainer.train()
    profiler.stop()
    gc.enable()
    return phase_peaks(profiler, *levels)


@pytest.mark.parametrize(
    ("settings", "version"),
    [
        pytest.param({**FULL, "mixed_precision": "bf16"}, 2, id="full, autocast"),
        pytest.param({**FULL, "gradient_checkpointing": True}, 2, id="full, checkpointing"),
        pytest.param({"trainer": "transformers"}, 1, id="lora, FSDP1"),
    ],
)
def test_fsdp_takes_what_it_takes_on_real_tensors(
    settings: dict[str, Any], version: int, tmp_path: Path
) -> None:
    """FSDP in a group that sends nothing, on real tensors, seen by torch's profiler."""
    dry_case = case(**{**FSDP, **settings}, fsdp_version=version)
    trainer = real_trainer(dry_case, tmp_path)
    enable(trainer, dry_case.plan, version)
    with group_of(dry_case.plan.num_gpus):
        measured = measured_peaks(trainer)
    peaks = dry_run(dry_case).record.phase_peaks()
    unseen = GENERATOR_STATE_BYTES * NUM_LAYERS * dry_case.plan.gradient_checkpointing
    for phase in PHASES:
        predicted = peaks[phase].allocated_bytes
        assert predicted + unseen == pytest.approx(measured[phase], rel=0.01), phase


def test_fsdp1_keeps_gradients_until_the_next_forward() -> None:
    """Under autocast it holds fp32 weights, as many gradients and two states each, per GPU."""
    settings = {**FULL, **FSDP, "dtype": "bfloat16", "mixed_precision": "bf16"}
    done = dry_run(cuda_case(LLAMA, 2, **settings, trainer="transformers", fsdp_version=1))
    record = done.record
    after_training = next(start for start, name in record.phases if name == "evaluation") - 1
    held = record.components_at(after_training)
    share = 4 * done.num_parameters / 2
    for component, times in {"weights": 1, "gradients": 1, "optimizer_states": 2}.items():
        assert held[component] == pytest.approx(times * share, rel=0.02), component


# --- few layers for all --------------------------------------------------------------------------


def same_but_for_norms(few: MemoryRecord, every: MemoryRecord) -> None:
    assert few.phases == every.phases
    assert few.phase_peaks() == every.phase_peaks()
    for peak in every.phase_peaks().values():
        assert few.components_at(peak.position) == every.components_at(peak.position)
    assert few.events == every.events
    pairs = zip(few.storages, every.storages, strict=True)
    assert {s.operation for pair in pairs if pair[0] != pair[1] for s in pair} <= NORMS


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({**FULL, **FSDP}, id="FSDP2"),
        pytest.param(
            {**FSDP, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
            id="FSDP2, lora, accumulation",
        ),
        only_whole({**QLORA, **FSDP}, "FSDP2, qlora"),
        pytest.param({**FULL, **HYBRID, "dtype": "bfloat16"}, id="FSDP2, hybrid"),
        only_whole({**FULL, **FSDP, "sharding": "zero2"}, "ZeRO-2"),
        pytest.param(
            {**FULL, **FSDP, "sharding": "zero2", "offload": "optimizer"}, id="ZeRO-2, offload"
        ),
    ],
)
def test_few_layers_stand_for_all(settings: dict[str, Any]) -> None:
    dry_case = cuda_case(LLAMA, **settings)
    few = dry_run(dry_case)
    every = dry_run(structs.replace(dry_case, few_layers=False))
    assert few.num_layers_traced == 4 < every.num_layers_traced
    same_but_for_norms(few.record, every.record)


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_zero_with_adapters_is_traced_in_all_layers(sharding: str) -> None:
    """The shares of their gradients are alike: one layer's would be taken for another's."""
    done = dry_run(cuda_case(LLAMA, **{**FSDP, "sharding": sharding}))
    assert done.num_layers_traced == done.num_layers


# --- what is divided, and what is not ------------------------------------------------------------


def at_the_step(**settings: Any) -> dict[str, int]:
    record = dry_run(cuda_case(LLAMA, 2, **{**FULL, **settings})).record
    return record.components_at(record.phase_peaks()["optimizer step"].position)


def test_what_each_kind_of_sharding_divides() -> None:
    """Adam: weights, gradients and two states under FSDP; ZeRO's states, in fp32, are three."""
    whole, fsdp = at_the_step(), at_the_step(**FSDP)
    for component in ("weights", "gradients", "optimizer_states"):
        assert fsdp[component] == pytest.approx(whole[component] / 2, rel=0.02), component
    zero = at_the_step(sharding="zero2", num_gpus=2)
    assert zero["weights"] == pytest.approx(whole["weights"] / 2, rel=0.02)  # bf16
    assert zero["optimizer_states"] == pytest.approx(whole["optimizer_states"] * 3 / 4, rel=0.02)


def test_zeros_bucket_has_its_size_whatever_the_model() -> None:
    record = dry_run(cuda_case(LLAMA, 2, **FULL, sharding="zero2", num_gpus=2)).record
    buckets = [s for s in record.storages if s.shape == (REDUCE_BUCKET_SIZE,)]
    assert {(s.num_bytes, s.component) for s in buckets} == {(10**9, "communication")}


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    fsdp = at_the_step(**FSDP, offload="parameters")
    assert fsdp["gradients"] == fsdp["optimizer_states"] == 0
    assert fsdp["weights"] <= 1024  # the rotary embedding's buffers
    zero = at_the_step(sharding="zero2", num_gpus=2, offload="optimizer")
    assert zero["gradients"] == zero["optimizer_states"] == 0 < zero["weights"]


def test_a_case_with_sharding_leaves_nothing_behind() -> None:
    plain = case(method="full")
    before = dry_run(plain).record
    dry_run(cuda_case(LLAMA, 1, **FULL, **FSDP))
    dry_run(cuda_case(LLAMA, 1, **FULL, sharding="zero2", num_gpus=2))
    after = dry_run(plain).record
    assert (after.events, after.storages) == (before.events, before.storages)
