"""What training costs at the lowest prices that the catalog has."""

from __future__ import annotations

from ftplan.planner.hardware_spec import Device
from ftplan.planner.step_time import StepTime
from ftplan.planner.units import SECONDS_PER_HOUR
from ftplan.profiles import BILLINGS, lowest_prices


def usd_for(device: Device, gpu_seconds: float) -> dict[str, float | None]:
    """What so many seconds of one such GPU cost by each way of billing; None without a price."""
    return usd_for_gpu(device.name, gpu_seconds)


def usd_for_gpu(name: str, gpu_seconds: float) -> dict[str, float | None]:
    """The same of a GPU by its name in the catalog."""
    known = lowest_prices(name)
    hours = gpu_seconds / SECONDS_PER_HOUR
    return {
        billing: known[billing].usd_per_gpu_hour * hours if billing in known else None
        for billing in BILLINGS
    }


def usd_per_million_tokens(device: Device, step: StepTime) -> dict[str, float | None]:
    """The same for a million tokens."""
    return usd_for(device, 1e6 / step.tokens_per_second_per_gpu)
