"""What several GPUs may divide among them, what the host may hold, and what goes with what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftplan.planner.errors import InputError

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan

# `none` on several GPUs is DDP; `fsdp` is FSDP2; ZeRO's stages are DeepSpeed's.
SHARDINGS = ("none", "zero1", "zero2", "zero3", "fsdp")
ZERO = ("zero1", "zero2", "zero3")

# What people call each way for GPUs to divide state.
SHARDING_TITLES = {"none": "DDP", "fsdp": "FSDP", **{name: f"ZeRO-{name[-1]}" for name in ZERO}}
PARAMETERS_SHARDED = ("zero3", "fsdp")
# Elements up to which ZeRO-3 divides no parameter: DeepSpeed's default (zero/config.py), which
# accelerate's plugin leaves alone unless it is given a configuration file.
PARAM_PERSISTENCE_THRESHOLD = 100_000
# What each can keep in the host's memory. FSDP2's CPUOffloadPolicy takes gradients and optimizer
# states along with the parameters; for ZeRO-3 that is taken so too.
OFFLOADS_OF = {
    "none": ("none",),
    "zero1": ("none", "optimizer"),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "parameters"),
    "fsdp": ("none", "parameters"),
}
OFFLOADS = ("none", "optimizer", "parameters")


def check_sharding(plan: TrainingPlan) -> None:
    """Raises InputError when state cannot be spread as the plan says."""
    sharding, offload = plan.sharding, plan.offload
    if offload not in OFFLOADS_OF[sharding]:
        able = [name for name, offloads in OFFLOADS_OF.items() if offload in offloads]
        raise InputError(
            f"`--offload {offload}` is not for `--sharding {sharding}`",
            "use " + " or ".join(f"`--sharding {name}`" for name in able),
        )
    if plan.dp_replicate_size > 1:
        _check_replicas(plan)
    if sharding == "none":
        return
    if plan.num_gpus == 1 and offload == "none":
        raise InputError(
            f"`--sharding {sharding}` divides state among GPUs, and there is one",
            "use `--num-gpus 2` or more, or leave out `--sharding`",
        )
    if plan.trainer == "loop":
        raise InputError(
            "`--trainer loop` trains on one GPU", "use `--trainer trl` or `--trainer transformers`"
        )
    if plan.objective != "sft":
        raise InputError(
            f"`--objective {plan.objective}` with `--sharding {sharding}` is not modelled",
            "leave out `--sharding`: `--num-gpus` alone is DDP",
        )
    _check_kinds(plan)
    if sharding == "zero3":
        _check_zero3(plan)


def _check_replicas(plan: TrainingPlan) -> None:
    """Raises InputError unless each copy of the model has GPUs to divide it."""
    given = f"`--dp-replicate-size {plan.dp_replicate_size}`"
    if plan.sharding != "fsdp":
        raise InputError(
            f"{given} is hybrid sharding, which is FSDP's, and this is "
            f"`--sharding {plan.sharding}`",
            "use `--sharding fsdp`, or leave it out",
        )
    if plan.num_gpus % plan.dp_replicate_size or plan.dp_shard_size < 2:
        raise InputError(
            f"{given} leaves no equal groups of 2 GPUs or more of `--num-gpus {plan.num_gpus}`",
            f"use `--num-gpus {2 * plan.dp_replicate_size}` or a larger multiple of "
            f"{plan.dp_replicate_size}; copies that are not divided are DDP's, "
            "without `--sharding`",
        )


def _check_kinds(plan: TrainingPlan) -> None:
    """Raises InputError for dtypes and optimizers that cannot be divided."""
    divides_states = plan.sharding == "fsdp" or plan.offload != "none"
    if plan.optimizer.module == "bitsandbytes" and divides_states:
        raise InputError(
            f"`--optim {plan.optim}` cannot step on sharded or offloaded tensors: "
            "its states are bitsandbytes' own",
            "use `--optim adamw_torch_fused`",
        )
    if plan.optimizer.needs_whole_parameters:
        raise InputError(
            f"`--optim {plan.optim}` with `--sharding {plan.sharding}` is not modelled",
            "use `--optim adamw_torch_fused`",
        )
    if plan.shards_parameters and plan.quantization == "int8":
        raise InputError(
            f"an int8 base cannot be divided by `--sharding {plan.sharding}`",
            "use `--quantization nf4`: its bytes can be stored as numbers of the model's dtype",
        )
    pure_16_bit = plan.mixed_precision == "no" and plan.dtype != "float32"
    if plan.sharding in ZERO and pure_16_bit:
        raise InputError(
            f"DeepSpeed takes {plan.dtype} weights under mixed precision only",
            "use `--mixed-precision bf16` or `--dtype float32`",
        )


def _check_zero3(plan: TrainingPlan) -> None:
    """Raises InputError for what TRL does otherwise under ZeRO-3, and what is not modelled."""
    if plan.quantization != "none":
        raise InputError(
            "a quantized base under `--sharding zero3` is not modelled",
            "use `--sharding fsdp`, which divides it as well",
        )
    if not plan.gradient_checkpointing:
        return
    if plan.method == "freeze":
        raise InputError(
            "`--method freeze` under ZeRO-3 cannot be checkpointed: torch finds frozen parameters "
            "gone when it compares what it computed again (transformers issue 47254)",
            "use `--gradient-checkpointing false`, or `--sharding fsdp`",
        )
    if plan.resolved_method.adapter and not plan.use_reentrant:
        raise InputError(
            "ZeRO-3 with adapters checkpoints by the reentrant function: TRL sees to it",
            "use `--use-reentrant`, or `--gradient-checkpointing false`",
        )
