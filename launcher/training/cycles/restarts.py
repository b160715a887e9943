"""ReLoRA and PLoRA: adapters that are merged into the base and begun anew.

What is merged is kept once beside the checkpoints, so that a resumed run merges the same matrices
into the base in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training.cycles.cycle import Cycle, read_state
from ftplan.launcher.training.cycles.merging import (
    Adapted,
    adapted_modules,
    begin_anew,
    matrices,
    merge,
    merged_state_dict,
)
from ftplan.launcher.training.cycles.pruning import prune_states
from ftplan.launcher.training.cycles.rates import JaggedRate, StagedRate, follow, renew
from ftplan.launcher.training.saving import write_whole
from ftplan.planner.cycles import cycle_steps, restart_warmup_steps


class Restarts(Cycle):
    """Merges the adapters into the base every so many steps, and begins them anew.

    ReLoRA prunes the optimizer's states and warms the learning rate up again; PLoRA forgets the
    states, and each stage has a schedule of its own.
    """

    def __init__(self, run: RunDir, method: str, settings: Mapping[str, Any], seed: int) -> None:
        super().__init__(run)
        self.method, self.settings, self.seed = method, settings, seed
        self.num_restarts = 0
        self.every = 0
        self.modules: list[Adapted] = []
        self.rate: JaggedRate | StagedRate | None = None
        self._restarted_at: int | None = None

    @property
    def share(self) -> float:
        """Of an update, what is merged: PLoRA's `W = m W + (1 - m)(W + BA)` at momentum m."""
        return 1.0 - float(self.settings["plora_momentum"])

    def prepare(self, trainer: Any, checkpoint: Path | None) -> None:
        self.modules = adapted_modules(trainer.model)
        if checkpoint is None:
            return
        kept = read_state(checkpoint)
        self.num_restarts, self._restarted_at = kept["num_restarts"], kept["restarted_at"]
        for number in range(1, self.num_restarts + 1):
            merge(self.modules, load_file(self._merged(number)), self.share)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **parts: Any,
    ) -> None:
        given = self.settings["jagged_restart_steps"]
        self.every = cycle_steps(self.method, given, state.max_steps)
        self.rate = self._new_rate(state)
        if self._restarted_at is not None:
            self.rate.restarted_at = self._restarted_at
        follow(lr_scheduler, self.rate)
        renew(lr_scheduler)

    def _new_rate(self, state: TrainerState) -> JaggedRate | StagedRate:
        if self.method == "plora":
            stage = min(self.every, state.max_steps - self.num_restarts * self.every)
            return StagedRate(state.max_steps, stage)
        given = self.settings["jagged_restart_warmup_steps"]
        return JaggedRate(restart_warmup_steps(given, self.every))

    def advance(self, state: TrainerState, parts: Mapping[str, Any]) -> None:
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        self.num_restarts += 1
        values = matrices(self.modules)
        if state.is_world_process_zero:
            self._keep_merged(values)
            self.tell("restart", after_step=state.global_step, number=self.num_restarts)
        merge(self.modules, values, self.share)
        begin_anew(parts["model"], self.modules, self.seed + self.num_restarts)
        self._prune(parts["optimizer"])
        self._restarted_at = parts["lr_scheduler"].last_epoch
        assert self.rate is not None
        if isinstance(self.rate, StagedRate):
            left = state.max_steps - state.global_step
            self.rate.stage_steps = min(self.every, left)
        self.rate.restarted_at = self._restarted_at
        renew(parts["lr_scheduler"])

    def _prune(self, optimizer: Any) -> None:
        adapters = [parameter for module in self.modules for parameter in module.parameters]
        method = "reset" if self.method == "plora" else self.settings["relora_prune_method"]
        ratio, seed = self.settings["relora_prune_ratio"], self.seed + self.num_restarts
        prune_states(optimizer, adapters, ratio, method, seed)

    def state(self) -> dict[str, Any]:
        return {"num_restarts": self.num_restarts, "restarted_at": self._restarted_at}

    def merge_last(self, trainer: Any) -> None:
        """Merge the last adapters whole and begin them anew, so that the model in memory stays what
        it is; `save` comes after."""
        merge(self.modules, matrices(self.modules), 1.0)
        begin_anew(trainer.model, self.modules, self.seed)

    def save(self, trainer: Any, folder: Path) -> None:
        """The whole model."""
        if trainer.is_world_process_zero():
            base = trainer.model.get_base_model()
            base.save_pretrained(folder, state_dict=merged_state_dict(trainer.model))

    def _keep_merged(self, values: Mapping[str, torch.Tensor]) -> None:
        """On the disk before a checkpoint says that it is there; waits for room, as no later
        checkpoint is of use without it."""
        target = self._merged(self.num_restarts)
        write_whole(target, lambda beside: save_file(dict(values), beside), self.notice)

    def _merged(self, number: int) -> Path:
        return self.run.checkpoints / f"merged-{number}.safetensors"
