"""Memory by phase: what was predicted, by component, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from ftplan.launcher.report.elements import Child, Html, join, table, tag
from ftplan.launcher.report.facts import RunFacts, mapping, number
from ftplan.launcher.views import said_unmet
from ftplan.planner.phases import COMPONENTS, STEP_PHASES
from ftplan.planner.units import format_bytes, format_percent

# What is measured at once of the phases that are predicted one by one.
_PASSES = "forward and backward"
_COVERED = {_PASSES: STEP_PHASES}


class PredictedPhase(Struct, frozen=True):
    """A phase of the estimate and the components it has."""

    name: str
    components: Mapping[str, int]

    @property
    def allocated_bytes(self) -> int:
        return sum(self.components.values())


class PhaseGroup(Struct, frozen=True, kw_only=True):
    """What is measured together: the phases that are predicted of it, and its measured bytes."""

    name: str
    predicted: tuple[PredictedPhase, ...]
    measured: Mapping[str, int]

    @property
    def predicted_bytes(self) -> int | None:
        return max((phase.allocated_bytes for phase in self.predicted), default=None)

    @property
    def measured_bytes(self) -> int | None:
        return self.measured.get("allocated_bytes")


def phase_groups(facts: RunFacts) -> list[PhaseGroup]:
    """In the order of the estimate; what was measured of none of its phases comes last."""
    phases = mapping(facts.estimate.get("per_gpu")).get("phases")
    predicted = [_read(phase) for phase in phases] if isinstance(phases, list) else []
    group_of = {name: group for group, names in _COVERED.items() for name in names}
    names = [group_of.get(phase.name, phase.name) for phase in predicted]
    groups = [
        PhaseGroup(
            name=name,
            predicted=tuple(
                phase for phase, of in zip(predicted, names, strict=True) if of == name
            ),
            measured=facts.phases.get(name, {}),
        )
        for name in dict.fromkeys([*names, *facts.phases])
    ]
    whole = number(mapping(facts.record.get("measured")).get("allocated_bytes"))
    if whole and not any(group.measured_bytes for group in groups):
        measured = {"allocated_bytes": int(whole)}
        groups.append(PhaseGroup(name="whole run", predicted=(), measured=measured))
    return groups


def _read(phase: object) -> PredictedPhase:
    raw = mapping(phase)
    sizes = {str(name): number(size) for name, size in mapping(raw.get("components")).items()}
    return PredictedPhase(
        str(raw.get("name")), {name: int(size) for name, size in sizes.items() if size}
    )


def shown_components(groups: list[PhaseGroup]) -> list[str]:
    """Those that any phase has, in the usual order."""
    present = {name for group in groups for phase in group.predicted for name in phase.components}
    return [name for name in COMPONENTS if name in present] + sorted(present - {*COMPONENTS})


def memory_section(facts: RunFacts) -> Html | None:
    groups = phase_groups(facts)
    if not groups and not facts.predicted:
        return None
    return join(_figure(groups) if groups else None, _totals(facts), _phases(groups), _notes(facts))


def _figure(groups: list[PhaseGroup]) -> Html:
    components = shown_components(groups)
    sizes = [size for group in groups for size in (group.predicted_bytes, group.measured_bytes)]
    widest = max([size for size in sizes if size] or [1])
    measured = any(group.measured_bytes for group in groups)
    rows = [row for group in groups for row in _bars(group, components, widest)]
    keys = [
        tag("span", tag("i", class_=f"key part c{at}"), COMPONENTS.get(name, name))
        for at, name in enumerate(components)
    ]
    if measured:
        keys.append(tag("span", tag("i", class_="key measured"), "measured"))
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("b", "Tensors at the highest point of each phase"),
            tag("span", keys, class_="legend"),
        ),
        tag("div", rows, class_="bars"),
    )


def _bars(group: PhaseGroup, components: list[str], widest: int) -> list[Html]:
    rows = []
    for phase in group.predicted:
        parts = [
            tag(
                "i",
                class_=f"part c{at}",
                style=f"width:{100 * phase.components[name] / widest:.3f}%",
                title=f"{COMPONENTS.get(name, name)}: {format_bytes(phase.components[name])}",
            )
            for at, name in enumerate(components)
            if phase.components.get(name)
        ]
        rows.append(_bar(phase.name, parts, format_bytes(phase.allocated_bytes)))
    if size := group.measured_bytes:
        part = tag("i", class_="measured", style=f"width:{100 * size / widest:.3f}%")
        over = f" {group.name}" if len(group.predicted) != 1 else ""
        rows.append(_bar(f"measured{over}", part, format_bytes(size), class_="told"))
    return rows


def _bar(label: str, parts: Child, value: str, class_: str = "") -> Html:
    return tag(
        "div",
        tag("span", label, class_="name"),
        tag("span", parts, class_="track", aria_hidden="true"),
        tag("span", value, class_="value"),
        class_=f"bar {class_}".strip(),
    )


def _off(predicted: float | None, measured: float | None) -> str:
    return format_percent(predicted / measured - 1) if predicted and measured else "-"


def _size(value: object) -> str:
    size = number(value)
    return "-" if size is None else format_bytes(size)


_TOTALS = (
    ("allocated", "allocated_bytes", "tensors"),
    ("reserved", "reserved_bytes", "what torch's allocator holds"),
    ("device", "device_bytes", "what the driver or the system shows of the process"),
)


def _totals(facts: RunFacts) -> Html:
    measured = facts.measured
    rows = []
    for label, name, meaning in _TOTALS:
        guess, real = number(facts.predicted.get(name)), number(measured.get(name))
        if (guess or real) and not (_on_processor(facts) and name == "reserved_bytes"):
            named = join(label, tag("small", meaning))
            rows.append((named, _size(guess), _size(real), _off(guess, real)))
    columns = ("", ">predicted", ">measured", ">off by")
    return table("Highest of the whole run", columns, rows)


def _phases(groups: list[PhaseGroup]) -> Html | None:
    """Each phase in figures, and every component of it."""
    if not groups:
        return None
    components = shown_components(groups)
    rows = [
        (
            group.name,
            _size(group.predicted_bytes),
            _size(group.measured_bytes),
            _off(group.predicted_bytes, group.measured_bytes),
            _size(group.measured.get("reserved_bytes")),
            _size(group.measured.get("device_bytes")),
        )
        for group in groups
    ]
    heads = ("phase", ">predicted", ">measured", ">off by", ">reserved", ">device")
    phases = [phase for group in groups for phase in group.predicted]
    parts = [
        (COMPONENTS.get(name, name), *(_size(phase.components.get(name)) for phase in phases))
        for name in components
    ]
    return tag(
        "details",
        tag("summary", "Each phase in figures"),
        table("Allocated by phase; reserved and device as measured", heads, rows),
        table(
            "Predicted components",
            ("component", *(f">{phase.name}" for phase in phases)),
            parts,
        ),
    )


def _on_processor(facts: RunFacts) -> bool:
    """Where nothing reserves memory: the record has the bytes of tensors there, too."""
    return bool(mapping(facts.plan.get("device")).get("kind") == "cpu")


def _notes(facts: RunFacts) -> Html | None:
    if not _on_processor(facts):
        return None
    said = (
        "On a processor tensors are counted after loading and in the first two steps, which hold "
        "the longest rows."
    )
    unmet = said_unmet(facts.record) if facts.record else None
    return tag("p", f"{said} {unmet}" if unmet else said, class_="note")
