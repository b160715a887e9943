"""What a run directory tells, also of a run that has failed, goes on, or was never started."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.launcher.data.private_text import keys_in
from ftplan.launcher.process import last_words
from ftplan.launcher.processes import lives
from ftplan.launcher.run_dir import RunDir, read_mapping, rows_of
from ftplan.launcher.step_seconds import mean_step_seconds
from ftplan.planner.errors import InputError

# Where a row of metrics.jsonl begins to be long.
_LONGEST_TEXT = 2000

_LOG_BYTES, _LOG_LINES = 32_768, 40


class Outcome(Struct, frozen=True, kw_only=True):
    """How a run stands: `state` is a word, `mark` a sign that goes with it."""

    state: str
    mark: str
    good: bool | None
    told: str = ""


class RunFacts(Struct, frozen=True, kw_only=True):
    """A run directory as read: mappings are empty where a file is not there or damaged."""

    run: RunDir
    outcome: Outcome
    plan: Mapping[str, Any]
    train: Mapping[str, Any]
    record: Mapping[str, Any]
    status: Mapping[str, Any]
    profile: Mapping[str, Any]
    environment: Mapping[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    phases: dict[str, dict[str, int]]
    earlier: list[dict[str, Any]]
    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    unreadable: list[str]

    @property
    def predicted(self) -> Mapping[str, Any]:
        return mapping(self.plan.get("predicted"))

    @property
    def estimate(self) -> Mapping[str, Any]:
        return mapping(self.plan.get("estimate"))

    @property
    def name(self) -> str:
        return self.run.root.resolve().name

    @property
    def num_steps(self) -> int:
        """Those planned."""
        return int(number(self.plan.get("steps")) or 0)

    @property
    def measured(self) -> Mapping[str, Any]:
        """The record's; of a run that has none what is known so far, under the same names."""
        if self.record:
            return mapping(self.record.get("measured"))
        found: dict[str, float | None] = {}
        for sizes in self.phases.values():
            found |= {name: max(size, found.get(name) or 0) for name, size in sizes.items()}
        seconds = [known for row in self.steps if (known := number(row.get("seconds")))]
        tokens = [known for row in self.steps if (known := number(row.get("tokens")))]
        if seconds:
            found["step_seconds"] = mean_step_seconds(seconds)
            found["tokens_per_second_per_gpu"] = sum(tokens) / sum(seconds)
            found["train_seconds"] = sum(seconds)
        return found

    def setting(self, name: str) -> Any:
        return mapping(mapping(self.plan.get("plan")).get(name)).get("value")

    def evaluation(self, when: str) -> dict[str, Any]:
        """The row of the evaluation `before` or `after` training; empty without one."""
        return next((row for row in self.evaluations if row.get("when") == when), {})


def read_facts(run: RunDir) -> RunFacts:
    """Everything that is there. Nothing raises for a file that is damaged: it is named."""
    unreadable: list[str] = []

    def read(path: Path) -> Mapping[str, Any]:
        if not path.is_file():
            return {}
        try:
            return read_mapping(path)
        except (InputError, UnicodeDecodeError):
            unreadable.append(path.name)
            return {}

    rows = list(run.metric_rows())
    record, status = read(run.record), read(run.status)
    steps = [row for row in rows if _is_step(row)]
    events = list(_events(rows))
    phases = phases_of(record, events)
    return RunFacts(
        run=run,
        outcome=outcome_of(run, status),
        plan=read(run.plan),
        train=read(run.train),
        record=record,
        status=status,
        profile=read(run.data_profile),
        environment=read(run.environment),
        steps=steps,
        evaluations=[row for row in events if row["event"] == "evaluation"],
        phases=phases,
        earlier=[row for row in events if row["event"] == "evaluation of an earlier stage"],
        events=[row for row in events if row["event"] not in _SHOWN_ELSEWHERE],
        samples=list(rows_of(run.samples)),
        unreadable=unreadable,
    )


_SHOWN_ELSEWHERE = ("evaluation", "memory", "evaluation of an earlier stage")


def _is_step(row: Mapping[str, Any]) -> bool:
    return "event" not in row and number(row.get("step")) is not None


def _events(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows that are no steps, with the last step before each where it does not say itself."""
    step = 0
    for row in rows:
        if "event" in row:
            yield {"step": step, **row}
        elif _is_step(row):
            step = row["step"]


def phases_of(record: Mapping[str, Any], events: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Measured bytes by phase: by the record, else by what was told while the run went on."""
    told = mapping(record.get("measured")).get("phases")
    rows = (
        [{"phase": phase.get("name"), **phase} for phase in map(mapping, told)]
        if isinstance(told, list)
        else [row for row in events if row["event"] == "memory"]
    )
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        sizes = found.setdefault(str(row.get("phase")), {})
        for name in ("allocated_bytes", "reserved_bytes", "device_bytes"):
            if size := number(row.get(name)):
                sizes[name] = max(int(size), sizes.get(name, 0))
    return found


def outcome_of(run: RunDir, status: Mapping[str, Any]) -> Outcome:
    """How the run stands, by its files and by whether its process lives."""
    stage = str(status.get("stage", ""))
    if run.finished:
        return Outcome(state="finished", mark="✓", good=True)
    if stage == "interrupted":
        return Outcome(state="interrupted", mark="‖", good=None)
    if lives(status.get("process") or {"pid": status.get("pid")}):
        return Outcome(state="running", mark="▶", good=None, told=stage)
    if words := last_words(run.stderr):
        return Outcome(state="failed", mark="✕", good=False, told=shown(words))
    if not status:
        return Outcome(state="not started", mark="○", good=None)
    told = f"Its process is gone and left no error; the last it told of was `{stage}`."
    return Outcome(state="broken off", mark="✕", good=False, told=told)


def last_lines(run: RunDir) -> str:
    """The end of the log, each line as far as it may be shown; empty where there is none."""
    try:
        with run.stderr.open("rb") as log:
            log.seek(max(0, run.stderr.stat().st_size - _LOG_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    # What a progress bar writes over is not shown.
    lines = [line.rpartition("\r")[2] for line in text.split("\n") if line.strip()]
    return "\n".join(map(shown, lines[-_LOG_LINES:]))


def mapping(value: object) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: object) -> float | None:
    """The value where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def said(value: object, form: Callable[[float], str]) -> str:
    """A number in its form; `-` of anything else."""
    known = number(value)
    return "-" if known is None else form(known)


def shown(text: object) -> str:
    """Text of a log or a model that a report may carry: of bounded length, without keys, and with
    `~` for the home folder, which names its owner."""
    words = str(text)
    if len(words) > _LONGEST_TEXT:
        words = words[:_LONGEST_TEXT].rstrip() + " ..."
    kinds = list(keys_in(words))
    if kinds:
        return f"[left out: it holds what looks like a key ({', '.join(kinds)})]"
    return without_home(words)


def without_home(text: str) -> str:
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text
