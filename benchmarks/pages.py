"""The tables of docs/accuracy.md: `python -m benchmarks.pages` writes them anew.

A test compares the page with the same rows, so that no figure there is older than the code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

from benchmarks import comparison, rules, several_gpus, views
from benchmarks.references import read
from ftplan.launcher.cases import Case, Refusal, read_cases
from ftplan.launcher.commands.validate import closed_form, compare
from ftplan.launcher.validate_views import trainer_rows
from ftplan.planner.accuracy import Prediction
from ftplan.planner.rules_of_thumb import RULES

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"

_PREDICTED: dict[str, Prediction] = {}

# Of the statistics of the draw, those that fit a page.
_GROUPINGS = ("shape", "objective", "quantization", "sharding", "trainer")

Rows = list[list[str]]
Tables = Mapping[str, tuple[Callable[[], Rows], ...]]


@cache
def by_trainer() -> Rows:
    """Allocated memory of the runs in tests/measured, as `ftplan validate` prints it."""
    rows = trainer_rows(list(compare(_measured(), _closed_form)))
    return [row[:2] + row[3:] for row in rows if row[2] == "allocated"]


@cache
def on_several_gpus() -> Rows:
    """Those on several GPUs, and fsdp_qlora's."""
    return several_gpus.rows(several_gpus.errors(several_gpus.cases_of(), _closed_form))


@cache
def by_rule() -> Rows:
    """ftplan and each rule of thumb on the same runs."""
    return [[group.method, group.title, *group.cells] for group in rules.groups(_measured())]


@cache
def sources_of_rules() -> Rows:
    return [[rule.title, rule.source, rule.leaves_out] for rule in RULES.values()]


@cache
def by_draw() -> Rows:
    """The closed form beside the dry runs of the reference file."""
    found = comparison.Report.of([comparison.compare(reference) for reference in read()])
    return views.group_rows(found, _GROUPINGS)


# The tables under each heading, in their order.
TABLES: Tables = {
    "How accurate it is": (by_trainer,),
    "Runs on several GPUs": (on_several_gpus,),
    "Rules of thumb beside it": (by_rule, sources_of_rules),
    "Closed form beside dry run": (by_draw,),
}


@cache
def _measured() -> tuple[Case | Refusal, ...]:
    return tuple(read_cases(rules.MEASURED))


def _closed_form(case: Case) -> Prediction:
    """Once for each run, which several tables have."""
    if case.id not in _PREDICTED:
        _PREDICTED[case.id] = closed_form(case)
    return _PREDICTED[case.id]


def with_tables(text: str) -> str:
    """The page of accuracy with its tables anew."""
    return filled(text, TABLES)


def filled(text: str, of: Tables) -> str:
    """A page with the rows of these tables replaced; heads and all else stay."""
    for heading, tables in of.items():
        start = text.index(f"## {heading}\n")
        end = text.find("\n## ", start)
        fresh = partial(_filled, iter(tables))
        text = text[:start] + re.sub(_TABLE, fresh, text[start:end], flags=re.M) + text[end:]
    return text


# A head and the line below it, then rows.
_TABLE = r"^(\|.*\n\|[-:|]+\|\n)(?:\|.*\n)*"


def _filled(fresh: Iterator[Callable[[], Rows]], found: re.Match[str]) -> str:
    rows = next(fresh)()
    return found[1] + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
