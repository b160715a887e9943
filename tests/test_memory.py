"""Peak memory: sums, growth, figures worked out by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.families import FAMILIES
from ftplan.planner.hardware_spec import (
    CPU_HEAP_HOLES,
    CPU_PROCESS_BYTES,
    CPU_WORST_HEAP_HOLES,
    Device,
)
from ftplan.planner.memory import (
    COMPONENTS,
    MEMORY_MARGIN,
    RESERVED_OVER_ALLOCATED,
    MemoryEstimate,
    estimate_memory,
    fits,
    needed_bytes,
    weight_memory_bytes,
)
from ftplan.planner.methods import COMPARED_METHODS, METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.plan import (
    ATTENTIONS,
    AUTOCAST_DTYPE,
    DTYPES,
    LOSSES,
    MIXED_PRECISIONS,
    TRAINERS,
    TrainingPlan,
)
from ftplan.planner.rule_of_thumb import (
    COMPONENTS_OF_PART,
    PARTS_BYTES_PER_PARAMETER,
    rule_bytes,
    rule_to_dict,
)
from ftplan.planner.stack import cublas_workspace_bytes

MakeConfig = Callable[..., dict[str, Any]]
MakeSpec = Callable[..., ModelSpec]
QUANTIZED = ("nf4", "fp4", "int8")
# What a torch.optim optimizer has of each tensor besides: a counter of steps, in a block.
COUNTER_BYTES = 512


def _precisions(adapter: bool) -> list[tuple[str, str]]:
    """Of weights and autocast: both 16-bit dtypes at once are refused, and training weights in fp16
    under fp16 autocast (tests/test_plan.py)."""
    return [
        (dtype, autocast)
        for dtype in DTYPES
        for autocast in MIXED_PRECISIONS
        if AUTOCAST_DTYPE[autocast] in (None, dtype) or dtype == "float32"
        if adapter or (dtype, autocast) != ("float16", "fp16")
    ]


@st.composite
def plans(draw: st.DrawFn) -> TrainingPlan:
    """Plans of every method, for models of at least two layers."""
    method = draw(st.sampled_from(sorted(COMPARED_METHODS)))
    quantizations = {"lora": ("none", *QUANTIZED), "qlora": QUANTIZED}.get(method, ("none",))
    dtype, mixed_precision = draw(st.sampled_from(_precisions(METHODS[method].adapter)))
    trainer = draw(st.sampled_from(TRAINERS))
    losses = [loss for loss in LOSSES if loss != "triton_ce" or trainer == "transformers"]
    loss = draw(st.sampled_from(losses))
    optimizers = [
        name
        for name, optimizer in sorted(OPTIMIZERS.items())
        if trainer != "loop" or not optimizer.needs_trainer
    ]
    optim = draw(st.sampled_from(optimizers))
    most = 1 if OPTIMIZERS[optim].layerwise else 4
    return TrainingPlan(
        method=method,
        quantization=draw(st.sampled_from(quantizations)),
        double_quant=draw(st.booleans()),
        dtype=dtype,
        mixed_precision=mixed_precision,
        lora_rank=draw(st.integers(1, 256)),
        lora_dropout=draw(st.sampled_from([0.0, 0.1])),
        num_trainable_layers=draw(st.integers(1, 2)),
        optim=optim,
        per_device_train_batch_size=draw(st.integers(1, 64)),
        gradient_accumulation_steps=draw(st.integers(1, most)),
        max_length=draw(st.integers(1, 8192)),
        gradient_checkpointing=draw(st.booleans()),
        attn_implementation=draw(st.sampled_from(ATTENTIONS)),
        loss=loss,
        trainer=trainer,
        num_gpus=draw(st.integers(1, min(most, 2))),
    )


families = st.sampled_from(sorted(FAMILIES))


def growth(before: MemoryEstimate, after: MemoryEstimate) -> dict[str, int]:
    """By how much each total grew."""
    totals = ("allocated_peak_bytes", "reserved_peak_bytes", "device_peak_bytes", "required_bytes")
    return {name: getattr(after, name) - getattr(before, name) for name in totals}


def component_peak(memory: MemoryEstimate, component: str) -> int:
    return max(phase.components[component] for phase in memory.phases)


# --- sums and maxima


@given(plan=plans(), family=families)
def test_components_sum_to_the_peak_of_their_phase(
    plan: TrainingPlan, family: str, tiny_spec: MakeSpec
) -> None:
    memory = estimate_memory(tiny_spec(family), plan)
    for phase in memory.phases:
        assert set(phase.components) == set(COMPONENTS)
        assert all(size >= 0 for size in phase.components.values())
        assert sum(phase.components.values()) == phase.allocated_peak_bytes
    peaks = [phase.allocated_peak_bytes for phase in memory.phases]
    assert memory.allocated_peak_bytes == memory.peak_phase.allocated_peak_bytes == max(peaks)
    assert sum(memory.to_dict()["components"].values()) == memory.allocated_peak_bytes


@given(plan=plans(), family=families)
def test_the_kinds_of_memory_hold_each_other(
    plan: TrainingPlan, family: str, tiny_spec: MakeSpec, devices: dict[str, Device]
) -> None:
    """allocated <= reserved < device <= required."""
    memory = estimate_memory(tiny_spec(family), plan, device=devices["A100"])
    assert memory.allocated_peak_bytes <= memory.reserved_peak_bytes < memory.device_peak_bytes
    assert memory.device_peak_bytes <= memory.required_bytes


def test_the_phases_are_those_of_a_run(small_llama: ModelSpec) -> None:
    names = [phase.name for phase in estimate_memory(small_llama, TrainingPlan()).phases]
    assert names[0] == "load" and names[-1] == "save"
    for part in ("forward", "loss", "backward", "optimizer step"):
        assert part in names


def test_on_a_processor_the_process_and_the_holes_of_its_heap_count(
    small_llama: ModelSpec, devices: dict[str, Device]
) -> None:
    plan = TrainingPlan(dtype="float32", mixed_precision="no")
    memory = estimate_memory(small_llama, plan, device=devices["CPU"])
    usual, worst = (
        round(memory.allocated_peak_bytes * (1 + holes)) + CPU_PROCESS_BYTES
        for holes in (CPU_HEAP_HOLES, CPU_WORST_HEAP_HOLES)
    )
    assert (memory.device_peak_bytes, memory.required_bytes) == (usual, worst)
    assert memory.host.phases[-1].peak_bytes == memory.device_peak_bytes


def test_what_the_allocator_holds_depends_on_the_stack(small_llama: ModelSpec) -> None:
    """Expandable segments are what ftplan's launcher turns on, and others do not."""
    assert set(RESERVED_OVER_ALLOCATED) == set(TRAINERS)
    for trainer, factor in (("trl", 1.04), ("transformers", 1.125)):
        memory = estimate_memory(small_llama, TrainingPlan(trainer=trainer, loss="stock"))
        assert memory.reserved_peak_bytes == round(factor * memory.allocated_peak_bytes)


def test_what_fits_leaves_the_margin_free(
    small_llama: ModelSpec, devices: dict[str, Device]
) -> None:
    memory = estimate_memory(small_llama, TrainingPlan(), device=devices["A100"])
    needed = needed_bytes(memory)
    assert needed == round((1 + MEMORY_MARGIN) * memory.required_bytes)
    assert fits(memory, dataclasses.replace(devices["A100"], free_bytes=needed))
    assert not fits(memory, dataclasses.replace(devices["A100"], free_bytes=needed - 1))


# --- growth


@given(plan=plans(), family=families, more=st.integers(1, 32))
def test_memory_never_falls_when_the_batch_grows(
    plan: TrainingPlan, family: str, more: int, tiny_spec: MakeSpec
) -> None:
    larger = plan.replace(per_device_train_batch_size=plan.per_device_train_batch_size + more)
    model = tiny_spec(family)
    grown = growth(estimate_memory(model, plan), estimate_memory(model, larger))
    assert min(grown.values()) >= 0, grown


@given(plan=plans(), family=families, more=st.integers(1, 4096))
def test_memory_never_falls_when_rows_grow(
    plan: TrainingPlan, family: str, more: int, tiny_spec: MakeSpec
) -> None:
    longer = plan.replace(max_length=plan.max_length + more)
    model = tiny_spec(family)
    grown = growth(estimate_memory(model, plan), estimate_memory(model, longer))
    assert min(grown.values()) >= 0, grown


@given(plan=plans(), family=families, more=st.integers(1, 256))
def test_memory_never_falls_when_the_rank_grows(
    plan: TrainingPlan, family: str, more: int, tiny_spec: MakeSpec
) -> None:
    higher = plan.replace(lora_rank=plan.lora_rank + more)
    model = tiny_spec(family)
    grown = growth(estimate_memory(model, plan), estimate_memory(model, higher))
    assert min(grown.values()) >= 0, grown
    if not plan.resolved_method.adapter:
        assert max(grown.values()) == 0


@given(plan=plans(), family=families, layers=st.integers(2, 20), more=st.integers(1, 20))
def test_memory_never_falls_when_layers_grow(
    plan: TrainingPlan, family: str, layers: int, more: int, tiny_spec: MakeSpec
) -> None:
    model = tiny_spec(family)
    shallow = dataclasses.replace(model, layers=(model.layers[-1],) * layers)
    deep = dataclasses.replace(model, layers=(model.layers[-1],) * (layers + more))
    grown = growth(estimate_memory(shallow, plan), estimate_memory(deep, plan))
    assert min(grown.values()) >= 0, grown


@given(plan=plans(), family=families)
def test_memory_never_falls_when_freeze_trains_more_layers(
    plan: TrainingPlan, family: str, tiny_spec: MakeSpec
) -> None:
    plan = plan.replace(method="freeze", quantization="none", mixed_precision="bf16")
    one, three = (plan.replace(num_trainable_layers=layers) for layers in (1, 3))
    model = tiny_spec(family)
    grown = growth(estimate_memory(model, one), estimate_memory(model, three))
    assert min(grown.values()) >= 0, grown


@given(plan=plans(), family=families)
def test_checkpointing_never_keeps_more_activations(
    plan: TrainingPlan, family: str, tiny_spec: MakeSpec
) -> None:
    """From two layers up: a single one is computed again while its input is kept besides."""
    model, plan = tiny_spec(family), plan.replace(num_trainable_layers=2)
    without, with_it = (
        estimate_memory(model, plan.replace(gradient_checkpointing=on)) for on in (False, True)
    )
    assert component_peak(with_it, "activations") <= component_peak(without, "activations")


def test_checkpointing_saves_most_activations_of_a_deep_model(llama_2_7b: ModelSpec) -> None:
    """32 layers: an input each instead of all between, and one layer computed again."""
    plan = TrainingPlan(per_device_train_batch_size=4, max_length=2048)
    without, with_it = (
        component_peak(
            estimate_memory(llama_2_7b, plan.replace(gradient_checkpointing=on)), "activations"
        )
        for on in (False, True)
    )
    assert with_it < without / 8


@given(plan=plans(), family=families, longest=st.integers(1, 9000))
def test_rows_are_cut_at_max_length_and_no_longer_than_the_longest(
    plan: TrainingPlan, family: str, longest: int, tiny_spec: MakeSpec
) -> None:
    model = tiny_spec(family)
    known = estimate_memory(model, plan, longest_row=longest)
    cut = estimate_memory(model, plan.replace(max_length=min(plan.max_length, longest)))
    assert known == cut


# --- weights


@given(plan=plans(), family=st.sampled_from(sorted(set(FAMILIES) - {"qwen3_moe", "mixtral"})))
def test_quantized_weights_are_smaller(
    plan: TrainingPlan, family: str, tiny_spec: MakeSpec
) -> None:
    model = tiny_spec(family)
    plain = plan.replace(method="lora", quantization="none")
    sizes = [
        weight_memory_bytes(model, plain.replace(quantization=q, double_quant=double))
        for q, double in (("nf4", True), ("nf4", False), ("int8", True), ("none", True))
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_unquantized_weights_are_parameters_times_width(llama_2_7b: ModelSpec) -> None:
    for dtype, width in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        plan = TrainingPlan(dtype=dtype, mixed_precision="no")
        assert weight_memory_bytes(llama_2_7b, plan) == 6_738_415_616 * width


def test_llama_2_7b_in_nf4_by_hand(llama_2_7b: ModelSpec) -> None:
    """Matrices: 32 x (4 x 4096 x 4096 + 3 x 4096 x 11008) = 6,476,005,376 weights of 4 bits
    and, for each 64 of them, an 8-bit scale; for each 256 scales, an fp32 one:

        6,476,005,376 / 2      = 3,238,002,688
        6,476,005,376 / 64     =   101,187,584
        101,187,584 / 256 x 4  =     1,581,056

    Embeddings, head and norms stay bf16: 262,410,240 x 2 = 524,820,480.
    """
    assert llama_2_7b.quantizable_weights == 6_476_005_376
    plan = TrainingPlan(method="qlora", quantization="nf4", double_quant=True)
    by_hand = 3_238_002_688 + 101_187_584 + 1_581_056 + 524_820_480
    assert weight_memory_bytes(llama_2_7b, plan) == by_hand == 3_865_591_808
    # Without double quantization the 101,187,584 scales are fp32.
    single = plan.replace(double_quant=False)
    assert weight_memory_bytes(llama_2_7b, single) == 3_238_002_688 + 404_750_336 + 524_820_480


def test_stacked_experts_are_not_quantized(tiny_spec: MakeSpec) -> None:
    """Only attention's matrices are linear modules: 3 x 12,288 weights."""
    model = tiny_spec("mixtral")
    plan = TrainingPlan(method="qlora", quantization="nf4", double_quant=False)
    rest = model.num_parameters - 3 * 12_288
    assert weight_memory_bytes(model, plan) == round(3 * 12_288 * 0.5625) + 2 * rest


# --- worked by hand


def test_full_training_of_llama_2_7b_holds_16_bytes_a_parameter(llama_2_7b: ModelSpec) -> None:
    """fp32 weights 4, gradients 4, two fp32 states 8, under bf16 autocast:

    6,738,415,616 x 16 = 107,814,649,856 bytes at the optimizer step; beside them counters and
    norms of 291 tensors, and the workspaces.
    """
    plan = TrainingPlan(
        method="full", dtype="float32", mixed_precision="bf16", optim="adamw_torch_fused"
    )
    memory = estimate_memory(llama_2_7b, plan)
    step = next(phase for phase in memory.phases if phase.name == "optimizer step")
    assert step.components["weights"] == 4 * 6_738_415_616
    assert step.components["gradients"] == 4 * 6_738_415_616
    assert step.components["optimizer_states"] == 8 * 6_738_415_616 + 291 * COUNTER_BYTES
    rest = step.allocated_peak_bytes - 107_814_649_856 - 291 * COUNTER_BYTES
    workspaces = 2 * cublas_workspace_bytes((8, 0))
    assert workspaces + 291 * COUNTER_BYTES <= rest < workspaces + 2 * 291 * COUNTER_BYTES


def test_pure_bf16_full_training_steps_at_10_bytes_a_parameter(llama_2_7b: ModelSpec) -> None:
    """Weights 2, gradients 2, states 4, and 2 for the list of roots of the foreach AdamW; in all
    beside workspaces of 17 MB."""
    plan = TrainingPlan(method="full", dtype="bfloat16", mixed_precision="no", optim="adamw_torch")
    phases = {phase.name: phase for phase in estimate_memory(llama_2_7b, plan).phases}
    rest = phases["optimizer step"].allocated_peak_bytes - 10 * 6_738_415_616
    assert 0 < rest < 2 * cublas_workspace_bytes((8, 0)) + 4 * 291 * COUNTER_BYTES
    assert phases["load"].allocated_peak_bytes == 2 * 6_738_415_616


def test_lora_on_llama_2_7b_by_hand(llama_2_7b: ModelSpec) -> None:
    """Rank 16 on all linear layers: 39,976,960 fp32 adapters, gradients and two states each."""
    memory = estimate_memory(llama_2_7b, TrainingPlan(method="lora", lora_rank=16))
    step = next(phase for phase in memory.phases if phase.name == "optimizer step")
    assert step.components["weights"] == 2 * 6_738_415_616
    assert step.components["adapters"] == 4 * 39_976_960
    assert step.components["gradients"] == 4 * 39_976_960
    assert step.components["optimizer_states"] == 8 * 39_976_960 + 448 * COUNTER_BYTES
    assert step.components["activations"] == 0


def test_trl_holds_the_adapters_of_a_quantized_base_in_bf16(llama_2_7b: ModelSpec) -> None:
    """And a plain Trainer leaves them in fp32; gradients and states are of the same width."""
    trl = TrainingPlan(method="qlora", quantization="nf4", lora_rank=16, trainer="trl")
    for plan, width in ((trl, 2), (trl.replace(trainer="transformers"), 4)):
        phases = {phase.name: phase for phase in estimate_memory(llama_2_7b, plan).phases}
        step = phases["optimizer step"].components
        assert step["adapters"] == step["gradients"] == width * 39_976_960
        assert step["optimizer_states"] == 2 * width * 39_976_960 + 448 * COUNTER_BYTES


def test_stock_logits_by_hand(llama_2_7b: ModelSpec) -> None:
    """4 x 4096 tokens x 32000 entries: bf16 logits, their fp32 copy and log-softmax in forward;
    then the log-softmax, gradients on both sides of it, and the logits in fp32 that accelerate's
    autocast hands back are gone: 12 bytes."""
    plan = TrainingPlan(
        loss="stock", trainer="transformers", per_device_train_batch_size=4, max_length=4096
    )
    phases = {phase.name: phase for phase in estimate_memory(llama_2_7b, plan).phases}
    entries = 4 * 4096 * 32000
    assert phases["loss"].components["logits_and_loss"] == pytest.approx(12 * entries, rel=1e-3)


@given(plan=plans(), family=families)
def test_a_fused_loss_never_holds_more_than_stock_logits_and_their_gradients(
    plan: TrainingPlan, family: str, tiny_spec: MakeSpec
) -> None:
    """But for what it makes early: gradients of the hidden states and of the head."""
    model = dataclasses.replace(tiny_spec(family), vocab_size=32768)
    tokens = plan.per_device_train_batch_size * plan.max_length
    early = 4 * (tokens * model.hidden_size + model.embedding_parameters)
    stock, fused = (
        component_peak(
            estimate_memory(model, plan.replace(loss=loss, trainer="transformers")),
            "logits_and_loss",
        )
        for loss in ("stock", "trl-fused")
    )
    assert fused <= stock + early


# --- the rule of thumb beside it


def test_the_rule_of_thumb_is_17_and_a_half_bytes() -> None:
    assert sum(PARTS_BYTES_PER_PARAMETER.values()) == 17.5
    assert rule_bytes(7_000_000_000) == 122_500_000_000
    assert rule_to_dict(1000)["bytes"] == 17_500


def test_each_component_belongs_to_one_part_of_the_rule() -> None:
    listed: list[Any] = [c for part in COMPONENTS_OF_PART.values() for c in part]
    assert sorted(listed) == sorted(COMPONENTS)
    assert set(COMPONENTS_OF_PART) == set(PARTS_BYTES_PER_PARAMETER)


def test_embeddings_have_wide_states_under_8_bit_optimizers(llama_2_7b: ModelSpec) -> None:
    """transformers keeps them in fp32; adapters have none."""
    full = TrainingPlan(method="full", optim="adamw_8bit")
    embeddings = 32_000 * 4096
    rest = llama_2_7b.num_parameters - embeddings
    states = component_peak(estimate_memory(llama_2_7b, full), "optimizer_states")
    assert states == pytest.approx(rest * 2 * (1 + 4 / 256) + embeddings * 8, rel=1e-5)
    lora = TrainingPlan(optim="adamw_8bit")
    states = component_peak(estimate_memory(llama_2_7b, lora), "optimizer_states")
    assert states == pytest.approx(39_976_960 * 2 * (1 + 4 / 256), rel=1e-3)
