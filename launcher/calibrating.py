"""From the history of runs to calibrations: which runs count, and what is fitted to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ftplan.launcher.calibration_file import MachineStack, Stored, are_measured, major, release
from ftplan.launcher.history import StoredRun, stored_run
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.stages_dir import StagesDir, is_stages_dir
from ftplan.planner.calibration_fit import Fit, PastRun, fit
from ftplan.planner.errors import InputError
from ftplan.planner.margin import LEAST_RUNS
from ftplan.planner.step_time import StepParts
from ftplan.profiles import find_gpu_by_driver_name

# The latest of a machine count: older ones are of older kernels, and a fit takes time for each.
MOST_RUNS = 200


class Learned(Struct, frozen=True, kw_only=True):
    """What the runs of one stack say. `fit`: None of fewer than LEAST_RUNS."""

    stack: MachineStack
    num_runs: int
    fit: Fit | None

    def stored(self, ftplan: str) -> Stored | None:
        if self.fit is None:
            return None
        return Stored(
            stack=self.stack,
            ftplan=ftplan,
            calibration=self.fit.calibration,
            held_out=tuple(msgspec.to_builtins(one) for one in self.fit.held_out),
            refused=self.fit.refused,
            by_configuration=self.fit.by_configuration,
        )


def imported_runs(paths: Sequence[Path], say: Callable[[str], None]) -> list[StoredRun]:
    """The rows of finished run directories, of stages one for each, and of folders of such.

    In a folder, runs that cannot be used are passed over, and `say` is told. Raises InputError
    where what is named itself is none, or has not finished.
    """
    return [row for path in paths for row in _rows(path, say)]


def _rows(path: Path, say: Callable[[str], None]) -> Iterator[StoredRun]:
    if not path.is_dir():
        raise InputError(f"no run directory at `{path}`", "runs are made by `ftplan auto`")
    if is_stages_dir(path):
        finished = (stage.run for stage in StagesDir(path).runs() if stage.run.finished)
        yield from map(stored_run, finished)
        return
    run = RunDir(path)
    if run.plan.is_file():
        if not run.finished:
            raise InputError(f"`{path}` has not finished", f"`ftplan resume {path}` goes on")
        yield stored_run(run)
        return
    inside = [
        folder
        for folder in sorted(path.iterdir())
        if is_stages_dir(folder) or RunDir(folder).finished
    ]
    if not inside:
        raise InputError(
            f"`{path}` is not a run directory, and has none in it that has finished",
            "name run directories, or a folder of them such as `runs`",
        )
    for folder in inside:
        try:
            yield from _rows(folder, say)
        except InputError as error:
            say(f"passed over: {error.message}")


def learned(
    runs: Iterable[StoredRun], ftplan: str, fitted_on: str
) -> tuple[list[Learned], dict[str, int]]:
    """(what each stack's runs say, how many runs were left out for which reason). `ftplan`: the
    version whose formulas are to be corrected; `fitted_on`: a date."""
    by_stack: dict[MachineStack, list[PastRun]] = {}
    left_out: dict[str, int] = {}
    for run in runs:
        if why := why_left_out(run, ftplan):
            left_out[why] = left_out.get(why, 0) + 1
            continue
        by_stack.setdefault(_stack(run), []).append(past_run(run))
    found = []
    for stack in sorted(by_stack, key=str):
        latest = by_stack[stack][-MOST_RUNS:]
        enough = len(latest) >= LEAST_RUNS
        fitted = fit(latest, fitted_on) if enough else None
        found.append(Learned(stack=stack, num_runs=len(latest), fit=fitted))
    return found, left_out


def why_left_out(run: StoredRun, ftplan: str) -> str | None:
    """Why a run says nothing of the constants of this version; None where it does."""
    if run.ftplan != ftplan:
        return "planned by another version of ftplan"
    if run.torch is None:
        return "without torch's version"
    if run.kind == "cpu":
        if run.processor != run.device:
            return "trained on another processor than planned for"
        if not are_measured(run.rates_source):
            return "on a processor whose rates were assumed"
        return None
    entry = find_gpu_by_driver_name(run.gpu) if run.gpu else None
    if run.gpu is None or (entry is not None and entry.name != run.device):
        return "trained on another GPU than planned for"
    return None


def _stack(run: StoredRun) -> MachineStack:
    torch = release(run.torch) or ""
    driver = major(run.driver) if run.kind != "cpu" else None
    return MachineStack(run.device, run.kind, driver, torch)


def past_run(run: StoredRun) -> PastRun:
    """What the fit needs to know; figures that are missing or impossible are None."""
    formula, measured = run.formula, run.measured
    reserved = int(formula["reserved_bytes"])
    closed_form = formula.get("closed_form_reserved_bytes")
    parts = _parts(formula.get("step_parts"))
    rate = _positive(measured.get("settled_tokens_per_second_per_gpu"))
    return PastRun(
        configuration=run.configuration,
        kind="cpu" if run.kind == "cpu" else "cuda",
        allocated_bytes=int(run.predicted["allocated_bytes"]),
        reserved_bytes=reserved,
        least_reserved_bytes=min(reserved, int(closed_form or reserved)),
        context_bytes=int(formula["context_bytes"]),
        measured_allocated_bytes=_positive_int(measured.get("allocated_bytes")),
        measured_reserved_bytes=_positive_int(measured.get("reserved_bytes")),
        measured_device_bytes=_positive_int(measured.get("device_bytes")),
        parts=parts,
        step_seconds=formula["tokens_per_step"] / rate if parts and rate else None,
    )


def _parts(raw: Any) -> StepParts | None:
    if not raw:
        return None
    parts = msgspec.convert(raw, StepParts)
    return parts if parts.arithmetic > 0 and parts.traffic > 0 else None


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _positive_int(value: Any) -> int | None:
    found = _positive(value)
    return None if found is None else round(found)
