"""The formula behind each part of a step's time, with its numbers put in.

Equations carry the numbers of docs/time-model.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.achieved import ESTIMATE
from ftplan.planner.batching import mean_batch_tokens
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.hardware_spec import Device
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_time import (
    StepWork,
    achieved_bytes_per_second,
    achieved_flops_per_second,
    step_parts,
    step_work,
)
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
    rows = plan.per_device_train_batch_size
    tokens = mean_batch_tokens(data.trained_lengths, rows, plan.max_length)
    work = step_work(
        model,
        plan,
        device,
        tokens_per_micro_batch=tokens,
        mean_length=tokens / rows,
        stack=stack,
    )
    return list(_terms(work, device))


def _terms(work: StepWork, device: Device) -> Iterator[TimeTerm]:
    parts = step_parts(work, device)
    speed = f"{format_bytes(round(achieved_bytes_per_second(device)))} a second"
    yield TimeTerm(
        part="arithmetic",
        equation="T2",
        formula=" + ".join(_products(work, device)),
        seconds=parts.arithmetic,
    )
    moved, updated = round(work.moved_bytes), round(work.optimizer_bytes)
    yield TimeTerm(
        part="memory traffic",
        equation="T4",
        formula=f"{format_bytes(moved)} at {speed}",
        seconds=parts.traffic,
    )
    yield TimeTerm(
        part="optimizer step",
        equation="T1",
        formula=f"{format_bytes(updated)} at {speed}",
        seconds=parts.optimizer,
    )
    link = device.link_bytes_per_second
    if work.exchanged_bytes and link:
        sent = format_bytes(round(work.exchanged_bytes))
        yield TimeTerm(
            part="exchange between GPUs",
            equation="T5",
            formula=f"{sent} at {format_bytes(round(link))} a second",
            seconds=parts.sending,
        )
    if work.copied_bytes:
        rate = format_bytes(round(work.copied_bytes / parts.copying))
        yield TimeTerm(
            part="copies from and to the host",
            equation="T5",
            formula=f"{format_bytes(round(work.copied_bytes))} at {rate} a second",
            seconds=parts.copying,
        )
        rate = format_bytes(round(ESTIMATE.host_bandwidth))
        yield TimeTerm(
            part="optimizer step on the host",
            equation="T5",
            formula=f"{format_bytes(round(work.host_bytes))} at {rate} a second",
            seconds=parts.on_host,
        )
    yield TimeTerm(
        part="launching kernels",
        equation="T6",
        formula=f"{work.kernels:,} of micro-batches, {work.optimizer_kernels:,} of the optimizer",
        seconds=parts.launching,
    )


def _products(work: StepWork, device: Device) -> Iterator[str]:
    others = work.flops - work.float32_flops
    for dtype, flops in ((work.dtype, others), ("float32", work.float32_flops)):
        if flops:
            rate = achieved_flops_per_second(dtype, device) / 1e12
            yield f"{flops / 1e12:,.4g} TFLOP in {dtype} at {rate:,.3g} TFLOP/s"
