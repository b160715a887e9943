"""Peak memory: sums, growth, figures worked out by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.families import FAMILIES, spec_from_config
from ftplan.planner.hardware_spec import (
    CPU_HEAP_HOLES,
    CPU_PROCESS_BYTES,
    CPU_WORST_HEAP_HOLES,
    Device,
)
from ftplan.planner.layers import LayerTotals, Operation, decoder_layer
from ftplan.planner.memory import (
    COMPONENTS,
    MEMORY_MARGIN,
    RESERVED_OVER_ALLOCATED,
    MemoryEstimate,
    disk_bytes,
    estimate_memory,
    fits,
    host_loading_bytes,
    needed_bytes,
    weight_memory_bytes,
)
from ftplan.planner.methods import COMPARED_METHODS, METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.plan import (
    ATTENTIONS,
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
from ftplan.planner.trained import MethodSettings

MakeConfig = Callable[..., dict[str, Any]]
MakeSpec = Callable[..., ModelSpec]
QUANTIZED = ("nf4", "fp4", "int8")
CLOSED_FORM_OPTIMIZERS = sorted(OPTIMIZERS)


@st.composite
def plans(draw: st.DrawFn) -> TrainingPlan:
    """Plans of every method, for models of at least two layers."""
    method = draw(st.sampled_from(sorted(COMPARED_METHODS)))
    quantizations = {"lora": ("none", *QUANTIZED), "qlora": QUANTIZED}.get(method, ("none",))
    dtype = draw(st.sampled_from(DTYPES))
    # Weights in fp16 are not trained under fp16 autocast (tests/test_plan.py).
    only_adapters = dtype == "float16" and not METHODS[method].adapter
    return TrainingPlan(
        method=method,
        quantization=draw(st.sampled_from(quantizations)),
        double_quant=draw(st.booleans()),
        dtype=dtype,
        mixed_precision=draw(
            st.sampled_from(["no", "bf16"] if only_adapters else MIXED_PRECISIONS)
        ),
        lora_rank=draw(st.integers(1, 256)),
        lora_dropout=draw(st.sampled_from([0.0, 0.1])),
        num_trainable_layers=draw(st.integers(1, 2)),
        optim=draw(st.sampled_from(CLOSED_FORM_OPTIMIZERS)),
        per_device_train_batch_size=draw(st.integers(1, 64)),
        gradient_accumulation_steps=draw(st.integers(1, 4)),
        max_length=draw(st.integers(1, 8192)),
        gradient_checkpointing=draw(st.booleans()),
        attn_implementation=draw(st.sampled_from(ATTENTIONS)),
        loss=draw(st.sampled_from(LOSSES)),
        trainer=draw(st.sampled_from(TRAINERS)),
        num_gpus=draw(st.integers(1, 2)),
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
    for part in ("forward", "loss backward", "optimizer step", "evaluation"):
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
    assert memory.host_ram_peak_bytes == memory.device_peak_bytes


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


def test_each_gpus_process_loads_the_model(llama_2_7b: ModelSpec, small_llama: ModelSpec) -> None:
    """13.5 GB in files of at most 5 GB; 135 M parameters in one file."""
    for model, file_bytes in ((llama_2_7b, 5 * 10**9), (small_llama, 2 * 134_515_008)):
        for num_gpus in (1, 4):
            plan = TrainingPlan(num_gpus=num_gpus)
            each = CPU_PROCESS_BYTES + file_bytes
            assert host_loading_bytes(model, plan) == num_gpus * each
            assert estimate_memory(model, plan).host_ram_peak_bytes == num_gpus * each


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
    shallow = dataclasses.replace(tiny_spec(family), num_hidden_layers=layers)
    deep = dataclasses.replace(shallow, num_hidden_layers=layers + more)
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
        plan = TrainingPlan(dtype=dtype)
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

    6,738,415,616 x 16 = 107,814,649,856 bytes at the optimizer step, and nothing beside them
    with an optimizer that updates in place.
    """
    plan = TrainingPlan(
        method="full", dtype="float32", mixed_precision="bf16", optim="adamw_torch_fused"
    )
    memory = estimate_memory(llama_2_7b, plan)
    step = next(phase for phase in memory.phases if phase.name == "optimizer step")
    assert step.components["weights"] == 4 * 6_738_415_616
    assert step.components["gradients"] == 4 * 6_738_415_616
    assert step.components["optimizer_states"] == 8 * 6_738_415_616
    assert step.allocated_peak_bytes == 107_814_649_856


def test_pure_bf16_full_training_steps_at_10_bytes_a_parameter(llama_2_7b: ModelSpec) -> None:
    """Weights 2, gradients 2, states 4, and 2 for the list of roots of the foreach AdamW."""
    plan = TrainingPlan(method="full", dtype="bfloat16", mixed_precision="no", optim="adamw_torch")
    phases = {phase.name: phase for phase in estimate_memory(llama_2_7b, plan).phases}
    assert phases["optimizer step"].allocated_peak_bytes == 10 * 6_738_415_616
    assert phases["load"].allocated_peak_bytes == 2 * 6_738_415_616


def test_lora_on_llama_2_7b_by_hand(llama_2_7b: ModelSpec) -> None:
    """Rank 16 on all linear layers: 39,976,960 fp32 adapters, gradients and two states each."""
    memory = estimate_memory(llama_2_7b, TrainingPlan(method="lora", lora_rank=16))
    step = next(phase for phase in memory.phases if phase.name == "optimizer step")
    assert step.components["weights"] == 2 * 6_738_415_616
    assert step.components["adapters"] == 4 * 39_976_960
    assert step.components["gradients"] == 4 * 39_976_960
    assert step.components["optimizer_states"] == 8 * 39_976_960
    assert step.components["activations"] == 0


def test_trl_holds_the_adapters_of_a_quantized_base_in_bf16(llama_2_7b: ModelSpec) -> None:
    """And a plain Trainer leaves them in fp32; gradients and states are of the same width."""
    trl = TrainingPlan(method="qlora", quantization="nf4", lora_rank=16, trainer="trl")
    for plan, width in ((trl, 2), (trl.replace(trainer="transformers"), 4)):
        phases = {phase.name: phase for phase in estimate_memory(llama_2_7b, plan).phases}
        step = phases["optimizer step"].components
        assert step["adapters"] == step["gradients"] == width * 39_976_960
        assert step["optimizer_states"] == 2 * width * 39_976_960


def test_how_far_backward_rises_by_hand() -> None:
    """Backwards over three operations for 10 tokens; gradients come, saved tensors go.

    third: 10 x 6 = 60 alive (the highest so far); its 10 x 1 saved go: 50;
    second: + 10 x 5 = 100 (the highest); - 10 x 8 saved, - third's 60: -40;
    first: + 10 x 9 = 50.
    """
    first = Operation(name="first", saved_bytes=3, gradient_bytes=9)
    second = Operation(name="second", saved_bytes=8, gradient_bytes=5)
    third = Operation(name="third", saved_bytes=1, gradient_bytes=6)
    totals = LayerTotals(operations=(first, second, third))
    assert totals.saved_bytes(10, 1) == 120
    assert totals.backward_temporary_bytes(10, 1) == 100
    # Larger at the front, where what came before has gone: -40 + 300.
    larger = dataclasses.replace(first, gradient_bytes=30)
    rise = LayerTotals(operations=(larger, second, third)).backward_temporary_bytes(10, 1)
    assert rise == 260
    # What making a gradient holds besides is gone with it.
    held = dataclasses.replace(third, gradient_temporary_bytes=7)
    rise = LayerTotals(operations=(first, second, held)).backward_temporary_bytes(10, 1)
    assert rise == 130


def test_the_last_layers_backward_keeps_one_layer_and_no_final_norm(
    llama_2_7b: ModelSpec,
) -> None:
    """2048 tokens of width 4096 in bf16: 32 layers' inputs and 6 bytes a value of the final norm;
    at the end the bottom layer's input. Beside them what the layer saves when computed again.
    """
    plan = TrainingPlan(max_length=2048)
    phases = {phase.name: phase.components for phase in estimate_memory(llama_2_7b, plan).phases}
    hidden = 2048 * 4096 * 2
    again = 2048 * layer_keeps(llama_2_7b, plan)
    assert phases["forward"]["activations"] == 32 * hidden + 3 * hidden
    assert phases["backward, first layer"]["activations"] == 35 * hidden + again
    assert phases["backward, last layer"]["activations"] == hidden + again


def test_evaluation_keeps_no_activations_with_or_without_checkpointing(
    llama_2_7b: ModelSpec,
) -> None:
    """Full training in pure bf16, 8 x 2048 tokens: beneath the gated product the layer's input,
    the sum after attention and the norm's result, 3 x 2 x 4096; around it 3 x 2 x 11008 bytes.
    That is more than the fused loss's tile of 4096 x 32768 entries.
    """
    plan = TrainingPlan(method="full", mixed_precision="no", per_device_train_batch_size=8)
    for checkpointing in (False, True):
        memory = estimate_memory(llama_2_7b, plan.replace(gradient_checkpointing=checkpointing))
        evaluation = next(p for p in memory.phases if p.name == "evaluation").components
        assert evaluation["activations"] == evaluation["logits_and_loss"] == 0
        assert evaluation["temporaries"] == 8 * 2048 * (3 * 2 * 4096 + 3 * 2 * 11008)


def test_evaluation_is_fullest_in_a_layer_or_in_the_loss(llama_2_7b: ModelSpec) -> None:
    """Stock: 10 bytes an entry of 32000, beside the last hidden state."""
    memory = estimate_memory(llama_2_7b, TrainingPlan(loss="stock"))
    evaluation = next(p for p in memory.phases if p.name == "evaluation").components
    assert evaluation["logits_and_loss"] == 2048 * 32000 * 10
    assert evaluation["temporaries"] == 2048 * 4096 * 2


def test_stock_logits_by_hand(llama_2_7b: ModelSpec) -> None:
    """4 x 4096 tokens x 32000 entries: bf16 logits, fp32 copy, fp32 log-softmax: 10 bytes."""
    plan = TrainingPlan(
        loss="stock", trainer="transformers", per_device_train_batch_size=4, max_length=4096
    )
    phases = {phase.name: phase for phase in estimate_memory(llama_2_7b, plan).phases}
    entries = 4 * 4096 * 32000
    assert phases["forward"].components["logits_and_loss"] == 10 * entries
    assert phases["loss backward"].components["logits_and_loss"] == 14 * entries


@given(plan=plans(), family=families)
def test_a_fused_loss_never_holds_more_than_stock_logits_and_their_gradients(
    plan: TrainingPlan, family: str, tiny_spec: MakeSpec
) -> None:
    """But for what it makes early: gradients of the hidden states and of the head."""
    model = dataclasses.replace(tiny_spec(family), vocab_size=32768)
    tokens = plan.per_device_train_batch_size * plan.max_length
    early = 4 * (tokens * model.hidden_size + model.embedding_parameters)
    stock, fused = (
        component_peak(estimate_memory(model, plan.replace(loss=loss)), "logits_and_loss")
        for loss in ("stock", "trl-fused")
    )
    assert fused <= stock + early


def test_a_checkpoint_on_disk_holds_trained_weights_and_states(llama_2_7b: ModelSpec) -> None:
    """Two checkpoints of adapters and states, and the final adapters: fp32, 12 + 12 + 4 bytes."""
    trained = METHODS["lora"].count(llama_2_7b, MethodSettings(lora_rank=16))
    count = trained.num_trainable_parameters
    assert disk_bytes(4 * count, 8 * count) == (2 * (4 + 8) + 4) * 39_976_960


def layer_keeps(model: ModelSpec, plan: TrainingPlan, length: int = 1) -> int:
    """Bytes that one layer keeps of one token."""
    trained = plan.resolved_method.count(model, plan.method_settings)
    own = trained.trained_layers > 0
    layer = LayerTotals(operations=decoder_layer(model, plan, trained, own_weights=own))
    return layer.saved_bytes(1, length)


def test_a_layer_of_llama_2_7b_keeps_by_hand(llama_2_7b: ModelSpec) -> None:
    """Full training in pure bf16, bytes a token; h = 4096, f = 11008:

    two norms: fp32 copy, normalized values     2 x (4 + 2) h = 49,152
    their results, read by q, k, v, gate and up       2 x 2 h = 16,384
    attention: q, k, v and its result, which o reads  4 x 2 h = 32,768
    attention: a log-sum for each of 32 heads          4 x 32 =    128
    silu(gate), gate, up; and their product, for down 4 x 2 f = 88,064
    """
    plan = TrainingPlan(method="full", dtype="bfloat16", mixed_precision="no")
    assert layer_keeps(llama_2_7b, plan) == 49_152 + 16_384 + 32_768 + 128 + 88_064


def test_adapters_on_a_quantized_base_read_what_is_there(llama_2_7b: ModelSpec) -> None:
    """PEFT casts the input of an adapter on a plain base to fp32, and autocast back to bf16: a
    copy for each product. Its layers for bitsandbytes leave casting to autocast, which has
    nothing to cast: one copy for q, k and v, none for o, one for gate and up, one for down.
    """
    lora = TrainingPlan(method="lora")
    qlora = TrainingPlan(method="qlora", quantization="nf4")
    copies = (3 + 1 + 2) * 4096 + 11008, (1 + 0 + 1) * 4096 + 11008
    difference = layer_keeps(llama_2_7b, lora) - layer_keeps(llama_2_7b, qlora)
    assert difference == 2 * (copies[0] - copies[1])


def test_eager_attention_keeps_the_scores(tiny_spec: MakeSpec) -> None:
    """4 heads: softmax in fp32 and bf16, and with capped scores their tanh in bf16."""
    plan = TrainingPlan(method="full", mixed_precision="no", attn_implementation="eager")
    for family, per_score in (("llama", 4 + 2), ("gemma2", 4 + 2 + 2)):
        model = tiny_spec(family)
        grown = layer_keeps(model, plan, length=1000) - layer_keeps(model, plan, length=0)
        assert grown == 1000 * 4 * per_score


def test_cudas_autocast_runs_layer_norm_and_pow_in_fp32(
    tiny_spec: MakeSpec, devices: dict[str, Device]
) -> None:
    """GPT-2 of width 64: two norms keep their input in fp32 instead of bf16; tanh-GELU three of
    its four results, 256 wide, likewise. Each norm's result is cast for one product as before.
    """
    plan = TrainingPlan(method="lora", gradient_checkpointing=False, max_length=64)
    model = tiny_spec("gpt2")
    kept = [
        component_peak(estimate_memory(model, plan, device=devices[name]), "activations")
        for name in ("A100", "CPU")
    ]
    assert kept[0] - kept[1] == 3 * 64 * (2 * 64 * 2 + 3 * 256 * 2)


def test_autocast_copies_of_llama_2_7b_by_hand(llama_2_7b: ModelSpec) -> None:
    """bf16 copies: 202,375,168 weights in the matrices of a layer, 1,249,280 in its adapters,
    131,072,000 in the output projection.

    Without checkpointing backward needs every layer's; with it one layer's, and of frozen
    weights none waits in autocast's cache until forward ends.
    """
    matrices, adapters, head = 2 * 202_375_168, 2 * 1_249_280, 2 * 131_072_000
    plan = TrainingPlan(method="lora", dtype="float32", loss="stock", lora_rank=16)

    def copies(**changes: Any) -> list[int]:
        phases = estimate_memory(llama_2_7b, plan.replace(**changes)).phases
        return [phase.components["autocast_copies"] for phase in phases[1:5]]

    layer, every = matrices + adapters, 32 * (matrices + adapters)
    assert copies() == [32 * adapters + head, head, layer, layer]
    assert copies(gradient_checkpointing=False) == [every + head, every + head, every, layer]
    assert copies(method="full") == [32 * matrices + head, head, matrices, matrices]
    # A base in bf16 is not cast; TRL's fused loss casts at most 32,768 rows of the head at once.
    assert copies(dtype="bfloat16") == [32 * adapters, 0, adapters, adapters]
    assert copies(loss="trl-fused", method="full")[1] == head


# --- beside autograd


def autograd_keeps(config: dict[str, Any], plan: TrainingPlan, *, with_loss: bool = False) -> int:
    """Bytes of the storages that forward leaves for backward, weights aside.

    Of the decoder alone, or of the model with the stock loss.
    """
    torch = pytest.importorskip("torch", reason="the reference is autograd")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    shape = transformers.AutoConfig.for_model(**config)
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):
        setattr(shape, name, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(
        shape,
        dtype=getattr(torch, plan.dtype),
        attn_implementation=plan.attn_implementation,
    )
    model.train()
    decoder = model.get_decoder()
    if plan.method == "lora":
        settings = peft.LoraConfig(r=plan.lora_rank, target_modules=list(plan.target_modules))
        model = peft.get_peft_model(model, settings)
        model.enable_input_require_grads()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    rows = torch.ones(plan.per_device_train_batch_size, plan.max_length, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        if with_loss:
            model(input_ids=rows, labels=rows, use_cache=False)
        else:
            decoder(input_ids=rows, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "mixed_precision"), [("bfloat16", "no"), ("bfloat16", "bf16"), ("float32", "bf16")]
)
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_layer_keeps_what_autograd_keeps_of_it(
    family: str,
    method: str,
    dtype: str,
    mixed_precision: str,
    tiny_config: MakeConfig,
    tiny_spec: MakeSpec,
    devices: dict[str, Device],
) -> None:
    """A third layer's part of what forward leaves, autocast's copies of weights included.

    On a processor, whose autocast differs from CUDA's. Within 4 %: the shapes are so small that
    masks, indices and log-sums show.
    """
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    names = tuple(dict.fromkeys(m.name for m in tiny_spec(family).layer_linears))
    plan = TrainingPlan(
        method=method,
        dtype=dtype,
        mixed_precision=mixed_precision,
        lora_rank=8,
        target_modules=names,
        per_device_train_batch_size=2,
        max_length=64,
        gradient_checkpointing=False,
        # transformers has no other kernel for Gemma 2 on a processor.
        attn_implementation="eager" if family == "gemma2" else "sdpa",
        trainer="transformers",
    )
    real, predicted = [], []
    for layers in (2, 3):
        real.append(autograd_keeps(tiny_config(family, **{depth: layers}), plan))
        model = tiny_spec(family, **{depth: layers})
        phases = estimate_memory(model, plan, device=devices["CPU"]).phases
        forward = next(phase for phase in phases if phase.name == "forward").components
        predicted.append(forward["activations"] + forward["autocast_copies"])
    assert predicted[1] - predicted[0] == pytest.approx(real[1] - real[0], rel=0.04)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_output_projections_copy_is_kept_until_backward(
    family: str, method: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    """fp32 weights, tied in GPT-2: what 128 more entries of the vocabulary leave is their
    log-softmax in fp32, and the 16-bit copy of their rows."""
    model = tiny_spec(family)
    plan = TrainingPlan(
        method=method,
        dtype="float32",
        target_modules=tuple({m.name for m in model.layer_linears}),
        per_device_train_batch_size=2,
        max_length=64,
        loss="stock",
        trainer="transformers",
    )
    real, predicted = [], []
    for vocabulary in (128, 256):
        config = tiny_config(family, vocab_size=vocabulary)
        real.append(autograd_keeps(config, plan, with_loss=True))
        phases = estimate_memory(tiny_spec(family, vocab_size=vocabulary), plan).phases
        predicted.append(phases[2].components["autocast_copies"])
    assert real[1] - real[0] == predicted[1] - predicted[0] + 128 * (2 * 64) * 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_capping_the_logits_keeps_their_tanh(
    mixed_precision: str, tiny_config: MakeConfig, tiny_spec: MakeSpec
) -> None:
    plan = TrainingPlan(
        method="full",
        mixed_precision=mixed_precision,
        per_device_train_batch_size=2,
        max_length=64,
        attn_implementation="eager",
        loss="stock",
        trainer="transformers",
    )
    real, predicted = [], []
    for cap in (None, 30.0):
        config = tiny_config("gemma2", final_logit_softcapping=cap)
        real.append(autograd_keeps(config, plan, with_loss=True))
        model = tiny_spec("gemma2", final_logit_softcapping=cap)
        predicted.append(component_peak(estimate_memory(model, plan), "logits_and_loss"))
    assert real[1] - real[0] == predicted[1] - predicted[0] == 2 * 64 * 128 * 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRun:
    """A layer of a small model of transformers, on the processor."""

    forward: Callable[[Any], Any]
    hidden_size: int
    dtype: Any

    def hidden_state(self, rows: int) -> Any:
        import torch

        shape = rows, LAYER_LENGTH, self.hidden_size
        return torch.randn(shape, dtype=self.dtype, requires_grad=True)


LAYER_LENGTH = 256
LAYER_CHANGES = {"max_position_embeddings": 256, "num_hidden_layers": 1}
WIDE_LAYER = {"hidden_size": 256, "intermediate_size": 704, **LAYER_CHANGES}
WIDE_GPT2 = {"n_embd": 256, "n_layer": 1, "n_positions": 256}


def layer_config(family: str, tiny_config: MakeConfig) -> dict[str, Any]:
    """Wide enough for products to outweigh log-sums and scales."""
    return tiny_config(family, **(WIDE_GPT2 if family == "gpt2" else WIDE_LAYER))


def layer_run(config: dict[str, Any], plan: TrainingPlan) -> LayerRun:
    torch = pytest.importorskip("torch", reason="the reference is torch's profiler")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    shape = transformers.AutoConfig.for_model(**config)
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):
        setattr(shape, name, 0.0)
    dtype = getattr(torch, plan.dtype)
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype).train()
    decoder = model.get_decoder()
    if plan.method == "lora":
        settings = peft.LoraConfig(r=plan.lora_rank, target_modules=list(plan.target_modules))
        peft.get_peft_model(model, settings)
    layer = decoder.h[0] if config["model_type"] == "gpt2" else decoder.layers[0]

    def forward(hidden: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
            output = layer(hidden, **rotation)
        return output[0] if isinstance(output, tuple) else output

    run = LayerRun(forward=forward, hidden_size=shape.hidden_size, dtype=dtype)
    places = torch.arange(LAYER_LENGTH)[None]
    rotary = getattr(decoder, "rotary_emb", None)
    rotation = {"position_embeddings": rotary(run.hidden_state(1), places)} if rotary else {}
    return run


def highest_level(work: Callable[[], Any], mark: int) -> int:
    """How far tensors rose above what was alive when a tensor of `mark` bytes was made."""
    import torch

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    sizes = [num_bytes for _, num_bytes in memory]
    start = next(i for i, size in enumerate(sizes) if mark <= size < mark + 64) + 1
    return max(itertools.accumulate(sizes[start:]))


def measured_rises(run: LayerRun) -> tuple[float, float]:
    """Bytes a token by which backward, and a forward pass that keeps nothing, rise."""
    import torch

    mark, rows = 1_000_001, (4, 8)
    # Weights have their gradients from here on, so that these do not count.
    run.forward(run.hidden_state(1)).sum().backward()

    def backward(num_rows: int) -> int:
        hidden = run.hidden_state(num_rows)
        gradient = torch.ones_like(hidden)

        def work() -> None:
            output = run.forward(hidden)
            torch.empty(mark, dtype=torch.uint8)
            output.backward(gradient)

        return highest_level(work, mark)

    def inference(num_rows: int) -> int:
        hidden = run.hidden_state(num_rows)

        def work() -> Any:
            torch.empty(mark, dtype=torch.uint8)
            with torch.no_grad():
                return run.forward(hidden)

        return highest_level(work, mark)

    tokens = (rows[1] - rows[0]) * LAYER_LENGTH
    slopes = [(rise(rows[1]) - rise(rows[0])) / tokens for rise in (backward, inference)]
    return slopes[0], slopes[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "mixed_precision"), [("float32", "no"), ("bfloat16", "no"), ("bfloat16", "bf16")]
)
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_a_layer_rises_in_backward_and_in_evaluation_as_torch_counts(
    family: str, method: str, dtype: str, mixed_precision: str, tiny_config: MakeConfig
) -> None:
    """Within 2 % in backward and 6 % in evaluation, against torch's profiler on a processor.

    Backward without the gradient handed in, a forward pass without the layer's input.
    """
    config = layer_config(family, tiny_config)
    model = spec_from_config(config, family)
    plan = TrainingPlan(
        method=method,
        dtype=dtype,
        mixed_precision=mixed_precision,
        target_modules=tuple(dict.fromkeys(m.name for m in model.layer_linears)),
        trainer="transformers",
        loss="stock",
    )
    backward, inference = measured_rises(layer_run(config, plan))
    trained = plan.resolved_method.count(model, plan.method_settings)
    operations = decoder_layer(model, plan, trained, own_weights=method == "full", kind="cpu")
    layer = LayerTotals(operations=operations)
    assert layer.backward_temporary_bytes(1, LAYER_LENGTH) == pytest.approx(backward, rel=0.02)
    if (method, dtype, mixed_precision) == ("lora", "bfloat16", "no"):
        return  # a processor casts the base's result to fp32 to add the adapter's, a GPU does not
    beneath = 2 * model.hidden_size * plan.weight_bytes
    expected = layer.inference_bytes(1, LAYER_LENGTH) + beneath
    assert expected == pytest.approx(inference, rel=0.06)


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
    assert states == round(rest * 2 * (1 + 4 / 256) + embeddings * 8)
    lora = TrainingPlan(optim="adamw_8bit")
    states = component_peak(estimate_memory(llama_2_7b, lora), "optimizer_states")
    assert states == round(39_976_960 * 2 * (1 + 4 / 256))
