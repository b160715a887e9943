"""The closed form beside runs that others measured on several GPUs: `python -m
benchmarks.several_gpus [CASES]`.

CASES: measured runs, as `ftplan validate` takes them; by default those of tests/measured. Each run
counts by the figure of memory that its source measured on each GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ftplan.launcher.cases import Case, read_cases
from ftplan.launcher.commands.validate import closed_form
from ftplan.launcher.validate_views import signed_percent
from ftplan.planner.accuracy import GroupStatistics, Prediction, relative_error
from ftplan.planner.errors import FtplanError

_FOLDER = Path(__file__).parent.parent / "tests" / "measured"
MEASURED = (_FOLDER / "rows.jsonl", _FOLDER / "fsdp_qlora.jsonl")

# Where a run has several, the first of them: what it holds decides, what the allocator and other
# libraries take besides comes on top.
_QUANTITIES = ("allocated_bytes", "reserved_bytes")

ALL = "all"


def cases_of(paths: Sequence[Path] = MEASURED) -> list[Case]:
    """The runs on several GPUs."""
    found = [case for path in paths for case in read_cases(path)]
    return [case for case in found if isinstance(case, Case) and case.plan.num_gpus > 1]


def errors(
    cases: Iterable[Case], predict: Callable[[Case], Prediction] = closed_form
) -> dict[tuple[str, str], list[float]]:
    """(trainer, what was measured) -> relative error of each run; `ALL` at last."""
    found: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        quantity = next((name for name in _QUANTITIES if case.measured.get(name)), None)
        if quantity is None:
            continue
        error = relative_error(getattr(predict(case), quantity), case.measured[quantity] or 0.0)
        found.setdefault((case.trainer, quantity.removesuffix("_bytes")), []).append(error)
    found[ALL, ""] = [error for errors in found.values() for error in errors]
    return found


def rows(found: dict[tuple[str, str], list[float]]) -> list[list[str]]:
    """Trainer, quantity, runs, median, 95th percentile, bias and the farthest, as printed."""
    printed = []
    for (trainer, quantity), of in found.items():
        said = GroupStatistics.of(of)
        percents = [f"{100 * share:.1f} %" for share in (said.median, said.p95)]
        farthest = signed_percent(max(of, key=abs))
        printed.append(
            [trainer, quantity, str(len(of)), *percents, signed_percent(said.bias), farthest]
        )
    return printed


def main() -> int:
    try:
        found = errors(cases_of([Path(name) for name in sys.argv[1:]] or MEASURED))
    except FtplanError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    for row in rows(found):
        print(" | ".join(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
