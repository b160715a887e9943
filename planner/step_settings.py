"""From a plan to what its step's trace depends on."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING

from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.losses import LossShape
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.modules import Numerics
from ftplan.planner.objectives import keeps_reference
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import Stack
from ftplan.planner.step_trace import StepSettings, StepTrace, trace_step
from ftplan.planner.trained import Trained

if TYPE_CHECKING:
    from ftplan.planner.memory import Workload

FLOAT32_BYTES = 4
NUMBER_BYTES = 8  # of a token's number, a label, an entry of a mask


@lru_cache(maxsize=512)
def traced_step(model: ModelSpec, settings: StepSettings) -> StepTrace:
    return trace_step(model, settings)


def step_settings(
    model: ModelSpec,
    plan: TrainingPlan,
    workload: Workload,
    kind: DeviceKind,
    capability: tuple[int, int],
    stack: Stack,
) -> StepSettings:
    trained = plan.resolved_method.count(model, plan.method_settings)
    adapted = frozenset(linear.name for linear in trained.adapted)
    objective = plan.resolved_objective
    outer = FLOAT32_BYTES if stack.kbit_prepare and not stack.casts_back else plan.weight_bytes
    settings = StepSettings(
        numerics=Numerics(
            weights=plan.weight_bytes,
            residual=outer,
            norms=FLOAT32_BYTES if stack.kbit_prepare else plan.weight_bytes,
            adapters=2 if stack.casts_back else adapter_weight_bytes(plan),
            # What ftplan asks of bitsandbytes (launcher/training/build.py).
            compute=plan.compute_bytes if plan.autocast else FLOAT32_BYTES,
            quantization=plan.quantization,
            double_quant=plan.double_quant,
            adapted=adapted,
            rank=plan.lora_rank,
            dropout=plan.lora_dropout if objective.has_dropout else 0.0,
            attn_implementation=plan.attn_implementation,
            fused_kernels=stack.fused_kernels,
            repeats_key_value=stack.repeats_heads(model.model_type, plan.attn_implementation),
        ),
        trained_layers=trained.trained_layers,
        trains_embeddings=trained.trains_embeddings,
        trains_head=trained.trains_lm_head,
        # `gradient_checkpointing_enable` also asks for it (transformers.modeling_utils).
        input_learns=trained.trains_embeddings or plan.gradient_checkpointing,
        autocast=plan.compute_bytes if plan.autocast else None,
        is_fp16=plan.dtype == "float16" or plan.mixed_precision == "fp16",
        on_cuda=kind == "cuda",
        capability=capability,
        gradient_checkpointing=plan.gradient_checkpointing,
        use_reentrant=plan.use_reentrant,
        accumulates=plan.gradient_accumulation_steps > 1,
        loss=plan.loss,
        loss_shape=LossShape.of(
            plan.loss, workload.rows, workload.length, model.vocab_size, model.hidden_size
        ),
        shifts_logits=stack.shifts_logits,
        holds_logits=plan.trainer == "loop",
        returns_fp32=plan.autocast,
        embedding_width=outer,
        head_width=outer,
        input_bytes=NUMBER_BYTES * objective.batch_numbers,
        scores=objective.scores,
        finds_top1=objective.finds_top1,
        pairs_rows=objective.pairs_rows,
    )
    if not objective.has_reference:
        return settings
    return dataclasses.replace(
        settings,
        reference=_of_reference(model, plan, settings),
        asks_before=plan.precompute_ref_log_probs,
    )


def _of_reference(model: ModelSpec, plan: TrainingPlan, settings: StepSettings) -> StepSettings:
    """The model as it was: without adapters, or a second one. TRL does not freeze that, so autocast
    takes its parameters as trained ones."""
    if not keeps_reference(plan) and plan.resolved_method.adapter:
        return dataclasses.replace(
            settings, numerics=dataclasses.replace(settings.numerics, adapted=frozenset())
        )
    if not keeps_reference(plan):
        return settings
    return dataclasses.replace(
        settings,
        trained_layers=model.num_hidden_layers,
        trains_embeddings=True,
        trains_head=True,
        finds_top1=False,
    )


def adapter_weight_bytes(plan: TrainingPlan) -> int:
    """Bytes of one adapter weight.

    PEFT holds adapters of a 16-bit base in fp32 (`autocast_adapter_dtype`); TRL's trainers
    cast the adapters of a quantized base to bf16 (trl.trainer.sft_trainer, TRL 1.16).
    """
    if plan.quantization != "none":
        return 2 if plan.trainer == "trl" else FLOAT32_BYTES
    return FLOAT32_BYTES if plan.autocast_adapter_dtype else plan.weight_bytes


def trained_widths(plan: TrainingPlan, trained: Trained) -> tuple[tuple[int, int], ...]:
    """(count, bytes a parameter) of the model's own trained parameters and the adapters'."""
    return (
        (trained.base_parameters, plan.weight_bytes),
        (trained.added_parameters, adapter_weight_bytes(plan)),
    )
