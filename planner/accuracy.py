"""How far predictions are from what was measured, and statistics of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from msgspec import Struct, structs

from ftplan.planner.memory import MEMORY_MARGIN

Key = TypeVar("Key", bound=Hashable)

# What is predicted of a run and compared, each apart: device and allocated memory of the same run
# differ by gibibytes.
QUANTITIES = ("allocated_bytes", "reserved_bytes", "device_bytes", "tokens_per_second_per_gpu")

# Of runs that were left little memory on purpose: how much was free where the run was carried out
# to its end, and where it was not. With `required_bytes` and more a run is to survive.
SURVIVED_WITH, FAILED_WITH = "survived_free_bytes", "failed_free_bytes"

# An under-estimate by more is one that matters: it eats up what a plan keeps free for the
# estimate's own error, and the run may not survive.
FAR_UNDER = MEMORY_MARGIN


class Prediction(Struct, frozen=True, kw_only=True):
    """What is predicted of one run, per GPU. No speed, and no bounds of it, where the GPU is not
    known."""

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    tokens_per_second_per_gpu: float | None = None
    least_tokens_per_second_per_gpu: float | None = None
    most_tokens_per_second_per_gpu: float | None = None
    required_bytes: int


class Comparison(Struct, frozen=True, kw_only=True):
    """A prediction beside what was measured; or, with no prediction, why it was refused.

    `refused` names every reason, the weightiest first. `is_bound`: the rows' length is known as a
    limit only, at which they were predicted: the prediction is an upper bound, and no error of it
    can be told.
    """

    id: str
    source: str
    trainer: str
    method: str
    measured: Mapping[str, float | None]
    predicted: Prediction | None
    refused: tuple[str, ...] = ()
    is_bound: bool = False

    def __post_init__(self) -> None:
        assert (self.predicted is None) == bool(self.refused), "predicted, or refused with a reason"

    def error(self, quantity: str) -> float | None:
        """Relative error of one quantity; None unless it was predicted, not as a bound, and
        measured."""
        return None if self.is_bound else self._difference(quantity)

    @property
    def speed_within(self) -> bool | None:
        """Whether the measured speed lies within its bounds; None where there are none."""
        if self.predicted is None or self.error("tokens_per_second_per_gpu") is None:
            return None
        least = self.predicted.least_tokens_per_second_per_gpu
        most = self.predicted.most_tokens_per_second_per_gpu
        measured = self.measured["tokens_per_second_per_gpu"]
        if least is None or most is None or measured is None:
            return None
        return least <= measured <= most

    def excess(self, quantity: str) -> float | None:
        """How far an upper bound is above what was measured, relative to that; None as above."""
        return self._difference(quantity) if self.is_bound else None

    def _difference(self, quantity: str) -> float | None:
        predicted = getattr(self.predicted, quantity, None)
        measured = self.measured.get(quantity)
        if predicted is None or measured is None:
            return None
        return relative_error(predicted, measured)

    @property
    def survival_foreseen(self) -> bool | None:
        """Whether a run that was left little memory ended as the required memory says; None for
        other runs."""
        if self.predicted is None or self.is_bound:
            return None
        survived, failed = (self.measured.get(name) for name in (SURVIVED_WITH, FAILED_WITH))
        if survived is not None:
            return survived >= self.predicted.required_bytes
        return None if failed is None else failed < self.predicted.required_bytes

    def to_dict(self) -> dict[str, Any]:
        """The object of `validate --json`."""
        return {
            "id": self.id,
            "predicted": structs.asdict(self.predicted) if self.predicted else None,
            "measured": dict(self.measured),
            "relative_error": {quantity: self.error(quantity) for quantity in QUANTITIES},
            "bound": "upper" if self.is_bound else None,
            "refused": "; ".join(self.refused) or None,
        }


def relative_error(predicted: float, measured: float) -> float:
    """`predicted / measured - 1`: above 0 for an over-estimate. `measured` is above 0."""
    assert measured > 0
    return predicted / measured - 1


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie.

    Linear interpolation between the sorted values, of which the smallest stands at 0 and the
    largest at 1: NumPy's default, and `statistics.quantiles` with `inclusive`. Half is the median.
    """
    assert values and 0 <= share <= 1
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class GroupStatistics(Struct, frozen=True, kw_only=True):
    """Relative errors of one quantity over a group of runs.

    `median` and `p95` are of the absolute error, `bias` is the mean of the signed one.
    `under_share` of the runs were predicted too low, `far_under_share` by more than FAR_UNDER.
    """

    count: int
    median: float
    p95: float
    bias: float
    under_share: float
    far_under_share: float

    @staticmethod
    def of(errors: Sequence[float]) -> GroupStatistics:
        """Statistics of at least one error."""
        sizes = [abs(error) for error in errors]
        count = len(errors)
        return GroupStatistics(
            count=count,
            median=percentile(sizes, 0.5),
            p95=percentile(sizes, 0.95),
            bias=sum(errors) / count,
            under_share=sum(error < 0 for error in errors) / count,
            far_under_share=sum(error < -FAR_UNDER for error in errors) / count,
        )


def grouped(errors: Iterable[tuple[Key, float]]) -> dict[Key, GroupStatistics]:
    """Statistics of each group of (key, error), in the order in which keys first come."""
    groups: dict[Key, list[float]] = {}
    for key, error in errors:
        groups.setdefault(key, []).append(error)
    return {key: GroupStatistics.of(group) for key, group in groups.items()}


def errors_by_group(
    comparisons: Iterable[Comparison], quantity: str
) -> list[tuple[tuple[str, str], float]]:
    """((source, method), relative error) of every run where the quantity can be compared."""
    found = ((c.source, c.method, c.error(quantity)) for c in comparisons)
    return [((source, method), error) for source, method, error in found if error is not None]
