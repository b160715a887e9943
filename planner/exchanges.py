"""What the GPUs of a plan exchange in an optimizer step: Eq. (T5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import structs

from ftplan.planner.collectives import Collective
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.optimizer_steps import Updated
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.units import MIB
from ftplan.planner.weights import weight_memory_bytes
from ftplan.planner.zero import REDUCE_BUCKET_SIZE

# `bucket_cap_mb` of torch's DistributedDataParallel: gradients are summed so many bytes at once.
DDP_BUCKET_BYTES = 25 * MIB


def step_collectives(
    model: ModelSpec, plan: TrainingPlan, updated: Sequence[Updated]
) -> tuple[Collective, ...]:
    """Collective operations of a step, in all its micro-batches.

    DDP sums gradients once a step, ZeRO-1 and ZeRO-2 divide their sum and gather what each GPU has
    updated. FSDP and ZeRO-3 gather parameters for forward and again for backward, and divide the
    sum of gradients, in each micro-batch, layer by layer; hybrid sharding does so among the GPUs
    that divide one copy, and sums what each has of the gradients over the copies. All but DDP send
    what the products take: 16-bit copies of fp32 masters (`MixedPrecisionPolicy` as accelerate 1.15
    sets it; DeepSpeed's engine).
    """
    gradients = float(sum(p.count * p.num_bytes for p in updated))
    if plan.sharding != "none" and plan.autocast:
        gradients = float(
            sum(p.count * p.num_bytes // p.width * plan.compute_bytes for p in updated)
        )
    if plan.shards_parameters:
        return _sharded(model, plan, gradients)
    num_gpus = plan.data_parallel_size
    if num_gpus == 1:
        return ()
    group = {"num_gpus": num_gpus, "per_machine": _together(plan, num_gpus, apart=1)}
    if plan.sharding == "none":
        count = max(1, math.ceil(gradients / DDP_BUCKET_BYTES))
        return (
            Collective(operation="all_reduce", num_bytes=gradients / count, count=count, **group),
        )
    count = max(1, math.ceil(gradients / (REDUCE_BUCKET_SIZE * plan.compute_bytes)))
    divided = Collective(
        operation="reduce_scatter", num_bytes=gradients / count, count=count, **group
    )
    return divided, structs.replace(divided, operation="all_gather")


def _sharded(model: ModelSpec, plan: TrainingPlan, gradients: float) -> tuple[Collective, ...]:
    shards, copies = plan.dp_shard_size, plan.dp_replicate_size
    if shards == 1:
        return ()
    units = model.num_hidden_layers + 1  # what is outside of the layers is gathered together
    times = plan.gradient_accumulation_steps * units
    width = plan.compute_bytes if plan.autocast else None
    weights = float(weight_memory_bytes(model, plan, width=width))
    group = {"num_gpus": shards, "per_machine": _together(plan, shards, apart=1)}
    exchanged = [
        Collective(operation="all_gather", num_bytes=weights / units, count=2 * times, **group),
        Collective(operation="reduce_scatter", num_bytes=gradients / units, count=times, **group),
    ]
    if copies > 1:
        exchanged.append(
            Collective(
                operation="all_reduce",
                num_bytes=gradients / units / shards,
                count=times,
                num_gpus=copies,
                per_machine=_together(plan, copies, apart=shards),
            )
        )
    return tuple(exchanged)


def waited_collectives(
    model: ModelSpec, plan: TrainingPlan, tokens: float, *, reached: float
) -> tuple[Collective, ...]:
    """What tensor parallelism exchanges in a step, of `tokens` a micro-batch: each waits for it.

    In forward the products of attention's and the feed-forward's last matrices are summed, and the
    embeddings; in backward the gradient of the input of every other matrix, one by one, as
    transformers 5.23 divides them (`ColwiseParallel`, `RowwiseParallel`), in the `reached` share of
    the layers. The logits are gathered.
    """
    if plan.tp_size == 1:
        return ()
    layers = model.layer_counts.items()
    forward = 2 * model.num_hidden_layers
    inputs = sum(n * len((*of.attention.inputs, *of.feed_forward.inputs)) for of, n in layers)
    again = plan.gradient_checkpointing * forward / plan.every_n_layers
    times = 2 + forward + again + reached * inputs  # the embeddings and the head: once each way
    micro_batches = plan.gradient_accumulation_steps
    group = {"num_gpus": plan.tp_size, "per_machine": plan.tp_size}
    return (
        Collective(
            operation="all_reduce",
            num_bytes=tokens * model.hidden_size * plan.compute_bytes,
            count=micro_batches * times,
            **group,
        ),
        Collective(
            operation="all_gather",
            num_bytes=tokens * model.vocab_size * plan.compute_bytes,
            count=micro_batches,
            **group,
        ),
    )


def _together(plan: TrainingPlan, num_gpus: int, apart: int) -> int:
    """Of a group's GPUs, how many are on one machine, where each is so many numbers `apart` from
    the next; ranks are numbered machine by machine."""
    there = max(1, plan.gpus_per_machine // apart)
    return math.gcd(there, num_gpus)
