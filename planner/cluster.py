"""Machines that train together: what each has, and what they do all together."""

from __future__ import annotations

from functools import reduce

from msgspec import Struct, structs

from ftplan.planner.errors import InputError
from ftplan.planner.failures import (
    ASSUMED_WRITE_BYTES_PER_SECOND_OF_A_GPU,
    GPU_SECONDS_BETWEEN_FAILURES,
    Failures,
    failures_of,
)
from ftplan.planner.hardware_spec import Device, Network
from ftplan.planner.teams import Team, least_of


class Node(Struct, frozen=True, kw_only=True):
    """One machine: `num_gpus` of a kind and the `network` to the others. `ram_bytes`: None where
    unknown; `seconds_between_failures`: the mean, of the whole machine."""

    device: Device
    num_gpus: int
    network: Network | None
    ram_bytes: int | None = None
    seconds_between_failures: float | None = None

    @property
    def failure_rate(self) -> float:
        """Failures a second."""
        if self.seconds_between_failures is not None:
            return 1 / self.seconds_between_failures
        return self.num_gpus / GPU_SECONDS_BETWEEN_FAILURES


class Cluster(Struct, frozen=True, kw_only=True):
    """Machines that train together, unlike ones too; each step ends with the slowest.

    `write_bytes_per_second`: what checkpoints are written at, all machines together; None for what
    is assumed. Raises InputError without a machine.
    """

    nodes: tuple[Node, ...]
    write_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        if not self.nodes:
            raise InputError("a cluster has one machine at least")

    @property
    def num_machines(self) -> int:
        return len(self.nodes)

    def first(self, num_gpus: int) -> Cluster:
        """The first machines of it that have so many GPUs in all, all of theirs or, of one machine,
        some. Raises InputError where none have."""
        per_machine = self.gpus_per_machine
        machines = -(-num_gpus // per_machine)
        if machines > self.num_machines or num_gpus % machines:
            raise InputError(
                f"there are {self.num_machines} machines of {per_machine} GPUs"
                if machines > self.num_machines
                else f"no equal numbers of {num_gpus} GPUs on machines of {per_machine}",
                f"ask for multiples of {per_machine}, {self.num_gpus} at most",
            )
        nodes = [
            structs.replace(node, num_gpus=num_gpus // machines) for node in self.nodes[:machines]
        ]
        return structs.replace(self, nodes=tuple(nodes))

    @property
    def gpus_per_machine(self) -> int:
        """Torch's launcher starts as many processes on each machine: those of the smallest."""
        return min(node.num_gpus for node in self.nodes)

    @property
    def num_gpus(self) -> int:
        """GPUs that train."""
        return self.num_machines * self.gpus_per_machine

    @property
    def left_out(self) -> int:
        """GPUs that larger machines have beyond those of the smallest."""
        return sum(node.num_gpus for node in self.nodes) - self.num_gpus

    @property
    def device(self) -> Device:
        """What each GPU does at least, with the network between machines."""
        kinds = {node.device.name: node for node in self.nodes}.values()
        joined = [structs.replace(node.device, network=node.network) for node in self.nodes]
        return joined[0] if len(kinds) == 1 and _alike(joined) else reduce(least_of, joined)

    @property
    def team(self) -> Team:
        return Team(self.device, self.num_gpus)

    @property
    def ram_bytes(self) -> int | None:
        """Of the machine with least; None where one's is not known."""
        known = [node.ram_bytes for node in self.nodes]
        return None if None in known else min(ram for ram in known if ram is not None)

    @property
    def seconds_between_failures(self) -> float:
        """The mean time until one machine fails, and with it the run."""
        return 1 / sum(node.failure_rate for node in self.nodes)

    def failures(self, checkpoint_bytes: int) -> Failures:
        """What failures cost a run on all GPUs."""
        assumed = self.num_gpus * ASSUMED_WRITE_BYTES_PER_SECOND_OF_A_GPU
        rate = self.write_bytes_per_second or assumed
        return failures_of(self.seconds_between_failures, checkpoint_bytes, rate)


def _alike(devices: list[Device]) -> bool:
    return all(device == devices[0] for device in devices)
