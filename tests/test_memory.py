"""Peak memory: sums, growth, figures worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from ftplan.planner.hardware_spec import (
    CPU_HEAP_HOLES,
    CPU_PROCESS_BYTES,
    CPU_WORST_HEAP_HOLES,
    Device,
)
from ftplan.planner.memory import (
    MEMORY_MARGIN,
    RESERVED_OVER_ALLOCATED,
    MemoryEstimate,
    estimate_memory,
    fits,
    needed_bytes,
)
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.phases import COMPONENTS
from ftplan.planner.plan import (
    TRAINERS,
    TrainingPlan,
)
from ftplan.planner.rules_of_thumb import (
    COMPONENTS_OF_PART,
    PARTS_BYTES_PER_PARAMETER,
    rule_bytes,
    rule_to_dict,
)
from ftplan.planner.stack import cublas_workspace_bytes
from ftplan.planner.weights import weight_memory_bytes

MakeConfig = Callable[..., dict[str, Any]]
MakeSpec = Callable[..., ModelSpec]
QUANTIZED = ("nf4", "fp4", "int8")
# What a torch.optim optimizer has of each tensor besides: a counter of steps, in a block.
COUNTER_BYTES = 512


def component_peak(memory: MemoryEstimate, component: str) -> int:
    return max(phase.components[component] for phase in memory.phases)


# --- phases and totals


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
    assert fits(memory, structs.replace(devices["A100"], free_bytes=needed))
    assert not fits(memory, structs.replace(devices["A100"], free_bytes=needed - 1))


# --- growth (more in test_memory_properties.py)


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


# --- weights


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
    # The gradient of the embeddings' result, in fp32: 1 x 1024 tokens.
    assert step.components["activations"] == 1024 * 4096 * 4


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
