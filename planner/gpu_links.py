"""What the links between a machine's GPUs carry for collective operations.

NCCL and RCCL send around rings. A ring that visits every GPU over direct links alone uses all
links of a GPU to the others, several rings beside one another; where there is no such ring, as
with bridges between pairs or a card that no bridge reaches, every ring crosses PCIe at least once,
and its slowest part bounds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ftplan.planner.hardware_spec import GpuLink


def ring_bytes_per_second(
    gpus: Sequence[int], links: Sequence[GpuLink], own_bytes_per_second: Mapping[int, float]
) -> float | None:
    """What each of `gpus` (their indices) sends its neighbours in one direction over direct links;
    None where no ring over such links visits them all.

    `own_bytes_per_second`: all direct links of a GPU, which those to its neighbours cannot exceed:
    through a switch each pair has them, and all pairs share them. An upper bound where the rings
    of a mesh do not use every link.
    """
    to_others: dict[int, dict[int, float]] = {gpu: {} for gpu in gpus}
    for link in links:
        if link.bytes_per_second and link.first in to_others and link.second in to_others:
            to_others[link.first][link.second] = link.bytes_per_second
            to_others[link.second][link.first] = link.bytes_per_second
    if len(gpus) < 2 or not _has_ring(to_others, [gpus[0]]):
        return None
    return min(
        min(sum(reached.values()), own_bytes_per_second.get(gpu, float("inf")))
        for gpu, reached in to_others.items()
    )


def _has_ring(to_others: Mapping[int, Mapping[int, float]], visited: list[int]) -> bool:
    """Whether the way through `visited` can go on over the other GPUs and back to its start. Two
    GPUs are a ring. A machine has sixteen at most, and most of them see each other."""
    last = to_others[visited[-1]]
    if len(visited) == len(to_others):
        return visited[0] in last
    return any(_has_ring(to_others, [*visited, gpu]) for gpu in last if gpu not in visited)
