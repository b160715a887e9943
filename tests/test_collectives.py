"""What GPUs exchange over links and a network, and how long it takes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ftplan.planner.collectives import Collective
from ftplan.planner.errors import InputError
from ftplan.planner.exchanges import (
    DDP_BUCKET_BYTES,
    ring_collectives,
    step_collectives,
    waited_collectives,
)
from ftplan.planner.hardware_spec import Device, Network
from ftplan.planner.memory import estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import trained_part
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.step_time import estimate_step_time
from ftplan.planner.updated import updated_parameters
from ftplan.profiles import find_gpu, find_network

NDR = Network(name="ndr", bytes_per_second=48e9, latency_seconds=4e-6)
GIGABYTE = 1e9


def collective(
    operation: str = "all_reduce",
    *,
    num_gpus: int = 16,
    per_machine: int = 8,
    num_bytes: float = GIGABYTE,
    count: float = 1,
) -> Collective:
    return Collective(
        operation=operation,  # type: ignore[arg-type]
        num_bytes=num_bytes,
        count=count,
        num_gpus=num_gpus,
        per_machine=per_machine,
    )


def exchanges(model: ModelSpec, **settings: object) -> tuple[Collective, ...]:
    plan = TrainingPlan(**{"method": "full", **settings})  # type: ignore[arg-type]
    return step_collectives(model, plan, updated_parameters(model, plan, trained_part(model, plan)))


def test_two_machines_sum_a_gigabyte_at_the_rate_of_nvlinks_ring() -> None:
    """30 hops, 2 of them between machines; 2 x 15/16 GB at 360 GB/s, which is less than 8 cards."""
    sent = 2 * 15 / 16 * GIGABYTE / 360e9
    latency = 8.4e-6 + 28 * 3.4e-6 + 2 * 14e-6
    assert collective().seconds(360e9, NDR) == pytest.approx(sent + latency)


def test_one_card_for_eight_gpus_bounds_what_leaves_the_machine() -> None:
    slow = structs.replace(NDR, bytes_per_second=0.625e9)
    taken = collective("all_gather").seconds(360e9, slow)
    assert taken == pytest.approx(15 / 16 * GIGABYTE / 5e9, rel=0.01)


def test_gpus_that_are_alone_on_their_machine_have_its_cards_share_alone() -> None:
    taken = collective("reduce_scatter", num_gpus=4, per_machine=1).seconds(360e9, NDR)
    assert taken == pytest.approx(3 / 4 * GIGABYTE / 48e9, rel=0.01)


def test_small_sums_over_many_machines_go_by_trees() -> None:
    """A ring of 8,192 GPUs hops 16,382 times, a tree 2 x (7 + 10) times."""
    small = collective(num_gpus=8192, num_bytes=1e4)
    tree = 14e-6 + 2 * (7 * 1.25e-6 + 10 * 8.5e-6)
    assert small.seconds(360e9, NDR) == pytest.approx(tree, rel=0.01)
    gathered = collective("all_gather", num_gpus=8192, num_bytes=1e4)
    assert gathered.seconds(360e9, NDR) > 8191 * 1.9e-6


@given(
    num_machines=st.integers(1, 64),
    num_bytes=st.floats(1e3, 1e11),
    operation=st.sampled_from(("all_reduce", "all_gather", "reduce_scatter")),
)
def test_more_machines_never_take_less(num_machines: int, num_bytes: float, operation: str) -> None:
    fewer, more = (
        collective(operation, num_gpus=8 * n, num_bytes=num_bytes).seconds(360e9, NDR)
        for n in (num_machines, num_machines + 1)
    )
    assert 0 < fewer <= more


def test_an_unknown_network_is_asked_for() -> None:
    with pytest.raises(InputError, match="what joins them is not known") as raised:
        collective().seconds(360e9, None)
    assert raised.value.hint and "--interconnect" in raised.value.hint


def test_an_unknown_link_within_one_machine_counts_nothing() -> None:
    assert collective(num_gpus=8).seconds(None, None) == 0


def test_ddp_sums_gradients_in_buckets_once_a_step(small_llama: ModelSpec) -> None:
    (summed,) = exchanges(small_llama, num_gpus=32, num_machines=4, gradient_accumulation_steps=4)
    gradients = 2 * small_llama.num_parameters
    assert (summed.num_gpus, summed.per_machine, summed.num_machines) == (32, 8, 4)
    assert summed.count * summed.num_bytes == pytest.approx(gradients)
    assert summed.count == math.ceil(gradients / DDP_BUCKET_BYTES)


def test_fsdp_gathers_twice_and_divides_the_sum_in_each_micro_batch(
    small_llama: ModelSpec,
) -> None:
    """Masters in fp32 are sent as 16-bit copies."""
    gathered, reduced = exchanges(
        small_llama,
        dtype="float32",
        sharding="fsdp",
        num_gpus=16,
        num_machines=2,
        gradient_accumulation_steps=3,
    )
    weights = 2 * small_llama.num_parameters
    assert gathered.count * gathered.num_bytes == pytest.approx(3 * 2 * weights, rel=1e-3)
    assert reduced.count * reduced.num_bytes == pytest.approx(3 * weights, rel=1e-3)
    assert {c.per_machine for c in (gathered, reduced)} == {8}


@pytest.mark.parametrize(
    ("copies", "shards", "together", "copies_together"),
    [(4, 8, 8, 1), (2, 16, 8, 1), (8, 4, 4, 2), (16, 2, 2, 4)],
)
def test_hybrid_sharding_gathers_within_a_copy_and_sums_over_them(
    copies: int, shards: int, together: int, copies_together: int, small_llama: ModelSpec
) -> None:
    gathered, reduced, summed = exchanges(
        small_llama, sharding="fsdp", num_gpus=32, num_machines=4, dp_replicate_size=copies
    )
    assert (gathered.num_gpus, gathered.per_machine) == (shards, together)
    assert (summed.num_gpus, summed.per_machine) == (copies, copies_together)
    assert summed.num_bytes == pytest.approx(reduced.num_bytes / shards)


def seconds(model: ModelSpec, interconnect: str, **settings: object) -> float:
    device: Device = structs.replace(
        find_gpu("H100 SXM").device(), network=find_network(interconnect, 8)
    )
    plan = TrainingPlan(**{"method": "full", "max_length": 512, **settings})  # type: ignore[arg-type]
    step = estimate_step_time(model, plan, device, tokens_per_micro_batch=512, mean_length=512)
    assert step.least_step_seconds <= step.step_seconds <= step.most_step_seconds
    return step.step_seconds


def test_a_slower_network_takes_longer_and_hybrid_sharding_less_of_it(
    llama_2_7b: ModelSpec,
) -> None:
    """Two gathers and a divided sum cross the network, or a sum over eight machines."""
    shared = {"num_gpus": 64, "num_machines": 8, "sharding": "fsdp"}
    names = ("infiniband-ndr", "roce-100g", "ethernet-100g", "ethernet-10g")
    taken = [seconds(llama_2_7b, name, **shared) for name in names]
    assert taken == sorted(taken) and taken[-1] > 10 * taken[0]
    hybrid = seconds(llama_2_7b, "ethernet-10g", **shared, dp_replicate_size=8)
    assert hybrid / taken[-1] == pytest.approx((2 * 7 / 8) / (3 * 63 / 64), rel=0.01)


def test_machines_change_time_and_not_memory(llama_2_7b: ModelSpec) -> None:

    one, four = (
        TrainingPlan(method="full", sharding="fsdp", num_gpus=16, num_machines=n) for n in (1, 4)
    )
    alone, several = (estimate_memory(llama_2_7b, plan) for plan in (one, four))
    assert alone.required_bytes == several.required_bytes
    assert several.host_ram_peak_bytes < alone.host_ram_peak_bytes


def test_tensor_parallelism_waits_for_what_each_layer_exchanges(small_llama: ModelSpec) -> None:
    """Sums in forward of two products a layer, in backward of five gradients; the embeddings and
    the head add one each, and the logits are gathered."""
    plan = TrainingPlan(
        method="full", num_gpus=2, tp_size=2, gradient_checkpointing=False, max_length=64
    )
    summed, gathered = waited_collectives(small_llama, plan, (), 64.0, reached=1.0)
    layers = small_llama.num_hidden_layers
    assert summed.count == 7 * layers + 2
    assert summed.num_bytes == 64 * small_llama.hidden_size * 2
    assert gathered.num_bytes == 64 * small_llama.vocab_size * 2
    again = plan.replace(gradient_checkpointing=True)
    more, _ = waited_collectives(small_llama, again, (), 64.0, reached=1.0)
    assert more.count == 9 * layers + 2


def test_context_parallelism_sends_keys_and_values_round(small_llama: ModelSpec) -> None:
    """Gathered for forward, for what is computed again and for backward; there fp32 gradients go
    round besides, as often as there are GPUs."""
    plan = TrainingPlan(
        method="full",
        sharding="fsdp",
        num_gpus=8,
        cp_size=4,
        gradient_checkpointing=False,
        max_length=64,
    )
    gathered, sent = ring_collectives(small_llama, plan, 16.0, 1.0)
    layers, attention = small_llama.num_hidden_layers, small_llama.layers[0].attention
    own = 16 * 2 * attention.num_key_value_heads * attention.head_dim  # elements of a layer
    assert (gathered.operation, gathered.count, gathered.num_gpus) == ("all_gather", 2 * layers, 4)
    assert gathered.sent_bytes == 2 * layers * 3 / 4 * (4 * own * 2)
    assert (sent.operation, sent.sent_bytes) == ("send", layers * 4 * own * 4)
    again = plan.replace(gradient_checkpointing=True, gradient_accumulation_steps=2)
    assert ring_collectives(small_llama, again, 16.0, 1.0)[0].count == 2 * 3 * layers
    assert ring_collectives(small_llama, plan, 16.0, 0.0)[1].count == 0
    assert ring_collectives(small_llama, plan.replace(cp_size=1), 16.0, 1.0) == ()


def test_what_goes_round_takes_time(llama_2_7b: ModelSpec) -> None:
    """In a step that its links bind, the bytes over their rate."""
    taken = {}
    for rate in (1e8, 2e8):
        device = structs.replace(find_gpu("H100 SXM").device(), link_bytes_per_second=rate)
        plan = TrainingPlan(method="full", sharding="fsdp", num_gpus=8, cp_size=8)
        step = estimate_step_time(
            llama_2_7b, plan, device, tokens_per_micro_batch=8192, mean_length=8192
        )
        taken[rate] = step.step_seconds
        sent = sum(each.sent_bytes for each in step.work.collectives)
    row = 32 * 8192 * 2 * 4096  # keys and values of a row, in elements
    ring = 3 * 7 / 8 * 2 * row + 4 * row
    alone = sum(
        each.sent_bytes
        for each in step_collectives(
            llama_2_7b, plan, updated_parameters(llama_2_7b, plan, trained_part(llama_2_7b, plan))
        )
    )
    assert sent - alone == pytest.approx(ring)
    assert taken[1e8] - taken[2e8] == pytest.approx(sent / 2e8, rel=0.01)


def test_a_neighbour_on_another_machine_is_reached_by_one_card() -> None:
    network = Network(name="net", bytes_per_second=50e9, latency_seconds=4e-6)
    within = Collective(operation="send", num_bytes=1e9, count=3, num_gpus=8, per_machine=8)
    across = structs.replace(within, num_gpus=16)
    assert within.seconds(400e9, network) == pytest.approx(3 * 1e9 / 400e9, rel=0.02)
    assert across.seconds(400e9, network) == pytest.approx(3 * 1e9 / 50e9, rel=0.02)


def test_what_layers_exchange_is_added_to_the_step(llama_2_7b: ModelSpec) -> None:
    taken = []
    for rate in (1e9, 1e11):
        device = structs.replace(find_gpu("H100 SXM").device(), link_bytes_per_second=rate)
        plan = TrainingPlan(method="full", num_gpus=8, tp_size=8, gradient_checkpointing=False)
        step = estimate_step_time(
            llama_2_7b, plan, device, tokens_per_micro_batch=2048, mean_length=2048
        )
        taken.append((step.step_seconds, step.bound_by))
    (slow, bound), (fast, _) = taken
    assert bound == "links between GPUs"
    exchanged = 2 * 7 / 8 * (7 * 32 + 2) * 2048 * 4096 * 2 + 7 / 8 * 2048 * 32000 * 2
    assert slow - fast == pytest.approx(exchanged * (1e-9 - 1e-11), rel=0.1)


@pytest.mark.parametrize(("sharding", "times"), [("zero1", 1), ("zero2", 3)])
def test_zero_waits_for_sums_and_for_what_was_updated(
    sharding: str, times: int, small_llama: ModelSpec
) -> None:
    """ZeRO-2 divides gradients in each micro-batch, ZeRO-1 once a step."""
    plan = TrainingPlan(
        method="full",
        sharding=sharding,
        num_gpus=16,
        num_machines=2,
        gradient_accumulation_steps=3,
    )
    updated = updated_parameters(small_llama, plan, trained_part(small_llama, plan))
    assert step_collectives(small_llama, plan, updated) == ()
    divided, gathered = waited_collectives(small_llama, plan, updated, 64.0, reached=1.0)
    assert divided.count == times * gathered.count
    assert gathered.count * gathered.num_bytes == 2 * small_llama.num_parameters
