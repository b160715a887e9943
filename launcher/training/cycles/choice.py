"""Which method goes through cycles, and what carries them out."""

from __future__ import annotations

from typing import Any

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training.config import TrainConfig
from ftplan.launcher.training.cycles.adalora import RankSchedule
from ftplan.launcher.training.cycles.cycle import Cycle
from ftplan.launcher.training.cycles.lora_drop import LoraDrop
from ftplan.launcher.training.cycles.restarts import Restarts
from ftplan.launcher.training.measure import CpuAllocationRecorder
from ftplan.planner.cycles import RESTARTING


def add_cycle(
    trainer: Any, run: RunDir, config: TrainConfig, recorder: CpuAllocationRecorder
) -> Cycle | None:
    """The part of the run's method in the training loop, put there; None for most methods."""
    cycle = _cycle(trainer, run, config, recorder)
    if cycle is not None:
        trainer.add_callback(cycle)
    return cycle


def _cycle(
    trainer: Any, run: RunDir, config: TrainConfig, recorder: CpuAllocationRecorder
) -> Cycle | None:
    settings, seed = config.method_settings, trainer.args.seed
    if config.method in RESTARTING:
        return Restarts(run, config.method, settings, seed)
    if config.method == "lora-drop":
        return LoraDrop(run, settings, seed, recorder)
    if config.method == "adalora":
        return RankSchedule(run, settings)
    return None
