"""The files that the suite writes: one JSON object a line, appended so that nothing is ever lost.

`rows.jsonl` is what `ftplan validate` reads, `failures.jsonl` what did not work and why,
`ceilings.jsonl` what the card can do at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.configurations import Run
from benchmarks.gpu.task import OUT_OF_MEMORY
from ftplan.launcher.cases import FURTHER_FIELDS, OPTIONAL_FIELDS, SETTING_OF_FIELD
from ftplan.planner.accuracy import FAILED_WITH, SURVIVED_WITH
from ftplan.planner.plan import TrainingPlan

SOURCE = "ftplan benchmarks.gpu"


class Lines:
    """A JSON-lines file that is only ever appended to.

    A line that was being written when the machine went away is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_bytes()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                os.truncate(path, whole)

    def append(self, value: Mapping[str, Any]) -> None:
        """One line more, on the disk before this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)


def row(
    run: Run, answer: Mapping[str, Any], *, gpu: str, software: str, free_bytes: int | None
) -> dict[str, Any] | None:
    """A case of `ftplan validate`; None for a run that failed for another reason than memory.

    `free_bytes`: of the GPU when the run began.
    """
    if run.tight_share is not None or OUT_OF_MEMORY in answer:
        if "failed" in answer:
            return None
        name = FAILED_WITH if OUT_OF_MEMORY in answer else SURVIVED_WITH
        measured: Mapping[str, Any] = {name: run.free_bytes or free_bytes}
    elif "measured" in answer:
        measured = {k: v for k, v in answer["measured"].items() if v is not None}
    else:
        return None
    return {
        "id": run.key,
        "source": SOURCE,
        "software": software,
        "gpu": gpu,
        "model": run.candidate.model,
        "config": case_config(run),
        "measured": measured,
        **{k: v for k, v in answer.items() if k not in ("measured", OUT_OF_MEMORY)},
    }


def case_config(run: Run) -> dict[str, Any]:
    """A case's `config`: the plan's settings, those at their default left out that a case need not
    say."""
    plan, default = run.candidate.case.plan, TrainingPlan()
    said = {field: getattr(plan, name) for field, name in SETTING_OF_FIELD.items()}
    taken = plan.resolved_method.takes.values()
    said |= {name: getattr(plan, name) for name in ("lora_rank", "target_modules") if name in taken}
    if plan.quantization in ("nf4", "fp4"):
        said["double_quant"] = plan.double_quant
    for name in (*OPTIONAL_FIELDS, *FURTHER_FIELDS):
        if getattr(plan, name) != getattr(default, name):
            said.setdefault(name, getattr(plan, name))
    return {
        **said,
        "packing": False,
        "kbit_prepare": run.candidate.kbit_prepare,
        "length_is": "exact",
        "sharding": plan.sharding,
    }
