"""The directory of several stages: its paths, and the run directory of each."""

from __future__ import annotations

import shlex
from pathlib import Path

from msgspec import Struct

from ftplan.launcher.run_dir import RunDir, checked_folder_name, open_run, read_mapping
from ftplan.planner.errors import InputError


class StagesDir(Struct, frozen=True):
    """Paths of stages that are trained one after the other. Making the object touches nothing."""

    root: Path

    @property
    def quoted(self) -> str:
        """For a shell, in commands that are shown to be copied."""
        return shlex.quote(str(self.root))

    @property
    def stages(self) -> Path:
        """What the stages are, in order: its presence makes the folder one of stages."""
        return self.root / "stages.yaml"

    @property
    def record(self) -> Path:
        """Written last: its presence means that all stages have finished."""
        return self.root / "record.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def previous(self) -> Path:
        return self.root / "previous"

    @property
    def finished(self) -> bool:
        return self.record.is_file()

    def runs(self) -> list[StageRun]:
        """Raises InputError where the folder is damaged."""
        raw = read_mapping(self.stages)
        try:
            return [
                StageRun(
                    run=open_run(self.root / checked_folder_name(stage["folder"], self.stages)),
                    **stage,
                )
                for stage in raw["stages"]
            ]
        except (KeyError, TypeError) as error:
            raise InputError(f"`{self.stages}` is damaged: {error}") from error


class StageRun(Struct, frozen=True, kw_only=True):
    """A stage as stages.yaml names it, and its run directory."""

    run: RunDir
    folder: str
    name: str
    begin: str | None
    objective: str
    method: str


def is_stages_dir(path: Path) -> bool:
    return StagesDir(path).stages.is_file()
