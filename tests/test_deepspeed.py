"""DeepSpeed's configuration of a plan, and what becomes of plans where DeepSpeed is not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ftplan.launcher import deepspeed, emit
from ftplan.launcher.offer import Offer
from ftplan.launcher.planning import check_settings
from ftplan.launcher.run_dir import RunDir, read_mapping, write_yaml
from ftplan.launcher.training.config import read_train_config
from ftplan.planner.coordinator import (
    MAX_LIVE_PARAMETERS,
    MAX_REUSE_DISTANCE,
    PREFETCH_BUCKET_SIZE,
)
from ftplan.planner.errors import InputError
from ftplan.planner.goals import ANY_PLAN
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.sharding import PARAM_PERSISTENCE_THRESHOLD
from ftplan.planner.zero import REDUCE_BUCKET_SIZE
from ftplan.planner.zero3 import SUB_GROUP_SIZE
from tests.test_emit import GPU, ON_CPU, written

PLANS = [
    ("zero1", "none", "no"),
    ("zero2", "optimizer", "bf16"),
    ("zero3", "none", "fp16"),
    ("zero3", "parameters", "bf16"),
]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "it's mine")


def planned(sharding: str, offload: str, mixed_precision: str) -> TrainingPlan:
    return ON_CPU.replace(
        num_gpus=4,
        sharding=sharding,
        offload=offload,
        mixed_precision=mixed_precision,
        max_grad_norm=0.7,
        method="full",
    )


@pytest.mark.parametrize(("sharding", "offload", "mixed_precision"), PLANS)
def test_accelerates_own_plugin_reads_what_is_written(
    sharding: str, offload: str, mixed_precision: str, run: RunDir
) -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    written(run, planned(sharding, offload, mixed_precision), GPU)
    parsed = launch.launch_command_parser().parse_args(emit.launch_command(run)[3:])
    parsed, defaults, told_precision = launch._validate_launch_command(parsed)
    assert parsed.use_deepspeed and parsed.num_processes == 4 and not told_precision
    parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(parsed)
    with mock.patch.dict(os.environ, environment):
        plugin = DeepSpeedPlugin(hf_ds_config=dict(read_train_config(run).deepspeed or {}))
    assert plugin.zero_stage == int(sharding[-1])
    assert plugin.zero3_init_flag is (sharding == "zero3")
    assert plugin.gradient_clipping == 0.7
    assert plugin.offload_optimizer_device == ("none" if offload == "none" else "cpu")
    assert plugin.offload_param_device == ("cpu" if offload == "parameters" else "none")


@pytest.mark.parametrize(("sharding", "offload", "mixed_precision"), PLANS)
def test_deepspeeds_own_classes_read_what_the_memory_model_assumes(
    sharding: str, offload: str, mixed_precision: str
) -> None:
    config = pytest.importorskip("deepspeed.runtime.config", reason="needs `deepspeed`")
    given: dict[str, Any] = (
        deepspeed.deepspeed_config(planned(sharding, offload, mixed_precision)) or {}
    )
    filled = {name: 2 if value == "auto" else value for name, value in given.items()}
    read = config.DeepSpeedConfig(filled)
    zero = read.zero_config
    assert read.gradient_clipping == 0.7
    assert read.bfloat16_config.enabled is (mixed_precision == "bf16")
    assert read.bfloat16_config.check_grad_overflow  # steps that would spoil weights are skipped
    assert read.float16_config.enabled is (mixed_precision == "fp16")
    assert zero.stage == int(sharding[-1])
    assert zero.reduce_bucket_size == REDUCE_BUCKET_SIZE
    assert zero.contiguous_gradients and zero.reduce_scatter
    assert zero.overlap_comm is (sharding == "zero3")
    assert zero.sub_group_size == SUB_GROUP_SIZE
    assert zero.prefetch_bucket_size == PREFETCH_BUCKET_SIZE
    assert zero.param_persistence_threshold == PARAM_PERSISTENCE_THRESHOLD
    assert zero.max_live_parameters == MAX_LIVE_PARAMETERS
    assert zero.max_reuse_distance == MAX_REUSE_DISTANCE
    assert (zero.offload_optimizer is not None) is (offload != "none")
    assert (zero.offload_param is not None) is (offload == "parameters")


def test_a_run_says_nothing_else_to_deepspeed(run: RunDir) -> None:
    written(run, planned("zero2", "optimizer", "no"), GPU)
    train = read_mapping(run.train)
    for place, name in (
        (train["deepspeed"], "tensorboard"),
        (train["deepspeed"]["zero_optimization"]["offload_optimizer"], "nvme_path"),
    ):
        place[name] = "/somewhere"
        write_yaml(run.train, train)
        with pytest.raises(InputError, match=f"sets `{name}` of DeepSpeed"):
            read_train_config(run)
        del place[name]


def test_without_deepspeed_zero_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deepspeed, "is_installed", lambda: False)
    with pytest.raises(InputError, match="the package `deepspeed` is not installed") as raised:
        check_settings({"sharding": "zero2", "num_gpus": 2})
    assert "pip install 'ftplan[deepspeed]'" in str(raised.value.hint)
    check_settings({"sharding": "zero2", "num_gpus": 2}, for_launch=False)


@pytest.mark.parametrize("installed", [False, True])
def test_plans_to_be_launched_divide_with_deepspeed_where_it_is(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed, "is_installed", lambda: installed)
    for launches in (False, True):
        offer = Offer(devices=GPU, given={}, wanted=ANY_PLAN, launches=launches)
        assert ("zero2" in offer.shardings) is (installed or not launches)
        assert "fsdp" in offer.shardings


def test_zeros_checkpoints_are_for_as_many_gpus(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / "global_step4").mkdir(parents=True)
    for rank in range(2):
        (checkpoint / f"global_step4/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    deepspeed.check_parts(checkpoint, 2)
    deepspeed.check_parts(None, 4)
    with pytest.raises(InputError, match="parts of 2 GPUs, and 4 are to go on") as raised:
        deepspeed.check_parts(checkpoint, 4)
    assert "--num-gpus 2" in str(raised.value.hint)
