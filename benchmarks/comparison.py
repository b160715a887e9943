"""The closed form beside the dry run's figures, and statistics of how far apart they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct, structs

from benchmarks.draws import Configuration, reason
from benchmarks.references import Reference
from ftplan.planner.accuracy import GroupStatistics, relative_error
from ftplan.planner.errors import FtplanError, InputError
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.phases import COMPONENTS
from ftplan.planner.plan import TrainingPlan


class Bars(Struct, frozen=True, kw_only=True):
    """What the closed form must reach: the absolute relative error of the allocated peak, and
    how many configurations it is taken over, since a refusal is no answer."""

    least_count: int
    median: float
    p95: float
    farthest: float

    def reached(self, errors: Sequence[float]) -> bool:
        """Whether these signed relative errors are within."""
        if len(errors) < max(1, self.least_count):
            return False
        group = GroupStatistics.of(errors)
        within = group.median <= self.median and group.p95 <= self.p95
        return within and max(map(abs, errors)) <= self.farthest


BARS = Bars(least_count=300, median=0.01, p95=0.03, farthest=0.08)


def _checkpointing(plan: TrainingPlan) -> str:
    if not plan.gradient_checkpointing:
        return "off"
    return "reentrant" if plan.use_reentrant else "on"


def _sharding(plan: TrainingPlan) -> str:
    if plan.sharding == "none":
        return "none" if plan.num_gpus == 1 else "DDP"
    return plan.sharding if plan.offload == "none" else f"{plan.sharding}, {plan.offload} offloaded"


def _precision(plan: TrainingPlan) -> str:
    autocast = f"{plan.mixed_precision} autocast" if plan.autocast else "no autocast"
    return f"{plan.dtype}, {autocast}"


# The groups that statistics are given of.
GROUPINGS: Mapping[str, Callable[[Configuration, TrainingPlan], str]] = {
    "method": lambda _, plan: plan.method,
    "quantization": lambda _, plan: plan.quantization,
    "precision": lambda _, plan: _precision(plan),
    "optimizer's package": lambda _, plan: plan.optimizer.module or "torch, transformers",
    "checkpointing": lambda _, plan: _checkpointing(plan),
    "loss": lambda _, plan: plan.loss,
    "trainer": lambda _, plan: plan.trainer,
    "objective": lambda _, plan: plan.objective,
    "sharding": lambda _, plan: _sharding(plan),
    "attention": lambda _, plan: plan.attn_implementation,
    "packing": lambda _, plan: "packed" if plan.packing else "not packed",
    "accumulation": lambda _, plan: str(plan.gradient_accumulation_steps),
    "shape": lambda drawn, _: "catalog" if drawn.model else "random",
    "family": lambda drawn, _: drawn.source.spec.model_type,
}


class Compared(Struct, frozen=True, kw_only=True):
    """A configuration by dry run and in closed form; or why one of them refused it."""

    reference: Reference
    estimate: MemoryEstimate | None = None
    refused: str | None = None

    @property
    def error(self) -> float:
        """Relative error of the allocated peak: above 0 where the closed form says too much."""
        assert self.estimate is not None
        measured = self.reference.peak_phase.allocated_peak_bytes
        return relative_error(self.estimate.allocated_peak_bytes, measured)

    @property
    def differences(self) -> dict[str, int]:
        """Bytes of each component at the closed form's peak above those at the dry run's, the
        largest first."""
        assert self.estimate is not None
        said, known = self.estimate.peak_phase.components, self.reference.peak_phase.components
        by_name = {name: said.get(name, 0) - known.get(name, 0) for name in COMPONENTS}
        ordered = sorted(by_name.items(), key=lambda pair: -abs(pair[1]))
        return {name: difference for name, difference in ordered if difference}

    def to_dict(self) -> dict[str, Any]:
        configuration = {
            "key": self.reference.configuration.key,
            **self.reference.configuration.to_dict(),
        }
        if self.estimate is None:
            return {**configuration, "refused": self.refused}
        return {
            **configuration,
            "relative_error": self.error,
            "closed_form": self.estimate.to_dict(),
            "differences": self.differences,
        }


def compare(reference: Reference) -> Compared:
    """The closed form of one configuration, where there is one."""
    if reference.refused is not None:
        return Compared(reference=reference, refused=reference.refused)
    try:
        if reference.stale:
            raise InputError("the dry run took other modules than ftplan names now: `run` it again")
        return Compared(reference=reference, estimate=closed_form(reference.configuration))
    except FtplanError as error:
        return Compared(reference=reference, refused=error.message)


def closed_form(configuration: Configuration) -> MemoryEstimate:
    """What `ftplan estimate` computes; raises InputError for what it does not model."""
    source = configuration.source
    if source.stand_in:
        raise InputError(f"architecture `{source.spec.model_type}` has no closed form")
    return estimate_memory(source.spec, configuration.plan)


class Report(Struct, frozen=True, kw_only=True):
    """All comparisons: those with both figures, and who refused the others why."""

    compared: tuple[Compared, ...]
    refused_by_dry_run: Mapping[str, int]
    refused_by_closed_form: Mapping[str, int]

    @staticmethod
    def of(compared: Sequence[Compared]) -> Report:
        refused = [c for c in compared if c.refused is not None]
        reasons: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for c in refused:
            reasons[c.reference.refused is not None][reason(c.refused or "")] += 1
        return Report(
            compared=tuple(c for c in compared if c.estimate is not None),
            refused_by_dry_run=reasons[True],
            refused_by_closed_form=reasons[False],
        )

    @property
    def errors(self) -> list[float]:
        return [c.error for c in self.compared]

    @property
    def within(self) -> bool:
        """Whether the bars are reached."""
        return BARS.reached(self.errors)

    @property
    def worst(self) -> list[Compared]:
        """The farthest off first."""
        return sorted(self.compared, key=lambda c: -abs(c.error))

    def groups(self) -> dict[str, dict[str, list[float]]]:
        """The errors by grouping and group."""
        groups: dict[str, dict[str, list[float]]] = {name: {} for name in GROUPINGS}
        for c in self.compared:
            plan = c.reference.configuration.plan
            for name, group_of in GROUPINGS.items():
                group = group_of(c.reference.configuration, plan)
                groups[name].setdefault(group, []).append(c.error)
        return groups

    def to_dict(self, num_worst: int) -> dict[str, Any]:
        return {
            "schema": 1,
            "within": self.within,
            "bars": structs.asdict(BARS),
            "all": statistics(self.errors),
            "groups": {
                name: {group: statistics(errors) for group, errors in groups.items()}
                for name, groups in self.groups().items()
            },
            "refused_by_dry_run": dict(self.refused_by_dry_run),
            "refused_by_closed_form": dict(self.refused_by_closed_form),
            "worst": [c.to_dict() for c in self.worst[:num_worst]],
        }


def statistics(errors: Sequence[float]) -> dict[str, float] | None:
    """Count, median, 95th percentile and maximum of the size, and the mean; None of nothing."""
    if not errors:
        return None
    group = GroupStatistics.of(errors)
    return {
        "count": group.count,
        "median": group.median,
        "p95": group.p95,
        "max": max(map(abs, errors)),
        "bias": group.bias,
    }
