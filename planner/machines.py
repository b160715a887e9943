"""Which plans several machines can carry out together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftplan.planner.errors import InputError

if TYPE_CHECKING:
    from ftplan.planner.plan import TrainingPlan


def check_rows(plan: TrainingPlan, num_train_rows: int) -> None:
    """Raises InputError where some GPUs would have no row in a whole pass over the data."""
    if plan.data_parallel_size > num_train_rows:
        raise InputError(
            f"{plan.num_gpus:,} GPUs share {num_train_rows:,} rows: not each has one",
            f"use {num_train_rows:,} GPUs at most; `ftplan plan DATA --scale` says how many pay",
        )


def check_machines(plan: TrainingPlan) -> None:
    """Raises InputError where machines cannot share the plan's GPUs, or its layers."""
    machines = plan.num_machines
    if machines == 1:
        return
    given = f"`--num-machines {machines}`"
    if plan.num_gpus % machines:
        raise InputError(
            f"{given} with {plan.num_gpus} GPUs in all leaves machines with unlike numbers",
            "say with `--num-gpus` how many each machine has",
        )
    if plan.tp_size > plan.gpus_per_machine:
        raise InputError(
            f"`--tp-size {plan.tp_size}` divides each layer over machines of "
            f"{plan.gpus_per_machine} GPUs: every layer would wait for the network, four times",
            f"use `--sharding fsdp` in its place, or `--tp-size {plan.gpus_per_machine}` "
            "within one machine",
        )
    if plan.trainer == "loop":
        raise InputError(
            "`--trainer loop` trains on one GPU", "use `--trainer trl` or `--trainer transformers`"
        )
