"""Which data a person names, and how it is read: progress, refusals, two depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct, structs

from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.files import open_source
from ftplan.launcher.data.overlong import Rule
from ftplan.launcher.data.readings import readings, said_columns
from ftplan.launcher.data.shapes import FIELDS
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.host import usable_cores
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError, UnknownNameError

# Files from this size on show how far a pass over them is.
_BYTES_WITH_PROGRESS = 16 * 2**20


class DataAsked(Struct, frozen=True, kw_only=True):
    """Training rows, held-out rows where they are apart, and how to read them.

    `objective`: a plan's, where a person names one. `strict`: no row may be left out. `sample`: of
    large files about so many rows are looked at; for a first look, not for a run. `ask`: whether a
    person may be asked how rows are meant. `rule`: what becomes of rows that are too long.
    `files_are_tasks`: of several files each is a task, where rows name none.
    """

    paths: tuple[str, ...]
    eval_paths: tuple[str, ...] = ()
    columns: Mapping[str, str] = {}
    objective: str | None = None
    strict: bool = False
    test_share: float = 0.0
    sample: int | None = None
    ask: bool = False
    rule: Rule = Rule()
    files_are_tasks: bool = False

    def check(self) -> None:
        """Raises InputError where the files cannot be what they should, before anything slow."""
        open_source(self.paths)
        if self.eval_paths:
            open_source(self.eval_paths)

    def settled(self, ui: Ui) -> DataAsked:
        """With the reading that a person chooses where rows fit two formats and somebody is there
        to be asked; what is said instead of an answer is told."""
        if not (self.ask and ui.asks):
            return self
        found = readings(open_source(self.paths).records(), self.columns, self.objective)
        if not found:
            return self
        chosen = found[ui.choose("Most rows fit more than one format. How are they meant?", found)]
        columns = {**self.columns, **chosen.columns}
        ui.say(f"read as {chosen.format}, as `--columns {said_columns(columns)}` says unasked")
        return structs.replace(self, columns=columns)

    def read(self, ui: Ui, tokenizer: RowTokenizer | None) -> tuple[DataFile, DataFile | None]:
        """Training and held-out rows, measured. Raises InputError for what cannot be used."""
        data = self._read(ui, self.paths, tokenizer)
        if not self.eval_paths:
            return data, None
        return data, self._read(ui, self.eval_paths, tokenizer, objective=data.objective)

    def read_roughly(self) -> tuple[DataFile, DataFile | None]:
        """The same with lengths by characters, for a first look."""
        data = self._read_roughly(self.paths, self.objective)
        if not self.eval_paths:
            return data, None
        return data, self._read_roughly(self.eval_paths, data.objective)

    def _read_roughly(self, paths: Sequence[str], objective: str | None) -> DataFile:
        return read_data(
            paths,
            columns=self.columns,
            objective=objective,
            checks=False,
            rule=self.rule,
            files_are_tasks=self.files_are_tasks,
        )

    def _read(
        self,
        ui: Ui,
        paths: Sequence[str],
        tokenizer: RowTokenizer | None,
        objective: str | None = None,
    ) -> DataFile:
        size = open_source(paths).size_bytes
        with ui.progress("reading", size if size >= _BYTES_WITH_PROGRESS else None) as progress:
            data = read_data(
                paths,
                columns=self.columns,
                objective=objective or self.objective,
                tokenizer=tokenizer,
                progress=progress,
                processes=usable_cores(),
                sample=self.sample,
                rule=self.rule,
                files_are_tasks=self.files_are_tasks,
            )
        if self.strict:
            _refuse_left_out(data)
        return data


def _refuse_left_out(data: DataFile) -> None:
    count = sum(trouble.count for trouble in data.troubles.values())
    if count:
        kind, worst = next(iter(data.troubles.items()))
        raise InputError(
            f"{count:,} of {data.num_rows:,} rows would be left out: {kind} "
            f"({data.where(worst)})" + ("" if len(data.troubles) == 1 else ", and others"),
            "mend them, or leave out `--strict`; `ftplan data` lists every kind",
        )


def read_columns(text: str | None) -> dict[str, str]:
    """`instruction=q,label=` as {"instruction": "q", "label": ""}; raises InputError."""
    columns: dict[str, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        ours, separator, theirs = (word.strip() for word in part.partition("="))
        if not separator or not ours:
            raise InputError(
                f"`--columns {text}` does not name pairs",
                "write `--columns instruction=your_question,output=your_answer`",
            )
        if ours not in FIELDS:
            raise UnknownNameError("field of a row", ours, FIELDS)
        columns[ours] = theirs
    return columns


def checked_share(share: float) -> float:
    """Raises InputError unless it is a share that leaves something to train on."""
    if not 0 <= share <= 0.5:
        raise InputError(f"`--test-share {share:g}` is not between 0 and 0.5")
    return share
