"""GPUs with what collective operations reach between them, by the links that are there.

The catalog tells what a card can have: an RTX 3090 has NVLink, most machines no bridge for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct, structs

from ftplan.planner.gpu_links import ring_bytes_per_second
from ftplan.planner.hardware_spec import Device, GpuLink, PcieLink
from ftplan.profiles import GpuEntry, copied_share, link_bytes_per_second, reached_share


class Found(Struct, frozen=True, kw_only=True):
    """A device of this machine, and its card's entry in the catalog."""

    device: Device
    entry: GpuEntry


def with_links(
    found: Sequence[Found],
    links: Sequence[GpuLink],
    own_bytes_per_second: Mapping[int, float],
) -> tuple[Device, ...]:
    """The devices, each with the rate of the slowest among them; one alone keeps its catalogued
    rate, which is to cards beside it. `own_bytes_per_second`: all direct links of each index."""
    devices = [_with_host_link(each) for each in found]
    if len(devices) < 2:
        return tuple(devices)
    indices = [device.index for device in devices]
    ring = ring_bytes_per_second(indices, links, own_bytes_per_second)
    # Of Infinity Fabric no share is known: NVLink's stands in.
    rate = _slowest_pcie(found) if ring is None else reached_share("nvlink") * ring
    return tuple(structs.replace(device, link_bytes_per_second=rate) for device in devices)


def _with_host_link(found: Found) -> Device:
    rate = pcie_bytes_per_second(found.device.pcie, found.entry.pcie)
    if rate is None:
        return found.device
    return structs.replace(found.device, host_link_bytes_per_second=copied_share() * rate)


def _slowest_pcie(found: Sequence[Found]) -> float | None:
    rates = [pcie_bytes_per_second(each.device.pcie, each.entry.pcie) for each in found]
    known = [rate for rate in rates if rate is not None]
    return reached_share("pcie") * min(known) if known else None


def pcie_bytes_per_second(
    link: PcieLink | None, catalogued: tuple[str, int] | None
) -> float | None:
    """What the lanes carry in one direction: the width in use, at the generation that they rise
    to under load. What the driver does not tell is the data sheet's."""
    generation, width = catalogued or (None, None)
    if link is not None:
        generation = str(link.max_generation or link.generation or generation)
        width = link.width or link.max_width or width
    if generation is None or width is None:
        return None
    try:
        return link_bytes_per_second("pcie", generation, width)
    except KeyError:
        return None


def notes_on(label: str, device: Device, entry: GpuEntry) -> Iterator[str]:
    """What slows the card down here: a power limit below its own, fewer than half of its lanes."""
    if device.power_capped:
        yield (
            f"{label} is held at {device.power_watts:.0f} W of {device.default_power_watts:.0f}: "
            "it computes more slowly than its data sheet says, which predictions count on"
            f"{_uncap(device)}"
        )
    lanes = pcie_lanes(device.pcie, entry.pcie)
    width = device.pcie.width if device.pcie else None
    if width is not None and 2 * width < lanes:
        yield (
            f"{label} has {width} of its {lanes} PCIe lanes: what moves between it, the RAM and "
            "other GPUs moves slowly; a slot with more lanes would help"
        )


def _uncap(device: Device) -> str:
    """How to raise the limit again, where one command does it."""
    if device.vendor != "nvidia":
        return ""
    watts = f"{device.default_power_watts:.0f}"
    return f"; `sudo nvidia-smi -i {device.index} -pl {watts}` lifts the limit"


def pcie_lanes(link: PcieLink | None, catalogued: tuple[str, int] | None) -> int:
    """The lanes that the card has, whatever the slot; 0 if unknown."""
    return max(link.max_width or 0 if link else 0, catalogued[1] if catalogued else 0)
