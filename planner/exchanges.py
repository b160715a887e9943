"""What the GPUs of a plan exchange in an optimizer step: Eq. (T5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from msgspec import structs

from ftplan.planner.collectives import Collective, Operation
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.optimizer_steps import Updated
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.units import FLOAT32_BYTES, MIB
from ftplan.planner.weights import weight_memory_bytes
from ftplan.planner.zero import REDUCE_BUCKET_SIZE

# `bucket_cap_mb` of torch's DistributedDataParallel: gradients are summed so many bytes at once.
DDP_BUCKET_BYTES = 25 * MIB


def step_collectives(
    model: ModelSpec, plan: TrainingPlan, updated: Sequence[Updated]
) -> tuple[Collective, ...]:
    """Collective operations of a step, in all its micro-batches, that go on beside computing.

    DDP sums gradients once a step. FSDP and ZeRO-3 gather parameters for forward and again for
    backward, and divide the sum of gradients, in each micro-batch, layer by layer; hybrid sharding
    does so among the GPUs that divide one copy, and sums what each has of the gradients over the
    copies.
    """
    gradients = _gradient_bytes(plan, updated)
    if plan.shards_parameters:
        return _sharded(model, plan, gradients)
    if plan.data_parallel_size == 1 or plan.sharding != "none":
        return ()
    count = max(1, math.ceil(gradients / DDP_BUCKET_BYTES))
    return (_of_all(plan, "all_reduce", gradients, count),)


def ring_collectives(
    model: ModelSpec, plan: TrainingPlan, tokens: float, reached: float
) -> tuple[Collective, ...]:
    """What context parallelism's attention exchanges in a step, beside its computing.

    Each layer gathers keys and values of the whole row in forward, as often as it is computed
    again, and in backward. There their gradients go round besides, in fp32: in each of as many
    rounds as GPUs, each hands on those of the part that it has just worked on
    (`_templated_ring_attention` and its backward in torch 2.13, with accelerate's `allgather`;
    gradients go by `ALL_TO_ALL`).

    `tokens`: of a micro-batch on one GPU; `reached`: the share of the layers that backward reaches.
    """
    if plan.cp_size == 1:
        return ()
    micro_batches = plan.gradient_accumulation_steps
    group = {"num_gpus": plan.cp_size, "per_machine": _together(plan, plan.cp_size, apart=1)}
    again = plan.gradient_checkpointing * reached / plan.every_n_layers
    exchanged = []
    for layer, count in model.layer_counts.items():
        attention = layer.attention
        value_width = attention.value_head_dim or attention.head_dim
        own = tokens * attention.num_key_value_heads * (attention.head_dim + value_width)
        exchanged += [
            Collective(
                operation="all_gather",
                num_bytes=plan.cp_size * own * plan.compute_bytes,
                count=micro_batches * count * (1 + again + reached),
                **group,
            ),
            Collective(
                operation="send",
                num_bytes=own * FLOAT32_BYTES,
                count=micro_batches * count * reached * plan.cp_size,
                **group,
            ),
        ]
    return tuple(exchanged)


def waited_collectives(
    model: ModelSpec,
    plan: TrainingPlan,
    updated: Sequence[Updated],
    tokens: float,
    *,
    reached: float,
) -> tuple[Collective, ...]:
    """Those that nothing goes on beside: ZeRO-1's, ZeRO-2's and tensor parallelism's.

    `tokens`: of a micro-batch; `reached`: the share of the layers that backward reaches.
    """
    if plan.tp_size > 1:
        return _within_layers(model, plan, tokens, reached)
    if plan.sharding in ("zero1", "zero2") and plan.data_parallel_size > 1:
        return _zero(plan, _gradient_bytes(plan, updated))
    return ()


def forward_collectives(
    model: ModelSpec, plan: TrainingPlan, tokens: float, calls: float
) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
    """Of `calls` passes without gradients over so many tokens each: what goes on beside computing,
    and what is waited for."""
    once = plan.replace(
        gradient_accumulation_steps=1, gradient_checkpointing=False, every_n_layers=1
    )
    if plan.tp_size > 1:
        return (), _times(calls, _within_layers(model, once, tokens, reached=0.0))
    if not plan.shards_parameters:
        return (), ()
    gathers = [c for c in _sharded(model, once, 0.0) if c.operation == "all_gather"]
    return _times(calls / 2, gathers), ()  # a step gathers for backward, too


def _times(calls: float, collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    return tuple(structs.replace(c, count=calls * c.count) for c in collectives)


def _gradient_bytes(plan: TrainingPlan, updated: Sequence[Updated]) -> float:
    """Gradients as they are sent. All but DDP send what the products take: 16-bit copies of fp32
    masters (`MixedPrecisionPolicy` as accelerate 1.15 sets it; DeepSpeed's engine)."""
    if plan.sharding == "none" or not plan.autocast:
        return float(sum(p.count * p.num_bytes for p in updated))
    return float(sum(p.count * p.num_bytes // p.width * plan.compute_bytes for p in updated))


def _of_all(
    plan: TrainingPlan, operation: Operation, num_bytes: float, count: int, times: int = 1
) -> Collective:
    """Of all data-parallel GPUs: so many bytes in `count` parts, `times` over."""
    num_gpus = plan.data_parallel_size
    return Collective(
        operation=operation,
        num_bytes=num_bytes / count,
        count=times * count,
        num_gpus=num_gpus,
        per_machine=_together(plan, num_gpus, apart=1),
    )


def _zero(plan: TrainingPlan, gradients: float) -> tuple[Collective, ...]:
    """The sum of gradients is divided once a step (ZeRO-1), or in each micro-batch (ZeRO-2), and
    what each GPU has updated is gathered behind the step, by `allgather_bucket_size`, by default as
    large as `reduce_bucket_size`. DeepSpeed overlaps neither by default: `overlap_comm` is for
    stage 3 (deepspeed/runtime/zero/config.py, stage_1_and_2.py of 0.19.8)."""
    count = max(1, math.ceil(gradients / (REDUCE_BUCKET_SIZE * plan.compute_bytes)))
    times = plan.gradient_accumulation_steps if plan.sharding == "zero2" else 1
    return (
        _of_all(plan, "reduce_scatter", gradients, count, times),
        _of_all(plan, "all_gather", gradients, count),
    )


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


def _within_layers(
    model: ModelSpec, plan: TrainingPlan, tokens: float, reached: float
) -> tuple[Collective, ...]:
    """What tensor parallelism exchanges in a step.

    In forward the products of attention's and the feed-forward's last matrices are summed, and the
    embeddings; in backward the gradient of the input of every other matrix, one by one, as
    transformers 5.23 divides them (`ColwiseParallel`, `RowwiseParallel`). The logits are gathered.
    """
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
