"""Time of a step: FLOPs derived a second way, and how time follows the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ftplan.planner.collectives import Collective
from ftplan.planner.families import FAMILIES
from ftplan.planner.hardware_spec import Device
from ftplan.planner.methods import COMPARED_METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import trained_part
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.step_time import (
    StepTime,
    StepWork,
    estimate_step_time,
    forward_flops,
    host_seconds,
    micro_batch_flops,
    step_work,
    time_of,
)
from ftplan.planner.updated import updated_parameters
from ftplan.planner.weights import weight_memory_bytes

MakeSpec = Callable[..., ModelSpec]

TOKENS, LENGTH = 4096, 512


def flops(model: ModelSpec, plan: TrainingPlan, length: int = LENGTH) -> float:
    return micro_batch_flops(model, plan, TOKENS, length)


def plan_of(method: str, *, checkpointing: bool = False, loss: str = "stock") -> TrainingPlan:
    return TrainingPlan(
        method=method,
        quantization="nf4" if method == "qlora" else "none",
        gradient_checkpointing=checkpointing,
        loss=loss,
    )


def step(
    model: ModelSpec, plan: TrainingPlan, device: Device, *, tokens: float = TOKENS
) -> StepTime:
    return estimate_step_time(
        model, plan, device, tokens_per_micro_batch=tokens, mean_length=LENGTH
    )


def work(
    model: ModelSpec, plan: TrainingPlan, device: Device, *, tokens: float = TOKENS
) -> StepWork:
    return step_work(model, plan, device, tokens_per_micro_batch=tokens, mean_length=LENGTH)


# --- FLOPs


def test_forward_of_llama_2_7b_by_hand(llama_2_7b: ModelSpec) -> None:
    """A token: two FLOPs for each weight of the matrices it passes, and in every layer
    scores and mixing, 4 x 4096 FLOPs for each of the tokens before it, on average half a row.
    """
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
    attention = 32 * 4 * 4096 * (LENGTH / 2)
    plan = plan_of("full")
    counted = forward_flops(llama_2_7b, plan, TOKENS, LENGTH)
    assert counted == pytest.approx(TOKENS * (2 * matrices + attention), rel=1e-12)


def test_a_token_of_a_mixture_passes_its_own_experts_only(tiny_spec: MakeSpec) -> None:
    """Mixtral of width 64: attention 12,288 weights, router 4 x 64, two experts of 3 x 64 x 96."""
    model = tiny_spec("mixtral")
    plan = plan_of("full")
    weights = 3 * (12_288 + 4 * 64 + 2 * 3 * 64 * 96) + 128 * 64
    attention = 3 * 4 * 64 * (LENGTH / 2)
    counted = forward_flops(model, plan, TOKENS, LENGTH)
    assert counted == pytest.approx(TOKENS * (2 * weights + attention), rel=1e-12)


def test_full_training_takes_6_flops_a_parameter_and_token(llama_2_7b: ModelSpec) -> None:
    """The rule of Kaplan et al. 2020 (arXiv 2001.08361), where the vocabulary is small."""
    assert flops(llama_2_7b, plan_of("full")) == pytest.approx(
        6 * llama_2_7b.num_parameters * TOKENS, rel=0.04
    )


def test_lora_takes_4_flops_a_parameter_and_token(llama_2_7b: ModelSpec) -> None:
    """No gradients of the frozen weights."""
    lora = flops(llama_2_7b, plan_of("lora"))
    assert lora == pytest.approx(4 * llama_2_7b.num_parameters * TOKENS, rel=0.04)
    assert lora == flops(llama_2_7b, plan_of("qlora"))


def test_checkpointing_adds_the_forward_of_the_layers(llama_2_7b: ModelSpec) -> None:
    """But for the last product: torch stops once all that backward wants is there again."""
    plan = plan_of("full")
    head = 2 * TOKENS * llama_2_7b.embedding_parameters
    layers = forward_flops(llama_2_7b, plan, TOKENS, LENGTH) - head
    down = 32 * 2 * 4096 * 11008 * TOKENS
    added = flops(llama_2_7b, plan_of("full", checkpointing=True)) - flops(llama_2_7b, plan)
    assert added == pytest.approx(layers - down, rel=1e-12)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_checkpointing_of_adapters_reaches_the_first_layers_input(
    method: str, llama_2_7b: ModelSpec
) -> None:
    """All is computed again but down_proj's last product, of B. And the first layer's input has a
    gradient, through q, k and v and their A."""
    plan = plan_of(method)
    head = 2 * TOKENS * llama_2_7b.embedding_parameters
    layers = forward_flops(llama_2_7b, plan, TOKENS, LENGTH) - head
    last = 32 * 2 * 16 * 4096 * TOKENS
    first = 3 * (2 * 4096 * 4096 + 2 * 16 * 4096) * TOKENS
    added = flops(llama_2_7b, plan_of(method, checkpointing=True)) - flops(llama_2_7b, plan)
    assert added == pytest.approx(layers - last + first, rel=1e-12)


def test_a_fused_loss_computes_the_logits_twice(llama_2_7b: ModelSpec) -> None:
    """Of the 511 tokens a row that predict; a stock loss has logits of all 512."""
    added = flops(llama_2_7b, plan_of("lora", loss="trl-fused")) - flops(
        llama_2_7b, plan_of("lora")
    )
    predicting = TOKENS * 511 // 512
    assert added == pytest.approx(2 * (3 * predicting - 2 * TOKENS) * 32000 * 4096, rel=1e-9)


def test_freeze_goes_back_through_the_trained_layers_only(llama_2_7b: ModelSpec) -> None:
    """Forward of all, and of two layers out of 32 the gradients of inputs and weights. Attention
    goes back in five products, of which the scores are forward's again."""
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    attention = 4 * 4096 * (LENGTH / 2)
    forward = 32 * (2 * layer + attention) + 2 * 32000 * 4096
    backward = 2 * (4 * layer + 2.5 * attention) + 2 * 32000 * 4096
    plan = plan_of("freeze")
    assert flops(llama_2_7b, plan) == pytest.approx(TOKENS * (forward + backward), rel=1e-12)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_more_is_trained_more_is_computed(family: str, tiny_spec: MakeSpec) -> None:
    model = tiny_spec(family)
    assert flops(model, plan_of("freeze")) < flops(model, plan_of("full"))
    assert flops(model, plan_of("lora").replace(lora_rank=1)) < flops(model, plan_of("full"))


def test_attention_grows_with_the_square_of_the_row(llama_2_7b: ModelSpec) -> None:
    """For the same tokens the part beyond the matrices is proportional to the length. Two products
    forward, five backward."""
    plan = plan_of("full")
    base, twice, four = (flops(llama_2_7b, plan, length) for length in (1024, 2048, 4096))
    assert four - twice == pytest.approx(2 * (twice - base), rel=1e-9)
    assert twice - base == pytest.approx(3.5 * TOKENS * 32 * 2 * 4096 * 1024, rel=1e-9)


# --- time


@given(
    method=st.sampled_from(sorted(COMPARED_METHODS)),
    checkpointing=st.booleans(),
    device=st.sampled_from(["T4", "RTX 4090", "A100"]),
    tokens=st.integers(1, 100_000),
    more=st.integers(1, 10_000),
)
def test_more_tokens_take_more_time_but_less_each(
    method: str,
    checkpointing: bool,
    device: str,
    tokens: int,
    more: int,
    small_llama: ModelSpec,
    devices: dict[str, Device],
) -> None:
    plan = plan_of(method, checkpointing=checkpointing)
    few = step(small_llama, plan, devices[device], tokens=tokens)
    many = step(small_llama, plan, devices[device], tokens=tokens + more)
    assert 0 < few.step_seconds <= many.step_seconds
    assert many.bound_by == "launching kernels" or few.step_seconds < many.step_seconds
    assert few.tokens_per_second_per_gpu <= many.tokens_per_second_per_gpu * (1 + 1e-9)


def test_a_faster_card_takes_less_time(small_llama: ModelSpec, devices: dict[str, Device]) -> None:
    plan = plan_of("lora").replace(mixed_precision="fp16", dtype="float16")
    seconds = [step(small_llama, plan, devices[name]).step_seconds for name in ("A100", "T4")]
    assert seconds[0] < seconds[1]


def test_a_step_is_its_micro_batches(llama_2_7b: ModelSpec, devices: dict[str, Device]) -> None:
    one = step(llama_2_7b, plan_of("lora"), devices["A100"])
    plan = plan_of("lora").replace(gradient_accumulation_steps=8)
    eight = step(llama_2_7b, plan, devices["A100"])
    assert eight.tokens_per_step == 8 * one.tokens_per_step == 8 * TOKENS
    assert eight.step_flops == pytest.approx(8 * one.step_flops)
    assert eight.forward_flops == pytest.approx(8 * one.forward_flops)
    # The optimizer runs once.
    assert 7 * one.step_seconds < eight.step_seconds <= 8 * one.step_seconds


def test_a_step_never_beats_the_dense_peak(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    for device in devices.values():
        plan = plan_of("lora").replace(mixed_precision="no", dtype="float32")
        result = step(llama_2_7b, plan, device)
        assert result.step_flops / result.step_seconds < device.peak_flops_per_second["float32"]


def test_a_card_without_bfloat16_is_taken_at_its_fp32_rate(
    small_llama: ModelSpec, devices: dict[str, Device]
) -> None:
    bf16 = step(small_llama, plan_of("lora"), devices["T4"])
    half = plan_of("lora").replace(mixed_precision="fp16", dtype="float16")
    fp16 = step(small_llama, half, devices["T4"])
    assert bf16.step_seconds > fp16.step_seconds


def test_reading_the_weights_bounds_a_step_of_few_tokens(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    plan = plan_of("lora")
    assert step(llama_2_7b, plan, devices["CPU"], tokens=1).bound_by == "memory bandwidth"
    assert step(llama_2_7b, plan_of("lora"), devices["T4"]).bound_by == "arithmetic"


def test_the_optimizer_moves_adapters_in_their_own_width(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    """39,976,960 fp32 adapters: parameter, gradient and two states read, all but the gradient
    written: (4 + 3) x 4 bytes each over 85 % of 2e12 bytes/s, whatever the frozen base's dtype.
    """
    plan = plan_of("lora")
    one, two = (
        step(llama_2_7b, plan.replace(gradient_accumulation_steps=n), devices["A100"]).step_seconds
        for n in (1, 2)
    )
    assert 2 * one - two == pytest.approx(39_976_960 * 28 / (0.85 * 2e12), rel=1e-3)


def test_freeze_moves_activations_of_its_trained_layers_only(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    """30 of 32 layers save nothing and are not gone back through: they move what forward
    writes and reads, about half of what a trained layer moves.
    """
    fast = Device(
        name="endless arithmetic",
        kind="cuda",
        total_bytes=devices["A100"].total_bytes,
        free_bytes=devices["A100"].free_bytes,
        memory_bandwidth_bytes_per_second=2e12,
        peak_flops_per_second={"float32": 1e30, "bfloat16": 1e30},
        compute_capability=(8, 0),
    )
    frozen = step(llama_2_7b, plan_of("freeze"), fast, tokens=100_000).step_seconds
    full = step(llama_2_7b, plan_of("full"), fast, tokens=100_000).step_seconds
    assert frozen < 0.75 * full


@pytest.mark.parametrize(
    ("quantization", "checkpointing", "written_and_read"),
    [("nf4", False, 2), ("nf4", True, 3), ("int8", False, 2), ("int8", True, 2)],
)
def test_a_quantized_base_is_expanded_for_its_products(
    quantization: str,
    checkpointing: bool,
    written_and_read: int,
    llama_2_7b: ModelSpec,
    devices: dict[str, Device],
) -> None:
    """6,476,005,376 weights. 4 bits: forward, recomputation and backward each read them, write a
    bf16 copy and read it: beside the reading of the weights themselves 2 + 2 bytes each. LLM.int8
    casts them in backward only and scales the copy in place, which is twice that.
    """
    plan = plan_of("qlora", checkpointing=checkpointing).replace(quantization=quantization)
    plain = plan.replace(method="lora", quantization="none")
    passes = 3 if checkpointing else 2
    weights = weight_memory_bytes(llama_2_7b, plan) - weight_memory_bytes(llama_2_7b, plain)
    expected = passes * weights + written_and_read * 4 * 6_476_005_376
    # One token, so that activations, which differ too, weigh little.
    moved = [work(llama_2_7b, p, devices["A100"], tokens=1).moved_bytes for p in (plan, plain)]
    assert moved[0] - moved[1] == pytest.approx(expected, rel=0.02)


def test_a_quantized_base_costs_time_on_equal_terms(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    """A few hundred tokens at once, adapters of one width: what is left is the expanding."""
    for tokens in (64, 512):
        lora, qlora = (
            step(
                llama_2_7b,
                plan_of(method, checkpointing=True).replace(trainer="transformers"),
                devices["A100"],
                tokens=tokens,
            ).step_seconds
            for method in ("lora", "qlora")
        )
        assert qlora > lora


# --- launching


def test_kernels_are_counted_as_torch_carries_them_out() -> None:
    """Within 3 % of the operations that a real step of transformers and PEFT dispatches."""
    pytest.importorskip("torch", reason="torch's own operations are the reference")
    pytest.importorskip("peft", reason="PEFT's adapters are the reference")
    from benchmarks.launching import counted, dispatched, plans, step_of

    for plan in plans():
        assert counted(plan) == pytest.approx(dispatched(step_of(plan)), rel=0.03), plan


def test_a_step_takes_no_less_than_launching_its_kernels(
    small_llama: ModelSpec, devices: dict[str, Device]
) -> None:
    """Without checkpointing's hooks 10.5 µs an operation and 5 µs a launch."""
    of = work(small_llama, plan_of("full"), devices["A100"], tokens=16)
    result = time_of(of, devices["A100"])
    assert result.bound_by == "launching kernels"
    kernels = of.kernels + of.optimizer_kernels
    assert result.step_seconds == pytest.approx(15.5e-6 * kernels) == host_seconds(of)
    hooked = work(small_llama, plan_of("full", checkpointing=True), devices["A100"], tokens=16)
    assert hooked.kernels > of.kernels
    assert host_seconds(hooked) > hooked.kernels * 20e-6


def test_a_processor_computes_what_it_has_called(
    small_llama: ModelSpec, devices: dict[str, Device]
) -> None:
    """The host of a GPU runs ahead, a processor is the host itself."""
    of = work(small_llama, plan_of("full"), devices["CPU"])
    idle = time_of(structs.replace(of, kernels=0, optimizer_kernels=0), devices["CPU"])
    seconds = time_of(of, devices["CPU"]).step_seconds
    assert seconds - idle.step_seconds == pytest.approx(host_seconds(of))


def test_optimizers_launch_for_lists_or_for_each_parameter(llama_2_7b: ModelSpec) -> None:
    """448 adapter matrices: ten lists of 48 tensors at most; bitsandbytes updates one by one."""
    found = {}
    for optim in ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "adafactor"):
        plan = plan_of("lora").replace(optim=optim)
        updated = updated_parameters(llama_2_7b, plan, trained_part(llama_2_7b, plan))
        found[optim] = plan.optimizer.num_kernels(updated, "cuda")
    expected = {"adamw_torch_fused": 10, "adamw_torch": 90, "adamw_8bit": 448, "adafactor": 4480}
    assert found == expected


# --- bounds, MFU, energy


@given(
    method=st.sampled_from(("full", "lora", "qlora")),
    checkpointing=st.booleans(),
    device=st.sampled_from(("A100", "T4", "RTX 4090", "CPU")),
    tokens=st.integers(1, 100_000),
)
def test_a_step_lies_between_its_bounds(
    method: str,
    checkpointing: bool,
    device: str,
    tokens: int,
    small_llama: ModelSpec,
    devices: dict[str, Device],
) -> None:
    plan = plan_of(method, checkpointing=checkpointing)
    result = step(small_llama, plan, devices[device], tokens=tokens)
    assert 0 < result.least_step_seconds < result.step_seconds < result.most_step_seconds
    assert result.most_step_seconds < 5 * result.least_step_seconds


def test_bounds_are_of_what_overlaps(devices: dict[str, Device]) -> None:
    """An A100 of 300 TFLOP/s and 2 TB/s that nobody measured, links of 100 GB/s: arithmetic of
    0.7225 s at the peak takes 1 s of it at 0.85 x 0.85, and 1.7 TB another."""
    card = structs.replace(devices["A100"], link_bytes_per_second=100e9)
    summed = Collective(operation="all_reduce", num_bytes=50e9, count=1, num_gpus=2, per_machine=2)
    of = StepWork(
        kind="cuda", dtype="bfloat16", tokens=1.0, forward_flops=1.0, flops=216.75e12,
        model_flops=108.375e12, float32_flops=0.0, moved_bytes=1.7e12, optimizer_bytes=0.0,
        collectives=(summed,), overlapping=1.0, copied_bytes=0.0, host_bytes=0.0,
        kernels=0, optimizer_kernels=0, hooked=False,
    )  # fmt: skip
    result = time_of(of, card)
    assert result.step_seconds == pytest.approx(1 + 1)
    assert result.least_step_seconds == pytest.approx(max(0.7225, 1.7 / 1.84))
    assert result.most_step_seconds == pytest.approx(
        0.7225 / (0.6 * 0.74) + 1.7 / 1.4 + 0.5, rel=1e-4
    )
    assert result.mfu == pytest.approx(108.375 / (2 * 300))


def test_mfu_counts_no_recomputation(llama_2_7b: ModelSpec, devices: dict[str, Device]) -> None:
    """Checkpointing computes layers again, all but their last products, and the older function
    those too; what the model asks for is the same."""
    plain, again = (
        work(llama_2_7b, plan_of("full", checkpointing=c), devices["A100"]) for c in (False, True)
    )
    assert plain.model_flops == plain.flops == pytest.approx(again.model_flops)
    layers = again.forward_flops - 2 * TOKENS * 32000 * 4096
    last = 2 * TOKENS * 32 * 4096 * 11008
    assert again.flops - again.model_flops == pytest.approx(layers - last)
    reentrant = work(
        llama_2_7b,
        plan_of("full", checkpointing=True).replace(use_reentrant=True),
        devices["A100"],
    )
    assert reentrant.flops - reentrant.model_flops == pytest.approx(layers)


def test_energy_is_a_share_of_the_rated_power(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    card = structs.replace(devices["A100"], power_watts=400.0)
    result = step(llama_2_7b, plan_of("lora"), card)
    assert result.step_joules == pytest.approx(0.76 * 400 * result.step_seconds)
    assert result.joules_per_token == pytest.approx(304 / result.tokens_per_second_per_gpu)
    assert step(llama_2_7b, plan_of("lora"), devices["A100"]).step_joules is None


def test_what_waits_on_the_host_is_copied_in_each_micro_batch(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    """Of 2 GPUs each has half of 13.5 GB of 16-bit weights: forward and backward take both."""
    device = structs.replace(devices["A100"], host_link_bytes_per_second=25e9)
    plan = TrainingPlan(method="lora", num_gpus=2, sharding="fsdp", gradient_accumulation_steps=4)
    there = plan.replace(offload="parameters")
    size = {"tokens_per_micro_batch": 512.0, "mean_length": 512.0}
    work, waiting = (step_work(llama_2_7b, one, device, **size) for one in (plan, there))
    assert work.copied_bytes == work.host_bytes == 0
    assert waiting.copied_bytes == pytest.approx(4 * llama_2_7b.num_parameters * 2, rel=0.02)
    assert (waiting.flops, waiting.moved_bytes) == (work.flops, work.moved_bytes)
    assert waiting.host_bytes == 2 * work.optimizer_bytes and waiting.optimizer_bytes == 0
    taken, without = time_of(waiting, device), time_of(work, device)
    assert taken.step_seconds > 4 * llama_2_7b.num_parameters * 2 / 25e9 > without.step_seconds
    assert taken.bound_by == "links to the host"
    assert taken.least_step_seconds < taken.step_seconds < taken.most_step_seconds


def test_updated_parameters_come_back_once_from_an_optimizer_on_the_host(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    plan = TrainingPlan(
        method="full",
        dtype="float32",
        num_gpus=2,
        sharding="zero2",
        offload="optimizer",
        gradient_accumulation_steps=4,
    )
    size = {"tokens_per_micro_batch": 512.0, "mean_length": 512.0}
    work = step_work(llama_2_7b, plan, devices["A100"], **size)
    assert work.copied_bytes == pytest.approx(5 * llama_2_7b.num_parameters * 4 / 2, rel=0.01)
    assert work.host_bytes == pytest.approx(llama_2_7b.num_parameters * (3 * 4 + 2 * 8), rel=0.01)
