"""From a plan to what its step's trace depends on."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING

from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.losses import LossShape
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.modules import Numerics
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.sharded import Spread
from ftplan.planner.stack import Stack
from ftplan.planner.step_trace import StepSettings, StepTrace, trace_step
from ftplan.planner.trained import Trained

if TYPE_CHECKING:
    from ftplan.planner.memory import Workload

FLOAT32_BYTES = 4


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
    outer = FLOAT32_BYTES if stack.kbit_prepare and not stack.casts_back else plan.weight_bytes
    spread = spread_of(plan, stack)
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
            dropout=plan.lora_dropout,
            attn_implementation=plan.attn_implementation,
            fused_kernels=stack.fused_kernels,
            repeats_key_value=stack.repeats_heads(model.model_type, plan.attn_implementation),
        ),
        trained_layers=trained.trained_layers,
        trains_embeddings=trained.trains_embeddings,
        trains_head=trained.trains_lm_head,
        input_learns=trained.trains_embeddings or (plan.gradient_checkpointing and bool(adapted)),
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
        spread=spread,
    )
    if spread is None or spread.gathered is None:
        return settings
    return _computing_in(settings, spread.gathered)


def _computing_in(settings: StepSettings, width: int) -> StepSettings:
    """All parameters but quantized ones are gathered in that width."""
    numerics = dataclasses.replace(
        settings.numerics, weights=width, residual=width, norms=width, adapters=width
    )
    return dataclasses.replace(
        settings, numerics=numerics, embedding_width=width, head_width=width
    )


def spread_of(plan: TrainingPlan, stack: Stack) -> Spread | None:
    """How several GPUs divide the parameters; None where each holds all of them.

    Under mixed precision accelerate holds what is trained in fp32, unless the base is quantized
    (`fsdp2_prepare_model` of accelerate 1.15).
    """
    if plan.sharding != "fsdp":
        return None
    masters = plan.autocast and plan.quantization == "none"
    return Spread(
        kind="fsdp2",
        num_gpus=plan.num_gpus,
        frozen=plan.weight_bytes,
        trained=FLOAT32_BYTES if masters else plan.weight_bytes,
        adapters=FLOAT32_BYTES if masters else adapter_weight_bytes(plan),
        gathered=plan.compute_bytes if plan.autocast else None,
        offloads=plan.offload == "parameters",
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
