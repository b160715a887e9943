"""Which GPUs of a machine train together, and what the slowest of them makes of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import groupby, product

from msgspec import Struct, structs

from ftplan.planner.calibration import UNCALIBRATED
from ftplan.planner.hardware_spec import Device, Network

# Between the names of unlike devices that count as one.
_AND = " and "


class Team(Struct, frozen=True):
    """GPUs that train together, each with its own rows or its part of each.

    `device`: what each of them does at least: the least memory that is free on one, the lowest
    rates. Steps end together, so none is faster than the slowest. `members`: those of a machine, by
    their numbers; none where they are only thought of.
    """

    device: Device
    num_gpus: int
    members: tuple[Device, ...] = ()


def teams_of(device: Device | Sequence[Device], num_gpus: int | None) -> list[Team]:
    """Teams to choose from.

    `device`: one of which there are as many as asked for, or all that a machine has; of alike GPUs
    those with the most free memory are taken. `num_gpus`: how many there must be, None for any.
    """
    if isinstance(device, Device):
        return [Team(device, num_gpus or 1)]
    kinds = [
        sorted(alike, key=lambda gpu: (-gpu.free_bytes, gpu.index))
        for _, alike in groupby(sorted(device, key=_kind), key=_kind)
    ]
    found = []
    for counts in product(*(range(len(kind) + 1) for kind in kinds)):
        size = sum(counts)
        if size and num_gpus in (None, size):
            taken = [kind[:count] for kind, count in zip(kinds, counts, strict=True) if count]
            members = sorted((gpu for alike in taken for gpu in alike), key=lambda gpu: gpu.index)
            # Alike GPUs differ in what is free, and the last has the least.
            found.append(
                Team(reduce(least_of, (alike[-1] for alike in taken)), size, tuple(members))
            )
    return found


def roomiest(gpus: Sequence[Device], num_gpus: int) -> Team:
    """So many of a machine's GPUs that the least memory that is free on one is the most."""
    freest = sorted(gpus, key=lambda gpu: (-gpu.free_bytes, gpu.index))[:num_gpus]
    members = tuple(sorted(freest, key=lambda gpu: gpu.index))
    return Team(reduce(least_of, members), len(members), members)


def divided(processor: Device, num_processes: int) -> Device:
    """What each of so many processes has of one processor: memory, bandwidth and cores in equal
    parts."""
    if num_processes == 1:
        return processor
    return structs.replace(
        processor,
        total_bytes=processor.total_bytes // num_processes,
        free_bytes=processor.free_bytes // num_processes,
        memory_bandwidth_bytes_per_second=(
            processor.memory_bandwidth_bytes_per_second / num_processes
        ),
        peak_flops_per_second={
            dtype: rate / num_processes for dtype, rate in processor.peak_flops_per_second.items()
        },
        link_bytes_per_second=processor.memory_bandwidth_bytes_per_second / num_processes,
    )


def _kind(gpu: Device) -> tuple[object, ...]:
    """What is the same of alike GPUs."""
    return gpu.name, gpu.total_bytes, gpu.compute_capability or (0, 0), gpu.power_watts or 0.0


def names_of(name: str) -> list[str]:
    """What a device or a network stands for: several where it is what unlike ones do at least."""
    return name.split(_AND)


def least_of(one: Device, other: Device) -> Device:
    """A device that does no more than either."""
    if one.name == other.name:
        name = one.name
    else:
        name = _AND.join(sorted({*names_of(one.name), *names_of(other.name)}))
    links = (one.link_bytes_per_second, other.link_bytes_per_second)
    to_host = (one.host_link_bytes_per_second, other.host_link_bytes_per_second)
    watts = (one.power_watts, other.power_watts)
    boards = (one.default_power_watts, other.default_power_watts)
    return structs.replace(
        one,
        name=name,
        total_bytes=min(one.total_bytes, other.total_bytes),
        free_bytes=min(one.free_bytes, other.free_bytes),
        memory_bandwidth_bytes_per_second=min(
            one.memory_bandwidth_bytes_per_second, other.memory_bandwidth_bytes_per_second
        ),
        peak_flops_per_second=_least_rates(one.peak_flops_per_second, other.peak_flops_per_second),
        matmul_flops_per_second=_least_rates(
            one.matmul_flops_per_second, other.matmul_flops_per_second
        ),
        compute_capability=_older(one, other),
        link_bytes_per_second=min((link for link in links if link), default=None),
        host_link_bytes_per_second=min((link for link in to_host if link), default=None),
        network=_slower(one.network, other.network),
        power_watts=None if None in watts else max(watt for watt in watts if watt),
        default_power_watts=None if None in boards else max(watt for watt in boards if watt),
        context_bytes=max(one.context_bytes, other.context_bytes),
        # What was learned of one card is not known of the other.
        calibration=one.calibration if one.calibration == other.calibration else UNCALIBRATED,
    )


def _slower(one: Network | None, other: Network | None) -> Network | None:
    """A network that does no more than either; of an unknown one nothing is known."""
    if one is None or other is None or one == other:
        return one if one == other else None
    return Network(
        name=_AND.join(sorted({*names_of(one.name), *names_of(other.name)})),
        bytes_per_second=min(one.bytes_per_second, other.bytes_per_second),
        latency_seconds=max(one.latency_seconds, other.latency_seconds),
    )


def _least_rates(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Of the dtypes that both have."""
    return {dtype: min(one[dtype], other[dtype]) for dtype in one if dtype in other}


def _older(one: Device, other: Device) -> tuple[int, int] | None:
    capabilities = (one.compute_capability, other.compute_capability)
    return None if None in capabilities else min(c for c in capabilities if c)
