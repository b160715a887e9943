"""What the caching allocator holds of a run in closed form: its storages, replayed.

The closed form knows what is alive at each moment; how much the allocator reserves for it depends
on the order in which storages come and go. Replaying it takes some 50 ms, so the search does with
a share of what is allocated (`RESERVED_OVER_ALLOCATED`), and what is shown of a plan is replayed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from ftplan.planner.allocator import allocator_peaks, replay
from ftplan.planner.compiled_step import CompiledStep, compiled_step
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import (
    MemoryEstimate,
    calibrated_reserved,
    context_bytes,
    estimate_memory,
)
from ftplan.planner.model_spec import ModelSpec, Parameter
from ftplan.planner.objectives import keeps_reference, trained_model, trained_part
from ftplan.planner.optimizer_steps import Updated
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.run_storages import RunStorages
from ftplan.planner.sharded import shards_of
from ftplan.planner.stack import OWN_STACK, Stack, cublas_workspace_bytes
from ftplan.planner.step_settings import model_rows, row_length, trained_widths
from ftplan.planner.step_trace import step_units
from ftplan.planner.tensor_parallel import one_rank
from ftplan.planner.units import FLOAT32_BYTES, MIB
from ftplan.planner.updated import updated_parameters
from ftplan.planner.weights import quantized_storages

# `bucket_cap_mb` of torch.nn.parallel.DistributedDataParallel.
DDP_BUCKET_BYTES = 25 * MIB

# How far the storages' own peak may be from the sum of moments: farther, some are not in order.
MOST_APART = 0.02

# How much too high, relatively, `required` may be: finer steps take a replay each.
REQUIRED_TOLERANCE = 0.03


def replayed_memory(
    model: ModelSpec,
    plan: TrainingPlan,
    *,
    device: Device | None = None,
    longest_row: int | None = None,
    stack: Stack = OWN_STACK,
) -> MemoryEstimate:
    """`estimate_memory`, with what the allocator reserves and requires from its replay.

    On the processor, under ZeRO, and where the storages do not add up it is `estimate_memory`'s
    own.
    """
    memory = estimate_memory(model, plan, device=device, longest_row=longest_row, stack=stack)
    run = ordered_storages(model, plan, device, longest_row, stack)
    if run is None:
        return memory
    events, small_bytes = run.large_events()
    # The launcher turns expandable segments on; people's own stacks seldom do.
    expandable = plan.trainer == "trl"
    peaks = allocator_peaks(
        run.sizes, events, expandable_segments=expandable, tolerance=REQUIRED_TOLERANCE
    )
    reserved, required = peaks.reserved_peak_bytes, peaks.required_bytes
    context = context_bytes(device)
    if device is not None:
        free_bytes = device.free_bytes - context - small_bytes
        if required <= free_bytes < reserved:  # it gives back what it keeps
            reserved = replay(
                run.sizes, events, capacity_bytes=free_bytes, expandable_segments=expandable
            ).reserved_peak_bytes
    uncalibrated = reserved + small_bytes
    reserved, required = calibrated_reserved(
        device, memory.allocated_peak_bytes, uncalibrated, required + small_bytes
    )
    return dataclasses.replace(
        memory,
        uncalibrated_reserved_bytes=uncalibrated,
        reserved_peak_bytes=reserved,
        device_peak_bytes=reserved + context,
        required_bytes=required + context,
    )


def ordered_storages(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device | None,
    longest_row: int | None,
    stack: Stack,
) -> RunStorages | None:
    """All storages of a run; None where their order is not known, or they do not add up."""
    rows, length = model_rows(plan, row_length(plan, longest_row))
    step = compiled_step(model, plan, rows, length, device, stack)
    settings = step.settings
    if not settings.on_cuda or settings.reduction is not None or settings.partition is not None:
        return None
    run = run_storages(model, plan, step, rows, length, stack)
    apart = run.peak_bytes / step.peak_bytes(rows, length) - 1
    return run if abs(apart) <= MOST_APART else None


def run_storages(
    model: ModelSpec, plan: TrainingPlan, step: CompiledStep, rows: int, length: int, stack: Stack
) -> RunStorages:
    """Loading, two steps, the second of which has optimizer states, and an evaluation's pass. With
    accumulation each step has two micro-batches, and gradients are there from the first one on;
    under FSDP it has the last one."""
    settings, held, optimizer = step.settings, step.held, plan.optimizer
    by_trainer = plan.trainer != "loop"
    run = RunStorages(
        step.trace,
        rows,
        length,
        hands_on=settings.spread is not None,
    )
    at_rest, updated, exchanged = _at_rest(
        one_rank(trained_model(model, plan), plan.tp_size), plan, step, stack
    )
    run.born(at_rest)
    run.born(_buckets(held.communication))
    workspace = cublas_workspace_bytes(settings.capability)
    run.born([workspace, workspace])  # of the forward pass's thread and of backward's
    if step.trace.before:
        run.forward_only(step.trace.before)
    gradients: list[int] = []
    stepping = optimizer.step_storages(updated, by_trainer=by_trainer)
    for first in (True, False):
        if step.trace.generation:
            run.generation(*step.trace.generation)
        for segments in step.trace.scored:
            run.forward_only(segments)
        if not by_trainer:  # a loop of one's own lets go of them as late
            run.died(gradients)
        if settings.accumulates and settings.spread is None:
            gradients = run.born(p.num_bytes for p in updated for _ in range(p.count))
            for _ in range(2):
                run.died(run.micro_batch())
        else:
            gradients = run.micro_batch(exchanged, carries=settings.accumulates)
        if settings.spread is None or not settings.spread.offloads:
            if first:
                run.born(optimizer.state_sizes(updated))
            run.step(stepping)
        if by_trainer:
            run.died(gradients)
    for segments in step.trace.evaluation:
        run.forward_only(segments)
    return run


def _at_rest(
    model: ModelSpec, plan: TrainingPlan, step: CompiledStep, stack: Stack
) -> tuple[list[int], Sequence[Updated], list[int]]:
    """(bytes of each tensor of the model, what the optimizer is given, bytes of what FSDP gathers
    for a whole micro-batch)."""
    settings = step.settings
    if settings.spread is not None:
        numerics = settings.numerics_of_layers(model)
        shards = shards_of(model, settings.spread, numerics, settings.trained_outside)
        units = step_units(model, settings)
        gathered = (units.outside if settings.spread.kind == "fsdp1" else units.root).gathered
        scales = step.held.weights + step.held.adapters - sum(shards.at_rest)
        return [*shards.at_rest, max(0, scales)], shards.updated, [gathered]
    trained = trained_part(model, plan)
    sizes = list(_weights(model, plan, stack, step.held.weights))
    if keeps_reference(plan):
        sizes += sizes
    if (judge := model.reward_model) is not None:
        sizes += _unquantized(judge, plan.compute_bytes)
    for parameters, width in trained_widths(plan, trained)[1:]:
        sizes += [p.size * width for p in _layer_by_layer(parameters)]
    sizes += [p.size * FLOAT32_BYTES for p in _layer_by_layer(trained.frozen)]
    sizes.append(trained.index_bytes)
    return sizes, updated_parameters(model, plan, trained), []


def _unquantized(model: ModelSpec, width: int) -> Iterator[int]:
    """Bytes of each parameter, `width` of an element."""
    yield from (p.size * width for p in _layer_by_layer(model.outer_parameters))
    for layer in model.layers:
        yield from (p.size * width for p in layer.parameters() for _ in range(p.count))


def _weights(model: ModelSpec, plan: TrainingPlan, stack: Stack, total_bytes: int) -> Iterator[int]:
    """Bytes of each tensor of the loaded model, `total_bytes` in all. Beside quantized matrices,
    embeddings and head, the rest counts as two equal tensors a layer."""
    if plan.quantization == "none":
        yield from _unquantized(model, plan.weight_bytes)
        return
    rest = total_bytes
    for size in quantized_storages(model, plan, stack):
        yield size
        rest -= size
    for _ in range(1 if model.tie_word_embeddings else 2):
        outer = min(model.embedding_parameters * plan.weight_bytes, rest)
        yield outer
        rest -= outer
    places = 2 * model.num_hidden_layers
    yield from [rest // places] * places


def _layer_by_layer(parameters: Iterable[Parameter]) -> Iterator[Parameter]:
    """Each parameter as often as it is there."""
    listed = list(parameters)
    for number in range(max((p.count for p in listed), default=0)):
        yield from (p for p in listed if p.count > number)


def _buckets(num_bytes: int) -> Iterator[int]:
    while num_bytes > 0:
        yield min(num_bytes, DDP_BUCKET_BYTES)
        num_bytes -= DDP_BUCKET_BYTES
