"""How a run fares on more and more GPUs: what fits, how fast, at what cost, and where more of them
stop paying."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.cluster import Cluster
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError
from ftplan.planner.failures import Failures
from ftplan.planner.memory import needed_bytes
from ftplan.planner.ranking import Evaluated, Ranking
from ftplan.planner.run_time import RunTime
from ftplan.planner.units import SECONDS_PER_HOUR, format_bytes

NUMBERS_OF_GPUS = tuple(2**power for power in range(11))

# More GPUs pay while so much of the time that as many times the GPUs could save is saved.
WORTH_ADDING = 0.5

# A plan for some number of GPUs on a cluster of them, a given method among the settings.
Choose = Callable[[Cluster, Mapping[str, Any]], Ranking]


class ScalePoint(Struct, frozen=True, kw_only=True):
    """A run on some number of GPUs. `refused`: why there is no plan; else `best`.

    `failures`: what they cost, `seconds`: of the run with them, `usd`: of all GPUs for that time,
    None without a price. `efficiency`: tokens a second of one GPU, as a share of what it does on
    the smallest number that fits.
    """

    num_gpus: int
    num_machines: int
    refused: str | None = None
    best: Evaluated | None = None
    run: RunTime | None = None
    failures: Failures | None = None
    seconds: float | None = None
    usd: float | None = None
    efficiency: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all GPUs together."""
        if self.best is None:
            return None
        return self.num_gpus * self.best.step.tokens_per_second_per_gpu

    def to_dict(self) -> dict[str, Any]:
        plan = self.best.plan if self.best else None
        step = self.best.step if self.best else None
        return {
            "num_gpus": self.num_gpus,
            "num_machines": self.num_machines,
            "fits": self.best is not None,
            "refused": self.refused,
            "plan": {
                name: getattr(plan, name) if plan else None
                for name in (
                    *("method", "sharding", "dp_replicate_size", "offload"),
                    *("per_device_train_batch_size", "gradient_accumulation_steps"),
                    *("gradient_checkpointing", "effective_batch_size"),
                )
            },
            "required_bytes": self.best.memory.required_bytes if self.best else None,
            "host_ram_peak_bytes": self.best.memory.host_ram_peak_bytes if self.best else None,
            "checkpoint_bytes": self.best.memory.disk.checkpoint if self.best else None,
            "step_seconds": step.step_seconds if step else None,
            "least_step_seconds": step.least_step_seconds if step else None,
            "most_step_seconds": step.most_step_seconds if step else None,
            "tokens_per_second": self.tokens_per_second,
            "mfu": step.mfu if step else None,
            "bound_by": step.bound_by if step else None,
            "efficiency": self.efficiency,
            "steps": self.run.steps if self.run else None,
            "failures": self.failures.to_dict() if self.failures else None,
            "seconds": self.seconds,
            "usd": self.usd,
        }


class Scaling(Struct, frozen=True, kw_only=True):
    """The points of a scaling table. `method`: that all of them train by, None where none fits;
    `stops_paying`: the number of GPUs beyond which more save too little, None where all pay."""

    points: tuple[ScalePoint, ...]
    method: str | None
    stops_paying: int | None

    @property
    def fitting(self) -> list[ScalePoint]:
        return [point for point in self.points if point.best is not None]


def scale(
    data: DataProfile,
    given: Mapping[str, Any],
    numbers: Sequence[int],
    cluster_of: Callable[[int], Cluster],
    choose: Choose,
    usd_per_gpu_hour: float | None,
) -> Scaling:
    """Plans on each of `numbers` of GPUs, `given` settings kept.

    The method is the one chosen on the largest number that one machine has, else on the first
    beyond that fits, so that points differ in GPUs alone. `cluster_of`: the machines with so many
    GPUs, raises InputError where they cannot be; `choose`: the plans on them.
    """
    machines = {number: _machines(cluster_of, number) for number in numbers}
    known: dict[int, Ranking | str] = {}
    method = given.get("method")
    for number in _where_to_choose(machines):
        if method is None:
            known[number] = ranking = _chosen(choose, machines[number], given, data, number)
            if isinstance(ranking, Ranking) and ranking.best is not None:
                method = ranking.best.plan.method
    kept = given if method is None else {**given, "method": method}
    points = []
    for number in numbers:
        found = known.get(number)
        if not _is_of(found, method):
            found = _chosen(choose, machines[number], kept, data, number)
        assert found is not None
        points.append(_point(number, machines[number], found, data, usd_per_gpu_hour))
    return Scaling(
        points=tuple(_with_efficiency(points)), method=method, stops_paying=_stops_paying(points)
    )


def _machines(cluster_of: Callable[[int], Cluster], number: int) -> Cluster | str:
    try:
        return cluster_of(number)
    except InputError as error:
        return error.message


def _where_to_choose(machines: Mapping[int, Cluster | str]) -> list[int]:
    """The largest number on one machine, then larger ones; smaller ones where there is none."""
    possible = {n: c for n, c in machines.items() if isinstance(c, Cluster)}
    single = [n for n, c in sorted(possible.items()) if c.num_machines == 1]
    return single[-1:] + [n for n in sorted(possible) if n not in single]


def _is_of(found: Ranking | str | None, method: str | None) -> bool:
    if isinstance(found, Ranking) and found.best is not None:
        return found.best.plan.method == method
    return found is not None and method is None


def _chosen(
    choose: Choose, cluster: Cluster | str, given: Mapping[str, Any], data: DataProfile, number: int
) -> Ranking | str:
    """The plans, or why there can be none."""
    if isinstance(cluster, str):
        return cluster
    if number > data.num_train_rows:
        return f"more GPUs than the {data.num_train_rows:,} rows"
    numbers = {"num_gpus": cluster.num_gpus, "num_machines": cluster.num_machines}
    try:
        return choose(cluster, {**given, **numbers})
    except InputError as error:
        return error.message


def _point(
    number: int,
    cluster: Cluster | str,
    found: Ranking | str,
    data: DataProfile,
    usd_per_gpu_hour: float | None,
) -> ScalePoint:
    machines = cluster.num_machines if isinstance(cluster, Cluster) else 0
    if isinstance(cluster, str) or isinstance(found, str):
        why = found if isinstance(found, str) else "cannot be"
        return ScalePoint(num_gpus=number, num_machines=machines, refused=why)
    best = found.best
    if best is None:
        why = _why_not(found)
        return ScalePoint(num_gpus=number, num_machines=machines, refused=why)
    run = RunTime.of(best.plan, best.step, data.num_train_rows)
    failures = cluster.failures(best.memory.disk.checkpoint)
    seconds = run.seconds / failures.training_share if failures.training_share > 0 else None
    usd = None
    if seconds is not None and usd_per_gpu_hour is not None:
        usd = number * usd_per_gpu_hour * seconds / SECONDS_PER_HOUR
    return ScalePoint(
        num_gpus=number,
        num_machines=machines,
        best=best,
        run=run,
        failures=failures,
        seconds=seconds,
        usd=usd,
    )


def _why_not(found: Ranking) -> str:
    """Why none of a ranking's plans can be."""
    if found.nearest is None:
        return found.rejected[0].reason
    needed = needed_bytes(found.nearest.memory, found.margin)
    return f"does not fit: needs {format_bytes(needed)} of each GPU"


def _with_efficiency(points: Sequence[ScalePoint]) -> list[ScalePoint]:
    fitting = [point for point in points if point.best is not None]
    if not fitting:
        return list(points)
    smallest = min(fitting, key=lambda point: point.num_gpus).best
    assert smallest is not None
    alone = smallest.step.tokens_per_second_per_gpu
    return [
        structs.replace(point, efficiency=point.best.step.tokens_per_second_per_gpu / alone)
        if point.best is not None
        else point
        for point in points
    ]


def _stops_paying(points: Sequence[ScalePoint]) -> int | None:
    """The number of GPUs after which the next saves less than WORTH_ADDING of what it could."""
    timed = [(point.num_gpus, point.seconds) for point in points]
    fitting = sorted((number, seconds) for number, seconds in timed if seconds is not None)
    for (number, seconds), (more, shorter) in pairwise(fitting):
        could = more / number - 1
        if seconds / shorter - 1 < WORTH_ADDING * could:
            return number
    return None
