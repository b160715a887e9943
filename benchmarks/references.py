"""What the dry run says of drawn configurations, kept so that a comparison takes no time.

A reference file is JSON lines, one a configuration, in the order in which they were carried out;
of two that are the same configuration the later one counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from msgspec import Struct

from benchmarks.draws import Configuration
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.exact import DryRunner, case_of
from ftplan.planner.dry_run_summary import DryRunSummary
from ftplan.planner.errors import FtplanError
from ftplan.planner.phases import Phase

REFERENCE = Path(__file__).parent / "reference" / "draw.jsonl"

_PACKAGES = ("torch", "transformers", "trl", "peft")

# What the kept figures are called in a DryRunSummary.
_COUNTS = (
    "num_parameters",
    "num_trainable_parameters",
    "trained_weight_bytes",
    "num_layers",
    "num_layers_traced",
)


class Reference(Struct, frozen=True, kw_only=True):
    """One configuration's dry run. `refused`: why there are no figures; else None.

    `target_modules`: what `all-linear` meant, which follows from what ftplan knows of a family.
    `phases`: components that are 0 are left out. `allocator`, `expandable`: reserved and required
    bytes of the caching allocator by default, and with `expandable_segments:True`.
    """

    configuration: Configuration
    versions: Mapping[str, str]
    seconds: float
    target_modules: tuple[str, ...]
    refused: str | None = None
    phases: tuple[Phase, ...] = ()
    allocator: Mapping[str, int] | None = None
    expandable: Mapping[str, int] | None = None
    counts: Mapping[str, int] | None = None

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.allocated_peak_bytes)

    @property
    def stale(self) -> bool:
        """Whether a dry run would take other modules today."""
        return case_for(self.configuration).plan.target_modules != self.target_modules

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it."""
        common = {
            "key": self.configuration.key,
            **self.configuration.to_dict(),
            "versions": self.versions,
            "seconds": self.seconds,
            "target_modules": self.target_modules,
        }
        if self.refused is not None:
            return {**common, "refused": self.refused}
        return {
            **common,
            "allocated_peak_bytes": self.peak_phase.allocated_peak_bytes,
            "peak_phase": self.peak_phase.name,
            "phases": [phase.to_dict() for phase in self.phases],
            "allocator": self.allocator,
            "expandable": self.expandable,
            "counts": self.counts,
        }

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Reference:
        phases = tuple(
            Phase(name=phase["name"], components=phase["components"])
            for phase in raw.get("phases", ())
        )
        return Reference(
            configuration=Configuration.from_dict(raw),
            versions=raw["versions"],
            seconds=raw["seconds"],
            target_modules=tuple(raw["target_modules"]),
            refused=raw.get("refused"),
            phases=phases,
            allocator=raw.get("allocator"),
            expandable=raw.get("expandable"),
            counts=raw.get("counts"),
        )


def read(path: Path = REFERENCE) -> list[Reference]:
    """The configurations of a reference file; none where there is no file."""
    if not path.is_file():
        return []
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Reference.from_dict(row) for row in {row["key"]: row for row in rows}.values()]


def carry_out(
    configurations: Sequence[Configuration], path: Path, jobs: int
) -> Iterator[Reference]:
    """Dry runs of the configurations, each added to the file as soon as it is done.

    `jobs`: processes at once.
    """
    versions = {package: version(package) for package in _PACKAGES}
    idle: SimpleQueue[DryRunner] = SimpleQueue()

    def one(configuration: Configuration) -> Reference:
        runner = idle.get()
        try:
            return dry_run(runner, configuration, versions)
        finally:
            idle.put(runner)

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        file = stack.enter_context(path.open("a", encoding="utf-8"))
        for _ in range(jobs):
            idle.put(stack.enter_context(DryRunner()))
        pool = ThreadPoolExecutor(jobs)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for done in as_completed([pool.submit(one, item) for item in configurations]):
            reference = done.result()
            file.write(json.dumps(reference.to_dict(), separators=(",", ":")) + "\n")
            file.flush()
            yield reference


def dry_run(
    runner: DryRunner, configuration: Configuration, versions: Mapping[str, str]
) -> Reference:
    """One configuration's dry run; what it raises becomes a refusal."""
    began = time.perf_counter()
    case = case_for(configuration)
    common: dict[str, Any] = {
        "configuration": configuration,
        "versions": versions,
        "target_modules": case.plan.target_modules,
    }
    try:
        summary = runner.run(case)
    except FtplanError as error:
        seconds = time.perf_counter() - began
        return Reference(**common, seconds=seconds, refused=error.message)
    return Reference(
        **common,
        seconds=time.perf_counter() - began,
        phases=_without_zeros(summary),
        allocator=_peaks(summary, expandable=False),
        expandable=_peaks(summary, expandable=True),
        counts={name: getattr(summary, name) for name in _COUNTS},
    )


def case_for(configuration: Configuration) -> DryRunCase:
    """What the dry run is asked, on a GPU with an A100's kernels."""
    return case_of(configuration.source, configuration.plan, None)


def _without_zeros(summary: DryRunSummary) -> tuple[Phase, ...]:
    return tuple(
        Phase(name=phase.name, components={k: v for k, v in phase.components.items() if v})
        for phase in summary.phases
    )


def _peaks(summary: DryRunSummary, *, expandable: bool) -> dict[str, int]:
    peaks = summary.expandable if expandable else summary.allocator
    return {
        "reserved_peak_bytes": peaks.reserved_peak_bytes,
        "required_bytes": peaks.required_bytes,
    }
