"""AdaLoRA's schedule: ranks are taken away after optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training.cycles.cycle import ADAPTER, Cycle, read_state, read_tensors
from ftplan.launcher.training.importance import REMEMBERED
from ftplan.planner.cycles import adalora_schedule
from ftplan.planner.peft_options import read_options


class ImportanceAlone(TrainerCallback):
    """What AdaLoRA does after each step before it takes ranks away: a step that is to be measured,
    or has no data, needs no more."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **parts: Any,
    ) -> None:
        model.base_model.rankallocator.update_ipt(model.base_model.model)


class RankSchedule(Cycle):
    """Calls PEFT's `update_and_allocate`, with a schedule that fits the run's steps.

    A checkpoint holds the matrices at their first rank, those taken away as zeros: PEFT would
    write them cut, and the optimizer's states would not fit them when the run goes on.
    """

    def __init__(self, run: RunDir, settings: Mapping[str, Any]) -> None:
        super().__init__(run)
        self.given = read_options(settings["peft_config"])
        self._config: Any = None
        self._allocator: Any = None
        self._pattern: Any = None

    def prepare(self, trainer: Any, checkpoint: Path | None) -> None:
        tuner = trainer.model.base_model
        self._config, self._allocator = tuner.peft_config[ADAPTER], tuner.rankallocator
        if checkpoint is None:
            return
        self._config.rank_pattern = None
        self._pattern = read_state(checkpoint)["rank_pattern"]
        for key, value in read_tensors(checkpoint, trainer.args.device).items():
            remembered, _, name = key.partition("/")
            getattr(self._allocator, remembered)[name] = value

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        for name, value in adalora_schedule(state.max_steps, self.given).to_dict().items():
            setattr(self._config, name, value)
        if self._pattern is not None:
            self._config.rank_pattern = self._pattern

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **parts: Any,
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)

    @contextmanager
    def saving(self, checkpoint: Path) -> Iterator[None]:
        with super().saving(checkpoint):
            pattern, self._config.rank_pattern = self._config.rank_pattern, None
            try:
                yield
            finally:
                self._config.rank_pattern = pattern

    def state(self) -> dict[str, Any]:
        return {"rank_pattern": self._config.rank_pattern}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{remembered}/{name}": value.contiguous()
            for remembered in REMEMBERED
            for name, value in getattr(self._allocator, remembered).items()
        }
