"""Which machines a command plans for: `--num-machines`, `--interconnect`, `--cluster`.

On the command line `--num-gpus` is of each machine; a plan's `num_gpus` is of all of them, as
accelerate's `num_processes` is.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.plan import check_setting

if TYPE_CHECKING:
    from ftplan.planner.cluster import Cluster
    from ftplan.planner.memory import MemoryEstimate


def add_cluster_flags(parser: argparse.ArgumentParser, *, has_file: bool = True) -> None:
    parser.add_argument(
        "--interconnect",
        metavar="NAME",
        help="what joins machines, such as infiniband-ndr, roce-400g, efa-p5 or ethernet-100g "
        "(default: what is usual with the GPU)",
    )
    if has_file:
        parser.add_argument(
            "--cluster",
            metavar="FILE",
            type=Path,
            help="the machines, unlike ones too, as YAML, in the place of `--gpu`, `--num-gpus`, "
            "`--num-machines` and `--interconnect`",
        )


def asked_cluster(
    arguments: argparse.Namespace, ui: Ui, given: dict[str, Any], device: Device | None
) -> Cluster | None:
    """The machines that are asked for; None for one machine, or where no GPU is named.

    `given` gets the numbers of machines and of all GPUs. Raises InputError for machines of which
    too little is known, and for flags that contradict each other.
    """
    if arguments.cluster is not None:
        return read_cluster_flag(arguments, ui, given)
    machines = checked_machines(arguments, given)
    if device is None or machines == 1:
        return None
    per_machine = given["num_gpus"] // machines
    return cluster_of(ui, arguments.gpu, device, arguments.interconnect, machines, per_machine)


def checked_machines(arguments: argparse.Namespace, given: Mapping[str, Any]) -> int:
    """How many there are; raises InputError for flags that say too little of them."""
    machines = int(given.get("num_machines", 1))
    check_setting("num_machines", machines)
    if machines > 1 and "num_gpus" not in given:
        raise InputError(
            f"`--num-machines {machines}` does not say how many GPUs each has",
            "add `--num-gpus 8`: GPUs of each machine",
        )
    if machines == 1 and arguments.interconnect is not None:
        raise InputError(
            f"`--interconnect {arguments.interconnect}` joins machines, and there is one",
            "say how many with `--num-machines`",
        )
    return machines


def cluster_of(
    ui: Ui,
    gpu: str,
    device: Device,
    interconnect: str | None,
    num_machines: int,
    per_machine: int,
) -> Cluster:
    """Alike machines of a catalogued GPU; what joins them is the usual where it is not said."""
    from ftplan.planner.cluster import Cluster, Node
    from ftplan.profiles import find_gpu, find_network, usual_network

    name = interconnect
    if name is None:
        name = usual_network(find_gpu(gpu))
        ui.say(
            f"no `--interconnect` given: {name} is taken to join machines of {device.name}, as is "
            "usual with them"
        )
    network = find_network(name, per_machine)
    return Cluster(
        nodes=(Node(device=device, num_gpus=per_machine, network=network),) * num_machines
    )


def on_cluster(device: Device | None, cluster: Cluster | None) -> Device | None:
    """The device as one of a cluster's."""
    return device if cluster is None else cluster.device


def read_cluster_flag(arguments: argparse.Namespace, ui: Ui, given: dict[str, Any]) -> Cluster:
    """The machines of `--cluster`, their numbers put into `given`; raises InputError."""
    from ftplan.launcher.cluster_file import read_cluster

    others = {
        "--gpu": arguments.gpu,
        "--interconnect": arguments.interconnect,
        "--free-memory": getattr(arguments, "free_memory", None),
        "--num-gpus": given.get("num_gpus"),
        "--num-machines": given.get("num_machines"),
    }
    beside = [flag for flag, value in others.items() if value is not None]
    if beside:
        raise InputError(
            f"`--cluster {arguments.cluster}` names the machines, and so does `{beside[0]}`",
            f"leave out `{beside[0]}`, or `--cluster`",
        )
    cluster = read_cluster(arguments.cluster)
    given["num_gpus"], given["num_machines"] = cluster.num_gpus, cluster.num_machines
    if cluster.left_out:
        ui.warn(
            f"machines with more than {cluster.gpus_per_machine} GPUs leave {cluster.left_out} of "
            "them idle: as many processes are started on each"
        )
    return cluster


def cluster_to_dict(cluster: Cluster, memory: MemoryEstimate | None = None) -> Mapping[str, Any]:
    """`cluster` of the JSON output; with what a run needs there and what failures cost it."""
    kinds: dict[tuple[Any, ...], int] = {}
    for node in cluster.nodes:
        network = node.network
        key = (
            node.device.name,
            node.num_gpus,
            network.name if network else None,
            network.bytes_per_second if network else None,
            network.latency_seconds if network else None,
        )
        kinds[key] = kinds.get(key, 0) + 1
    names = ("gpu", "num_gpus", "interconnect", "network_bytes_per_second", "latency_seconds")
    return {
        "num_machines": cluster.num_machines,
        "num_gpus": cluster.num_gpus,
        "machines": [
            {**dict(zip(names, key, strict=True)), "count": count} for key, count in kinds.items()
        ],
        "seconds_between_failures": cluster.seconds_between_failures,
        **(_needs(cluster, memory) if memory else {}),
    }


def _needs(cluster: Cluster, memory: MemoryEstimate) -> dict[str, Any]:
    return {
        "required_bytes": cluster.num_gpus * memory.required_bytes,
        "host_ram_peak_bytes_of_a_machine": memory.host_ram_peak_bytes,
        "checkpoint_bytes": memory.disk.checkpoint,
        "failures": cluster.failures(memory.disk.checkpoint).to_dict(),
    }
