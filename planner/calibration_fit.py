"""Fits a calibration to finished runs, and keeps what predicts runs better that it has not seen.

Each constant is a factor whose logarithm is expected to be near 0, its `spread` away, and each run
tells it with its `noise`: the fit is the most probable factor, so that few runs move it little.
Runs that are far off count by their distance, not its square (Huber), and every factor stays within
its bounds. Only the constants of `CONSTANTS` are fitted: what tensors take and what a step computes
follow from formulas, whose errors stay where they are (docs/calibration.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import exp, log

from msgspec import Struct, structs

from ftplan.planner.accuracy import percentile
from ftplan.planner.calibration import CONSTANTS, Calibration, Constant
from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.margin import ASSUMED_MARGIN, LEAST_RUNS, Margin, measured_margin
from ftplan.planner.step_time import StepParts, corrected, joined_seconds

# Deviations from which on a run counts by its distance alone: 95 % of the efficiency of least
# squares where no run is far off (Huber, Robust Statistics, 1981).
_HUBER = 1.345

# So much nearer a correction has to bring the middle run, or it is not worth having: a judgement.
_LEAST_GAIN = 0.1

DEVICE_MEMORY = "device memory"

_MOST_FOLDS = 10
_MOST_ITERATIONS = 60
_STEP = 1e-4
_TOLERANCE = 1e-9


class PastRun(Struct, frozen=True, kw_only=True):
    """A finished run: what the formulas said of it without a calibration, and what was measured.

    `configuration`: the same of runs that were told the same. `least_reserved_bytes`: the lowest
    that was predicted, by a dry run or in closed form. `parts`: of a step, and `step_seconds` of
    one with as many tokens as predicted; None where that was not measured.
    """

    configuration: str
    kind: DeviceKind
    allocated_bytes: int
    reserved_bytes: int
    least_reserved_bytes: int
    context_bytes: int
    measured_allocated_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    measured_device_bytes: int | None = None
    parts: StepParts | None = None
    step_seconds: float | None = None


class HeldOut(Struct, frozen=True, kw_only=True):
    """How far predictions were off on runs that were not fitted: relative errors, without their
    sign, of the middle run and the farthest, without the corrections and with them.

    `num_closer`: of how many runs the prediction came closer.
    """

    quantity: str
    num_runs: int
    median_before: float
    median_after: float
    worst_before: float
    worst_after: float
    num_closer: int

    @property
    def improves(self) -> bool:
        """Whether the corrections are worth having: the middle run nearer by a tenth, and more
        runs nearer than not."""
        nearer = self.median_after <= (1 - _LEAST_GAIN) * self.median_before
        return nearer and 2 * self.num_closer > self.num_runs


class Fit(Struct, frozen=True, kw_only=True):
    """The calibration, and what was found on runs held out. `refused`: factors that were fitted
    and do not improve anything. `by_configuration`: runs that were told the same were held out
    together."""

    calibration: Calibration
    held_out: tuple[HeldOut, ...]
    refused: dict[str, float]
    margin: Margin
    by_configuration: bool


class _Block(Struct, frozen=True, kw_only=True):
    """Constants that are fitted together. `error`: the logarithm of predicted over measured with
    some calibration, None of a run that does not tell."""

    quantity: str
    names: tuple[str, ...]
    error: Callable[[PastRun, Calibration], float | None]

    @property
    def constants(self) -> list[Constant]:
        return [CONSTANTS[name] for name in self.names]


def _context_error(run: PastRun, calibration: Calibration) -> float | None:
    device, reserved = run.measured_device_bytes, run.measured_reserved_bytes
    if run.kind == "cpu" or device is None or reserved is None or device <= reserved:
        return None
    return log(calibration.context * run.context_bytes / (device - reserved))


def _reserved_error(run: PastRun, calibration: Calibration) -> float | None:
    """Of reserved over allocated bytes: how far the tensors are off is the formulas' own."""
    reserved, allocated = run.measured_reserved_bytes, run.measured_allocated_bytes
    if run.kind == "cpu" or not reserved or not allocated:
        return None
    predicted = max(1.0, calibration.reserved * run.reserved_bytes / run.allocated_bytes)
    return log(predicted / (reserved / allocated))


def _step_error(run: PastRun, calibration: Calibration) -> float | None:
    if run.parts is None or run.step_seconds is None:
        return None
    seconds, _ = joined_seconds(corrected(run.parts, calibration), run.kind)
    return log(seconds / run.step_seconds)


BLOCKS = (
    _Block(quantity="context", names=("context",), error=_context_error),
    _Block(quantity="reserved over allocated", names=("reserved",), error=_reserved_error),
    _Block(
        quantity="seconds a step", names=("arithmetic", "traffic", "launching"), error=_step_error
    ),
)


def fit(runs: Sequence[PastRun], fitted_on: str = "") -> Fit:
    """The calibration of a machine by its runs, in the order in which they were finished.

    A block of constants is corrected where at least `LEAST_RUNS` runs tell of it and the correction
    brings runs closer that it was not fitted to. `fitted_on`: a date, kept as it is.
    """
    by_configuration = len({run.configuration for run in runs}) >= LEAST_RUNS
    folds = _folds(runs, by_configuration)
    calibration, found = Calibration(), []
    refused: dict[str, float] = {}
    fitted = [structs.replace(calibration) for _ in folds]  # of each fold, by the runs outside
    for block in BLOCKS:
        telling = [run for run in runs if block.error(run, calibration) is not None]
        if len(telling) < LEAST_RUNS:
            continue
        tried = [
            _fitted(block, one, _outside(runs, fold))
            for one, fold in zip(fitted, folds, strict=True)
        ]
        held_out = _held_out(block, runs, folds, tried)
        found.append(held_out)
        whole = _fitted(block, calibration, runs)
        if held_out.improves:
            calibration, fitted = whole, tried
        else:
            refused |= {name: getattr(whole, name) for name in block.names}
    device = _of_device(runs, folds, fitted)
    margin = ASSUMED_MARGIN
    if device:
        found.append(_compared(DEVICE_MEMORY, [(before, after) for before, after, _ in device]))
        margin = measured_margin([under for _, _, under in device])
    calibration = structs.replace(
        calibration,
        margin=margin.share if margin.num_runs else None,
        num_runs=len(runs),
        fitted_on=fitted_on,
    )
    return Fit(
        calibration=calibration,
        held_out=tuple(found),
        refused=refused,
        margin=margin,
        by_configuration=by_configuration,
    )


def _folds(runs: Sequence[PastRun], by_configuration: bool) -> list[set[int]]:
    """Indices of the runs that are held out together, each once."""
    groups: dict[object, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(run.configuration if by_configuration else index, []).append(index)
    folds: list[set[int]] = [set() for _ in range(min(len(groups), _MOST_FOLDS))]
    for number, group in enumerate(groups.values()):
        folds[number % len(folds)].update(group)
    return folds


def _outside(runs: Sequence[PastRun], fold: set[int]) -> list[PastRun]:
    return [run for index, run in enumerate(runs) if index not in fold]


def _held_out(
    block: _Block,
    runs: Sequence[PastRun],
    folds: Sequence[set[int]],
    fitted: Sequence[Calibration],
) -> HeldOut:
    pairs = []
    for fold, calibration in zip(folds, fitted, strict=True):
        for index in sorted(fold):
            before = block.error(runs[index], Calibration())
            after = block.error(runs[index], calibration)
            if before is not None and after is not None:
                pairs.append((exp(before) - 1, exp(after) - 1))
    return _compared(block.quantity, pairs)


def _compared(quantity: str, pairs: Iterable[tuple[float, float]]) -> HeldOut:
    """`pairs`: relative errors without the corrections and with them."""
    sizes = [(abs(before), abs(after)) for before, after in pairs]
    before, after = [one for one, _ in sizes], [other for _, other in sizes]
    return HeldOut(
        quantity=quantity,
        num_runs=len(sizes),
        median_before=percentile(before, 0.5),
        median_after=percentile(after, 0.5),
        worst_before=max(before),
        worst_after=max(after),
        num_closer=sum(after < before for before, after in sizes),
    )


def _of_device(
    runs: Sequence[PastRun], folds: Sequence[set[int]], fitted: Sequence[Calibration]
) -> list[tuple[float, float, float]]:
    """Of each run on a GPU: the relative error of the device's peak without a calibration and with
    that of the others, and how much more there was than the lowest prediction."""
    found = []
    for fold, calibration in zip(folds, fitted, strict=True):
        for run in (runs[index] for index in sorted(fold)):
            if run.kind == "cpu" or not run.measured_device_bytes:
                continue
            measured = run.measured_device_bytes
            before = (run.reserved_bytes + run.context_bytes) / measured - 1
            after = _device_bytes(run, run.reserved_bytes, calibration) / measured - 1
            lowest = _device_bytes(run, run.least_reserved_bytes, calibration)
            found.append((before, after, measured / lowest - 1))
    return found


def _device_bytes(run: PastRun, reserved: int, calibration: Calibration) -> float:
    held = max(run.allocated_bytes, calibration.reserved * reserved)
    return held + calibration.context * run.context_bytes


def _fitted(block: _Block, calibration: Calibration, runs: Sequence[PastRun]) -> Calibration:
    """The calibration with the block's factors fitted to runs, all others as they are."""
    telling = [run for run in runs if block.error(run, calibration) is not None]

    def errors(logs: Sequence[float]) -> list[float]:
        tried = _with(calibration, block.names, logs)
        found = (block.error(run, tried) for run in telling)
        return [error for error in found if error is not None]

    return _with(calibration, block.names, _most_probable(errors, block.constants))


def _with(calibration: Calibration, names: Sequence[str], logs: Sequence[float]) -> Calibration:
    factors = {name: exp(value) for name, value in zip(names, logs, strict=True)}
    return structs.replace(calibration, **factors)


def _most_probable(
    errors: Callable[[Sequence[float]], list[float]], constants: Sequence[Constant]
) -> list[float]:
    """Logarithms of factors at the least of `_cost`, within their bounds: Levenberg and Marquardt's
    steps with the weights of Huber's loss, of the factors that no bound holds."""
    bounds = [(log(constant.least), log(constant.most)) for constant in constants]
    noise = constants[0].noise
    spreads = [constant.spread for constant in constants]
    logs, damping = [0.0] * len(constants), 1e-3
    found = errors(logs)
    cost = _cost(found, logs, noise, spreads)
    for _ in range(_MOST_ITERATIONS):
        curvature, slope = _normal(errors, found, logs, noise, spreads)
        free = [
            k
            for k, (least, most) in enumerate(bounds)
            if not (logs[k] <= least and slope[k] > 0) and not (logs[k] >= most and slope[k] < 0)
        ]
        while damping < 1e9:
            matrix = [[curvature[i][j] * (1 + damping * (i == j)) for j in free] for i in free]
            change = _solved(matrix, [-slope[i] for i in free])
            tried = list(logs)
            for k, by in zip(free, change, strict=True):
                tried[k] = min(max(logs[k] + by, bounds[k][0]), bounds[k][1])
            found_there = errors(tried)
            there = _cost(found_there, tried, noise, spreads)
            if there < cost:
                break
            damping *= 10
        else:
            return logs
        gained, logs, found, cost = cost - there, tried, found_there, there
        damping = max(damping / 10, 1e-6)
        if gained < _TOLERANCE:
            return logs
    return logs


def _cost(
    errors: Sequence[float], logs: Sequence[float], noise: float, spreads: Sequence[float]
) -> float:
    """Less the logarithm of how probable factors are: Huber's loss of the runs' errors, and the
    factors' own distance from 1."""
    of_runs = sum(_huber(error / noise) for error in errors)
    return of_runs + sum((x / spread) ** 2 / 2 for x, spread in zip(logs, spreads, strict=True))


def _huber(deviations: float) -> float:
    size = abs(deviations)
    return size**2 / 2 if size <= _HUBER else _HUBER * (size - _HUBER / 2)


def _normal(
    errors: Callable[[Sequence[float]], list[float]],
    found: Sequence[float],
    logs: Sequence[float],
    noise: float,
    spreads: Sequence[float],
) -> tuple[list[list[float]], list[float]]:
    """(curvature, slope) of the cost."""
    columns = []
    for k in range(len(logs)):
        beside = [x + _STEP * (i == k) for i, x in enumerate(logs)]
        moved = errors(beside)
        columns.append([(there - here) / _STEP for here, there in zip(found, moved, strict=True)])
    weights = [min(1.0, _HUBER * noise / abs(e)) / noise**2 if e else 1 / noise**2 for e in found]
    curvature = [
        [sum(w * a * b for w, a, b in zip(weights, one, other, strict=True)) for other in columns]
        for one in columns
    ]
    slope = [sum(w * a * e for w, a, e in zip(weights, one, found, strict=True)) for one in columns]
    for k, spread in enumerate(spreads):
        curvature[k][k] += spread**-2
        slope[k] += logs[k] * spread**-2
    return curvature, slope


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The solution of `matrix x = right`; the matrix is symmetric and positive definite."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * found[j] for j in range(i + 1, size))
        found[i] = (rows[i][size] - known) / rows[i][i]
    return found
