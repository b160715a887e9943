"""A cluster as a person describes it in YAML: `--cluster cluster.yaml` (docs/scaling.md).

```yaml
machines:
  - gpu: H100 SXM
    num_gpus: 8
    count: 4                       # as many alike (1)
    interconnect: infiniband-ndr   # or what each GPU reaches: 45GB/s
    latency: 4us                   # of a hop, where it is known
    ram: 2TB
    time_between_failures: 260d    # of one machine
storage: 20GB/s                    # what checkpoints are written at, all machines together
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftplan.launcher.amounts import parse_seconds
from ftplan.launcher.plan_file import check_known
from ftplan.launcher.run_dir import read_mapping
from ftplan.planner.cluster import Cluster, Node
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Network
from ftplan.planner.units import parse_bytes
from ftplan.profiles import find_gpu, find_network, usual_network

_PARTS = ("machines", "storage")
_MACHINE_PARTS = (
    *("gpu", "num_gpus", "count", "interconnect", "latency", "ram", "time_between_failures"),
)
_EXAMPLE = "for example `machines: [{gpu: H100 SXM, num_gpus: 8, count: 4}]`"
_LATENCY_SECONDS = 4e-6


def read_cluster(path: Path) -> Cluster:
    """Raises InputError that names what is wrong, and in which machine."""
    raw = read_mapping(path)
    check_known(raw, _PARTS, f"part of `{path.name}`")
    machines = raw.get("machines")
    if not isinstance(machines, list) or not machines:
        raise InputError(f"`{path}`: `machines` must be a list of machines", _EXAMPLE)
    nodes: list[Node] = []
    for number, machine in enumerate(machines, start=1):
        try:
            nodes += _nodes(machine, path)
        except InputError as error:
            raise InputError(f"`{path}`, machine {number}: {error.message}", error.hint) from error
    storage = raw.get("storage")
    return Cluster(
        nodes=tuple(nodes),
        write_bytes_per_second=None if storage is None else _rate("storage", storage),
    )


def _nodes(machine: Any, path: Path) -> list[Node]:
    if not isinstance(machine, Mapping):
        raise InputError("a machine is a mapping", _EXAMPLE)
    check_known(machine, _MACHINE_PARTS, f"part of a machine in `{path.name}`")
    if not isinstance(machine.get("gpu"), str):
        raise InputError("it names no `gpu`", _EXAMPLE)
    entry = find_gpu(machine["gpu"])
    num_gpus = _number(machine, "num_gpus")
    between = machine.get("time_between_failures")
    node = Node(
        device=entry.device(),
        num_gpus=num_gpus,
        network=_network(machine, str(machine.get("interconnect", usual_network(entry))), num_gpus),
        ram_bytes=parse_bytes(str(machine["ram"])) if "ram" in machine else None,
        seconds_between_failures=(
            parse_seconds("time_between_failures:", str(between)) if between is not None else None
        ),
    )
    return [node] * _number(machine, "count")


def _network(machine: Mapping[str, Any], name: str, num_gpus: int) -> Network:
    """A network of the catalog, or one of a rate."""
    latency = _latency(machine["latency"]) if "latency" in machine else None
    if name[:1].isdigit():
        rate = _rate("interconnect", name)
        return Network(
            name=f"{name} a GPU", bytes_per_second=rate, latency_seconds=latency or _LATENCY_SECONDS
        )
    known = find_network(name, num_gpus)
    if latency is None:
        return known
    return Network(
        name=known.name, bytes_per_second=known.bytes_per_second, latency_seconds=latency
    )


def _rate(name: str, value: Any) -> float:
    """Bytes a second of `20GB/s`."""
    text = str(value).strip()
    amount = re.sub(r"\s*(/s|ps)$", "", text, flags=re.IGNORECASE)
    if amount == text or (rate := parse_bytes(amount)) <= 0:
        raise InputError(f"`{name}: {value}` is no rate", "write for example `20GB/s`")
    return float(rate)


def _latency(value: Any) -> float:
    """Seconds of `4us`, `0.1ms`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|µs|ms)", str(value).strip().casefold())
    if found is None:
        raise InputError(f"`latency: {value}` is no time of a hop", "write for example `4us`")
    return float(found[1]) * (1e-3 if found[2] == "ms" else 1e-6)


def _number(machine: Mapping[str, Any], name: str) -> int:
    value = machine.get(name, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"`{name}: {value}` is no number of machines or GPUs", "write 1 or more")
    return value
