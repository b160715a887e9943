"""Cards of the catalog that somebody may turn to where what is there is too small."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from ftplan.planner.stack import FLASH_CAPABILITY
from ftplan.planner.units import format_bytes
from ftplan.profiles import GpuEntry, gpu_catalog, lowest_prices


@cache
def cards_by_memory() -> Sequence[GpuEntry]:
    """NVIDIA's desktop and server cards that compute in bf16, the smallest first; of equal ones
    those that a price is known of."""
    meant = [
        g
        for g in gpu_catalog().values()
        if (g.compute_capability or (0, 0)) >= FLASH_CAPABILITY and "Laptop" not in g.name
    ]
    return sorted(meant, key=lambda g: (g.memory_bytes, usd_per_hour(g.name, 1) is None, g.name))


def smallest_card(free_bytes: int) -> str:
    """The first of them that has so much memory, and how much it has."""
    for card in cards_by_memory():
        if card.memory_bytes >= free_bytes:
            return f"{card.name} ({format_bytes(card.memory_bytes)}) and larger"
    return "no single GPU of the catalog"


def usd_per_hour(gpu_name: str, num_gpus: int) -> float | None:
    """The lowest price that is known of so many of a GPU, on demand where it is to be had so."""
    prices = lowest_prices(gpu_name)
    price = prices.get("on-demand") or prices.get("spot")
    return num_gpus * price.usd_per_gpu_hour if price else None
