"""What is shown of machines that train together. Pure."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from ftplan.launcher.ui import table
from ftplan.planner.cluster import Cluster
from ftplan.planner.memory import MemoryEstimate
from ftplan.planner.units import format_bytes, format_seconds


def cluster_table(cluster: Cluster, memory: MemoryEstimate) -> Table:
    """All GPUs together, each machine's host, checkpoints and what failures cost."""
    failures = cluster.failures(memory.disk.checkpoint)
    between = format_seconds(failures.seconds_between_failures)
    network = cluster.device.network
    rows: list[list[RenderableType]] = [
        [
            "all GPUs",
            format_bytes(cluster.num_gpus * memory.required_bytes),
            f"required on {cluster.num_gpus:,}, as each {format_bytes(memory.required_bytes)}",
        ],
        ["host RAM", format_bytes(memory.host.peak_bytes), _host(cluster, memory)],
    ]
    if network is not None:
        rows.append(
            [
                "network",
                f"{format_bytes(network.bytes_per_second)}/s",
                f"for each GPU, by {network.name}",
            ]
        )
    rows += [
        [
            "checkpoint",
            format_bytes(memory.disk.checkpoint),
            f"saved in {format_seconds(failures.save_seconds)}, best every "
            f"{format_seconds(failures.daly_seconds)}",
        ],
        [
            "failures",
            f"{100 * failures.lost_share:.2g} %",
            f"of the time; one of them fails in {between}",
        ],
    ]
    return table(f"On {cluster.num_machines:,} machines", ("", ">size", ""), rows)


def _host(cluster: Cluster, memory: MemoryEstimate) -> str:
    """Of one machine, and whether it has as much, where that is known."""
    said = f"of each machine, {memory.host.peak_phase.name}"
    ram = cluster.ram_bytes
    if ram is None:
        return said
    enough = "enough" if memory.host.required_bytes <= ram else "too much"
    return f"{said}: {enough} for {format_bytes(ram)}"
