"""What the allocator holds by the closed form, beside the dry run's own replay."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from benchmarks.comparison import compare, statistics
from benchmarks.references import Reference
from ftplan.planner.allocator import replay
from ftplan.planner.memory import RESERVED_OVER_ALLOCATED
from ftplan.planner.replayed import ordered_storages
from ftplan.planner.stack import OWN_STACK

# The share of what is allocated that stands in for a replay, with expandable segments and without.
_SHARES = {True: RESERVED_OVER_ALLOCATED["trl"], False: RESERVED_OVER_ALLOCATED["transformers"]}


class ReservedErrors(Struct, frozen=True, kw_only=True):
    """Relative errors of the peak of reserved bytes on one configuration: the closed form's
    replay, and the share in its place."""

    key: str
    replayed: float
    share: float


def compare_reserved(
    references: Sequence[Reference], *, expandable: bool, most_events: int | None = None
) -> list[ReservedErrors]:
    """Of the configurations whose order of storages the closed form knows; `most_events`: of a
    replay, for those that take no longer."""
    found = (_compared(reference, expandable, most_events) for reference in references)
    return [errors for errors in found if errors is not None]


def _compared(
    reference: Reference, expandable: bool, most_events: int | None
) -> ReservedErrors | None:
    peaks = reference.expandable if expandable else reference.allocator
    memory = None if peaks is None else compare(reference).estimate
    if peaks is None or memory is None:
        return None
    model, plan = reference.configuration.source.spec, reference.configuration.plan
    run = ordered_storages(model, plan, None, None, OWN_STACK)
    if run is None:
        return None
    events, small_bytes = run.large_events()
    if most_events is not None and len(events) > most_events:
        return None
    large = replay(run.sizes, events, expandable_segments=expandable).reserved_peak_bytes
    actual = peaks["reserved_peak_bytes"]
    return ReservedErrors(
        key=reference.configuration.key,
        replayed=(small_bytes + large) / actual - 1,
        share=memory.allocated_peak_bytes * _SHARES[expandable] / actual - 1,
    )


def reserved_report(references: Sequence[Reference]) -> dict[str, dict[str, dict[str, float]]]:
    """Statistics of both, with expandable segments and without."""
    report = {}
    for name, expandable in (("expandable_segments", True), ("default", False)):
        compared = compare_reserved(references, expandable=expandable)
        report[name] = {
            "replayed": statistics([c.replayed for c in compared]) or {},
            "share": statistics([c.share for c in compared]) or {},
        }
    return report
