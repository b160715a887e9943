"""`ftplan plan DATA --scale`: the same run on more and more GPUs, and where they stop paying."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

from msgspec import structs
from rich.table import Table
from rich.text import Text

from ftplan.launcher.cluster_flags import cluster_of, cluster_to_dict, read_cluster_flag
from ftplan.launcher.commands import plan as plan_command
from ftplan.launcher.commands.estimate import named_device
from ftplan.launcher.planning import FoundOut, find_out
from ftplan.launcher.settings_flags import given_settings
from ftplan.launcher.ui import Ui, table
from ftplan.planner.cluster import Cluster, Node
from ftplan.planner.errors import InputError
from ftplan.planner.policy import effective_batch_size
from ftplan.planner.ranking import Ranking
from ftplan.planner.scaling import NUMBERS_OF_GPUS, WORTH_ADDING, ScalePoint, Scaling, scale
from ftplan.planner.sharding import SHARDING_TITLES
from ftplan.planner.units import format_count, format_seconds

GPUS_PER_MACHINE = 8

_COLUMNS = (">GPUs", ">step", ">tokens/s", ">each", ">time", ">USD", ">lost", "how")


def run_scale(arguments: argparse.Namespace, ui: Ui) -> int:
    """Exit status 1 where it fits on none of the numbers."""
    _check_alone(arguments)
    given = given_settings(arguments)
    numbers = read_numbers(arguments.scale)
    cluster = _cluster(arguments, ui, given, numbers)
    if not arguments.scale:
        numbers = [number for number in numbers if number <= cluster.num_gpus]
    found = find_out(
        ui,
        asked=plan_command.data_asked(arguments),
        model_name=arguments.model,
        named_device=cluster.device,
        given={**given, "num_gpus": cluster.gpus_per_machine},
        wanted=plan_command.wanted(arguments),
        runs_dir=arguments.runs_dir,
        for_launch=False,
        calibrate=arguments.calibration,
    )
    price = found.offer.limits.usd_per_gpu_hour
    kept = {name: value for name, value in found.offer.given.items() if name != "num_gpus"}
    scaling = scale(found.profile, kept, numbers, cluster.first, partial(_choose, found), price)
    ui.json(_to_dict(found, cluster, scaling, price))
    if not ui.as_json:
        _show(ui, found, cluster, scaling)
    return 0 if scaling.fitting else 1


def _check_alone(arguments: argparse.Namespace) -> None:
    """Raises InputError for what is of one plan."""
    for name in ("out", "explain"):
        if getattr(arguments, name):
            raise InputError(
                f"`--{name}` is of one plan, and `--scale` makes several",
                f"leave out `--{name}`, or name one number with `--num-gpus`",
            )


def read_numbers(text: str) -> list[int]:
    """Numbers of GPUs of `1,2,4`; the usual ones of nothing. Raises InputError."""
    if not text:
        return list(NUMBERS_OF_GPUS)
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) == 0:
            raise InputError(
                f"`--scale {text}`: `{part.strip()}` is no number of GPUs",
                "write `--scale 1,8,64`, or `--scale` alone behind the data",
            )
        numbers.append(int(part))
    return sorted(set(numbers))


def _cluster(
    arguments: argparse.Namespace, ui: Ui, given: dict[str, Any], numbers: list[int]
) -> Cluster:
    """Machines with as many GPUs as the largest number asks for; `given` loses their numbers."""
    if arguments.cluster is not None:
        cluster = read_cluster_flag(arguments, ui, given)
        del given["num_gpus"], given["num_machines"]
        return cluster
    if given.pop("num_machines", None) is not None:
        raise InputError(
            "`--scale` says how many GPUs there are in all, `--num-machines` says so too",
            "leave out `--num-machines`; `--num-gpus` says how many each machine has",
        )
    device = named_device(arguments.gpu, arguments.free_memory)
    if device is None:
        raise InputError(
            "`--scale` thinks of more GPUs than are here, and none is named",
            'name it with `--gpu "H100 SXM"`, or the machines with `--cluster FILE`',
        )
    per_machine = given.pop("num_gpus", GPUS_PER_MACHINE)
    machines = -(-max(numbers) // per_machine)
    if machines == 1:
        return Cluster(nodes=(Node(device=device, num_gpus=per_machine, network=None),))
    return cluster_of(ui, arguments.gpu, device, arguments.interconnect, machines, per_machine)


def _choose(found: FoundOut, cluster: Cluster, given: Mapping[str, Any]) -> Ranking:
    offer = structs.replace(found.offer, devices=cluster.device, given=given)
    return offer.ranking(found.source.spec, found.profile)


def _to_dict(
    found: FoundOut, cluster: Cluster, scaling: Scaling, price: float | None
) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": {
            "name": found.source.spec.name,
            "num_parameters": found.source.spec.num_parameters,
        },
        "method": scaling.method,
        "cluster": cluster_to_dict(cluster),
        "usd_per_gpu_hour": price,
        "scale": [point.to_dict() for point in scaling.points],
        "stops_paying_num_gpus": scaling.stops_paying,
    }


def _show(ui: Ui, found: FoundOut, cluster: Cluster, scaling: Scaling) -> None:
    spec, profile = found.source.spec, found.profile
    machine = cluster.nodes[0]
    network = cluster.device.network
    joined = f", joined by {network.name}" if network and cluster.num_machines > 1 else ""
    method = f", {scaling.method}" if scaling.method else ""
    ui.show(
        f"{spec.name}: {format_count(spec.num_parameters)} parameters{method}; {profile.path}: "
        f"{profile.num_train_rows:,} rows; machines of {machine.num_gpus} x "
        f"{cluster.device.name}{joined}",
        "",
        scale_table(scaling),
        "",
    )
    if scaling.fitting:
        ui.show(
            "each: tokens/s of a GPU, beside the smallest number that fits. lost: of the time, to",
            "failures: checkpoints, restarts, what is computed again; time and USD have it in",
            "them. how: what is divided, and rows x micro-batches of a GPU.",
        )
    for line in _said(found, scaling):
        ui.show(line)


def _said(found: FoundOut, scaling: Scaling) -> list[str]:
    """Where more GPUs stop paying, and where the recipe's batch could not be kept."""
    said = []
    if scaling.stops_paying is not None:
        said.append(
            f"Beyond {scaling.stops_paying:,} GPUs more of them stop paying: the next number is "
            f"less than {100 * WORTH_ADDING:.0f} % as much faster as it has more GPUs."
        )
    policy = effective_batch_size(found.profile.num_train_rows).value
    given = {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(found.offer.given)
    larger = [
        point.num_gpus
        for point in scaling.fitting
        if point.best is not None and point.best.plan.effective_batch_size > policy
    ]
    if larger and not given:
        said.append(
            f"From {min(larger):,} GPUs on a step has more rows than the {policy} of the recipe: "
            "each GPU needs one at least. Fewer, larger steps may learn less; look at the loss."
        )
    return said


def scale_table(scaling: Scaling) -> Table:
    return table("The same run on more GPUs", _COLUMNS, [_row(point) for point in scaling.points])


def _row(point: ScalePoint) -> list[str | Text]:
    best = point.best
    number = f"{point.num_gpus:,}"
    if best is None or point.failures is None:
        return [number, *[""] * (len(_COLUMNS) - 2), Text(point.refused or "", "red")]
    return [
        number,
        format_seconds(best.step.step_seconds),
        format_count(point.tokens_per_second or 0),
        f"{100 * (point.efficiency or 0):.0f} %",
        "" if point.seconds is None else format_seconds(point.seconds),
        "" if point.usd is None else f"{point.usd:,.2f}",
        f"{100 * point.failures.lost_share:.1f} %",
        said_strategy(point),
    ]


def said_strategy(point: ScalePoint) -> str:
    """`FSDP, 8 copies; 2 x 4 rows`: what is divided, micro-batch and accumulation."""
    assert point.best is not None
    plan = point.best.plan
    how = "" if plan.num_gpus == 1 else SHARDING_TITLES[plan.sharding]
    if plan.dp_replicate_size > 1:
        how += f", {plan.dp_replicate_size} copies"
    if plan.offload != "none":
        how += f", {plan.offload} on the host"
    again = f" x {plan.gradient_accumulation_steps}" if plan.gradient_accumulation_steps > 1 else ""
    batch = f"{plan.per_device_train_batch_size}{again} a GPU"
    return f"{how}; {batch}" if how else batch
