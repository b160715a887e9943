"""Which task each row belongs to: the one it names or, where that was asked for, its file's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.overlong import Fate
from ftplan.launcher.data.rows import Row
from ftplan.planner.tasks import NO_TASK


class RowTasks(Struct, frozen=True, kw_only=True):
    """The tasks of a run's rows. `names`: sorted; a task's number is its place among them.

    `files`, `eval_files`: names of the tasks of whole files, of training and held-out rows; empty
    where rows name their tasks.
    """

    names: tuple[str, ...]
    files: tuple[str, ...] = ()
    eval_files: tuple[str, ...] = ()

    def number(self, row: Row, *, held_out_file: bool = False) -> int:
        """The row's task. `held_out_file`: whether it is of the file of held-out rows."""
        files = self.eval_files if held_out_file else self.files
        return self.names.index(files[row.file] if files else row.task or NO_TASK)

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) for name, value in structs.asdict(self).items()}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> RowTasks:
        return RowTasks(**{name: tuple(raw[name]) for name in RowTasks.__struct_fields__})


def tasks_of(data: DataFile, eval_data: DataFile | None = None) -> RowTasks | None:
    """The tasks that rows belong to; None where there are not several."""
    sides = [side for side in (data, eval_data) if side is not None]
    counted = [_task_counts(side) for side in sides]
    if counted[0].keys() <= {NO_TASK} and data.files_are_tasks and len(data.source.files) > 1:
        files, *others = [_file_tasks(side) for side in sides]
        eval_files = others[0] if others else ()
        return RowTasks(
            names=tuple(sorted({*files, *eval_files})), files=files, eval_files=eval_files
        )
    names = tuple(sorted({task for counts in counted for task in counts}))
    return RowTasks(names=names) if len(counted[0]) > 1 else None


def _task_counts(data: DataFile) -> Counter[str]:
    """The used rows of each task, and those of none."""
    names = [NO_TASK, *data.survey.tasks]
    return Counter(names[code] for code in compress(data.survey.task_codes, data.used()))


def _file_tasks(data: DataFile) -> tuple[str, ...]:
    """Names of files as those of tasks: as short as tells them apart."""
    paths = [file.path for file in data.source.files]
    for names in (
        [path.name.partition(".")[0] for path in paths],
        [path.name for path in paths],
    ):
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(str(path) for path in paths)


def task_lengths(
    data: DataFile, tasks: RowTasks | None, fate: Fate, *, held_out_file: bool = False
) -> dict[str, tuple[int, ...]]:
    """What is left of each task's rows of a side, in tokens, from the longest."""
    if tasks is None:
        return {}
    lengths: dict[str, list[int]] = {name: [] for name in tasks.names}
    by_row = [NO_TASK, *data.survey.tasks]
    files: Sequence[str] = tasks.eval_files if held_out_file else tasks.files
    for row, length in zip(fate.owners, fate.left, strict=True):
        name = files[data.survey.files[row]] if files else by_row[data.survey.task_codes[row]]
        lengths[name].append(length)
    return {name: tuple(sorted(left, reverse=True)) for name, left in lengths.items()}
