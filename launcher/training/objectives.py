"""Configurations and trainers, TRL's or on it: one of each for an entry of
`planner.objectives.OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from msgspec import Struct
from transformers import TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    SFTConfig,
)

from ftplan.launcher.training.arguments import launched_arguments
from ftplan.launcher.training.online import PlannedGRPOTrainer, PlannedRLOOTrainer
from ftplan.launcher.training.order import PlannedOrder
from ftplan.launcher.training.reference_free import (
    ORPOConfig,
    PlannedORPOTrainer,
    PlannedSimPOTrainer,
    SimPOConfig,
)
from ftplan.launcher.training.trainer import PlannedTrainer

# Log-probabilities of the reference, where it has been asked about the rows already.
_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_logps")


class TokenizedRows(PlannedOrder):
    """For TRL's trainers that tokenize rows themselves: these come tokenized."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any) -> Dataset:
        if any(name in dataset.column_names for name in _REFERENCE_COLUMNS):
            return dataset
        return super()._precompute_ref_logps(dataset, *args)  # type: ignore[misc]


class PlannedDPOTrainer(TokenizedRows, DPOTrainer):
    """Rows have `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    has_pairs = True


class PlannedKTOTrainer(TokenizedRows, KTOTrainer):
    """Rows have `prompt_ids`, `completion_ids`, `KL_completion_ids` (those of another row of the
    same micro-batch) and `label`. They are taken as they stand, so that micro-batches are those."""

    is_divisible = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return KTOTrainer._get_train_sampler(self, train_dataset)


class PlannedRewardTrainer(TokenizedRows, RewardTrainer):
    """Rows have `chosen_ids` and `rejected_ids`."""

    has_pairs = True


class Training(Struct, frozen=True, kw_only=True):
    """How an objective is trained. `trainer`: None for the one in `training.trainer`."""

    arguments: type[TrainingArguments]
    trainer: type[Any] | None = None


TRAININGS: dict[str, Training] = {
    "sft": Training(arguments=SFTConfig),
    "dpo": Training(arguments=DPOConfig, trainer=PlannedDPOTrainer),
    "orpo": Training(arguments=ORPOConfig, trainer=PlannedORPOTrainer),
    "simpo": Training(arguments=SimPOConfig, trainer=PlannedSimPOTrainer),
    "kto": Training(arguments=KTOConfig, trainer=PlannedKTOTrainer),
    "reward": Training(arguments=RewardConfig, trainer=PlannedRewardTrainer),
    "grpo": Training(arguments=GRPOConfig, trainer=PlannedGRPOTrainer),
    "rloo": Training(arguments=RLOOConfig, trainer=PlannedRLOOTrainer),
}


def make_trainer(objective: str, loss: str, **common: Any) -> Any:
    """The objective's trainer; `common`: what every trainer takes."""
    own = TRAININGS[objective].trainer
    return PlannedTrainer(stock_loss=loss == "stock", **common) if own is None else own(**common)


def trainer_arguments(
    objective: str, training_arguments: Mapping[str, Any], output_dir: str, **more: Any
) -> Any:
    """TRL's configuration: the plan's arguments, and how this launcher runs it."""
    planned = launched_arguments(training_arguments, output_dir)
    return TRAININGS[objective].arguments(**planned, **more)
