"""Two steps, an evaluation and a save of the training process, on fake tensors.

The second step holds optimizer states; with accumulation, each step has two micro-batches, the
second of which meets the gradients of the first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode

from ftplan.launcher.dry_run.attention import repeats_heads_for_flash
from ftplan.launcher.dry_run.blank import BlankWeights, choose_without_weights
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.cuda import (
    CUDA_KERNELS,
    cublas_workspace_bytes,
    cuda_behaviour,
)
from ftplan.launcher.dry_run.draft import Draft
from ftplan.launcher.dry_run.fakes import make_fake, quantize_blank
from ftplan.launcher.dry_run.fused_kernels import fuse, fused_rotary_embeddings
from ftplan.launcher.dry_run.layers import keep_few_layers, meet_outside, same_on_every_layer
from ftplan.launcher.dry_run.losses import shifted_logits_loss, shifts_logits, use_liger_loss
from ftplan.launcher.dry_run.objectives import (
    DRY_TRAINERS,
    keeps_reference,
    preference_rows,
    trainer_construction,
)
from ftplan.launcher.dry_run.operations import REPLACED
from ftplan.launcher.dry_run.optimizers import optimizer_behaviour, optimizer_kernels
from ftplan.launcher.dry_run.quantized import dequantization, int8_matmul, quantized_kernels
from ftplan.launcher.dry_run.recorder import Recorder
from ftplan.launcher.dry_run.sharding import adopt, spread
from ftplan.launcher.dry_run.trainers import (
    DrySFTTrainer,
    DryTransformersTrainer,
    PlainLoop,
    blank_tokenizer,
    cast_back,
    causal_model,
    collating_for_real,
    with_adapters,
)
from ftplan.launcher.dry_run.zero import engine_dtype, turn_into
from ftplan.launcher.emit import method_settings, training_arguments
from ftplan.launcher.training.adapters import hold_adapters_as_base, name_the_task, refused
from ftplan.launcher.training.build import (
    apply_method,
    count_parameters,
    count_trainable,
    decoder_layer_list,
    decoder_layers,
    meta_model,
    trained_bytes,
)
from ftplan.launcher.training.loop import sft_arguments
from ftplan.launcher.training.objectives import trainer_arguments
from ftplan.planner.allocator import BLOCK_BYTES
from ftplan.planner.errors import InputError
from ftplan.planner.memory_record import MemoryRecord
from ftplan.planner.repeat_layers import NotRepeating
from ftplan.planner.sharding import ZERO

_STEPS = 2
_MICRO_BATCHES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """The record of a dry run, and what the model turned out to be."""

    record: MemoryRecord
    num_parameters: int
    num_trainable_parameters: int
    trained_weight_bytes: int
    num_layers_traced: int
    num_layers: int


def dry_run(case: DryRunCase, say: Callable[[str], None] = lambda _: None) -> DryRun:
    """Carry the case out; layers that turn out unlike are traced one by one.

    Raises InputError for what cannot be built or run.
    """
    try:
        return _DryRun(case, say).carry_out(few_layers=case.few_layers)
    except NotRepeating:
        say("equal layers behave unlike: tracing all of them")
        return _DryRun(case, say).carry_out(few_layers=False)


class _DryRun:
    def __init__(self, case: DryRunCase, say: Callable[[str], None]) -> None:
        self.case, self.plan, self.say = case, case.plan, say

    def carry_out(self, *, few_layers: bool) -> DryRun:
        plan, settings = self.plan, method_settings(self.plan)
        self.say("building the model")
        model = meta_model(self.case.config, settings)
        peft_config = apply_method(model, plan.method, settings)
        reference = meta_model(self.case.config, settings) if keeps_reference(plan) else None
        num_parameters, num_layers = count_parameters(model), len(decoder_layers(model))
        quantize_blank(model, getattr(torch, plan.dtype))
        selection = None
        alone = not meet_outside(model.config, plan.trainer)
        # FSDP1 gathers two layers ahead of adapters, further than what is known to repeat.
        near = plan.sharding != "fsdp" or self.case.fsdp_version > 1
        # ZeRO-3 keeps what is used again within a billion elements, across any number of layers.
        near = near and plan.sharding != "zero3"
        if few_layers and alone and near and same_on_every_layer(peft_config):
            selection = keep_few_layers(model, reference)
        with trainer_construction(self.case.kind, reference):
            trainer = self._adapted_trainer(model, peft_config)
        layers_path, layers = decoder_layer_list(trainer.model)
        whole = [(trainer.model, 1)]  # what stands for the whole model, and how often
        if selection:
            whole += [
                (layers[place], run.left_out) for run in selection.runs for place in run.template
            ]
        draft = Draft(layers_path)
        self._record(trainer, reference, draft)
        return DryRun(
            record=draft.finish(selection.runs if selection else ()),
            num_parameters=num_parameters,
            num_trainable_parameters=sum(count_trainable(m) * times for m, times in whole),
            trained_weight_bytes=sum(trained_bytes(m) * times for m, times in whole),
            num_layers_traced=len(layers),
            num_layers=num_layers,
        )

    def _adapted_trainer(self, model: Any, peft_config: Any) -> Any:
        """The trainer, its model with its adapters; raises InputError where PEFT refuses them."""
        if peft_config is None:
            return self._trainer(model, None)
        choose_without_weights(peft_config)
        try:
            with BlankWeights():
                trainer = self._trainer(model, peft_config)
        except InputError:
            raise
        except Exception as error:
            raise refused(self.plan.resolved_method, error) from error
        name_the_task(trainer.model)
        if not self.plan.autocast_adapter_dtype:
            hold_adapters_as_base(trainer.model, getattr(torch, self.plan.dtype))
        return trainer

    def _trainer(self, model: Any, peft_config: Any) -> Any:
        plan = self.plan
        rows = self._rows()
        planned = training_arguments(plan, self.case.kind) | {
            "use_cpu": True,
            # accelerate refuses fp16 on a processor; `_surroundings` puts it in place.
            "bf16": plan.autocast,
            "fp16": False,
            "max_steps": _STEPS,
            "gradient_accumulation_steps": self._micro_batches,
            "max_length": None,
        }
        if plan.packing:  # the rows are full: what packing does to a batch, TRL's collator does
            planned |= {"packing": False, "padding_free": True}
        if plan.objective == "sft":
            skip = {"skip_prepare_dataset": True}
            arguments = sft_arguments(planned, "unused", dataset_kwargs=skip)
        else:
            arguments = trainer_arguments(plan.objective, planned, "unused")
        arguments.save_strategy = "no"
        common = {
            "args": arguments,
            "train_dataset": rows,
            "eval_dataset": rows,
            "processing_class": blank_tokenizer(),
        }
        if plan.objective != "sft":
            trainer: Any = DRY_TRAINERS[plan.objective](
                model=model, peft_config=peft_config, **common
            )
        elif plan.trainer == "trl":
            trainer = DrySFTTrainer(
                model=model,
                peft_config=peft_config,
                row_lengths=[plan.max_length] * len(rows),
                stock_loss=plan.loss != "trl-fused",
                **common,
            )
        else:
            wrapped = with_adapters(
                model,
                peft_config,
                kbit_prepare=self.case.kbit_prepare,
                checkpointing=plan.gradient_checkpointing,
            )
            if self.case.casts_back:
                cast_back(wrapped)
            if plan.trainer == "loop":
                trainer = PlainLoop(wrapped, arguments, rows, steps=_STEPS)
            else:
                trainer = DryTransformersTrainer(model=wrapped, **common)
        if plan.packing:
            trainer.data_collator = collating_for_real(trainer.data_collator)
        if plan.loss == "liger":
            use_liger_loss(causal_model(trainer.model))
        if self.case.fused_kernels:
            fuse(trainer.model, quantized=plan.quantization != "none")
        return trainer

    @property
    def _micro_batches(self) -> int:
        return min(self.plan.gradient_accumulation_steps, _MICRO_BATCHES)

    def _rows(self) -> Dataset:
        length = self.case.row_length
        count = self.plan.per_device_train_batch_size * self._micro_batches * _STEPS
        if self.plan.objective != "sft":
            return preference_rows(self.plan.objective, count, length)
        row = {"input_ids": [1] * length, "labels": [1] * length}
        if self.plan.trainer != "trl":
            row["attention_mask"] = [1] * length
        return Dataset.from_list([row] * count)

    def _record(self, trainer: Any, reference: Any, draft: Draft) -> None:
        decompositions = {
            **REPLACED,
            **quantized_kernels(self.plan.quantization),
            **optimizer_kernels(self.plan.optimizer, self.case.kind),
        }
        fake_mode = FakeTensorMode()
        recorder = Recorder(draft, fake_mode, decompositions, self.case.padded)
        if self.case.kind == "cuda":
            recorder.decompositions.update(CUDA_KERNELS)
            draft.granularity = BLOCK_BYTES
            draft.workspace_bytes = cublas_workspace_bytes(self.case.capability)
        trainer.observe(draft, recorder)
        if self.plan.sharding in ZERO:
            turn_into(trainer.model, engine_dtype(self.plan))
        make_fake(trainer.model, fake_mode)
        if reference is not None:
            make_fake(reference, fake_mode)
        draft.begin_phase("load")
        self.say("tracing two steps")
        recorder.between_steps = True  # while the optimizer is made
        with (
            self._surroundings(trainer),
            fake_mode,
            recorder.watching(trainer.model, reference),
            spread(trainer, recorder, self.case),
        ):
            if reference is not None:
                adopt(recorder, reference, as_reference=True)
            trainer.train()
            self.say("tracing an evaluation step")
            trainer.evaluate_one_batch()
            draft.begin_phase("save")

    def _surroundings(self, trainer: Any) -> ExitStack:
        """All that differs from a real run on a real device."""
        stack = ExitStack()
        # Cycles must not be collected at some moment or other: records would differ.
        gc.disable()
        stack.callback(gc.enable)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # The batch is known, so masks are made as for real tensors.
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", _never))
        # `sum() == numel()` says nothing to fakes; `all()` is what the recorder answers.
        stack.enter_context(
            mock.patch("transformers.masking_utils.fast_all", torch.Tensor.all, create=True)
        )
        for target, replacement in dequantization(self.plan.quantization):
            stack.enter_context(mock.patch.object(*target, replacement))
        stack.enter_context(optimizer_behaviour(self.plan.optimizer, self.case.kind))
        if self.case.kind == "cuda":
            repeats = self.case.repeats_key_value or repeats_heads_for_flash(
                self.case.config["model_type"], self.case.transformers_version
            )
            stack.enter_context(cuda_behaviour(self.case.capability, repeats))
            if self.plan.quantization == "int8":
                stack.enter_context(mock.patch("bitsandbytes.matmul", int8_matmul))
        if self.plan.mixed_precision == "fp16" and self.plan.trainer != "loop":
            trainer.accelerator.state._mixed_precision = "fp16"
            # The loss scale and a flag are all that a scaler holds; gradients are scaled in place.
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
        if self.case.fused_kernels:
            stack.enter_context(fused_rotary_embeddings(causal_model(trainer.model)))
        if self.plan.loss == "stock" and shifts_logits(self.case.transformers_version):
            trainer.model.config.loss_type = "ForCausalLM"
            stack.enter_context(
                mock.patch.dict(
                    "transformers.loss.loss_utils.LOSS_MAPPING",
                    {"ForCausalLM": shifted_logits_loss},
                )
            )
        return stack


def _never(tensor: Any = None) -> bool:
    return False
