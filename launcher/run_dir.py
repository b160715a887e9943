"""A run directory: the one class that owns every file name in it.

Files are written beside and renamed, so each is whole or absent. `record.json` comes last: its
presence means that the run finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from ftplan.launcher.manifest import damage
from ftplan.planner.errors import InputError

CHECKPOINT_PREFIX = "checkpoint-"
LOCK_NAME = "run.lock"

# The safe loader, in C where PyYAML was built with it: it takes a seventh of the time.
_YAML: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Kept when a run is repeated: what it was started from.
_INPUTS = frozenset(
    {
        "plan.yaml",
        "train.yaml",
        "accelerate.yaml",
        "command.txt",
        "data_profile.json",
        "left_out.jsonl",
        "next_plans.json",
        "data",
        "base",
        LOCK_NAME,
    }
)


class RunDir(Struct, frozen=True):
    """Paths of one run. Making the object touches nothing."""

    root: Path

    @property
    def quoted(self) -> str:
        """For a shell, in commands that are shown to be copied."""
        return shlex.quote(str(self.root))

    @property
    def plan(self) -> Path:
        return self.root / "plan.yaml"

    @property
    def accelerate(self) -> Path:
        return self.root / "accelerate.yaml"

    @property
    def train(self) -> Path:
        return self.root / "train.yaml"

    @property
    def command(self) -> Path:
        return self.root / "command.txt"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def data_profile(self) -> Path:
        return self.root / "data_profile.json"

    @property
    def left_out(self) -> Path:
        """Rows of the data that are not trained on, and why."""
        return self.root / "left_out.jsonl"

    @property
    def data(self) -> Path:
        """Copies of the data files, as they were when the run was planned."""
        return self.root / "data"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What GPUs and the training process's memory did while it ran."""
        return self.root / "samples.jsonl"

    @property
    def status(self) -> Path:
        """What the training process is doing now; replaced at every change."""
        return self.root / "status.json"

    @property
    def next_plans(self) -> Path:
        """Plans of the ranking that need less, for a run that memory runs out in."""
        return self.root / "next_plans.json"

    @property
    def lowered(self) -> Path:
        """What the run computes with since memory ran out."""
        return self.root / "lowered.json"

    @property
    def trackers(self) -> Path:
        """What TensorBoard and others that the run reports to keep here."""
        return self.root / "trackers"

    @property
    def stdout(self) -> Path:
        return self.root / "stdout.log"

    @property
    def stderr(self) -> Path:
        return self.root / "stderr.log"

    @property
    def stacks(self) -> Path:
        """A file for each rank, which gets its stack when the run hangs."""
        return self.root / "stacks"

    @property
    def loss_plot(self) -> Path:
        return self.root / "loss.png"

    @property
    def memory_plot(self) -> Path:
        return self.root / "memory.png"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tokens(self) -> Path:
        """The rows as tokens while training goes on; gone afterwards."""
        return self.root / "tokens"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def merged(self) -> Path:
        """Where `ftplan merge` puts the merged model."""
        return self.root / "merged"

    @property
    def base(self) -> Path:
        """Of a stage: the model of the one before, its adapter merged."""
        return self.root / "base"

    @property
    def held_out(self) -> Path:
        """Of a stage: held-out rows as tokens, which later stages are evaluated on."""
        return self.root / "held_out"

    @property
    def replay(self) -> Path:
        """Of a stage: rows as tokens that later stages mix into their own."""
        return self.root / "replay"

    @property
    def record(self) -> Path:
        return self.root / "record.json"

    @property
    def lock(self) -> Path:
        """Held while the run goes on; `launcher.lock` says by whom."""
        return self.root / LOCK_NAME

    @property
    def job(self) -> Path:
        """What the run was handed to, where that is an engine."""
        return self.root / "job.json"

    @property
    def previous(self) -> Path:
        """Results of earlier attempts in this directory, numbered."""
        return self.root / "previous"

    @property
    def finished(self) -> bool:
        return self.record.is_file()

    def checkpoint_steps(self) -> dict[int, Path]:
        """The checkpoints by step, whole or not."""
        return {
            int(step): path
            for path in self.checkpoints.glob(f"{CHECKPOINT_PREFIX}*")
            if (step := path.name.removeprefix(CHECKPOINT_PREFIX)).isdecimal()
        }

    def last_checkpoint(
        self, told: Callable[[str], None] | None = None, *, hashes: bool = False
    ) -> Path | None:
        """The whole checkpoint of the highest step, None without any. `told`: of each that is
        passed over, and why. `hashes`: read the files, instead of comparing their sizes alone."""
        found = self.checkpoint_steps()
        for step in sorted(found, reverse=True):
            wrong = damage(found[step], hashes=hashes)
            if wrong is None:
                return found[step]
            if told is not None:
                told(f"{found[step].name} is damaged and passed over: {wrong}")
        return None

    def set_results_aside(self) -> Path | None:
        """Move what an earlier attempt left to `previous/N`; the inputs stay. Loses nothing.

        Returns the folder, None when there was nothing to move.
        """
        shutil.rmtree(self.tokens, ignore_errors=True)  # what a killed run has left
        results = [p for p in self.root.iterdir() if p.name not in {*_INPUTS, "previous"}]
        if not results:
            return None
        target = self.new_previous()
        for path in results:
            shutil.move(path, target / path.name)
        return target

    def new_previous(self) -> Path:
        """A new folder of `previous`, with the next free number."""
        number = 1
        while (self.previous / str(number)).exists():
            number += 1
        target = self.previous / str(number)
        target.mkdir(parents=True)
        return target

    def read_plan(self) -> dict[str, Any]:
        return read_mapping(self.plan)

    def read_record(self) -> dict[str, Any]:
        return read_mapping(self.record)

    def read_status(self) -> dict[str, Any]:
        """The latest status; empty before the training process has written one."""
        try:
            return read_mapping(self.status)
        except InputError:
            return {}

    def metric_rows(self) -> Iterator[dict[str, Any]]:
        """Rows of metrics.jsonl; damaged ones and a last one still being written are left out."""
        yield from rows_of(self.metrics)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one a line, as `metric_rows` reads it; none where there is no file."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = parsed_row(line)
        if row is not None:
            yield row


def parsed_row(line: str | bytes) -> dict[str, Any] | None:
    """The mapping of one line of JSON; None of a damaged one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def open_run(path: Path) -> RunDir:
    """The run directory at `path`; raises InputError if it is not one."""
    run = RunDir(path)
    if not path.is_dir():
        raise InputError(f"no run directory at `{path}`", "runs are made by `ftplan auto`")
    for needed in (run.plan, run.train, run.accelerate):
        if not needed.is_file():
            raise InputError(f"`{path}` is not a run directory: it has no {needed.name}")
    return run


def checked_folder_name(name: str, where: Path) -> str:
    """A name within a run directory; raises InputError for one that leads out of it."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(
            f"`{where}` names a folder `{name}`, which is not a plain name",
            "folders of a run stay within it: put back the name that was planned",
        )
    return name


def create_run(base: Path, name: str) -> RunDir:
    """A new, empty directory `base/name`, or `name-2`, `name-3`, ... where that is taken."""
    root = base / name
    number = 1
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        while not _made(root):
            number += 1
            root = base / f"{name}-{number}"
    except OSError as error:
        raise InputError(
            f"cannot make the run directory `{root}`: {error.filename}: {error.strerror}",
            "choose a folder that can be written with `--runs-dir`",
        ) from error
    return RunDir(root)


def _made(folder: Path) -> bool:
    """Make a folder; False where its name is taken."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def overwrite_json(path: Path, value: Any) -> None:
    """Write into a file that is there, which a full disk may still allow; not whole or absent."""
    with contextlib.suppress(OSError), path.open("r+", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.truncate()


def write_yaml(path: Path, value: Mapping[str, Any], comment: str = "") -> None:
    text = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=100)
    write_text(path, f"# {comment}\n{text}" if comment else text)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; raises InputError otherwise."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.load(text, _YAML)
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"`{path}` is damaged: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"`{path}` does not hold a mapping")
    return value
