"""A plan file of several stages: each with its data and the settings that are its own.

`ftplan plan A --then B --out stages.yaml` writes one, `ftplan launch stages.yaml` carries it out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.plan_file import (
    SCHEMA,
    check_known,
    check_new,
    checked_model,
    data_part,
    model_name,
    read_asked,
    read_settings,
)
from ftplan.launcher.run_dir import read_mapping, write_yaml
from ftplan.launcher.version import version
from ftplan.planner.errors import FtplanError, InputError
from ftplan.planner.plan import Reason

if TYPE_CHECKING:
    from ftplan.launcher.stages import PlannedStage

_COMMENT = (
    "Stages that are trained one after the other: carry them out with `ftplan launch`. A setting "
    "that is left out is chosen anew."
)
_PARTS = ("schema", "ftplan", "model", "device", "plan", "replay_share", "stages")
_STAGE_PARTS = ("name", "data", "plan", "replay_share")
_EXAMPLE = "`ftplan plan FIRST.jsonl --then SECOND.jsonl --out stages.yaml` writes such a file"


class AskedStage(Struct, frozen=True, kw_only=True):
    """A stage as a person wants it. `settings`: those given; `reasons`: of those that stand in a
    file with one; `sha256`: what the data have to be, if it is said."""

    name: str
    asked: DataAsked
    settings: Mapping[str, Any] = {}
    reasons: Mapping[str, Reason] = {}
    sha256: str | None = None
    replay_share: float = 0.0


class StageFile(Struct, frozen=True, kw_only=True):
    """What a file of stages says."""

    model: str
    stages: tuple[AskedStage, ...]


def is_stage_file(path: Path) -> bool:
    """Whether a plan file is one of stages; raises InputError where it cannot be read."""
    return "stages" in read_mapping(path)


def read_stage_file(path: Path) -> StageFile:
    """Raises InputError that names what is wrong, and in which stage."""
    raw = read_mapping(path)
    check_known(raw, _PARTS, f"part of `{path.name}`")
    model = checked_model(path, raw)
    stages = raw.get("stages")
    if not isinstance(stages, list) or not stages:
        raise InputError(f"`{path}`: `stages` must be a list of stages", _EXAMPLE)
    shared = raw.get("plan") or {}
    if not isinstance(shared, Mapping):
        raise InputError(f"`{path}`: `plan` must be a mapping of settings for all stages")
    read = []
    for number, stage in enumerate(stages, start=1):
        try:
            read.append(_stage(path, stage, shared, raw.get("replay_share", 0.0)))
        except FtplanError as error:
            raise of_stage(error, number) from error
    return StageFile(model=model, stages=tuple(read))


def of_stage(error: FtplanError, number: int, hint: str | None = None) -> FtplanError:
    """The error, told of the stage."""
    told = InputError if isinstance(error, InputError) else type(error)
    return told(f"stage {number}: {error.message}", hint or error.hint)


def _stage(path: Path, raw: Any, shared: Mapping[str, Any], replay_share: Any) -> AskedStage:
    if not isinstance(raw, Mapping):
        raise InputError("it must be a mapping with `data` and `plan`", _EXAMPLE)
    check_known(raw, _STAGE_PARTS, f"part of a stage of `{path.name}`")
    data, plan = raw.get("data"), raw.get("plan") or {}
    if isinstance(data, str):
        data = [data]
    if isinstance(data, list):
        data = {"paths": data}
    if not isinstance(data, Mapping):
        raise InputError("it has no `data`", "name a file: `data: rows.jsonl`")
    if not isinstance(plan, Mapping):
        raise InputError("its `plan` must be a mapping of settings", "`plan: {lora_rank: 8}`")
    settings, reasons = read_settings({**shared, **plan})
    asked = read_asked(path, data)
    return AskedStage(
        name=stage_name(raw.get("name"), asked.paths),
        asked=asked,
        settings=settings,
        reasons=reasons,
        sha256=data.get("sha256"),
        replay_share=checked_replay_share(raw.get("replay_share", replay_share)),
    )


def stage_name(given: Any, paths: Sequence[str]) -> str:
    """What is given, or the first file's name without what follows its first dot."""
    if given is not None and not isinstance(given, str):
        raise InputError(f"its `name` is {given!r}", "a name is text")
    name = given or Path(paths[0]).name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "stage"


def checked_replay_share(share: Any) -> float:
    """Raises InputError for what is no share of the rows of a stage."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 0.5:
        raise InputError(
            f"`replay_share` is {share!r}",
            "a share of a stage's rows from 0 to 0.5; 0.01 to 0.05 is usual",
        )
    return float(share)


def write_stage_file(stages: Sequence[PlannedStage], path: Path) -> None:
    """Raises InputError where the file is there already or cannot be written."""
    check_new(path)
    first = stages[0].planned
    write_yaml(
        path,
        {
            "schema": SCHEMA,
            "ftplan": version(),
            "model": model_name(first),
            "device": {"name": first.device.name, "free_bytes": first.device.free_bytes},
            "stages": [
                {
                    "name": stage.name,
                    "data": data_part(stage.planned),
                    "replay_share": stage.replay_share,
                    "plan": stage.planned.chosen.reasoned.to_dict(),
                }
                for stage in stages
            ],
        },
        _COMMENT,
    )
