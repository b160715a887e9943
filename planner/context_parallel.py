"""Context parallelism: which rows GPUs can divide. `ring_attention.py` has what they exchange.

accelerate 1.15 divides rows with FSDP2 (`ParallelismConfig.cp_size`) by torch's `context_parallel`,
which puts ring attention in the place of torch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftplan.planner.attention import FLASH_MAX_HEAD_DIM
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import DeviceKind
from ftplan.planner.model_spec import Attention, ModelSpec
from ftplan.planner.stack import FLASH_CAPABILITY

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan

LOSSES = ("stock", "trl-fused")


def check_context_parallel(plan: TrainingPlan) -> None:
    """Raises InputError where rows cannot be divided as the plan says, or it is not modelled."""
    if plan.cp_size == 1:
        return
    spelled = f"`--cp-size {plan.cp_size}`"
    if plan.num_gpus % plan.cp_size:
        raise InputError(
            f"{spelled} does not divide `--num-gpus {plan.num_gpus}`",
            f"use `--num-gpus {plan.cp_size}` or a multiple of it",
        )
    if plan.sharding != "fsdp":
        raise InputError(
            f"{spelled} goes with FSDP2 alone, and this is `--sharding {plan.sharding}`",
            "use `--sharding fsdp`",
        )
    if plan.attn_implementation != "sdpa":
        raise InputError(
            f"{spelled} divides torch's attention alone (`Trainer` of transformers)",
            "use `--attn-implementation sdpa`",
        )
    if plan.max_length % (2 * plan.cp_size):
        raise InputError(
            f"{spelled} gives each GPU two pieces of a row, and `--max-length {plan.max_length}` "
            f"has no {2 * plan.cp_size} equal ones",
            f"use a multiple of {2 * plan.cp_size}, and `pad_to_multiple_of` in training",
        )
    _check_modelled(plan, spelled)


def _check_modelled(plan: TrainingPlan, spelled: str) -> None:
    if plan.dp_replicate_size > 1:
        raise InputError(
            f"{spelled} beside `--dp-replicate-size {plan.dp_replicate_size}` is not modelled",
            "leave one of them out",
        )
    if plan.tp_size > 1:
        raise InputError(f"{spelled} with `--tp-size` is not modelled", "leave out one of them")
    if plan.quantization != "none":
        raise InputError(
            f"a base quantized to {plan.quantization} with {spelled} is not modelled",
            "use `--quantization none`",
        )
    if plan.offload != "none":
        raise InputError(f"{spelled} with `--offload` is not modelled", "leave out `--offload`")
    if plan.loss not in LOSSES:
        raise InputError(
            f"`--loss {plan.loss}` with {spelled} is not modelled",
            "use " + " or ".join(f"`--loss {loss}`" for loss in LOSSES),
        )
    if plan.compute_bytes != 2:
        raise InputError(
            f"{spelled} in fp32, for which torch has no FlashAttention, is not modelled",
            "use `--mixed-precision bf16`",
        )


def check_rows_divided(
    model: ModelSpec, plan: TrainingPlan, kind: DeviceKind, capability: tuple[int, int]
) -> None:
    """Raises InputError where ring attention does not go with the model, or is not modelled."""
    if plan.cp_size == 1:
        return
    spelled = f"`--cp-size {plan.cp_size}`"
    check_ring_kernel(plan, kind, capability)
    for layer in model.layer_counts:
        if layer.attention.reach is not None:
            raise InputError(
                f"{spelled}: `{model.name}` has windows, and ring attention knows none (accelerate "
                "refuses it)",
                "leave out `--cp-size`, or take a model whose layers all see the whole row",
            )
        if not _flash_takes(layer.attention):
            raise InputError(
                f"the closed form does not model {spelled} with the attention of `{model.name}`",
                "leave out `--cp-size`",
            )


def check_ring_kernel(plan: TrainingPlan, kind: DeviceKind, capability: tuple[int, int]) -> None:
    """Raises InputError where another kernel than FlashAttention would go round the ring."""
    if plan.cp_size > 1 and (kind == "cpu" or capability < FLASH_CAPABILITY):
        raise InputError(
            f"`--cp-size {plan.cp_size}` is modelled with FlashAttention, which needs a GPU of "
            "compute capability 8.0",
            "name a newer one with `--gpu`, or leave out `--cp-size`",
        )


def _flash_takes(attention: Attention) -> bool:
    one_width = attention.value_head_dim in (None, attention.head_dim)
    plain = not (attention.picks_heads or attention.alibi or attention.sinks)
    return one_width and plain and attention.head_dim <= FLASH_MAX_HEAD_DIM
