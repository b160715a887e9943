"""What each phase of a run takes at most: load, a step's passes, the optimizer's step, evaluation,
save.

On CUDA the allocator's peaks are read and reset where a phase ends. On the processor tensors are
counted in the steps that `CpuAllocationRecorder` profiles, and the process's resident memory by the
kernel's high-water mark, which Linux lets a process reset (proc(5), `/proc/self/clear_refs`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training.measure import (
    CpuAllocationRecorder,
    live_bytes,
    on_cuda,
    process_peak_bytes,
)
from ftplan.launcher.training.trainer import append_metric

PASSES = "forward and backward"
OPTIMIZER_STEP = "optimizer step"

# A phase that takes this much more than before is told of anew: the first steps hold the longest
# batches, so few rows are written.
_TOLD_RISE = 0.01

_RESET_HIGH_WATER = "5"


class PhasePeaks(TrainerCallback):
    """Peak bytes by phase; a row of metrics.jsonl where one is new or has risen."""

    def __init__(self, run: RunDir, recorder: CpuAllocationRecorder) -> None:
        self.run = run
        self.recorder = recorder
        self.peaks: dict[str, dict[str, int]] = {}
        self._told: dict[str, dict[str, int]] = {}

    def end(self, phase: str, model: torch.nn.Module | None = None) -> None:
        """The phase is over: what has been taken since the last one ended is its peak.

        `model`: on the processor, where nothing counts allocations then, its tensors are counted.
        """
        if on_cuda():
            self._raise(phase, _cuda_peaks())
            return
        self._raise(phase, _resident_peak())
        if model is not None:
            self._raise(phase, {"allocated_bytes": live_bytes(model, None)})

    def highest(self) -> dict[str, int]:
        """Of all phases so far."""
        found: dict[str, int] = {}
        for peak in self.peaks.values():
            found |= {name: max(size, found.get(name, 0)) for name, size in peak.items()}
        return found

    def to_list(self) -> list[dict[str, Any]]:
        """`measured.phases` of record.json."""
        return [{"name": phase, **peak} for phase, peak in self.peaks.items()]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recorder.mark(PASSES)
        self.end(PASSES)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recorder.mark(OPTIMIZER_STEP)
        self.end(OPTIMIZER_STEP)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for phase, peak in self.recorder.peaks.items():
            self._raise(phase, {"allocated_bytes": peak, "reserved_bytes": peak})
        self.tell()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end("save")

    def tell(self) -> None:
        """Rows of metrics.jsonl for the phases that have risen since they were told of."""
        if os.environ.get("RANK", "0") != "0":
            return
        for phase, peak in self.peaks.items():
            told = self._told.get(phase, {})
            if any(size > (1 + _TOLD_RISE) * told.get(name, 0) for name, size in peak.items()):
                self._told[phase] = dict(peak)
                append_metric(self.run, {"event": "memory", "phase": phase, **peak})

    def _raise(self, phase: str, peak: dict[str, int]) -> None:
        known = self.peaks.setdefault(phase, {})
        for name, size in peak.items():
            known[name] = max(size, known.get(name, 0))


def _cuda_peaks() -> dict[str, int]:
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return {"allocated_bytes": allocated, "reserved_bytes": reserved}


def _resident_peak() -> dict[str, int]:
    """The process's highest resident memory since it was last asked for; nothing where the mark
    cannot be reset, as it would be that of all phases before."""
    peak = process_peak_bytes()
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_HIGH_WATER)
    except OSError:
        return {}
    return {"device_bytes": peak} if peak is not None else {}
