"""From a plan to what its step's trace depends on."""

from __future__ import annotations

from dataclasses import dataclass

from ftplan.planner.adapters import adapter_maker, early_gradient_bytes, loss_copy_bytes
from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.losses import LossShape
from ftplan.planner.model_spec import ModelSpec, Parameter
from ftplan.planner.modules import Numerics
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.prompts import prompt_maker, tokens_in_front
from ftplan.planner.stack import Stack
from ftplan.planner.step_trace import StepSettings
from ftplan.planner.trained import COPIES, Trained

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """What is discrete about the largest micro-batch: all else is linear in its rows and tokens.

    `masked_windows`: sliding windows that do not see all of a row.
    """

    single_row: bool
    accumulates: bool
    loss_shape: LossShape
    masked_windows: frozenset[int]

    @staticmethod
    def of(model: ModelSpec, plan: TrainingPlan, rows: int, length: int) -> Workload:
        return Workload(
            rows == 1,
            plan.gradient_accumulation_steps > 1,
            LossShape.of(plan.loss, rows, length, model.vocab_size, model.hidden_size),
            frozenset(window for window in model.sliding_windows if window < length),
        )


def step_settings(
    model: ModelSpec,
    plan: TrainingPlan,
    workload: Workload,
    kind: DeviceKind,
    capability: tuple[int, int],
    stack: Stack,
    trained: Trained,
) -> StepSettings:
    autocast = plan.autocast and plan.trainer != "loop"  # a plain loop does without
    options = plan.resolved_method.options(plan.method_settings)
    hooks_input = plan.gradient_checkpointing and plan.resolved_method.adapter
    in_model = plan.loss != "trl-fused"  # TRL's own is computed outside of the model
    in_front, width = tokens_in_front(options), adapter_weight_bytes(plan)
    outer = FLOAT32_BYTES if stack.kbit_prepare and not stack.casts_back else plan.weight_bytes
    return StepSettings(
        numerics=Numerics(
            weights=plan.weight_bytes,
            residual=outer,
            norms=FLOAT32_BYTES if stack.kbit_prepare else plan.weight_bytes,
            adapters=2 if stack.casts_back else adapter_weight_bytes(plan),
            # What ftplan asks of bitsandbytes (launcher/training/build.py).
            compute=plan.compute_bytes if autocast else FLOAT32_BYTES,
            quantization=plan.quantization,
            adapter=adapter_maker(options, trained, loss_in_model=in_model),
            double_quant=plan.double_quant,
            rank=plan.lora_rank,
            dropout=plan.lora_dropout,
            attn_implementation=plan.attn_implementation,
            fused_kernels=stack.fused_kernels,
            padded=stack.padded,
            masked_windows=workload.masked_windows,
            repeats_key_value=stack.repeats_heads(model.model_type, plan.attn_implementation),
        ),
        trained_names=_trained_in_layers(model, trained),
        adapted={
            place: frozenset(trained.linears_of(model.layers[place]))
            for place in trained.adapted_layers
        },
        trains_embeddings=trained.trains_embeddings,
        trains_head=trained.trains_lm_head,
        trained_outside=_trained_names(trained),
        input_learns=trained.trains_embeddings
        or bool(trained.num_trained_tokens or in_front)
        or hooks_input,
        hooks_input=hooks_input,
        autocast=plan.compute_bytes if autocast else None,
        is_fp16=plan.dtype == "float16" or plan.mixed_precision == "fp16",
        on_cuda=kind == "cuda",
        capability=capability,
        gradient_checkpointing=plan.gradient_checkpointing,
        use_reentrant=plan.use_reentrant,
        accumulates=workload.accumulates,
        single_row=workload.single_row,
        loss=plan.loss,
        loss_shape=workload.loss_shape,
        shifts_logits=stack.shifts_logits,
        holds_logits=plan.trainer == "loop",
        returns_fp32=autocast,
        embedding_width=outer,
        head_width=outer,
        prompts=prompt_maker(options, trained, model.hidden_size, width),
        tokens_in_front=in_front,
        num_trained_tokens=trained.num_trained_tokens,
        early_gradients=early_gradient_bytes(options, trained, width, loss_in_model=in_model),
        loss_copies=loss_copy_bytes(options, trained, loss_in_model=in_model),
    )


def _trained_names(trained: Trained) -> frozenset[str]:
    """Names of the model's parameters that are trained, themselves or as copies."""
    names = [p.name for p in trained.own]
    for kind in COPIES:
        copied = f".{kind}."
        names += [p.name.replace(copied, ".") for p in trained.held_as_base if copied in p.name]
    return frozenset(names)


def _trained_in_layers(model: ModelSpec, trained: Trained) -> dict[int, frozenset[str]]:
    """The same for each layer that has some."""
    deep = model.num_hidden_layers
    if trained.trained_layers:
        places = range(deep - trained.trained_layers, deep)
        return dict.fromkeys(places, trained.trained_in_layers)
    names = _trained_names(trained)
    of_kind = {
        id(layer): names & {p.name for p in layer.parameters()} for layer in model.layer_counts
    }
    return {place: of_kind[id(layer)] for place, layer in enumerate(model.layers)}


def adapter_weight_bytes(plan: TrainingPlan) -> int:
    """Bytes of one adapter weight.

    PEFT holds adapters of a 16-bit base in fp32 (`autocast_adapter_dtype`); TRL's trainers
    cast the adapters of a quantized base to bf16 (trl.trainer.sft_trainer, TRL 1.16).
    """
    if plan.quantization != "none":
        return 2 if plan.trainer == "trl" else FLOAT32_BYTES
    return FLOAT32_BYTES if plan.autocast_adapter_dtype else plan.weight_bytes


def trained_widths(
    plan: TrainingPlan, trained: Trained
) -> tuple[tuple[tuple[Parameter, ...], int], ...]:
    """(parameters, bytes each) of all that is trained: the model's own, adapters, and what is
    held as the base is."""
    return (
        (trained.own, plan.weight_bytes),
        (trained.adapters, adapter_weight_bytes(plan)),
        (trained.held_as_base, plan.weight_bytes),
    )
