"""From a data file to what a plan needs of it, and to what a person is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import structs

from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.split import Split, rows_of, split_groups
from ftplan.planner.data_profile import DataProfile, Problem
from ftplan.planner.policy import data_advice

# Lengths at which `ftplan data` says what is cut.
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

_DUPLICATES = "repeats an earlier row"


def make_split(data: DataFile, eval_data: DataFile | None, test_share: float = 0.0) -> Split:
    """A split of the data file; nothing of it is held out beside a file of held-out rows."""
    if eval_data is None:
        return split_groups(data.groups(), test_share=test_share)
    return Split()


def profile_data(data: DataFile, split: Split, eval_data: DataFile | None = None) -> DataProfile:
    """What the pass over the file says of its training rows."""
    groups = data.groups()
    _, held_out, test = rows_of(groups, split)
    problems = _problems(data) + (data.leaks_of(eval_data) if eval_data else ())
    return DataProfile(
        path=", ".join(str(file.path) for file in data.source.files),
        sha256=data.sha256,
        format=data.format,
        objective=data.kind,
        trains=data.objective,
        num_rows=round(data.rows_each * data.num_rows),
        num_usable_rows=round(data.rows_each * len(groups)),
        num_eval_rows=len(eval_data.groups()) if eval_data else held_out,
        num_test_rows=round(data.rows_each * test),
        lengths=tuple(sorted(data.lengths(split), reverse=True)),
        exact=data.exact,
        trained_tokens=round(data.rows_each * data.trained_tokens(split)),
        duplicates=sum(p.count for p in problems if p.kind == _DUPLICATES),
        has_margins=data.survey.num_margins > 0,
        tasks=dict(data.survey.tasks.most_common()),
        rows_each=data.rows_each,
        problems=problems,
        warnings=_warnings(data, problems),
    )


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


def profile_to_dict(profile: DataProfile, max_position_embeddings: int) -> dict[str, Any]:
    """The object of `data --json` and of a run's data_profile.json."""
    advice = data_advice(profile, max_position_embeddings)
    max_length = advice["max_length"].value
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
        "truncated_rows": profile.cut_rows(max_length),
        "by_max_length": cuts(profile, max_position_embeddings),
        "duplicates": profile.duplicates,
        "tasks": dict(profile.tasks),
        "advice": [
            {"setting": setting, "value": item.value, "why": item.why}
            for setting, item in advice.items()
        ],
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
