"""From a data file to what a plan needs of it, and to what a person is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import structs

from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.labels import count_labels, label_warnings
from ftplan.launcher.data.overlong import Fate
from ftplan.launcher.data.questions import questions
from ftplan.launcher.data.split import MAX_EVAL_ROWS, Split, rows_of, split_groups
from ftplan.launcher.data.survey import Place
from ftplan.launcher.data.tasks import task_lengths, tasks_of
from ftplan.planner.data_profile import DataProfile, Problem
from ftplan.planner.errors import InputError
from ftplan.planner.labels import LabelRows
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.overlong import refuse_overlong
from ftplan.planner.policy import data_advice
from ftplan.planner.tasks import TaskWeighting

# Lengths at which `ftplan data` says what is cut.
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

_DUPLICATES = "repeats an earlier row"


def make_split(data: DataFile, eval_data: DataFile | None, test_share: float = 0.0) -> Split:
    """A split of the data file; nothing of it is held out beside a file of held-out rows."""
    if eval_data is None:
        return split_groups(data.groups(), test_share=test_share, labels=data.labels())
    return Split()


def profile_data(data: DataFile, split: Split, eval_data: DataFile | None = None) -> DataProfile:
    """What the pass over the file says of its training rows."""
    groups = data.groups()
    test = rows_of(groups, split)[2]
    trained = data.fate(split.trains)
    held_out = held_out_fate(data, split, eval_data)
    labels = _labels(data, split, eval_data)
    problems = _problems(data) + (data.leaks_of(eval_data) if eval_data else ())
    profile = DataProfile(
        path=", ".join(str(file.path) for file in data.source.files),
        sha256=data.sha256,
        format=data.format,
        objective=data.kind,
        trains=data.objective,
        num_rows=round(data.rows_each * data.num_rows),
        num_usable_rows=round(data.rows_each * len(groups)),
        num_eval_rows=held_out.counts.num_rows_left,
        num_test_rows=round(data.rows_each * test),
        lengths=_longest_first(trained.lengths),
        exact=data.exact,
        trained_tokens=round(data.rows_each * data.trained_tokens(split)),
        duplicates=sum(p.count for p in problems if p.kind == _DUPLICATES),
        has_margins=data.survey.num_margins > 0,
        task_lengths=task_lengths(data, tasks_of(data, eval_data), trained),
        labels=labels,
        language=data.survey.language,
        rows_each=data.rows_each,
        overlong=data.rule.mode,
        limit=data.rule.limit,
        train_counts=trained.counts,
        eval_counts=held_out.counts,
        lengths_left=_longest_first(trained.left) if trained.counts.changes else None,
        longest_held_out=max(held_out.lengths, default=0),
        longest_evaluated=max(held_out.left, default=0),
        questions=questions(data, split, eval_data),
        problems=(
            *problems,
            *_lengths_problems(data, trained),
            *_lengths_problems(eval_data or data, held_out, "held out: "),
        ),
        warnings=(*_warnings(data, problems), *label_warnings(labels)),
    )
    if held_out.counts.num_rows and not held_out.left:
        raise InputError(
            f"`{profile.path}`: at {_said_limit(data)} no held-out row is left",
            "raise `--max-length`, or give held-out rows with `--eval-data FILE`",
        )
    return profile


def _labels(data: DataFile, split: Split, eval_data: DataFile | None) -> dict[str, LabelRows]:
    """Rows of each label on both sides; empty where answers are none."""
    labels = data.labels()
    if labels is None or data.sample:
        return {}
    rows = list(zip(labels, data.groups(), strict=True))
    trained = [label for label, group in rows if split.trains(group)]
    if eval_data is None:
        return count_labels(trained, [label for label, group in rows if group in split.held_out])
    evaluated = eval_data.survey.labels.of_rows(eval_data.used()) or []
    return count_labels(trained, evaluated[:MAX_EVAL_ROWS])


def held_out_fate(data: DataFile, split: Split, eval_data: DataFile | None) -> Fate:
    """What becomes of the rows that are evaluated."""
    if eval_data is None:
        return data.fate(lambda group: group in split.held_out)
    return eval_data.fate(lambda group: True, MAX_EVAL_ROWS)


def _longest_first(lengths: list[int]) -> tuple[int, ...]:
    return tuple(sorted(lengths, reverse=True))


def check_lengths(
    data: DataFile, split: Split, eval_data: DataFile | None, *, strict: bool
) -> None:
    """Raises InputError where rows are too long and `--overlong refuse` was asked for, or where
    one would be left out for its length and none may be (`--strict`)."""
    fates = [data.fate(split.trains), held_out_fate(data, split, eval_data)]
    sides = [(data, fates[:1]), (eval_data, fates[1:])] if eval_data else [(data, fates)]
    for file, some in sides:
        too_long = sorted(row for fate in some for row in fate.too_long)
        if file.rule.mode == "refuse" and file.rule.limit is not None and too_long:
            raise refuse_overlong(len(too_long), file.rule.limit, file.said_rows(too_long)[1])
        left_out = sorted({row for fate in some for row in (*fate.dropped, *fate.without_answer)})
        if strict and left_out:
            rows = "1 row" if len(left_out) == 1 else f"{len(left_out):,} rows"
            raise InputError(
                f"{rows} would be left out for length at {_said_limit(file)} "
                f"({file.said_rows(left_out)[1]})",
                "shorten them, raise `--max-length`, or leave out `--strict`",
            )


def _said_limit(data: DataFile) -> str:
    return "any length" if data.rule.limit is None else f"{data.rule.limit:,} tokens"


def _lengths_problems(data: DataFile, fate: Fate, side: str = "") -> Iterator[Problem]:
    """What becomes of rows that are too long, a kind each."""
    limit = _said_limit(data)
    splits = data.rule.mode == "split"
    advice = {
        "dropped": "shorten them, raise `--max-length`, or take `--overlong truncate` or `split`",
        "cut": "a pair or a turn of this length is not split: shorten it, or raise `--max-length`"
        if splits
        else "raise `--max-length`, or take `--overlong split` or `drop`",
        "without_answer": "raise `--max-length`: what is asked leaves no room for an answer",
        "split": "",
    }
    for name, kind in LEFT_AS.items():
        rows = getattr(fate, name)
        if rows:
            numbers, where = data.said_rows(rows)
            yield Problem(
                kind=side + kind.format(limit=limit),
                count=len(rows),
                first_lines=numbers,
                where=where,
                left_out=name in ("dropped", "without_answer"),
                advice=advice[name],
            )


# What happens to rows too long, and how that is called.
LEFT_AS = {
    "dropped": "longer than {limit}",
    "without_answer": "no answer within {limit}",
    "split": "longer than {limit}, made into several rows",
    "cut": "longer than {limit}, cut off there",
}


def left_out_for_length(data: DataFile, *fates: Fate) -> Iterator[tuple[Place, str]]:
    """Every row that is left out, or a part of it, and why; in the file's order."""
    reasons = {name: LEFT_AS[name].format(limit=_said_limit(data)) for name in _LEFT_OUT}
    found = {
        row: f"a part of it: {reasons[name]}" if row in several else reasons[name]
        for fate in fates
        for several in [set(fate.split)]
        for name in _LEFT_OUT
        for row in getattr(fate, name)
    }
    for row in sorted(found):
        yield (data.survey.files[row], data.survey.numbers[row]), found[row]


_LEFT_OUT = ("dropped", "without_answer")


def _problems(data: DataFile) -> tuple[Problem, ...]:
    """Rows that are left out, then what is odd about others."""
    left_out = [
        Problem(
            kind=kind,
            count=trouble.count,
            first_lines=tuple(number for _, number in trouble.first),
            where=data.where(trouble),
        )
        for kind, trouble in data.troubles.items()
    ]
    return (*left_out, *data.odd_rows())


def _warnings(data: DataFile, problems: tuple[Problem, ...]) -> tuple[str, ...]:
    """For a person, a line each."""
    said = [
        f"{problem.count:,} of {data.num_rows:,} rows left out: {problem.kind} ({problem.where})"
        if problem.left_out
        else f"{problem.count:,} rows: {problem.kind} ({problem.where})"
        for problem in problems
    ]
    return (*said, *data.notes())


def profile_to_dict(
    profile: DataProfile, model: ModelSpec, max_length: int | None = None
) -> dict[str, Any]:
    """The object of `data --json` and of a run's data_profile.json. `max_length`: the one in force,
    if not the advised."""
    advice = data_advice(profile, model)
    max_length = max_length or int(advice["max_length"].value)
    return {
        "schema": 1,
        "path": profile.path,
        "sha256": profile.sha256,
        "format": profile.format,
        "objective": profile.objective,
        "trains": profile.trains,
        "num_rows": profile.num_rows,
        "num_usable_rows": profile.num_usable_rows,
        "num_train_rows": profile.num_train_rows,
        "num_eval_rows": profile.num_eval_rows,
        "num_test_rows": profile.num_test_rows,
        "problems": [structs.asdict(problem) for problem in profile.problems],
        "warnings": list(profile.warnings),
        "token_lengths": profile.summary(),
        "total_tokens": profile.total_tokens,
        "trained_tokens": profile.trained_tokens,
        "max_length": max_length,
        "truncated_rows": round(profile.rows_each * profile.train_counts.num_cut),
        "overlong": profile.overlong_to_dict(max_length),
        "by_max_length": cuts(profile, model.max_position_embeddings),
        "duplicates": profile.duplicates,
        "tasks": dict(profile.tasks),
        "labels": {name: structs.asdict(rows) for name, rows in profile.labels.items()},
        "language": profile.language or None,
        "advice": [
            {"setting": setting, "value": item.value, "why": item.why}
            for setting, item in advice.items()
        ],
    }


def weighting_to_dict(profile: DataProfile, weighting: TaskWeighting) -> dict[str, Any]:
    """How tasks are weighted, and what an epoch has of each at the start."""
    shares = weighting.shares(profile.tasks)
    return {
        "weighting": weighting.weighting,
        "temperature": weighting.temperature,
        "tasks": {
            task: {
                "num_rows": count,
                "share": shares[task],
                "times_each_row": shares[task] * profile.num_train_rows / count if count else None,
            }
            for task, count in profile.tasks.items()
        },
    }


def cuts(profile: DataProfile, max_position_embeddings: int) -> list[Mapping[str, Any]]:
    """What each candidate `max_length` cuts, up to the first that cuts nothing."""
    found: list[Mapping[str, Any]] = []
    for length in _LENGTHS:
        if length > max_position_embeddings:
            break
        rows = profile.cut_rows(length)
        found.append(
            {
                "max_length": length,
                "cut_rows": rows,
                "cut_tokens": profile.cut_tokens(length),
                "padded_share": profile.padded_share(8, length),
            }
        )
        if not rows:
            break
    return found
