"""train.yaml, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftplan.launcher.run_dir import RunDir, read_mapping
from ftplan.planner.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What the training process is to do."""

    model: str
    data: Path
    data_sha256: str
    eval_data: Path | None
    eval_data_sha256: str | None
    method: str
    method_settings: Mapping[str, Any]
    training_arguments: Mapping[str, Any]

    @property
    def is_quantized(self) -> bool:
        return bool(self.method_settings["quantization"] != "none")


def read_train_config(run: RunDir) -> TrainConfig:
    """Raises InputError naming the missing key."""
    raw = read_mapping(run.train)
    try:
        eval_data = raw["eval_data"]
        return TrainConfig(
            model=raw["model"],
            data=run.root / raw["data"],
            data_sha256=raw["data_sha256"],
            eval_data=run.root / eval_data if eval_data else None,
            eval_data_sha256=raw["eval_data_sha256"],
            method=raw["method"],
            method_settings=raw["method_settings"],
            training_arguments=raw["training_arguments"],
        )
    except KeyError as error:
        raise InputError(f"`{run.train}` has no `{error.args[0]}`") from error
