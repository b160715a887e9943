"""`ftplan validate CASES`: predictions beside measured runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ftplan.launcher.cases import Case, Refusal, read_cases
from ftplan.launcher.ui import Ui
from ftplan.planner.accuracy import Comparison, Prediction
from ftplan.planner.errors import FtplanError, InputError
from ftplan.planner.memory import estimate_memory
from ftplan.planner.step_time import estimate_step_time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cases",
        metavar="CASES",
        type=Path,
        help="measured runs, one JSON object a line; with --json one is printed for each",
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    cases = read_cases(arguments.cases)
    comparisons = []
    for comparison in _with_progress(ui, compare(cases, closed_form), len(cases)):
        comparisons.append(comparison)
        ui.json_line(comparison.to_dict())
    if not ui.as_json:
        from ftplan.launcher import validate_views

        ui.show(*validate_views.report(comparisons))
    return 0


def compare(
    cases: Iterable[Case | Refusal], predict: Callable[[Case], Prediction]
) -> Iterator[Comparison]:
    """Each case with its prediction, in order; what `predict` raises becomes a refusal."""
    for case in cases:
        if isinstance(case, Refusal):
            yield Comparison(
                id=case.id,
                source=case.source,
                method=case.method,
                measured=case.measured,
                predicted=None,
                refused=case.reasons,
            )
        else:
            yield _compared(case, predict)


def _compared(case: Case, predict: Callable[[Case], Prediction]) -> Comparison:
    prediction, refused = None, ""
    try:
        prediction = predict(case)
    except FtplanError as error:
        refused = error.message
    except OverflowError:
        refused = "numbers too large to compute with"
    return Comparison(
        id=case.id,
        source=case.source,
        method=case.plan.method,
        measured=case.measured,
        predicted=prediction,
        refused=(refused,) if refused else (),
    )


def closed_form(case: Case) -> Prediction:
    """The prediction of `ftplan estimate`; raises InputError for what it does not model."""
    if case.kbit_prepare:
        raise InputError("`kbit_prepare` is not modelled in closed form")
    if case.length_is != "exact":
        raise InputError("the length of the rows is not said, only a limit (`cap`)")
    model, plan = case.model.spec, case.plan
    memory = estimate_memory(model, plan, device=case.gpu)
    speed = None
    if case.gpu is not None:
        tokens = plan.per_device_train_batch_size * plan.max_length
        step = estimate_step_time(
            model, plan, case.gpu, tokens_per_micro_batch=tokens, mean_length=plan.max_length
        )
        speed = step.tokens_per_second_per_gpu
    return Prediction(
        allocated_bytes=memory.allocated_peak_bytes,
        reserved_bytes=memory.reserved_peak_bytes,
        device_bytes=memory.device_peak_bytes,
        tokens_per_second_per_gpu=speed,
    )


def _with_progress(ui: Ui, comparisons: Iterator[Comparison], count: int) -> Iterator[Comparison]:
    if ui.as_json and ui.out.is_terminal:
        return comparisons  # the lines themselves show it
    from ftplan.launcher.live import with_progress

    return with_progress(ui, comparisons, count, "cases")
