"""DeepSpeed's configuration of a plan: what the memory model assumes of ZeRO, in DeepSpeed's words.

Settings that are not said here have DeepSpeed's defaults (deepspeed/runtime/zero/config.py), and
none of them is left to accelerate, whose plugin has others.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ftplan.planner.coordinator import (
    MAX_LIVE_PARAMETERS,
    MAX_REUSE_DISTANCE,
    PREFETCH_BUCKET_SIZE,
)
from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.sharding import PARAM_PERSISTENCE_THRESHOLD, SHARDING_TITLES, ZERO
from ftplan.planner.zero import REDUCE_BUCKET_SIZE
from ftplan.planner.zero3 import SUB_GROUP_SIZE

PACKAGE = "deepspeed"

# Filled in by the trainer, which may lower rows when memory runs out.
_AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def check_installed(sharding: str) -> None:
    """Raises InputError where a plan needs DeepSpeed and it is not there."""
    if sharding in ZERO and not is_installed():
        raise InputError(
            f"{SHARDING_TITLES[sharding]} is DeepSpeed's, and the package `{PACKAGE}` is not "
            "installed",
            "`pip install 'ftplan[deepspeed]'`; or use `--sharding fsdp`, which torch brings",
        )


def check_parts(checkpoint: Path | None, num_processes: int) -> None:
    """Raises InputError for a checkpoint of ZeRO's with the parts of another number of processes:
    DeepSpeed does not divide optimizer states anew."""
    parts = len(list(checkpoint.glob("global_step*/*_optim_states.pt"))) if checkpoint else 0
    if checkpoint and parts and parts != num_processes:
        raise InputError(
            f"`{checkpoint}` has ZeRO's parts of {parts} GPUs, and {num_processes} are to go on",
            f"use `--num-gpus {parts}`, or begin anew with `ftplan launch`",
        )


def deepspeed_config(plan: TrainingPlan) -> dict[str, Any] | None:
    """What DeepSpeed calls `ds_config`; None for a plan without ZeRO."""
    if plan.sharding not in ZERO:
        return None
    return {
        **dict.fromkeys(_AUTO, "auto"),
        "gradient_clipping": plan.max_grad_norm,
        "bf16": {"enabled": plan.mixed_precision == "bf16"},
        "fp16": {"enabled": plan.mixed_precision == "fp16"},
        "zero_optimization": _zero_optimization(plan),
        # The optimizer is the plan's, where its states are in the host's memory as well.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _zero_optimization(plan: TrainingPlan) -> dict[str, Any]:
    stage = ZERO.index(plan.sharding) + 1
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": REDUCE_BUCKET_SIZE,
        # Below stage 3 it takes a second bucket.
        "overlap_comm": stage == 3,
    }
    if plan.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if plan.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    if stage == 3:
        zero |= {
            "sub_group_size": SUB_GROUP_SIZE,
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET_SIZE,
            "stage3_param_persistence_threshold": PARAM_PERSISTENCE_THRESHOLD,
            "stage3_max_live_parameters": MAX_LIVE_PARAMETERS,
            "stage3_max_reuse_distance": MAX_REUSE_DISTANCE,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return zero
