"""The formula behind each part of a step's time, with its numbers put in.

Equations carry the numbers of docs/time-model.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.achieved import ESTIMATE
from ftplan.planner.batching import mean_batch_tokens
from ftplan.planner.collectives import Collective
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.hardware_spec import Device
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_settings import mean_model_rows
from ftplan.planner.step_time import (
    StepWork,
    achieved_bytes_per_second,
    achieved_flops_per_second,
    step_parts,
    step_work,
)
from ftplan.planner.tasks import TaskWeighting
from ftplan.planner.units import format_bytes


class TimeTerm(Struct, frozen=True, kw_only=True):
    """One part of a step's time: `formula` in words and numbers, and what it comes to."""

    part: str
    equation: str
    formula: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return structs.asdict(self)


def explain_time(
    model: ModelSpec,
    plan: TrainingPlan,
    device: Device,
    data: DataProfile,
    stack: Stack = OWN_STACK,
) -> list[TimeTerm]:
    """The parts of a step on the mean micro-batch of the data; Eq. (T1) joins them."""
    lengths = data.epoch_lengths(TaskWeighting.of(plan))
    padded = mean_batch_tokens(lengths, plan.per_device_train_batch_size, plan.max_length)
    tokens, length = mean_model_rows(plan, padded)
    work = step_work(
        model,
        plan,
        device,
        tokens_per_micro_batch=tokens,
        mean_length=length,
        stack=stack,
    )
    return list(_terms(work, device))


def _terms(work: StepWork, device: Device) -> Iterator[TimeTerm]:
    parts, bandwidth = step_parts(work, device), achieved_bytes_per_second(device)
    yield TimeTerm(
        part="arithmetic",
        equation="T2",
        formula=" + ".join(_products(work, device)),
        seconds=parts.arithmetic,
    )
    yield _moving("memory traffic", "T4", work.moved_bytes, bandwidth, parts.traffic)
    yield _moving("optimizer step", "T1", work.optimizer_bytes, bandwidth, parts.optimizer)
    if work.collectives and parts.sending:
        yield TimeTerm(
            part="exchange between GPUs",
            equation="T5",
            formula=_exchanges(work.collectives, device),
            seconds=parts.sending,
        )
    if parts.waiting:
        yield TimeTerm(
            part="exchange, waited for",
            equation="T5",
            formula=_exchanges(work.waited, device),
            seconds=parts.waiting,
        )
    if work.copied_bytes:
        to_host = work.copied_bytes / parts.copying
        yield _moving(
            "copies from and to the host", "T5", work.copied_bytes, to_host, parts.copying
        )
        on_host = ESTIMATE.host_bandwidth
        yield _moving("optimizer step on the host", "T5", work.host_bytes, on_host, parts.on_host)
    yield TimeTerm(
        part="launching kernels",
        equation="T6",
        formula=f"{work.kernels:,} of micro-batches, {work.optimizer_kernels:,} of the optimizer",
        seconds=parts.launching,
    )


def _exchanges(collectives: Sequence[Collective], device: Device) -> str:
    """What is exchanged, and the rates of the links that it crosses."""
    found = [
        f"{c.operation.replace('_', '-')} {c.count:,.0f} x {format_bytes(c.num_bytes)} "
        f"among {c.num_gpus:,} GPUs"
        for c in collectives
    ]
    rates = []
    if device.link_bytes_per_second and any(c.per_machine > 1 for c in collectives):
        rates.append(f"{format_bytes(device.link_bytes_per_second)} a second")
    network = device.network
    if network and any(c.num_machines > 1 for c in collectives):
        rates.append(
            f"{network.name}, {format_bytes(network.bytes_per_second)} a second of each GPU"
        )
    return f"{'; '.join(found)}; at {' and '.join(rates)}"


def _moving(
    part: str, equation: str, num_bytes: float, bytes_per_second: float, seconds: float
) -> TimeTerm:
    rate = format_bytes(round(bytes_per_second))
    formula = f"{format_bytes(round(num_bytes))} at {rate} a second"
    return TimeTerm(part=part, equation=equation, formula=formula, seconds=seconds)


def _products(work: StepWork, device: Device) -> Iterator[str]:
    others = work.flops - work.float32_flops
    for dtype, flops in ((work.dtype, others), ("float32", work.float32_flops)):
        if flops:
            rate = achieved_flops_per_second(dtype, device) / 1e12
            yield f"{flops / 1e12:,.4g} TFLOP in {dtype} at {rate:,.3g} TFLOP/s"
