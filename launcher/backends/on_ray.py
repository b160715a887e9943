"""The entry point of a Ray job: `python -m ftplan.launcher.backends.on_ray RUN --num-machines N
--num-gpus G --num-cpus C --memory BYTES --restarts R -- ARGUMENTS OF PYTHON`.

One task of Ray on each of N machines carries out that machine's part, all of them at once. Where a
machine is lost or a part fails, the others are ended and all begin again, from the last whole
checkpoint. SIGTERM, which `ray job stop` sends, lets training save one and end.

The exit status is that of the first part that failed; 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.launcher.backends.job import (
    GRACE_SECONDS,
    MACHINE_RANK,
    MAIN_ADDRESS,
    MAIN_PORT,
    NUM_MACHINES,
)
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.ui import Ui

MODULE = "ftplan.launcher.backends.on_ray"

_POLL_SECONDS = 1.0

# Not to be tried again: the input cannot be used, or somebody has asked it to stop.
_FINAL = (2, 130, 143)


class Parts(Struct, frozen=True, kw_only=True):
    """What is asked of Ray. `resources`: of each machine, as Ray names them."""

    root: str
    num_machines: int
    resources: Mapping[str, float]
    arguments: tuple[str, ...]


class _Stop:
    """Whether somebody has asked the job to end."""

    number: int | None = None

    def ask(self, number: int, frame: object) -> None:
        self.number = self.number or number


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__)
    parser.add_argument("run_dir", type=Path)
    for name in ("num-machines", "num-gpus", "num-cpus", "memory", "restarts"):
        parser.add_argument(f"--{name}", type=int, default=1 if name == "num-machines" else 0)
    parser.add_argument("--accelerator-type")
    parsed = parser.parse_args(words[:at])
    parts = Parts(
        root=str(parsed.run_dir),
        num_machines=parsed.num_machines,
        resources=_resources(parsed),
        arguments=tuple(words[at + 1 :]),
    )
    stop = _Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.ask)
    return _with_restarts(Ui(), parts, parsed.restarts, stop)


def _resources(parsed: argparse.Namespace) -> dict[str, float]:
    asked: dict[str, float] = {
        "GPU": parsed.num_gpus,
        "CPU": max(1, parsed.num_cpus),
        "memory": parsed.memory,
    }
    if parsed.accelerator_type:
        asked[f"accelerator_type:{parsed.accelerator_type}"] = 0.001
    return {name: amount for name, amount in asked.items() if amount}


def _with_restarts(ui: Ui, parts: Parts, restarts: int, stop: _Stop) -> int:
    import ray

    # ftplan's own handler stays: Ray's would end the driver, and with it all tasks.
    ray.init(address="auto")
    signal.signal(signal.SIGTERM, stop.ask)
    for left in range(restarts, -1, -1):
        status = _attempt(ui, parts, stop)
        if stop.number is not None:
            return 0 if RunDir(Path(parts.root)).finished else 128 + stop.number
        if status == 0 or status in _FINAL or not left:
            return status
        ui.warn(f"a machine's part ended with status {status}: all begin again ({left} left)")
    return 1


def _attempt(ui: Ui, parts: Parts, stop: _Stop) -> int:
    """All machines' parts, once; the first exit status that is not 0, or 0."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([dict(parts.resources)] * parts.num_machines, strategy="STRICT_SPREAD")
    try:
        ready = group.ready()
        _tell_the_wait(ui, parts, ray.nodes())
        while not ray.wait([ready], timeout=_POLL_SECONDS)[0]:
            if stop.number is not None:
                return 128 + stop.number
        found = ray.get(_on(group, 0, ray.remote(_meeting_point), {"num_cpus": 0}).remote())
        part = ray.remote(_part)
        tasks = [
            _on(group, rank, part, _asked(parts)).remote(
                parts.root, list(parts.arguments), _variables(parts, rank, found)
            )
            for rank in range(parts.num_machines)
        ]
        return _first_failure(tasks, stop)
    except ray.exceptions.RayError as error:
        ui.warn(f"Ray: {str(error).strip().splitlines()[0]}")
        return 1
    finally:
        remove_placement_group(group)


def _tell_the_wait(ui: Ui, parts: Parts, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Ray waits for ever for machines that it does not have: an autoscaler may bring them."""
    asked = ", ".join(f"{name} {amount:g}" for name, amount in parts.resources.items())
    ui.say(f"waiting for {parts.num_machines} machines with {asked} each")
    having = [each["Resources"] for each in nodes if each["Alive"]]
    enough = sum(
        all(has.get(name, 0) >= amount for name, amount in parts.resources.items())
        for has in having
    )
    if enough < parts.num_machines:
        ui.warn(
            f"{enough} of this cluster's {len(having)} machines have that much in all: the job "
            "waits until others join, or `ray job stop` ends it"
        )


def _asked(parts: Parts) -> dict[str, Any]:
    """The whole of a machine's bundle; a part that fails is not tried again by itself."""
    named = {"GPU": "num_gpus", "CPU": "num_cpus", "memory": "memory"}
    asked = {named[name]: value for name, value in parts.resources.items() if name in named}
    return {**asked, "max_retries": 0}


def _on(group: Any, rank: int, function: Any, asked: Mapping[str, Any]) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    return function.options(scheduling_strategy=where, **asked)


def _first_failure(tasks: list[Any], stop: _Stop) -> int:
    """Waits until all parts have ended. Once one fails, or somebody asks, the others are asked to
    end as well, and are left their grace."""
    import ray

    running, status = list(tasks), 0
    until: float | None = None
    while running:
        ended, running = ray.wait(running, num_returns=1, timeout=_POLL_SECONDS)
        for task in ended:
            status = status or _status_of(task)
        if until is None and (status or stop.number is not None):
            until = time.monotonic() + float(os.environ.get(GRACE_SECONDS, "30"))
            for task in running:
                ray.cancel(task)
        elif until is not None and time.monotonic() > until:
            for task in running:
                ray.cancel(task, force=True)
            return status or 1
    return status


def _status_of(task: Any) -> int:
    """Of a part: its exit status; 1 of one that was lost with its machine."""
    import ray

    try:
        return int(ray.get(task))
    except ray.exceptions.RayError:
        return 1


def _variables(parts: Parts, rank: int, meeting_point: tuple[str, int]) -> dict[str, str]:
    address, port = meeting_point
    return {
        MACHINE_RANK: str(rank),
        NUM_MACHINES: str(parts.num_machines),
        MAIN_ADDRESS: address,
        MAIN_PORT: str(port),
    }


def _meeting_point() -> tuple[str, int]:
    """On the first machine: its address, and a port that nobody listens at."""
    import ray

    with socket.socket() as listening:
        listening.bind(("", 0))
        return ray.util.get_node_ip_address(), listening.getsockname()[1]


def _part(root: str, arguments: list[str], variables: dict[str, str]) -> int:
    """On each machine, in a task of Ray."""
    from ftplan.launcher.backends.machine import carry_out_here
    from ftplan.planner.errors import FtplanError

    ui = Ui()
    try:
        return carry_out_here(ui, Path(root), arguments, {**os.environ, **variables})
    except FtplanError as error:
        ui.fail(error)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
