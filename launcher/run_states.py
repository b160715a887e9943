"""What has become of the runs in a folder, from their files alone.

A state follows from what the files say and from whether the process that they name still runs;
nothing else keeps account of runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, structs

from ftplan.launcher import processes
from ftplan.launcher.live import newest_checkpoint
from ftplan.launcher.live_view import step_rows
from ftplan.launcher.run_dir import RunDir, open_run, parsed_row
from ftplan.launcher.stages_dir import StagesDir, is_stages_dir
from ftplan.planner.errors import InputError, UnknownNameError

State = Literal[
    "pending", "running", "finished", "interrupted", "failed", "stale", "not started", "damaged"
]  # fmt: skip

# A process of another machine cannot be asked; its files tell of it at every step.
QUIET_SECONDS = 30 * 60

# The last rows of metrics.jsonl lie in so many bytes of its end.
_TAIL_BYTES = 64 * 1024

# A folder without a run's files may hold folders of runs: `--name group/run`.
_DEPTH = 3


class RunSummary(Struct, frozen=True, kw_only=True):
    """One run, or several stages, as `ftplan runs` lists it. None: the files do not tell.

    `stage`: what it does now, or was doing; `why`: of one that failed or is damaged; `changed_at`:
    seconds since 1970, when its files last changed. `job`: of the engine that it was handed to.
    """

    name: str
    path: Path
    state: State
    stage: str | None = None
    why: str | None = None
    model: str | None = None
    method: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    checkpoint: str | None = None
    changed_at: float = 0.0
    size_bytes: int = 0
    stages: tuple[RunSummary, ...] = ()
    job: str | None = None


def state_of(stage: str | None, *, finished: bool, alive: bool) -> State:
    """`stage`: as status.json has it; `alive`: whether the process runs that wrote it."""
    if finished:
        return "finished"
    if stage is None:
        return "not started"
    if stage == "interrupted":
        return "interrupted"
    if stage == "failed":
        return "failed"
    return "running" if alive else "stale"


def is_alive(status: Mapping[str, Any], quiet_seconds: float) -> bool:
    """Whether the process that a status names runs. Of another machine's, whether the run's files
    have changed lately."""
    told = status.get("process") or status.get("launcher")
    if not isinstance(told, Mapping):
        return processes.lives({"pid": status.get("pid")})
    if not processes.is_here(told):
        return quiet_seconds < QUIET_SECONDS
    return processes.lives(told)


def runs_in(folder: Path) -> list[RunSummary]:
    """All runs below a folder, those that changed last first."""
    found = [summary_of(path, folder) for path in _run_folders(folder, _DEPTH)]
    return sorted(found, key=lambda run: (-run.changed_at, run.name))


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return
    for path in inside:
        if path.name.startswith("."):
            continue
        if has_run_files(path):
            yield path
        elif depth > 1:
            yield from _run_folders(path, depth - 1)


def has_run_files(path: Path) -> bool:
    """Whether a folder is a run's, whole or not."""
    run, stages = RunDir(path), StagesDir(path)
    telling = (run.plan, run.train, run.status, run.metrics, run.record, stages.stages)
    return any(file.exists() for file in telling)


def summary_of(path: Path, folder: Path | None = None) -> RunSummary:
    """What is to be told of one run or of several stages; a damaged one's is little."""
    name = str(path.relative_to(folder)) if folder else path.name
    known = RunSummary(
        name=name,
        path=path,
        state="damaged",
        changed_at=_changed_at(RunDir(path)),
        size_bytes=size_bytes(path),
    )
    try:
        return _of_stages(known) if is_stages_dir(path) else _of_run(known)
    except InputError as error:
        return structs.replace(known, why=error.message)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return structs.replace(known, why=f"a file holds something else than it should: {error}")


def _of_run(known: RunSummary) -> RunSummary:
    run = open_run(known.path)
    record = run.read_record() if run.finished else {}
    plan = run.read_plan() if not record else {}
    status = run.read_status()
    stage = status.get("stage")
    steps = record.get("steps", plan.get("steps"))
    last = last_step(run)
    method = record["method"] if record else plan["plan"]["method"]["value"]
    quiet = time.time() - known.changed_at
    alive = stage is not None and not run.finished and is_alive(status, quiet)
    return structs.replace(
        known,
        state=state_of(stage, finished=run.finished, alive=alive),
        stage=stage,
        why=status.get("error") if stage == "failed" else None,
        model=str((record or plan)["model"]["name"]),
        method=str(method),
        step=last["step"] if last else None,
        steps=int(steps) if steps is not None else None,
        loss=last["loss"] if last else None,
        checkpoint=newest_checkpoint(run),
    )


def _of_stages(known: RunSummary) -> RunSummary:
    """The state is that of the first stage that has not finished."""
    stages = StagesDir(known.path)
    parts = tuple(
        structs.replace(
            _of_run(_known_stage(stage.run, known)), name=f"{known.name}/{stage.folder}"
        )
        for stage in stages.runs()
    )
    current = _current(parts)
    done = sum(part.state == "finished" for part in parts)
    state = current.state
    if state in ("not started", "finished") and done and not stages.finished:
        state = "interrupted"  # between two stages
    return structs.replace(
        known,
        state="finished" if stages.finished else state,
        stage=f"stage {min(done + 1, len(parts))} of {len(parts)}",
        why=current.why,
        model=parts[0].model,
        method=" > ".join(dict.fromkeys(part.method or "?" for part in parts)),
        step=current.step,
        steps=current.steps,
        loss=current.loss,
        changed_at=max(part.changed_at for part in parts),
        stages=parts,
    )


def _known_stage(run: RunDir, known: RunSummary) -> RunSummary:
    return structs.replace(
        known,
        path=run.root,
        name=run.root.name,
        changed_at=_changed_at(run),
        size_bytes=size_bytes(run.root),
    )


def _current(parts: Sequence[RunSummary]) -> RunSummary:
    return next((part for part in parts if part.state != "finished"), parts[-1])


def last_step(run: RunDir) -> dict[str, Any] | None:
    """The row of the last step, from the end of metrics.jsonl."""
    rows = last_rows(run)
    return rows[-1] if rows else None


def last_rows(run: RunDir) -> list[dict[str, Any]]:
    """Rows of the last steps: as many as lie in the end of metrics.jsonl."""
    try:
        with run.metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    rows = (parsed_row(line) for line in lines)
    return [dict(row) for row in step_rows([row for row in rows if row is not None])]


def _changed_at(run: RunDir) -> float:
    """When what the run writes of itself last changed."""
    files = (run.metrics, run.status, run.record, run.samples, run.stderr, run.plan, run.root)
    return max(_modified_at(file) for file in files)


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def size_bytes(folder: Path) -> int:
    """Of all files below a folder; what goes away meanwhile, and links, do not count."""
    total = 0
    try:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                total += size_bytes(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
    except OSError:
        return total
    return total


def find_run(name: str, runs_dir: Path) -> Path:
    """The folder of a run that is named by its path or as in the list; raises InputError."""
    for path in (Path(name), runs_dir / name):
        if path.is_dir() and has_run_files(path):
            return path
    if Path(name).exists():
        raise InputError(f"`{name}` is not a run directory", "`ftplan runs` lists the runs")
    known = [str(path.relative_to(runs_dir)) for path in _run_folders(runs_dir, _DEPTH)]
    if not known:
        raise InputError(
            f"no run `{name}`: `{runs_dir}` holds none", "`--runs-dir DIR` names another"
        )
    raise UnknownNameError("run", name, known, f"`ftplan runs --runs-dir {runs_dir}` lists them.")
