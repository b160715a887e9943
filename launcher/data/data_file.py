"""A data file as ftplan knows it: what was found in one pass, and its rows as often as needed.

One reader serves profiling and training, so what was profiled is what is trained.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import compress, islice, repeat
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.launcher.data.files import Source, open_source
from ftplan.launcher.data.findings import Finding
from ftplan.launcher.data.leaks import LeakCheck
from ftplan.launcher.data.overlong import Fate, Lengths, Rule, Tally
from ftplan.launcher.data.readings import readings, said_columns
from ftplan.launcher.data.records import FIRST_NUMBERS
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.sample import LEAST_BYTES, Sample, check_sampled, sampled_records
from ftplan.launcher.data.shapes import (
    OBJECTIVES,
    SHAPES,
    TRAINS,
    Shape,
    Unusable,
    renamed,
    row_of,
    shape_of,
)
from ftplan.launcher.data.split import Split
from ftplan.launcher.data.survey import (
    Place,
    RowMeasure,
    Survey,
    Trouble,
    code_of,
    group_of,
    place_of,
    prompt_text,
    survey_records,
)
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.planner.data_profile import Problem
from ftplan.planner.errors import InputError
from ftplan.planner.labels import are_labels

# Below, a pass is over before processes have started.
_BYTES_FOR_PROCESSES = 32 * 2**20

_OBJECTS_BEFORE_COLLECTING = 200_000

# How often a progress bar is told of processes.
_LOOK_EVERY_SECONDS = 0.2

_LONGEST = 2**32  # no row has as many tokens

# What may become of a row.
_HAPPENS = ("num_too_long", "num_split", "num_cut", "num_dropped", "num_without_answer")


class DataFile(Struct, frozen=True, kw_only=True):
    """One or several files of rows.

    `kind`: what most rows are for, a key of TRAINS. `objective`: what they train, a plan's.
    `troubles`: rows that are left out, by kind. `columns`: a person's own names of fields.
    """

    source: Source
    columns: Mapping[str, str]
    survey: Survey
    format: str
    kind: str
    objective: str
    troubles: Mapping[str, Trouble]
    rule: Rule
    """What becomes of rows that are too long."""

    exact: bool
    sha256: str
    files_are_tasks: bool = False
    """Whether rows that name no task are of their file's."""

    sample: Sample | None = None
    """Where only some rows were looked at; `Place`s then name bytes."""

    @property
    def num_rows(self) -> int:
        return self.survey.num_rows

    def where(self, trouble: Trouble) -> str:
        """Where a trouble stands, for people."""
        return said_places(trouble.first, trouble.count, self.source, self._unit)

    @property
    def _unit(self) -> str:
        return "byte" if self.sample else self.source.files[0].unit

    def notes(self) -> Iterator[str]:
        """What the reader let pass, and which of several readings it took."""
        for note in self.survey.notes:
            yield str(note)
        often = [pair for pair, count in self.survey.readings.items() if 2 * count > self.num_rows]
        found = readings(self.source.records(), self.columns) if often else ()
        for other in found[1:]:
            if (self.format, other.format) in often:
                yield (
                    f"rows could be read as {other.format}, too; they are read as {self.format}, "
                    f"which takes more of their fields (`--columns {said_columns(other.columns)}` "
                    f"reads them as {other.format})"
                )

    def odd_rows(self) -> tuple[Problem, ...]:
        """Rows that are trained on all the same, of which a person is warned."""
        if self.survey.checks is None:
            return ()
        findings = self.survey.checks.findings()
        return tuple(_odd(found, self.source, self._unit) for found in findings)

    def leaks_of(self, held_out: DataFile) -> tuple[Problem, ...]:
        """Rows of a file of held-out rows that stand here too, or whose prompts do."""
        check = LeakCheck()
        for row in self.rows():
            check.train(prompt_text(row), row.answer)
        for row in held_out.rows():
            check.hold_out(code_of((row.file, row.number)), prompt_text(row), row.answer)
        return tuple(_odd(found, held_out.source, held_out._unit) for found in check.findings())

    def left_out(self) -> Iterator[tuple[Place, str]]:
        """Every row that is not used, and why, read again."""
        for record in self.source.records():
            place = (record.file, record.number)
            if record.broken:
                yield place, record.broken
                continue
            try:
                value = renamed(record.value, self.columns)
                shape = shape_of(value)
                row_of(record.number, value, shape, record.file)
            except Unusable as why:
                yield place, str(why)
                continue
            if self.objective not in TRAINS[shape.objective]:
                yield place, _for_something_else(shape, self.format)

    @property
    def rows_each(self) -> float:
        """Rows of the files for each that was looked at."""
        return self.sample.rows.value / self.sample.num_sampled if self.sample else 1.0

    def used(self) -> list[bool]:
        """Of each readable row, whether its shape trains the objective."""
        fits = [self.objective in TRAINS[shape.objective] for shape in SHAPES]
        return [fits[shape] for shape in self.survey.shapes]

    def groups(self) -> Sequence[int]:
        """The prompts of the used rows."""
        return array("Q", compress(self.survey.groups, self.used()))

    def labels(self) -> Sequence[str] | None:
        """The used rows' answers where all are labels; None for others."""
        if self.objective != "sft":
            return None
        found = self.survey.labels.of_rows(self.used())
        different = len(set(found or ()))
        return found if found and different > 1 and are_labels(different, len(found)) else None

    def lengths(self, split: Split) -> list[int]:
        """Tokens of the used rows that are trained on."""
        return self._of_training(self.survey.tokens, split)

    def trained_tokens(self, split: Split) -> int:
        """Tokens that carry loss, of the used rows that are trained on."""
        return sum(self._of_training(self.survey.trained, split))

    def _of_training(self, values: Sequence[int], split: Split) -> list[int]:
        groups = self.survey.groups
        rows = zip(values, groups, self.used(), strict=True)
        kept = split.held_out | split.test
        return [value for value, group, used in rows if used and group not in kept]

    def fate(self, keep: Callable[[int], bool], most: int | None = None) -> Fate:
        """What becomes of the used rows with these prompts, or the first so many of them, where
        some are too long. A row's prompt is its group."""
        survey, rule = self.survey, self.rule
        limit = _LONGEST if rule.limit is None else rule.limit
        used = zip(survey.groups, self.used(), strict=True)
        chosen = (row for row, (group, fits) in enumerate(used) if fits and keep(group))
        pieces_of = survey.pieces.by_row()
        tally = Tally(rule)
        lengths, left, owners = [], [], array("Q")
        happens = {name: array("Q") for name in _HAPPENS}
        for row in islice(chosen, most):
            tokens, first = survey.tokens[row], survey.first[row]
            lengths.append(tokens)
            if first < tokens <= limit:
                left.append(tokens)
                owners.append(row)
                continue
            whole = Lengths(tokens, survey.trained[row], first)
            pieces = pieces_of.get(row) or [whole]
            kept = [size for size in tally.take(whole, pieces) if size]
            left += kept
            owners.extend(repeat(row, len(kept)))
            for name in tally.happened & happens.keys():
                happens[name].append(row)
        counts = tally.counts
        tally.take_whole(len(lengths) - counts.num_rows, sum(left) - counts.num_tokens)
        places = {name.removeprefix("num_"): rows for name, rows in happens.items()}
        return Fate(tally.counts, lengths, left, owners, **places)

    def said_rows(self, rows: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """The numbers of the first of the survey's rows, and the same for people."""
        survey = self.survey
        places = [(survey.files[row], survey.numbers[row]) for row in rows[:FIRST_NUMBERS]]
        numbers = tuple(number for _, number in places)
        return numbers, said_places(places, len(rows), self.source, self._unit)

    def rows(self, keep: Callable[[int], bool] = lambda group: True) -> Iterator[Row]:
        """The used rows in the file's order, read again; `keep` is asked of each one's prompt."""
        for record in self.source.records():
            if record.broken:
                continue
            try:
                value = renamed(record.value, self.columns)
                shape = shape_of(value)
                if self.objective not in TRAINS[shape.objective]:
                    continue
                row = row_of(record.number, value, shape, record.file)
            except Unusable:
                continue
            if keep(group_of(row)):
                yield row


def read_data(
    paths: Sequence[Path | str],
    *,
    columns: Mapping[str, str] | None = None,
    objective: str | None = None,
    tokenizer: RowTokenizer | None = None,
    progress: Callable[[int], None] = lambda num_bytes: None,
    checks: bool = True,
    processes: int = 1,
    sample: int | None = None,
    rule: Rule = Rule(),  # noqa: B008 - frozen
    files_are_tasks: bool = False,
) -> DataFile:
    """Looks through files of rows once, or at about `sample` rows of large ones.

    `tokenizer` measures them; without one lengths are estimated. `objective`: a plan's, for which
    rows that can train it are used; else it follows from most rows. `rule`: what becomes of those
    too long. `files_are_tasks`: each of several files is a task, where no row names one. Raises
    InputError where the files cannot be read, or no row can be used.
    """
    source = open_source(paths)
    looked_for = _Pass(dict(columns or {}), RowMeasure(tokenizer, objective, rule), checks)
    sizes: list[int] = []
    if sample is None or source.size_bytes < LEAST_BYTES:
        survey, sha256 = _surveyed(source, looked_for, progress, processes)
    else:
        check_sampled(source)
        survey, sha256 = looked_for.over_sample(source, sample, sizes, progress), ""
    counts = [0] * len(SHAPES)
    for number in survey.shapes:
        counts[number] += 1
    if not any(counts):
        raise _no_usable_row(source, survey)
    kinds: dict[str, int] = {}
    for shape, count in zip(SHAPES, counts, strict=True):
        kinds[OBJECTIVES[shape.objective]] = kinds.get(OBJECTIVES[shape.objective], 0) + count
    wanted = objective or max(kinds, key=lambda name: kinds[name])
    pairs = any(n for n, shape in zip(counts, SHAPES, strict=True) if shape.name == "preference")
    if objective is None and wanted == "sft" and pairs:
        # Pairs among answers: now that their chosen answers alone are trained, they are shorter.
        return read_data(
            paths,
            columns=columns,
            objective=wanted,
            tokenizer=tokenizer,
            progress=progress,
            checks=checks,
            processes=processes,
            sample=sample,
            rule=rule,
            files_are_tasks=files_are_tasks,
        )
    usable = [
        (count, shape)
        for shape, count in zip(SHAPES, counts, strict=True)
        if count and wanted in TRAINS[shape.objective]
    ]
    if not usable:
        raise _other_objective(source, wanted, counts)
    most = max(usable, key=lambda one: one[0])[1]
    return DataFile(
        source=source,
        columns=dict(columns or {}),
        survey=survey,
        format=most.name,
        kind=most.objective,
        objective=wanted,
        troubles=_troubles(survey, wanted, most.name),
        rule=rule,
        exact=tokenizer is not None,
        sha256=sha256,
        files_are_tasks=files_are_tasks,
        sample=Sample.of(sizes, survey.tokens, source.size_bytes) if sizes else None,
    )


def _surveyed(
    source: Source, looked_for: _Pass, progress: Callable[[int], None], processes: int
) -> tuple[Survey, str]:
    """The whole pass, and the digest; of a large file side by side, in processes that this one is
    copied to."""
    large = source.size_bytes >= _BYTES_FOR_PROCESSES and processes > 1
    if large and "fork" in multiprocessing.get_all_start_methods():
        parts = source.parts(processes)
        if len(parts) > 1:
            return _side_by_side(source, parts, looked_for, progress)
    return looked_for.over(source, progress), source.sha256()


class _Pass(Struct):
    """What is looked for in a source, or a part of one."""

    columns: Mapping[str, str]
    measure: RowMeasure
    checks: bool

    def over(self, source: Source, progress: Callable[[int], None]) -> Survey:
        survey = survey_records(
            source.records(progress), self.columns, self.measure, checks=self.checks
        )
        survey.notes = source.notes
        return survey

    def over_sample(
        self, source: Source, count: int, sizes: list[int], progress: Callable[[int], None]
    ) -> Survey:
        """About so many rows; `sizes` gets the bytes of each that can be read."""
        survey, measure = Survey(self.checks), self.measure
        for record, num_bytes in sampled_records(source, count, progress):
            before = len(survey.numbers)
            survey.take(record, self.columns, measure)
            if len(survey.numbers) > before:
                sizes.append(num_bytes)
        survey.measure(measure)
        return survey


def _side_by_side(
    source: Source, parts: Sequence[Source], looked_for: _Pass, progress: Callable[[int], None]
) -> tuple[Survey, str]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    context = multiprocessing.get_context("fork")
    num_bytes = context.Value("q", 0)
    told = 0
    with ProcessPoolExecutor(
        len(parts) + 1, mp_context=context, initializer=_adopt, initargs=(looked_for, num_bytes)
    ) as pool:
        waiting = [pool.submit(_over_part, part) for part in parts]
        digest = pool.submit(source.sha256)  # beside them, so that the end waits for nothing
        while not all(future.done() for future in waiting):
            wait(waiting, timeout=_LOOK_EVERY_SECONDS)
            done = num_bytes.value
            progress(done - told)
            told = done
        progress(num_bytes.value - told)
        first, *others = [future.result() for future in waiting]
    for survey in others:
        first.merge(survey)
    return first, digest.result()


# In a process of its own: what it looks for, and where it tells how far it is.
_adopted: tuple[_Pass, Any] | None = None


def _adopt(looked_for: _Pass, num_bytes: Any) -> None:
    global _adopted
    # Rows hold no cycles, and looking for some takes a twentieth of the time.
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTING)
    _adopted = (looked_for, num_bytes)


def _over_part(part: Source) -> Survey:
    assert _adopted is not None
    looked_for, num_bytes = _adopted

    def tell(more: int) -> None:
        with num_bytes.get_lock():
            num_bytes.value += more

    return looked_for.over(part, tell)


def _troubles(survey: Survey, objective: str, taken: str) -> dict[str, Trouble]:
    """Rows that are left out: those that cannot be used at all, and those for something else."""
    troubles = dict(survey.troubles)
    for number, shape in enumerate(SHAPES):
        if objective in TRAINS[shape.objective]:
            continue
        kind = _for_something_else(shape, taken)
        for place in survey.places(number):
            troubles.setdefault(kind, Trouble()).add(place)
    return dict(sorted(troubles.items(), key=lambda item: -item[1].count))


def _odd(found: Finding, source: Source, unit: str) -> Problem:
    """A finding of checks, its numbers as places in the source."""
    places = [place_of(number) for number in found.numbers]
    return Problem(
        kind=f"{found.kind}, {found.detail}" if found.detail else found.kind,
        count=found.count,
        first_lines=tuple(number for _, number in places),
        where=said_places(places, found.count, source, unit),
        left_out=False,
        advice=found.advice,
    )


def _for_something_else(shape: Shape, taken: str) -> str:
    if shape.objective == "online":
        return "no answer"
    return f"a row for something else: {shape.name}, most are {taken}"


def _no_usable_row(source: Source, survey: Survey) -> InputError:
    name = source.files[0].path
    if not survey.troubles:
        return InputError(f"`{name}` holds no row", "it needs one JSON object a line")
    kind, worst = max(survey.troubles.items(), key=lambda item: item[1].count)
    return InputError(
        f"`{name}`: none of its {survey.num_rows} rows can be trained on: {kind} "
        f"({said_places(worst.first, worst.count, source, source.files[0].unit)})",
        "a row needs `instruction` and `output`, `prompt` and `completion`, `messages`, or `text`; "
        "fields of other names are told with `--columns instruction=NAME,output=NAME`",
    )


def _other_objective(source: Source, objective: str, counts: Sequence[int]) -> InputError:
    most = max(zip(counts, SHAPES, strict=True), key=lambda one: one[0])[1]
    trains = ", ".join(f"`{name}`" for name in TRAINS[most.objective])
    return InputError(
        f"`{source.files[0].path}`: no row can train `{objective}`: most are {most.name} rows",
        f"such rows train {trains}; leave `--objective` out to take the first",
    )


def said_places(places: Sequence[Place], count: int, source: Source, unit: str) -> str:
    """The first places of so many, for people: `line 3, 8, 9, ...`."""
    more = ", ..." if count > len(places) else ""
    if len(source.files) == 1:
        numbers = ", ".join(str(number) for _, number in places)
        return f"{unit} {numbers}{more}"
    if unit == "byte":
        names = (f"byte {number} of {source.files[file].path.name}" for file, number in places)
    else:
        names = (source.place(number, file) for file, number in places)
    return "; ".join(names) + more
