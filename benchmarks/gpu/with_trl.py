"""TRL's trainers, for plans that are trained by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from ftplan.launcher.training.loop import sft_arguments
from ftplan.launcher.training.objectives import (
    PlannedDPOTrainer,
    PlannedKTOTrainer,
    PlannedRewardTrainer,
    trainer_arguments,
)
from ftplan.launcher.training.stacks import Observed, blank_tokenizer
from ftplan.launcher.training.trainer import PlannedTrainer
from ftplan.planner.plan import TrainingPlan


class _SFTTrainer(Observed, PlannedTrainer):
    """Plain fine-tuning."""


class _DPOTrainer(Observed, PlannedDPOTrainer):
    """Pairs."""


class _KTOTrainer(Observed, PlannedKTOTrainer):
    """Single rows."""


class _RewardTrainer(Observed, PlannedRewardTrainer):
    """Pairs, scored."""


_PREFERENCES: dict[str, Any] = {"dpo": _DPOTrainer, "kto": _KTOTrainer, "reward": _RewardTrainer}


def trl_trainer(
    plan: TrainingPlan,
    model: Any,
    peft_config: Any,
    planned: Mapping[str, Any],
    rows: Sequence[Mapping[str, list[int]]],
    folder: str,
) -> Any:
    """The trainer that adds the adapters itself. `rows`: `input_ids` and `labels`."""
    common = {"model": model, "peft_config": peft_config, "processing_class": blank_tokenizer()}
    if plan.objective != "sft":
        arguments = trainer_arguments(plan.objective, planned, folder)
        arguments.save_strategy = "no"
        dataset = Dataset.from_list(_preferences(plan.objective, rows))
        return _PREFERENCES[plan.objective](args=arguments, train_dataset=dataset, **common)
    arguments = sft_arguments(planned, folder, dataset_kwargs={"skip_prepare_dataset": True})
    arguments.save_strategy = "no"
    return _SFTTrainer(
        args=arguments,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        row_lengths=[len(row["input_ids"]) for row in rows],
        stock_loss=plan.loss != "trl-fused",
        **common,
    )


def _preferences(objective: str, rows: Sequence[Mapping[str, list[int]]]) -> list[dict[str, Any]]:
    """The rows as pairs or as single ones, a token of each being the prompt's."""
    made: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        tokens = row["input_ids"]
        prompt, answer = tokens[:1], tokens[1:]
        if objective == "dpo":
            made.append({"prompt_ids": prompt, "chosen_ids": answer, "rejected_ids": answer[::-1]})
        elif objective == "kto":
            other = rows[number - 1]["input_ids"][1:]
            made.append(
                {
                    "prompt_ids": prompt,
                    "completion_ids": answer,
                    "KL_completion_ids": other,
                    "label": number % 2 == 0,
                }
            )
        else:
            made.append({"chosen_ids": tokens, "rejected_ids": tokens[::-1]})
    return made
