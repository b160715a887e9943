"""Rules of thumb and ftplan beside measured runs: `python -m benchmarks.rules [CASES]`.

CASES: measured runs, as `ftplan validate` takes them; by default those of tests/measured.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from rich.console import RenderableType
from rich.table import Table

from ftplan.launcher.cases import Case, Refusal, read_cases
from ftplan.launcher.commands.validate import closed_form, compare
from ftplan.launcher.ui import Ui, table
from ftplan.launcher.validate_views import signed_percent
from ftplan.planner.accuracy import FAR_UNDER, GroupStatistics, relative_error
from ftplan.planner.errors import FtplanError
from ftplan.planner.rules_of_thumb import RULES

MEASURED = Path(__file__).parent.parent / "tests" / "measured" / "rows.jsonl"
OURS = "ftplan"
QUANTITY = "allocated_bytes"

_LEGEND = (
    "Errors are predicted / measured - 1 of what is allocated on each GPU. Median and p95 (95th "
    "percentile) are of their size, bias is their mean. Far under: predicted too low by more than "
    f"{100 * FAR_UNDER:g} %. `-`: the rule says nothing of such runs."
)


class Group(Struct, frozen=True, kw_only=True):
    """What a rule says of the runs of one method: of how many, and how far off it is."""

    method: str
    rule: str
    num_runs: int
    statistics: GroupStatistics | None

    @property
    def title(self) -> str:
        return RULES[self.rule].title if self.rule in RULES else self.rule

    @property
    def cells(self) -> list[str]:
        """Runs it speaks of, median, 95th percentile, bias, far under; as printed."""
        found = self.statistics
        if found is None:
            return [f"0 of {self.num_runs}", "-", "-", "-", "-"]
        return [
            f"{found.count} of {self.num_runs}",
            f"{100 * found.median:.1f} %",
            f"{100 * found.p95:.1f} %",
            signed_percent(found.bias),
            f"{100 * found.far_under_share:.0f} %",
        ]

    def to_dict(self) -> dict[str, Any]:
        found = self.statistics
        return {
            "method": self.method,
            "rule": self.rule,
            "num_runs": self.num_runs,
            "count": found.count if found else 0,
            "median": found.median if found else None,
            "p95": found.p95 if found else None,
            "bias": found.bias if found else None,
            "far_under_share": found.far_under_share if found else None,
        }


def groups(cases: Sequence[Case | Refusal]) -> list[Group]:
    """Each rule's statistics for each method, all over the same runs: those whose allocated memory
    was measured and that ftplan models."""
    errors: dict[str, dict[str, list[float]]] = {}
    counts: Counter[str] = Counter()
    for case, compared in zip(cases, compare(cases, closed_form), strict=True):
        measured, ours = case.measured.get(QUANTITY), compared.error(QUANTITY)
        if isinstance(case, Refusal) or measured is None or ours is None:
            continue
        counts[case.plan.method] += 1
        by_rule = errors.setdefault(case.plan.method, {name: [] for name in (OURS, *RULES)})
        by_rule[OURS].append(ours)
        for name, rule in RULES.items():
            predicted = rule.num_bytes(case.model.spec, case.plan)
            if predicted is not None:
                by_rule[name].append(relative_error(predicted, measured))
    return [
        Group(
            method=method,
            rule=rule,
            num_runs=counts[method],
            statistics=GroupStatistics.of(found) if found else None,
        )
        for method, by_rule in sorted(errors.items())
        for rule, found in by_rule.items()
    ]


def rules_table(found: Iterable[Group]) -> Table:
    """A row for each method and rule."""
    rows: list[list[RenderableType]] = []
    before = None
    for group in found:
        rows.append([group.method if group.method != before else "", group.title, *group.cells])
        before = group.method
    columns = ("method", "by", ">runs", ">median", ">p95", ">bias", ">far under")
    return table("Against measured allocated memory", columns, rows)


def rules_listed() -> Table:
    """Where each rule is from, and what it leaves out."""
    rows: list[list[RenderableType]] = [
        [rule.title, f"{rule.source}. Leaves out: {rule.leaves_out}"] for rule in RULES.values()
    ]
    return table("The rules", ("rule", "where it is from"), rows)


def main(words: list[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    ui = Ui(as_json=arguments.json)
    try:
        found = groups(read_cases(arguments.cases))
    except FtplanError as error:
        ui.fail(error)
        return error.exit_status
    ui.json({"schema": 1, "groups": [group.to_dict() for group in found]})
    ui.show(rules_table(found), "", _LEGEND, "", rules_listed())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="?", metavar="CASES", type=Path, default=MEASURED)
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    return parser


if __name__ == "__main__":
    sys.exit(main())
