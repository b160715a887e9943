"""accelerate.yaml of hybrid sharding and tensor parallelism, parsed by accelerate's own classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ftplan.launcher import emit
from ftplan.launcher.parallelism import on_processes, parallelism_config, sizes_on
from ftplan.launcher.run_dir import RunDir, write_yaml
from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan
from ftplan.profiles import find_gpu

DIVIDED = TrainingPlan(num_gpus=4, tp_size=4, method="full")
HYBRID = TrainingPlan(num_gpus=8, dp_replicate_size=2, sharding="fsdp")


def parsed_by_accelerate(plan: TrainingPlan, run: RunDir, num_processes: int | None = None) -> Any:
    """accelerate's `ParallelismConfig` of what `accelerate launch` makes of the command."""
    launch = pytest.importorskip("accelerate.commands.launch")
    from accelerate import ParallelismConfig
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = emit.accelerate_config(plan, find_gpu("h100-sxm").device())
    write_yaml(run.accelerate, config)
    changed = sizes_on(config, num_processes) if num_processes else None
    parsed = launch.launch_command_parser().parse_args(emit.launch_command(run, sizes=changed)[3:])
    parsed, _, _ = launch._validate_launch_command(parsed)
    with mock.patch.dict(os.environ, prepare_multi_gpu_env(parsed)):
        assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
        found = ParallelismConfig()
    assert parsed.num_processes == found.total_size
    return found


@pytest.mark.train
@pytest.mark.parametrize(
    ("num_processes", "sizes"),
    [(None, (2, 4, 8)), (8, (2, 4, 8)), (4, (1, 4, 4)), (2, (1, 2, 2)), (12, (3, 4, 12))],
)
def test_accelerate_itself_makes_the_mesh_of_copies_and_parts(
    num_processes: int | None, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    found = parsed_by_accelerate(HYBRID, RunDir(tmp_path), num_processes)
    assert (found.dp_replicate_size, found.dp_shard_size, found.total_size) == sizes


@pytest.mark.train
def test_accelerate_itself_makes_the_mesh_of_divided_layers(tmp_path: Path) -> None:
    found = parsed_by_accelerate(DIVIDED, RunDir(tmp_path))
    assert (found.tp_size, found.dp_shard_size, found.total_size) == (4, 1, 4)


def test_divided_layers_need_as_many_gpus_as_planned() -> None:
    config = {"parallelism_config": parallelism_config(DIVIDED)}
    assert sizes_on(config, 4) == {"num_processes": 4}
    with pytest.raises(InputError, match="4 GPUs divide each layer of this model, and not 2"):
        on_processes(DIVIDED, config, 2)


def test_groups_of_unequal_size_are_refused_with_the_numbers_that_go() -> None:
    config = {"parallelism_config": parallelism_config(HYBRID)}
    with pytest.raises(InputError, match="6 GPUs are no equal groups of 4") as raised:
        sizes_on(config, 6)
    assert "`--num-gpus 4` or a multiple of it" in str(raised.value.hint)


def test_each_gpu_keeps_its_part_on_another_number_of_them() -> None:
    config = {"parallelism_config": parallelism_config(HYBRID)}
    assert on_processes(HYBRID, config, 12) == HYBRID.replace(num_gpus=12, dp_replicate_size=3)
    plain = HYBRID.replace(dp_replicate_size=1)
    assert parallelism_config(plain) == {}
    assert on_processes(plain, {}, 3) == plain.replace(num_gpus=3)
    assert sizes_on({}, 3) == {"num_processes": 3}
