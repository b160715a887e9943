"""How long GPUs take to exchange something together, over links within machines and a network
between them: Eq. (T10).

NCCL's own model of its rings and trees (src/graph/tuning.cc of NCCL 2.28), by which it chooses
between them: `time = latency of all hops + bytes / bandwidth`. A ring visits all GPUs of a machine
before it goes on to the next, and as many rings run beside one another as a machine has network
cards, each through a card of its own.
"""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Network

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


class _Protocol(Struct, frozen=True, kw_only=True):
    """One of NCCL's ways to send: the share of a link that is data, and seconds of a hop of rings
    and of trees within a machine; on the network beyond its own latency (`ncclTunerConstants`)."""

    share: float
    base: float
    ring_link: float
    tree_link: float
    ring_network: float
    tree_network: float


# `Simple` and `LL128`. The constants of the network are for one whose hop takes 4 µs, which is what
# LL128's ring has there; another network's own latency takes its place.
_PROTOCOLS = (
    _Protocol(
        share=1.0,
        base=8.4e-6,
        ring_link=3.4e-6,
        tree_link=4.0e-6,
        ring_network=10.0e-6,
        tree_network=10.0e-6,
    ),
    _Protocol(
        share=0.92,
        base=14.0e-6,
        ring_link=1.9e-6,
        tree_link=1.25e-6,
        ring_network=0.0,
        tree_network=4.5e-6,
    ),
)

# Of a ring's bandwidth, what a tree reaches.
_TREE_SHARE = 0.92


class Collective(Struct, frozen=True, kw_only=True):
    """Exchanges of one kind in an optimizer step: `count` of them, each of `num_bytes`, the whole
    of what is gathered, summed or divided; of `send`, what each GPU of a ring hands to the next.

    `num_gpus`: of a group that exchanges among itself, `per_machine` of them on one machine. All
    GPUs of a machine do so at once, in as many groups as it has, and share its network cards.
    """

    operation: Operation
    num_bytes: float
    count: float
    num_gpus: int
    per_machine: int

    @property
    def sent_bytes(self) -> float:
        """What a GPU sends in a step, by rings: a sum goes round twice."""
        if self.operation == "send":
            return self.count * self.num_bytes
        rounds = 2 if self.operation == "all_reduce" else 1
        return self.count * rounds * (self.num_gpus - 1) / self.num_gpus * self.num_bytes

    @property
    def num_machines(self) -> int:
        return self.num_gpus // self.per_machine

    def seconds(self, link_bytes_per_second: float | None, network: Network | None) -> float:
        """Of all of them, one after the other. Raises InputError where they cross a network that
        is not known.

        `link_bytes_per_second`: what a GPU sends to another of its machine; None where unknown,
        which counts nothing.
        """
        rates = [link_bytes_per_second] if link_bytes_per_second and self.per_machine > 1 else []
        if self.num_machines > 1:
            if network is None:
                raise InputError(
                    f"{self.num_machines} machines exchange gradients, and what joins them is "
                    "not known",
                    "name it with `--interconnect`, such as `--interconnect infiniband-ndr`",
                )
            # Each GPU has its part of the machine's cards, and a group those of its GPUs there; to
            # hand something on, the last of them has its own.
            cards = 1 if self.operation == "send" else self.per_machine
            rates.append(cards * network.bytes_per_second)
        if not rates:
            return 0.0
        hop = network.latency_seconds if network else 0.0
        if self.operation == "send":
            return self.count * min(self._next(each, min(rates), hop) for each in _PROTOCOLS)
        ways = [self._ring(protocol, min(rates), hop) for protocol in _PROTOCOLS]
        if self.operation == "all_reduce":
            ways += [self._tree(protocol, min(rates), hop) for protocol in _PROTOCOLS]
        return self.count * min(ways)

    def _next(self, protocol: _Protocol, rate: float, hop: float) -> float:
        """One hop, over the network where any of the GPUs has its neighbour on another machine."""
        latency = hop + protocol.ring_network if self.num_machines > 1 else protocol.ring_link
        return protocol.base + latency + self.num_bytes / (protocol.share * rate)

    def _ring(self, protocol: _Protocol, rate: float, hop: float) -> float:
        rounds = 2 if self.operation == "all_reduce" else 1
        between = rounds * (self.num_machines - 1)
        within = rounds * (self.num_gpus - 1) - between
        latency = within * protocol.ring_link + between * (hop + protocol.ring_network)
        sent = rounds * (self.num_gpus - 1) / self.num_gpus * self.num_bytes
        return protocol.base + latency + sent / (protocol.share * rate)

    def _tree(self, protocol: _Protocol, rate: float, hop: float) -> float:
        """Up and down a chain within each machine and a tree of the machines; each level passes
        the whole on."""
        levels = math.log2(self.num_machines)
        network = levels * (hop + protocol.tree_network)
        latency = 2 * ((self.per_machine - 1) * protocol.tree_link + network)
        sent = 2 * self.num_bytes
        return protocol.base + latency + sent / (_TREE_SHARE * protocol.share * rate)
