"""`ftplan validate CASES`: predictions beside measured runs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from msgspec import structs

from ftplan.launcher.cases import Case, Refusal, read_cases
from ftplan.launcher.host import usable_cores
from ftplan.launcher.ui import Ui
from ftplan.planner.accuracy import Comparison, Prediction
from ftplan.planner.errors import FtplanError, InputError
from ftplan.planner.litgpt import estimate_litgpt
from ftplan.planner.memory import MemoryEstimate
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.replayed import replayed_memory
from ftplan.planner.stack import TAKES_GROUPS_SINCE, Stack
from ftplan.planner.step_time import StepTime, estimate_step_time

if TYPE_CHECKING:
    from ftplan.launcher.exact import DryRunner


# Before, transformers checkpointed by torch's reentrant function unless told otherwise
# (`gradient_checkpointing_enable` in modeling_utils.py of 4.45 and 4.48). It computes a layer to
# its end again, result included; the newer one stops at the last thing that backward needs.
_NOT_REENTRANT_SINCE = (5,)


# Processes that carry dry runs out at once; each takes half a gibibyte and more.
_MOST_PROCESSES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cases",
        metavar="CASES",
        type=Path,
        help="measured runs, one JSON object a line; with --json one is printed for each",
    )
    parser.add_argument(
        "--exact", action="store_true", help="predict by dry run, some seconds a case"
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    cases = read_cases(arguments.cases)
    if arguments.exact:
        comparisons = _shown(ui, _compared_by_dry_runs(cases), len(cases))
    else:
        comparisons = _shown(ui, compare(cases, closed_form), len(cases))
    if not ui.as_json:
        from ftplan.launcher import validate_views

        ui.show(*validate_views.report(comparisons))
    return 0


def _shown(ui: Ui, compared: Iterator[Comparison], number: int) -> list[Comparison]:
    """All comparisons; under --json each is printed as it comes."""
    comparisons = []
    for comparison in _with_progress(ui, compared, number):
        comparisons.append(comparison)
        ui.json_line(comparison.to_dict())
    return comparisons


def _compared_by_dry_runs(cases: Sequence[Case | Refusal]) -> Iterator[Comparison]:
    """Each case by dry run, in order; one process a core, each of which takes the next case."""
    from ftplan.launcher.exact import DryRunner

    idle: SimpleQueue[DryRunner] = SimpleQueue()

    def predict(case: Case) -> Prediction:
        runner = idle.get()
        try:
            return dry_run(runner, case)
        finally:
            idle.put(runner)

    with ExitStack() as stack:
        workers = max(1, min(usable_cores(), len(cases), _MOST_PROCESSES))
        for _ in range(workers):
            idle.put(stack.enter_context(DryRunner()))
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        yield from pool.map(partial(_compared, predict), cases)


def compare(
    cases: Iterable[Case | Refusal], predict: Callable[[Case], Prediction]
) -> Iterator[Comparison]:
    """Each case with its prediction, in order; what `predict` raises becomes a refusal."""
    return map(partial(_compared, predict), cases)


def _compared(predict: Callable[[Case], Prediction], case: Case | Refusal) -> Comparison:
    if isinstance(case, Refusal):
        return Comparison(
            id=case.id,
            source=case.source,
            trainer=case.trainer,
            method=case.method,
            measured=case.measured,
            predicted=None,
            refused=case.reasons,
        )
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
        trainer=case.trainer,
        method=case.method,
        measured=case.measured,
        predicted=prediction,
        refused=(refused,) if refused else (),
        is_bound=prediction is not None and case.length_is == "cap",
    )


def closed_form(case: Case) -> Prediction:
    """The prediction of `ftplan estimate`; raises InputError for what it does not model."""
    if case.is_litgpt:
        return _prediction(case, _litgpt_memory(case))
    plan = _plan_of_its_time(case)
    memory = replayed_memory(case.model.spec, plan, device=case.gpu, stack=_stack(case))
    return _prediction(case, memory)


def _litgpt_memory(case: Case) -> MemoryEstimate:
    return estimate_litgpt(
        case.model.spec,
        case.plan,
        case.gpu,
        longest_first=case.longest_first,
        second_adapter=case.second_adapter,
    )


def _stack(case: Case) -> Stack:
    """What the case's software does beyond the plan's settings."""
    # TRL leaves it out for a base to be sharded (`is_sharded_qlora` in 0.13's sft_trainer.py).
    prepared = case.kbit_prepare and not case.plan.shards_parameters
    # Rows below a limit differ in length, and the shorter ones of a batch are padded.
    several = case.plan.per_device_train_batch_size > 1 and not case.packing
    return Stack(
        kbit_prepare=prepared,
        casts_back=prepared and (_version("trl", case.software) or (1,)) < (1,),
        repeats_key_value=case.repeats_key_value,
        fused_kernels=case.fused_kernels,
        fsdp_version=case.fsdp_version,
        padded=several and case.length_is == "cap",
        efficient_takes_groups=(_version("torch", case.software) or (0,)) >= TAKES_GROUPS_SINCE,
        transformers_version=_version("transformers", case.software),
        holds_outputs=case.is_fsdp_qlora,
        checkpoints_within=case.is_fsdp_qlora,
        sums_in_place=case.is_fsdp_qlora,
    )


def _plan_of_its_time(case: Case) -> TrainingPlan:
    """The case's plan, checkpointed as its release of transformers does."""
    version = _version("transformers", case.software)
    if case.plan.trainer == "transformers" and version and version < _NOT_REENTRANT_SINCE:
        return case.plan.replace(use_reentrant=True)
    return case.plan


def dry_run(runner: DryRunner, case: Case) -> Prediction:
    """The prediction of `ftplan estimate --exact`; raises InputError for what it cannot model."""
    from ftplan.launcher.exact import case_of, memory_of

    if case.is_litgpt:
        raise InputError("litgpt is modelled in closed form only")
    if case.is_fsdp_qlora:
        raise InputError("fsdp_qlora's script is modelled in closed form only")
    version = _version("transformers", case.software)
    if (
        version
        and version < (5,)
        and any(layer.feed_forward.experts for layer in case.model.spec.layer_counts)
    ):
        raise InputError(
            "before transformers 5 experts were modules of their own; the installed one stacks them"
        )
    plan = _plan_of_its_time(case)
    asked = case_of(case.model, plan, case.gpu, **structs.asdict(_stack(case)))
    return _prediction(case, memory_of(runner.run(asked), case.model, plan, case.gpu))


def _version(package: str, software: str) -> tuple[int, ...] | None:
    """(major, minor) of a package that a run's software names; None where it does not."""
    found = re.search(rf"\b{package}\W+(\d+)\.(\d+)", software)
    return (int(found[1]), int(found[2])) if found else None


def _prediction(case: Case, memory: MemoryEstimate) -> Prediction:
    step = None if case.is_litgpt else _step(case)
    speeds = {}
    if step is not None:
        speeds = {
            "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
            "least_tokens_per_second_per_gpu": step.tokens_per_step / step.most_step_seconds,
            "most_tokens_per_second_per_gpu": step.tokens_per_step / step.least_step_seconds,
        }
    return Prediction(
        allocated_bytes=memory.allocated_peak_bytes,
        reserved_bytes=memory.reserved_peak_bytes,
        device_bytes=memory.device_peak_bytes,
        required_bytes=memory.required_bytes,
        **speeds,
    )


def _step(case: Case) -> StepTime | None:
    """A step's time where the GPU and the rows' length are known."""
    if case.gpu is None or case.gpu.kind == "cpu" or case.length_is != "exact":
        return None
    plan = case.plan
    return estimate_step_time(
        case.model.spec,
        plan,
        case.gpu,
        tokens_per_micro_batch=plan.per_device_train_batch_size * plan.max_length,
        mean_length=plan.max_length,
        stack=_stack(case),
    )


def _with_progress(ui: Ui, comparisons: Iterator[Comparison], count: int) -> Iterator[Comparison]:
    if ui.as_json and ui.out.is_terminal:
        return comparisons  # the lines themselves show it
    from ftplan.launcher.live import with_progress

    return with_progress(ui, comparisons, count, "cases")
