"""TRL's trainers of other objectives than plain fine-tuning, on models that have no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import nn

from ftplan.launcher.dry_run.cuda import autocast
from ftplan.launcher.dry_run.generation import DryGRPOTrainer, DryRLOOTrainer
from ftplan.launcher.dry_run.trainers import Dry
from ftplan.launcher.training.objectives import (
    PlannedDPOTrainer,
    PlannedKTOTrainer,
    PlannedRewardTrainer,
)
from ftplan.launcher.training.reference_free import PlannedORPOTrainer, PlannedSimPOTrainer
from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.step_trace import REFERENCE_PHASE

# Trainers that keep a reference model take it from there.
_WITH_REFERENCE = (
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.kto_trainer",
    "trl.trainer.rloo_trainer",
)


class _DryPreference(Dry):
    """Reference log-probabilities that are computed before training are a phase of their own, on
    one batch."""

    reference_columns: tuple[str, ...]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        for column in self.reference_columns:
            dataset = dataset.add_column(column, [0.0] * len(dataset))
        return dataset

    def train(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        if trainer.precompute_ref_logps:
            self.observer.begin(REFERENCE_PHASE)
            batch = next(iter(trainer.get_train_dataloader()))
            trainer.compute_ref_log_probs(trainer.model, batch)
            del batch
            self.observer.recorder.between_steps = True
        return super().train(*args, **kwargs)  # type: ignore[misc]


class DryDPOTrainer(_DryPreference, PlannedDPOTrainer):
    """TRL's, on pairs."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")


class DryKTOTrainer(_DryPreference, PlannedKTOTrainer):
    """TRL's, on single rows and those that the KL term is estimated from."""

    reference_columns = ("ref_logps", "ref_KL_logps")


class DryORPOTrainer(Dry, PlannedORPOTrainer):
    """ftplan's, on pairs."""


class DrySimPOTrainer(Dry, PlannedSimPOTrainer):
    """ftplan's, on pairs."""


class DryRewardTrainer(Dry, PlannedRewardTrainer):
    """TRL's, on pairs."""


DRY_TRAINERS: dict[str, type[Any]] = {
    "dpo": DryDPOTrainer,
    "orpo": DryORPOTrainer,
    "simpo": DrySimPOTrainer,
    "kto": DryKTOTrainer,
    "reward": DryRewardTrainer,
    "grpo": DryGRPOTrainer,
    "rloo": DryRLOOTrainer,
}


def preference_rows(objective: str, count: int, length: int) -> Dataset:
    """Rows of so many tokens, prompt and completion together, all but one of them answer."""
    prompt, answer = [1], [1] * (length - 1)
    pair = {"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer}
    row: dict[str, Any] = {
        **dict.fromkeys(("dpo", "orpo", "simpo"), pair),
        "kto": {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": answer},
        "reward": {"chosen_ids": prompt + answer, "rejected_ids": prompt + answer},
    }[objective]
    rows = [dict(row) for _ in range(count)]
    if objective == "kto":
        for number, one in enumerate(rows):
            one["label"] = number % 2 == 0
    return Dataset.from_list(rows)


@contextmanager
def trainer_construction(kind: DeviceKind, reference: nn.Module | None) -> Iterator[None]:
    """Within, TRL's trainers can be constructed on models without data: nothing is loaded.

    `reference`: the model that TRL would load once more.
    """

    def create(*args: Any, **kwargs: Any) -> nn.Module:
        assert reference is not None
        return reference

    def no_hash(model: nn.Module) -> str:
        return ""

    with ExitStack() as stack:
        for module in _WITH_REFERENCE:
            stack.enter_context(mock.patch(f"{module}.create_model_from_path", create))
            stack.enter_context(mock.patch(f"{module}.hash_module", no_hash, create=True))
        if kind == "cuda":  # the reference model is wrapped at once
            target = "accelerate.accelerator.get_mixed_precision_context_manager"
            stack.enter_context(mock.patch(target, autocast))
        # Adapters too are built without data.
        stack.enter_context(torch.device("meta"))
        yield
