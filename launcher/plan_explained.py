"""What `plan --explain` adds: where memory and time come from, and what else could be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from ftplan.launcher.costs import usd_for
from ftplan.launcher.own_stack import installed_stack
from ftplan.launcher.planning import Planned
from ftplan.planner.cluster import Cluster, Node
from ftplan.planner.explain import Term, explain
from ftplan.planner.explain_host import explain_host
from ftplan.planner.explain_time import TimeTerm, explain_time
from ftplan.planner.failures import Failures
from ftplan.planner.ranking import Evaluated
from ftplan.planner.run_time import RunTime


class Explained(Struct, frozen=True, kw_only=True):
    """The terms of the chosen plan's memory and time, and the Pareto front of all plans."""

    memory: Sequence[Term]
    host: Sequence[dict[str, Any]]
    time: Sequence[TimeTerm]
    front: Sequence[Evaluated]
    failures: Failures | None

    def to_dict(self, planned: Planned) -> dict[str, Any]:
        """What is added to `plan --json`."""
        return {
            "explain": [term.to_dict() for term in self.memory],
            "explain_host": list(self.host),
            "explain_time": [term.to_dict() for term in self.time],
            "failures": self.failures.to_dict() if self.failures else None,
            "front": [_front_to_dict(planned, one) for one in self.front],
        }


def explained(planned: Planned, cluster: Cluster | None = None) -> Explained:
    """Raises nothing that planning has not. `cluster`: the machines, where they are described."""
    spec, profile = planned.source.spec, planned.profile
    plan, device = planned.chosen.plan, planned.device
    stack = profile.on(installed_stack(device), plan)
    return Explained(
        memory=explain(spec, plan, device, stack, profile.longest_in_run),
        host=explain_host(planned.chosen.memory, plan),
        time=explain_time(spec, plan, device, profile, stack),
        front=planned.offer.front(spec, profile, planned.ranking),
        failures=_failures(planned, cluster),
    )


def _failures(planned: Planned, cluster: Cluster | None) -> Failures | None:
    """What failures cost on the plan's machines; None on a processor, which nobody counted."""
    plan, device = planned.chosen.plan, planned.device
    if device.kind == "cpu":
        return None
    node = Node(device=device, num_gpus=plan.gpus_per_machine, network=device.network)
    machines = cluster or Cluster(nodes=(node,) * plan.num_machines)
    return machines.failures(planned.chosen.memory.disk.checkpoint)


def _front_to_dict(planned: Planned, one: Evaluated) -> dict[str, Any]:
    plan = one.plan
    run = RunTime.of(plan, one.step, planned.profile.num_train_rows)
    return {
        "method": plan.method,
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "every_n_layers": plan.every_n_layers,
        "loss": plan.loss,
        "num_gpus": plan.num_gpus,
        "sharding": plan.sharding,
        "required_bytes": one.memory.required_bytes,
        "seconds_per_row": one.seconds_per_row,
        "run_seconds": run.seconds,
        "usd": usd_for(one.device, plan.num_gpus * run.seconds),
        "chosen": one is planned.ranking.best,
    }
