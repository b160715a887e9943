"""ZeRO-3 in the dry run: each GPU's bytes counted by hand, what is gathered and for how long.

All of it was compared with DeepSpeed 0.18.2 itself, which is no dependency of the tests
(docs/dry-run.md).
"""

from __future__ import annotations

from math import ceil
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.dry_run import zero3
from ftplan.launcher.dry_run.step import DryRun, dry_run
from ftplan.launcher.emit import method_settings
from ftplan.launcher.training.build import meta_model
from ftplan.planner import coordinator
from ftplan.planner import zero3 as planner_zero3
from ftplan.planner.memory_record import MemoryRecord
from ftplan.planner.plan import TrainingPlan
from tests.dry_runs import LLAMA, PHASES, REENTRANT, case

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

ZERO3: dict[str, Any] = {"sharding": "zero3", "num_gpus": 2}
FULL: dict[str, Any] = {"method": "full", "dtype": "bfloat16", "mixed_precision": "bf16"}
BUCKET = 60_000
# Norms are whole on each GPU; all else is gathered for its module alone.
AT_ONCE = {
    "PREFETCH_BUCKET_SIZE": 0,
    "PARAM_PERSISTENCE_THRESHOLD": 100,
    "MAX_REUSE_DISTANCE": 0,
}
DEFAULTS = {"MAX_REUSE_DISTANCE": coordinator.MAX_REUSE_DISTANCE}


def zero3_run(constants: dict[str, int], **settings: Any) -> DryRun:
    with (
        mock.patch.multiple(coordinator, **constants),
        mock.patch.object(zero3, "REDUCE_BUCKET_SIZE", BUCKET),
    ):
        return dry_run(case(**{**ZERO3, **FULL, **settings}))


def shapes() -> dict[str, int]:
    """Elements of each parameter."""
    model = meta_model(LLAMA, method_settings(TrainingPlan(method="full")))
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def most_gathered(record: MemoryRecord, phase: str) -> int:
    """Bytes of gathered parameters at their highest in the last of these phases."""
    starts = [*record.phases, (len(record.events), "")]
    start, end = [
        (at, starts[n + 1][0]) for n, (at, name) in enumerate(record.phases) if name == phase
    ][-1]
    now = most = 0
    for position, event in enumerate(record.events[:end]):
        storage = record.storages[max(event, ~event)]
        if storage.component == "communication" and storage.shape != (BUCKET,):
            now += storage.num_bytes if event >= 0 else -storage.num_bytes
        if position >= start:
            most = max(most, now)
    return most


@pytest.mark.parametrize("num_gpus", [2, 3])
def test_what_is_held_between_steps_by_hand(num_gpus: int) -> None:
    record = zero3_run(AT_ONCE, num_gpus=num_gpus).record
    held = record.components_at(record.phases[-1][0])
    share = sum(ceil(numel / num_gpus) for numel in shapes().values())
    buffers = held["weights"] - 2 * share
    assert 0 < buffers <= 128  # the rotary embedding's
    assert held["gradients"] == 2 * share
    # fp32 weights and Adam's two states, one of each for each of the two groups of decay.
    assert held["optimizer_states"] == pytest.approx(3 * 4 * share, abs=16)
    whole = [n for n in shapes().values() if n <= AT_ONCE["PARAM_PERSISTENCE_THRESHOLD"]]
    padded = sum(num_gpus * ceil(numel / num_gpus) for numel in whole)
    assert held["communication"] == 2 * (BUCKET + padded)


def test_a_module_has_its_own_parameters_only() -> None:
    """Without fetching ahead, and nothing kept: the largest parameter beside the norms."""
    record = zero3_run(AT_ONCE).record
    numels = shapes().values()
    norms = sum(n for n in numels if n <= AT_ONCE["PARAM_PERSISTENCE_THRESHOLD"])
    assert most_gathered(record, "forward") == 2 * (norms + max(numels))


def test_what_is_used_again_soon_stays() -> None:
    """The model has fewer elements than `MAX_REUSE_DISTANCE`: from the second step on, backward
    finds every parameter gathered."""
    record = zero3_run(DEFAULTS).record
    assert most_gathered(record, "backward") >= 2 * sum(shapes().values())


def test_as_much_is_fetched_ahead_as_may_live() -> None:
    """One parameter at every module, of which half have none: until `MAX_LIVE_PARAMETERS` are
    there, the last of which is fetched whole."""
    live = 60_000
    constants = {"PREFETCH_BUCKET_SIZE": 1, "MAX_LIVE_PARAMETERS": live}
    record = zero3_run({**AT_ONCE, **constants}).record
    numels = shapes().values()
    norms = sum(n for n in numels if n <= AT_ONCE["PARAM_PERSISTENCE_THRESHOLD"])
    assert 2 * live <= most_gathered(record, "forward") <= 2 * (live + max(numels) + norms)


def test_what_is_fetched_together_lies_in_a_buffer_and_beside_it() -> None:
    """`AllGatherCoalescedHandle`: query, key and value weights and more, up to the bucket, are in
    one buffer; the first that is waited for makes copies of all."""
    together = {**AT_ONCE, "PREFETCH_BUCKET_SIZE": 10_000, "MAX_LIVE_PARAMETERS": 20_000}
    record = zero3_run(together).record
    groups = {s.num_bytes for s in record.storages if s.shape == (64 * (64 + 32 + 32 + 64),)}
    assert groups == {2 * 64 * (64 + 32 + 32 + 64)}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="full"),
        pytest.param({"gradient_checkpointing": True}, id="full, checkpointing"),
        pytest.param({"method": "lora", **REENTRANT}, id="lora, checkpointing"),
        pytest.param({"offload": "parameters"}, id="offload"),
    ],
)
def test_more_gpus_never_take_more(settings: dict[str, Any]) -> None:
    peaks = [zero3_run(AT_ONCE, num_gpus=n, **settings).record.phase_peaks() for n in (2, 5)]
    for phase in PHASES:
        two, five = (peak[phase].allocated_bytes for peak in peaks)
        assert two > five or (two >= five and "offload" in settings), phase


def test_one_sub_group_is_stepped_on_at_a_time() -> None:
    """Its gradients in fp32 live only then."""
    whole = zero3_run(AT_ONCE).record
    with mock.patch.object(planner_zero3, "SUB_GROUP_SIZE", 10_000):
        parts = zero3_run(AT_ONCE).record

    def at_step(record: MemoryRecord) -> int:
        return record.components_at(record.phase_peaks()["optimizer step"].position)["gradients"]

    share = sum(shapes().values()) // 2
    assert at_step(whole) > 2 * share + 4 * 0.9 * share
    assert at_step(parts) < 2 * share + 4 * 0.5 * share


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    run = zero3_run(AT_ONCE, offload="optimizer")
    held = run.record.components_at(run.record.phases[-1][0])
    assert held["gradients"] == held["optimizer_states"] == 0 < held["weights"]
    run = zero3_run(AT_ONCE, offload="parameters")
    held = run.record.components_at(run.record.phases[-1][0])
    assert held["gradients"] == held["optimizer_states"] == 0
    assert held["weights"] <= 128  # the rotary embedding's buffers


def test_the_parameters_are_counted_whole() -> None:
    run = zero3_run(DEFAULTS)
    assert run.num_trainable_parameters == run.num_parameters == sum(shapes().values())
    assert run.num_layers_traced == run.num_layers


def test_a_head_that_the_loss_reads_is_gathered_from_forward_to_the_step() -> None:
    """TRL reads its weight outside of it, so it is fetched for the whole model."""
    fused = zero3_run(AT_ONCE, loss="trl-fused").record
    numels = shapes()
    layers = [n for name, n in numels.items() if ".layers." in name]
    norms = sum(n for n in numels.values() if n <= AT_ONCE["PARAM_PERSISTENCE_THRESHOLD"])
    head = numels["lm_head.weight"]
    assert most_gathered(fused, "backward") >= 2 * (norms + head + max(layers))
