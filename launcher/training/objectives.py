"""Model classes, TRL's configurations and trainers: one of each for an entry of
`planner.objectives.OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from msgspec import Struct
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
)

from ftplan.planner.disk import CHECKPOINTS_KEPT
from ftplan.planner.errors import InputError


class TokenizedRows:
    """For TRL's trainers that tokenize rows themselves: these come tokenized."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


class PlannedDPOTrainer(TokenizedRows, DPOTrainer):
    """Rows have `prompt_ids`, `chosen_ids` and `rejected_ids`."""


class PlannedKTOTrainer(TokenizedRows, KTOTrainer):
    """Rows have `prompt_ids`, `completion_ids`, `KL_completion_ids` (those of another row of the
    same micro-batch) and `label`."""


class PlannedRewardTrainer(TokenizedRows, RewardTrainer):
    """Rows have `chosen_ids` and `rejected_ids`."""


class PlannedGRPOTrainer(GRPOTrainer):
    """Rows have `prompt`; it takes `reward_funcs` besides."""


class Training(Struct, frozen=True, kw_only=True):
    """How an objective is trained.

    `model_settings`: settings of the model's configuration. `task_type`: PEFT's; for `SEQ_CLS` it
    trains the head whole. `trainer`: None for the one in `training.trainer`.
    """

    arguments: type[TrainingArguments]
    trainer: type[Any] | None = None
    model: Any = AutoModelForCausalLM
    model_settings: Mapping[str, Any] = {}
    task_type: str = "CAUSAL_LM"


TRAININGS: dict[str, Training] = {
    "sft": Training(arguments=SFTConfig),
    "dpo": Training(arguments=DPOConfig, trainer=PlannedDPOTrainer),
    "kto": Training(arguments=KTOConfig, trainer=PlannedKTOTrainer),
    "reward": Training(
        arguments=RewardConfig,
        trainer=PlannedRewardTrainer,
        model=AutoModelForSequenceClassification,
        model_settings={"num_labels": 1},
        task_type="SEQ_CLS",
    ),
    "grpo": Training(arguments=GRPOConfig, trainer=PlannedGRPOTrainer),
}


def check_model_class(objective: str, config: PretrainedConfig) -> None:
    """Raises InputError where transformers has no model for the objective."""
    model = TRAININGS[objective].model
    if model is AutoModelForSequenceClassification and type(config) not in model._model_mapping:
        raise InputError(
            f"transformers has no sequence classification model for `{config.model_type}`, "
            f"which `--objective {objective}` trains",
            "take a model of another family, such as Llama or Qwen",
        )


def trainer_arguments(
    objective: str, training_arguments: Mapping[str, Any], output_dir: str, **more: Any
) -> Any:
    """TRL's configuration: the plan's arguments, and how this launcher runs it."""
    planned = dict(training_arguments)
    # transformers 5 takes a share of the steps as a `warmup_steps` below 1.
    planned["warmup_steps"] = planned.pop("warmup_ratio")
    return TRAININGS[objective].arguments(
        output_dir=output_dir,
        logging_steps=1,
        eval_strategy="no",
        prediction_loss_only=True,
        save_strategy="steps",
        save_total_limit=CHECKPOINTS_KEPT,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not planned["use_cpu"],
        ddp_find_unused_parameters=False,
        **planned,
        **more,
    )
