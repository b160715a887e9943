"""What every trainer is told, whichever of transformers' and TRL's it is. Needs no TRL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.training_args import OptimizerNames

from ftplan.planner.disk import CHECKPOINTS_KEPT


def launched_arguments(training_arguments: Mapping[str, Any], output_dir: str) -> dict[str, Any]:
    """Arguments of `transformers.TrainingArguments`: the plan's, and how this launcher runs it."""
    planned = dict(training_arguments)
    # transformers 5 takes a share of the steps as a `warmup_steps` below 1.
    planned["warmup_steps"] = planned.pop("warmup_ratio")
    if planned["optim"] not in list(OptimizerNames):  # `optimizers.settle_optimizer` makes it
        planned["optim"] = OptimizerNames.ADAMW_TORCH_FUSED
    return {
        "output_dir": output_dir,
        "logging_steps": 1,
        "eval_strategy": "no",
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_total_limit": CHECKPOINTS_KEPT,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not planned["use_cpu"],
        "ddp_find_unused_parameters": False,
        **planned,
    }
