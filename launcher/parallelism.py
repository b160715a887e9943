"""How processes share a model beside dividing it once: accelerate's `parallelism_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan

_PREFIX = "parallelism_config_"
_SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size")


def parallelism_config(plan: TrainingPlan) -> dict[str, int]:
    """Of accelerate's configuration; empty where FSDP over all processes, or DDP, is all."""
    if plan.tp_size > 1:
        return _config(1, 1, plan.tp_size)
    if plan.dp_replicate_size == 1:
        return {}
    return _config(plan.dp_replicate_size, plan.dp_shard_size)


def _config(copies: int, shards: int, tp_size: int = 1) -> dict[str, int]:
    sizes = (copies, shards, tp_size, 1)
    return {f"{_PREFIX}{name}": size for name, size in zip(_SIZES, sizes, strict=True)}


def sizes_on(config: Mapping[str, Any], num_processes: int) -> dict[str, int]:
    """What changes of accelerate's configuration on another number of processes: as many copies of
    the model as there are groups of the planned size, so that each process holds what was planned;
    of fewer processes, all divide one copy. Raises InputError where groups would be unequal."""
    changed = {"num_processes": num_processes}
    planned = config.get("parallelism_config")
    if not planned:
        return changed
    tp_size = int(planned[f"{_PREFIX}tp_size"])
    if tp_size > 1:
        if num_processes != tp_size:
            raise InputError(
                f"{tp_size} GPUs divide each layer of this model, and not {num_processes}",
                f"use `--num-gpus {tp_size}`, or plan again",
            )
        return changed
    group = int(planned[f"{_PREFIX}dp_shard_size"])
    if num_processes % group and group % max(1, num_processes):
        raise InputError(
            f"{num_processes} GPUs are no equal groups of {group}, each of which divides a copy of "
            "the model",
            f"use `--num-gpus {group}` or a multiple of it",
        )
    copies = max(1, num_processes // group)
    return {**changed, **_config(copies, num_processes // copies)}


def on_processes(plan: TrainingPlan, config: Mapping[str, Any], num_processes: int) -> TrainingPlan:
    """The plan on another number of GPUs; raises InputError as `sizes_on` does."""
    copies = sizes_on(config, num_processes).get(f"{_PREFIX}dp_replicate_size", 1)
    return plan.replace(num_gpus=num_processes, dp_replicate_size=copies)
