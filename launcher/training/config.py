"""train.yaml, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.launcher.run_dir import RunDir, read_mapping
from ftplan.planner.errors import InputError


class TrainConfig(Struct, frozen=True, kw_only=True):
    """What the training process is to do."""

    model: str
    data: Path
    data_sha256: str
    eval_data: Path | None
    eval_data_sha256: str | None
    method: str
    method_settings: Mapping[str, Any]
    loss: str
    training_arguments: Mapping[str, Any]

    @property
    def is_quantized(self) -> bool:
        return bool(self.method_settings["quantization"] != "none")


def checked_loss(loss: str, trainer: str) -> str:
    """The loss, if ftplan's training process has it; raises InputError otherwise.

    Both are settings of estimates too, where people ask about what they run elsewhere.
    """
    if trainer != "trl":
        raise InputError(
            f"runs are launched with TRL's trainer; `--trainer {trainer}` is for estimates",
            "leave `--trainer` out",
        )
    if loss == "liger":
        raise InputError(
            "TRL's trainer brings a fused loss of its own; `--loss liger` is for estimates",
            "use `--loss trl-fused`, the default, or `--loss stock`",
        )
    return loss


def checked_objective(objective: str) -> str:
    """The objective, if ftplan's training process has it; raises InputError otherwise."""
    if objective != "sft":
        raise InputError(
            f"runs are launched for plain fine-tuning; `--objective {objective}` is for estimates",
            "leave `--objective` out, or ask `ftplan estimate MODEL` about it",
        )
    return objective


def read_train_config(run: RunDir) -> TrainConfig:
    """Raises InputError naming the missing key."""
    raw = read_mapping(run.train)
    try:
        checked_objective(raw["method_settings"]["objective"])
        eval_data = raw["eval_data"]
        return TrainConfig(
            model=raw["model"],
            data=run.root / raw["data"],
            data_sha256=raw["data_sha256"],
            eval_data=run.root / eval_data if eval_data else None,
            eval_data_sha256=raw["eval_data_sha256"],
            method=raw["method"],
            method_settings=raw["method_settings"],
            loss=checked_loss(raw["loss"], raw["trainer"]),
            training_arguments=raw["training_arguments"],
        )
    except KeyError as error:
        raise InputError(f"`{run.train}` has no `{error.args[0]}`") from error
