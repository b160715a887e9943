"""The reward model that is named: a run of ours, a folder that holds one, or a Hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import structs

from ftplan.launcher.model_source import ModelSource, find_source
from ftplan.planner.errors import InputError
from ftplan.planner.rewards import with_reward_model

_HOW_TO_TRAIN = "train one with `ftplan auto PAIRS --objective reward`, and give its run directory"


def with_judge(source: ModelSource, judge: ModelSource | None) -> ModelSource:
    """The model, and what judges its completions."""
    if judge is None:
        return source
    spec = with_reward_model(source.spec, judge.spec)
    return structs.replace(source, spec=spec, reward_model=judge)


def reward_source(given: Mapping[str, Any]) -> ModelSource | None:
    """What the given settings name; raises InputError where that is no reward model."""
    name = given.get("reward_model")
    return find_reward_source(name) if name else None


def find_reward_source(name: str) -> ModelSource:
    """The model of that name, with its adapter where it is one.

    Raises InputError where there is no such model, or it does not score whole rows.
    """
    folder = Path(name)
    if (folder / "plan.yaml").is_file():
        folder = _made_by_run(folder)
    settings = folder / "adapter_config.json"
    if settings.is_file():
        return _of_adapter(folder, json.loads(settings.read_text(encoding="utf-8")))
    source = find_source(str(folder) if folder.is_dir() else name)
    if not _scores(source.config):
        raise InputError(f"`{name}` is no reward model: it gives no score", _HOW_TO_TRAIN)
    return source


def _made_by_run(run: Path) -> Path:
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return run / name
    raise InputError(
        f"the run `{run}` has made no model yet", f"finish it with `ftplan resume {run}`"
    )


def _of_adapter(folder: Path, settings: Mapping[str, Any]) -> ModelSource:
    if settings.get("task_type") != "SEQ_CLS":
        raise InputError(f"the adapter in `{folder}` gives no score", _HOW_TO_TRAIN)
    base = str(settings.get("base_model_name_or_path"))
    return structs.replace(find_source(base), adapter=folder)


def _scores(config: Mapping[str, Any]) -> bool:
    """One score a row: transformers tells two labels from one by `id2label`."""
    classes = config.get("architectures") or [""]
    one = len(config.get("id2label") or ()) == 1 or config.get("num_labels") == 1
    return one and all(name.endswith("ForSequenceClassification") for name in classes)


def folders(source: ModelSource | None) -> dict[str, str | None] | None:
    """Where training finds a reward model; None without one."""
    if source is None:
        return None
    adapter = source.adapter
    return {
        "model": str((source.folder or Path()).resolve()),
        "adapter": str(adapter.resolve()) if adapter else None,
    }


def rewarded_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and the objective that goes with a reward where none is."""
    if "objective" in given or not any(name in given for name in ("reward_model", "reward")):
        return dict(given)
    return {**given, "objective": DEFAULT_ONLINE}


DEFAULT_ONLINE = "grpo"
