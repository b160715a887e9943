"""What is to be merged: a finished run with an adapter, its base, and where the result goes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.launcher.host import existing_parent, ram_bytes
from ftplan.launcher.model_source import has_weights
from ftplan.launcher.run_dir import RunDir, open_run, read_mapping
from ftplan.planner.errors import InputError
from ftplan.planner.units import MIB, format_bytes

# Tokenizer, configuration and model card, generously.
_BESIDE_WEIGHTS_BYTES = 64 * MIB


class MergeRequest(Struct, frozen=True, kw_only=True):
    """`record`, `train`: the run's record.json and train.yaml."""

    run: RunDir
    base: Path
    out: Path
    record: dict[str, Any]
    train: dict[str, Any]

    @property
    def adapter(self) -> Path:
        return self.run.adapter

    @property
    def objective(self) -> str:
        return str(self.train["method_settings"]["objective"])


def merge_request(path: Path, out: Path | None) -> MergeRequest:
    """Raises InputError where there is nothing to merge, nothing to merge into, or no place."""
    run = open_run(path)
    if not run.finished:
        raise InputError(
            f"`{run.root}` has not finished", f"`ftplan resume {run.quoted}` goes on with it"
        )
    record, train = run.read_record(), read_mapping(run.train)
    if record.get("output") != "adapter":
        raise InputError(
            f"method `{record.get('method')}` trains the model itself: nothing is left to merge",
            f"`{run.model}` is the whole model",
        )
    if not (run.adapter / "adapter_config.json").is_file():
        raise InputError(
            f"`{run.adapter}` holds no adapter of PEFT", "run again, or put the folder back"
        )
    base = (run.root / str(train.get("model", ""))).resolve()
    if not has_weights(base):
        raise InputError(
            f"the base model's weights are no longer at `{base}`",
            f"put them back, or name their new place under `model` in `{run.train}`",
        )
    target = out or run.merged
    if os.path.lexists(target):
        raise InputError(
            f"`{target}` is there already", "name another folder with `--out`, or remove it"
        )
    return MergeRequest(run=run, base=base, out=target, record=record, train=train)


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises InputError where the disk has no room for so many bytes of weights."""
    free = shutil.disk_usage(existing_parent(folder)).free
    needed = num_bytes + _BESIDE_WEIGHTS_BYTES
    if needed > free:
        raise InputError(
            f"`{folder}` needs {format_bytes(needed)}, and {format_bytes(free)} is free there",
            "name a folder on another disk with `--out`, or free some room",
        )


def check_ram(num_bytes: int, why: str) -> None:
    """Raises InputError where so much RAM is not free."""
    _, available = ram_bytes()
    if num_bytes > available:
        raise InputError(
            f"{why}, the whole base is held in {format_bytes(num_bytes)} of RAM, and "
            f"{format_bytes(available)} is free",
            "end other programs, or merge on a machine with more RAM",
        )
