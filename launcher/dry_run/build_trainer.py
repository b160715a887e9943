"""The trainer of a case, on a model without data."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from peft import PeftConfig

from ftplan.launcher.dry_run.blank import BlankWeights, choose_without_weights
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.fused_kernels import fuse
from ftplan.launcher.dry_run.generation import micro_batches_of_a_generation, prompt_rows
from ftplan.launcher.dry_run.losses import use_liger_loss
from ftplan.launcher.dry_run.objectives import DRY_TRAINERS, preference_rows
from ftplan.launcher.dry_run.trainers import (
    DrySFTTrainer,
    DryTransformersTrainer,
    cast_back,
    collating_for_real,
)
from ftplan.launcher.emit import method_settings, training_arguments
from ftplan.launcher.training.adapters import refused, settle_adapters
from ftplan.launcher.training.cycles.adalora import ImportanceAlone
from ftplan.launcher.training.importance import is_adalora
from ftplan.launcher.training.loop import sft_arguments
from ftplan.launcher.training.objectives import trainer_arguments
from ftplan.launcher.training.optimizers import settle_optimizer
from ftplan.launcher.training.stacks import (
    PlainLoop,
    blank_tokenizer,
    causal_model,
    with_adapters,
)
from ftplan.planner.errors import InputError

_STEPS = 2
_MICRO_BATCHES = 2


def build_trainer(
    case: DryRunCase, model: Any, peft_config: PeftConfig | None, reward_model: Any = None
) -> Any:
    """The trainer that would train `model`, adapters added. `reward_model`: what judges its
    completions.

    Raises InputError where PEFT refuses them.
    """
    trainer = _built(case, model, peft_config, reward_model)
    plan = case.plan
    settle_optimizer(trainer, plan.method, plan.optim, method_settings(plan))
    return trainer


def _built(case: DryRunCase, model: Any, peft_config: PeftConfig | None, reward_model: Any) -> Any:
    if peft_config is None:
        return _trainer(case, model, None, reward_model)
    choose_without_weights(peft_config)
    try:
        with BlankWeights():
            trainer = _trainer(case, model, peft_config, reward_model)
    except InputError:
        raise
    except Exception as error:
        raise refused(case.plan.resolved_method, error) from error
    settle_adapters(trainer.model, method_settings(case.plan))
    if is_adalora(trainer.model) and case.plan.trainer != "loop":
        trainer.add_callback(ImportanceAlone())
    return trainer


def _trainer(
    case: DryRunCase, model: Any, peft_config: PeftConfig | None, reward_model: Any
) -> Any:
    plan = case.plan
    if plan.trainer == "trl":
        trainer = _trl_trainer(case, model, peft_config, reward_model)
    else:
        trainer = _other_trainer(case, model, peft_config)
    if plan.packing:
        trainer.data_collator = collating_for_real(trainer.data_collator)
    if plan.loss == "liger":
        use_liger_loss(causal_model(trainer.model))
    if case.fused_kernels:
        fuse(trainer.model, quantized=plan.quantization != "none")
    return trainer


def _trl_trainer(
    case: DryRunCase, model: Any, peft_config: PeftConfig | None, reward_model: Any
) -> Any:
    """TRL's, which adds the adapters itself."""
    plan, common = case.plan, _common(case)
    if plan.objective != "sft":
        if plan.resolved_objective.generates:
            common |= {"plan": plan, "row_length": case.row_length}
            common |= {"reward_model": reward_model}
        return DRY_TRAINERS[plan.objective](model=model, peft_config=peft_config, **common)
    return DrySFTTrainer(
        model=model,
        peft_config=peft_config,
        row_lengths=[plan.max_length] * len(common["train_dataset"]),
        stock_loss=plan.loss != "trl-fused",
        **common,
    )


def _other_trainer(case: DryRunCase, model: Any, peft_config: PeftConfig | None) -> Any:
    """transformers' own, or a plain loop."""
    plan, common = case.plan, _common(case)
    wrapped = with_adapters(
        model,
        peft_config,
        kbit_prepare=case.kbit_prepare,
        checkpointing=plan.gradient_checkpointing,
    )
    if case.casts_back:
        cast_back(wrapped)
    if plan.trainer == "loop":
        return PlainLoop(wrapped, common["args"], common["train_dataset"], steps=_STEPS)
    return DryTransformersTrainer(model=wrapped, **common)


def _common(case: DryRunCase) -> dict[str, Any]:
    """What every trainer is given."""
    rows = _rows(case)
    return {
        "args": _arguments(case),
        "train_dataset": rows,
        "eval_dataset": rows,
        "processing_class": blank_tokenizer(),
    }


def _arguments(case: DryRunCase) -> Any:
    plan = case.plan
    planned = training_arguments(plan, case.kind) | {
        "use_cpu": True,
        # accelerate refuses fp16 on a processor; `surroundings` puts it in place.
        "bf16": plan.autocast,
        "fp16": False,
        "max_steps": _STEPS,
        "gradient_accumulation_steps": _micro_batches(case),
    }
    if "max_length" in planned:
        planned["max_length"] = None
    if plan.resolved_objective.generates:
        planned["steps_per_generation"] = micro_batches_of_a_generation(plan)
    if plan.packing:  # the rows are full: what packing does to a batch, TRL's collator does
        planned |= {"packing": False, "padding_free": True}
    if plan.objective == "sft":
        skip = {"skip_prepare_dataset": True}
        arguments = sft_arguments(planned, "unused", dataset_kwargs=skip)
    else:
        arguments = trainer_arguments(plan.objective, planned, "unused")
    arguments.save_strategy = "no"
    return arguments


def _micro_batches(case: DryRunCase) -> int:
    return min(case.plan.gradient_accumulation_steps, _MICRO_BATCHES)


def _rows(case: DryRunCase) -> Dataset:
    plan, length = case.plan, case.row_length
    count = plan.per_device_train_batch_size * _micro_batches(case) * _STEPS
    if plan.resolved_objective.generates:
        return prompt_rows(plan)
    if plan.objective != "sft":
        return preference_rows(plan.objective, count, length)
    row = {"input_ids": [1] * length, "labels": [1] * length}
    if plan.trainer != "trl":
        row["attention_mask"] = [1] * length
    return Dataset.from_list([row] * count)
