"""The tables of docs/scaling.md: `python -m benchmarks.scaling` writes them anew.

Runs on 8 to 16,384 GPUs that nobody ran here: step times by the closed form, failures by the
formula and drawn at random, beside what others have published. A test compares the page with the
same rows.
"""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path

from msgspec import Struct, structs

from benchmarks.pages import Rows, Tables, filled
from ftplan.planner.cluster import Cluster, Node
from ftplan.planner.failures import GPU_SECONDS_BETWEEN_FAILURES, Failures
from ftplan.planner.hardware_spec import Device, Network
from ftplan.planner.memory import estimate_memory, fits, needed_bytes
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.step_time import StepTime, estimate_step_time
from ftplan.planner.units import SECONDS_PER_HOUR, format_bytes, format_count, format_seconds
from ftplan.profiles import find_gpu, find_network, require_model

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"

GPUS_PER_MACHINE = 8
NUMBERS = (8, 16, 64, 256, 1_024, 4_096, 16_384)
LENGTH = 8_192

# Failures that are drawn at each point.
_DRAWN = 20_000
_SEED = 11

_SETTINGS = {
    "method": "full",
    "dtype": "float32",
    "mixed_precision": "bf16",
    "max_length": LENGTH,
}


class Published(Struct, frozen=True, kw_only=True):
    """A figure of others: `tokens_per_second` of a GPU, or `mfu`; `plan`: what comes nearest."""

    what: str
    model: str
    plan: TrainingPlan
    device: Device
    tokens_per_second: float | None = None
    mfu: float | None = None


@cache
def published() -> tuple[Published, ...]:
    """torchtitan's benchmarks of December 2024 (docs: benchmarks/llama3_h100_202412_torchtitan.md),
    tables 1 and 3, and Llama 3's table 4 (arXiv 2407.21783)."""
    titan = {**_SETTINGS, "loss": "stock", "per_device_train_batch_size": 2, "every_n_layers": 2}
    llama = {**_SETTINGS, "sharding": "fsdp"}
    of_titan = structs.replace(_h100(_llama_network()), memory_bandwidth_bytes_per_second=2.4e12)
    found = [
        Published(
            what=f"torchtitan, FSDP, {number} GPUs",
            model="llama-3.1-8b",
            plan=_plan(number, **titan, sharding="fsdp"),
            device=of_titan,
            tokens_per_second=rate,
        )
        for number, rate in ((8, 5_762.0), (128, 5_605.0))
    ]
    found += [
        Published(
            what=f"Llama 3, 4D, {number:,} GPUs",
            model="llama-3.1-405b",
            plan=_plan(number, **llama, dp_replicate_size=number // 256),
            device=_h100(_llama_network()),
            mfu=mfu,
        )
        for number, mfu in ((8_192, 0.43), (16_384, 0.41))
    ]
    return tuple(found)


def beside_published() -> Rows:
    """What is published, what is estimated, and the estimate's bounds."""
    rows = []
    for one in published():
        model = require_model(one.model).spec
        step = _step(model, one.plan, one.device)
        tokens = [
            step.tokens_per_step / seconds
            for seconds in (step.step_seconds, step.most_step_seconds, step.least_step_seconds)
        ]
        assert step.mfu is not None
        per_token = step.mfu / tokens[0]
        if one.tokens_per_second is not None:
            figure, ours = one.tokens_per_second, tokens
            shown = [f"{value:,.0f} tokens/s" for value in (figure, ours[0])]
            bounds = f"{ours[1]:,.0f} to {ours[2]:,.0f}"
        else:
            assert one.mfu is not None
            figure, ours = one.mfu, [per_token * value for value in tokens]
            shown = [f"MFU {100 * value:.0f} %" for value in (figure, ours[0])]
            bounds = f"{100 * ours[1]:.0f} to {100 * ours[2]:.0f} %"
        rows.append([one.what, *shown, bounds, f"{100 * (ours[0] / figure - 1):+.0f} %"])
    return rows


def over_infiniband() -> Rows:
    return _runs("llama-3.1-8b", "infiniband-ndr")


def over_ethernet() -> Rows:
    return _runs("llama-3.1-8b", "ethernet-100g")


def larger_model() -> Rows:
    return _runs("llama-3.1-70b", "infiniband-ndr")


def of_failures() -> Rows:
    """What failures take of a run of 70B: the formula, and as many drawn at random."""
    rows = []
    for number in NUMBERS:
        model = require_model("llama-3.1-70b").spec
        plan = _plan(number, **_SETTINGS, sharding="fsdp")
        cluster = _cluster(number, find_network("infiniband-ndr", GPUS_PER_MACHINE))
        checkpoint = estimate_memory(model, plan, device=cluster.device).disk.checkpoint
        failures = cluster.failures(checkpoint)
        rows.append(
            [
                f"{number:,}",
                format_seconds(failures.seconds_between_failures),
                format_bytes(checkpoint),
                format_seconds(failures.save_seconds),
                format_seconds(failures.young_seconds),
                format_seconds(failures.daly_seconds),
                f"{100 * failures.lost_share:.2f} %",
                f"{100 * drawn_share(failures):.2f} %",
            ]
        )
    return rows


def drawn_share(failures: Failures, number: int = _DRAWN, seed: int = _SEED) -> float:
    """Of the time that passes until so many failures, what is not training that is kept. Failures
    come at random, while training, saving and restarting alike."""
    draw = random.Random(seed)
    each = failures.daly_seconds + failures.save_seconds
    passed = kept = restarting = 0.0
    for _ in range(number):
        until = draw.expovariate(1 / failures.seconds_between_failures)
        passed += until
        kept += max(0.0, until - restarting) // each * failures.daly_seconds
        restarting = failures.restart_seconds
    return 1 - kept / passed


def _runs(name: str, interconnect: str) -> Rows:
    """A row of 8,192 tokens on each GPU, as many GPUs as NUMBERS say."""
    model, network = require_model(name).spec, find_network(interconnect, GPUS_PER_MACHINE)
    rows: Rows = []
    alone = None
    for number in NUMBERS:
        device = _h100(network)
        found = _fastest(model, number, device)
        if found is None:
            smallest = _plan(number, **_SETTINGS, sharding="fsdp")
            lacking = needed_bytes(estimate_memory(model, smallest, device=device))
            rows.append([f"{number:,}", f"needs {format_bytes(lacking)}", *[""] * 6])
            continue
        plan, step = found
        alone = alone or step.tokens_per_second_per_gpu
        assert step.mfu is not None
        copies = f", {plan.dp_replicate_size} copies" if plan.dp_replicate_size > 1 else ""
        rows.append(
            [
                f"{number:,}",
                f"FSDP{copies}",
                format_seconds(step.step_seconds),
                f"{format_seconds(step.least_step_seconds)} to "
                f"{format_seconds(step.most_step_seconds)}",
                format_count(number * step.tokens_per_second_per_gpu),
                f"{100 * step.mfu:.0f} %",
                f"{100 * step.tokens_per_second_per_gpu / alone:.0f} %",
                step.bound_by,
            ]
        )
    return rows


def _fastest(model: ModelSpec, number: int, device: Device) -> tuple[TrainingPlan, StepTime] | None:
    """The fastest of FSDP over all GPUs and over each 1, 4 or 16 machines; None where none fits."""
    found = []
    for machines in (None, 1, 4, 16):
        copies = 1 if machines is None else number // (machines * GPUS_PER_MACHINE)
        if machines is not None and copies < 2:
            continue
        plan = _plan(number, **_SETTINGS, sharding="fsdp", dp_replicate_size=copies)
        if fits(estimate_memory(model, plan, device=device), device):
            found.append((plan, _step(model, plan, device)))
    return min(found, key=lambda one: one[1].step_seconds, default=None)


def _plan(number: int, **settings: object) -> TrainingPlan:
    machines = max(1, number // GPUS_PER_MACHINE)
    return TrainingPlan(**{"num_gpus": number, "num_machines": machines, **settings})  # type: ignore[arg-type]


def _step(model: ModelSpec, plan: TrainingPlan, device: Device) -> StepTime:
    tokens = plan.per_device_train_batch_size * plan.max_length
    return estimate_step_time(
        model, plan, device, tokens_per_micro_batch=tokens, mean_length=plan.max_length
    )


def _h100(network: Network) -> Device:
    return structs.replace(find_gpu("H100 SXM").device(), network=network)


def _llama_network() -> Network:
    """Both ran on RoCE with 400 Gbit/s for each GPU."""
    return find_network("roce-400g", GPUS_PER_MACHINE)


def _cluster(number: int, network: Network) -> Cluster:
    node = Node(device=_h100(network), num_gpus=GPUS_PER_MACHINE, network=network)
    return Cluster(nodes=(node,) * (number // GPUS_PER_MACHINE))


# The tables under each heading, in their order.
TABLES: Tables = {
    "Beside published figures": (beside_published,),
    "8B on InfiniBand": (over_infiniband,),
    "8B on Ethernet": (over_ethernet,),
    "70B on InfiniBand": (larger_model,),
    "Failures": (of_failures,),
}


def main() -> int:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
    print(f"one GPU fails in {GPU_SECONDS_BETWEEN_FAILURES / SECONDS_PER_HOUR:,.0f} hours")
    return 0


if __name__ == "__main__":
    sys.exit(main())
