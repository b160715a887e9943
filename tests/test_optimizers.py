"""States and steps of every optimizer: by hand, and beside the dry run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from msgspec import structs

from ftplan.planner.families import spec_from_config
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.optimizer_steps import Updated
from ftplan.planner.optimizers import OPTIMIZERS
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.units import GIB, KIB, MIB
from ftplan.planner.updated import frozen_parameters, updated_parameters
from tests.sweeps import swept

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
}
SHORT: dict[str, Any] = {
    **{"max_length": 32, "per_device_train_batch_size": 1, "gradient_checkpointing": False},
    **{"dtype": "bfloat16", "mixed_precision": "bf16", "loss": "stock"},
}
PROJECTED = sorted(name for name, optimizer in OPTIMIZERS.items() if optimizer.low_rank)
IN_BACKWARD = sorted(name for name, o in OPTIMIZERS.items() if o.steps_in_backward)


def tiny() -> ModelSpec:
    return spec_from_config(TINY, "tiny")


def matrix(rows: int, columns: int, width: int = 2, **more: Any) -> Updated:
    return Updated(shape=(rows, columns), width=width, **{"kind": "linear", **more})


# --- states by hand


@pytest.mark.parametrize(
    ("optim", "bytes_per_parameter"),
    [
        ("adamw_torch", 8.0),  # two fp32 states
        ("adamw_torch_fused", 8.0),
        ("adamw_8bit", 2.03125),  # two of one byte, and an fp32 scale for each 256
        ("paged_adamw_8bit", 2.03125),
        ("paged_adamw_32bit", 8.0),
        ("lion_32bit", 4.0),
        ("lion_8bit", 1.015625),
        ("ademamix", 12.0),  # two momenta and the squares
        ("ademamix_8bit", 3.046875),
        ("rmsprop_bnb", 4.0),
        ("rmsprop", 4.0),
        ("adagrad", 4.0),
        ("adamw_torch_8bit", 2.03125),
        ("adamw_torch_4bit", 1.03125),
        ("schedule_free_adamw", 8.0),
        ("schedule_free_sgd", 4.0),
        ("stable_adamw", 8.0),
        ("grokadamw", 0.0),  # on the host
        ("sgd", 0.0),
        ("lomo", 0.0),
    ],
)
def test_states_of_a_large_fp32_parameter(optim: str, bytes_per_parameter: float) -> None:
    """Maps of codes, step counters and the like are a few KiB besides."""
    states = OPTIMIZERS[optim].state_bytes([matrix(2**15, 2**15, 4)])
    assert 0 <= states - bytes_per_parameter * GIB <= 4 * KIB


def test_a_16_bit_parameter_has_a_state_more_in_stable_adamw() -> None:
    states = OPTIMIZERS["stable_adamw"].state_bytes([matrix(2**15, 2**15)])
    assert 0 <= states - 6 * GIB <= 4 * KIB


def test_adafactor_keeps_a_row_and_a_column() -> None:
    """300 and 200 numbers of fp32 take three blocks of 512 bytes and two, the root mean square
    one."""
    assert OPTIMIZERS["adafactor"].state_bytes([matrix(300, 200, count=3)]) == 3 * 6 * 512
    vector = Updated(shape=(300,), width=2)
    assert OPTIMIZERS["adafactor"].state_bytes([vector]) == 4 * 512
    stacked = Updated(shape=(8, 300, 200), width=2)
    assert OPTIMIZERS["adafactor"].state_bytes([stacked]) == 9728 + 6656 + 512


def test_galore_keeps_averages_of_128_columns_and_the_projection() -> None:
    states = OPTIMIZERS["galore_adamw"].state_bytes([matrix(1024, 256)])
    assert states == 2 * (2 * 1024 * 128 + 128 * 256)
    wide = OPTIMIZERS["galore_adamw"].state_bytes([matrix(256, 1024)])
    assert wide == states
    # In fp32 the projection is a view of all 256 x 256 singular vectors.
    assert OPTIMIZERS["galore_adamw"].state_bytes([matrix(1024, 256, 4)]) == 4 * (
        2 * 1024 * 128 + 256 * 256
    )
    embedding = matrix(1024, 256, kind="embedding")
    assert OPTIMIZERS["galore_adamw"].state_bytes([embedding]) == 2 * 2 * 1024 * 256


def test_small_tensors_and_embeddings_have_wide_states_in_8_bit_optimizers() -> None:
    """A norm of 64 numbers: two states of 256 bytes, each in a block of 512."""
    optimizer = OPTIMIZERS["adamw_8bit"]
    norm = Updated(shape=(64,), width=2)
    assert optimizer.state_bytes([norm]) == 2 * 512
    embedding = matrix(1024, 256, kind="embedding")
    assert optimizer.state_bytes([embedding]) == 2 * 4 * 1024 * 256
    maps = 2 * KIB
    assert optimizer.state_bytes([matrix(64, 64)]) == 2 * (4096 + 512) + maps
    assert optimizer.state_bytes([matrix(64, 64), matrix(64, 64)]) == 4 * (4096 + 512) + maps


def test_grokadamws_states_are_the_hosts() -> None:
    parameters = [matrix(1024, 1024)]
    optimizer = OPTIMIZERS["grokadamw"]
    assert optimizer.state_bytes(parameters) == 0
    assert optimizer.state_bytes(parameters, "cpu") == 6 * MIB
    assert optimizer.host_state_bytes(parameters) == 6 * MIB
    assert OPTIMIZERS["adamw_torch"].host_state_bytes(parameters) == 0


def test_adalomo_has_states_of_frozen_parameters_too() -> None:
    plan = TrainingPlan(method="lora", optim="adalomo", **SHORT)
    model = tiny()
    trained = plan.resolved_method.count(model, plan.method_settings)
    frozen = frozen_parameters(model, plan, trained)
    assert sum(p.count * p.num_elements for p in frozen) == model.num_parameters
    states = max(p.components["optimizer_states"] for p in estimate_memory(model, plan).phases)
    own = OPTIMIZERS["adalomo"].state_bytes(updated_parameters(model, plan, trained))
    assert states == own + OPTIMIZERS["adalomo"].state_bytes(frozen)


# --- steps


@pytest.mark.parametrize("optim", IN_BACKWARD)
def test_gradients_do_not_live_together_where_the_step_is_within_backward(optim: str) -> None:
    estimate = estimate_memory(tiny(), TrainingPlan(method="full", optim=optim, **SHORT))
    gradients = max(phase.components["gradients"] for phase in estimate.phases)
    largest = 2 * 1000 * 256
    assert gradients <= 2 * largest
    step = next(p for p in estimate.phases if p.name == "optimizer step")
    assert step.components["gradients"] == 0


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_nothing_accumulates_where_the_step_is_within_backward(optim: str) -> None:
    plan = TrainingPlan(method="full", optim=optim, **SHORT)
    accumulating = plan.replace(gradient_accumulation_steps=4)
    once, often = (estimate_memory(tiny(), p).allocated_peak_bytes for p in (plan, accumulating))
    assert once == often


def test_galore_projects_linear_modules_alone() -> None:
    """GPT-2's matrices are no torch.nn.Linear; a tied head is an embedding."""
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    config = {**gpt2, "vocab_size": 500}
    for given, number in ((config, 0), ({**TINY, "tie_word_embeddings": True}, 28), (TINY, 29)):
        model = spec_from_config(given, "model")
        plan = TrainingPlan(method="full", optim="galore_adamw", **SHORT)
        trained = plan.resolved_method.count(model, plan.method_settings)
        kinds = [(p.kind, p.count) for p in updated_parameters(model, plan, trained)]
        assert sum(count for kind, count in kinds if kind == "linear") == number


# --- beside the dry run


def dry(config: dict[str, Any], **settings: Any) -> tuple[MemoryEstimate, Any]:
    """The closed form's estimate, and the record of all layers."""
    from ftplan.launcher.dry_run.step import dry_run
    from tests.dry_runs import cuda_case

    case = cuda_case(config, config["num_hidden_layers"], **{**SHORT, **settings})
    record = dry_run(structs.replace(case, few_layers=False)).record
    return estimate_memory(spec_from_config(config, "tiny"), case.plan), record


def assert_alike(estimate: MemoryEstimate, record: Any) -> None:
    """States exactly; the step and the peak within a half percent."""
    phases = {phase.name: phase for phase in estimate.phases}
    peaks = record.phase_peaks()
    saved = record.components_at(peaks["save"].position)
    assert phases["save"].components["optimizer_states"] == saved["optimizer_states"]
    step = peaks["optimizer step"].allocated_bytes
    # What else there is: inputs and numbers, some blocks.
    assert phases["optimizer step"].allocated_peak_bytes == pytest.approx(step, abs=16 * KIB)
    highest = max(peak.allocated_bytes for name, peak in peaks.items() if name != "evaluation")
    assert math.isclose(estimate.allocated_peak_bytes, highest, rel_tol=0.005)


def needs(optim: str) -> None:
    """Skip where the dry run's packages or the optimizer's are not installed."""
    pytest.importorskip("trl", reason="needs the `train` extra")
    pytest.importorskip(OPTIMIZERS[optim].module or "torch")


beside_the_dry_run = pytest.mark.usefixtures("on_the_processor")


@pytest.mark.train
@beside_the_dry_run
@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_training_all_parameters(optim: str) -> None:
    needs(optim)
    config = {**TINY, "num_hidden_layers": 2}
    assert_alike(*dry(config, method="full", optim=optim))


@pytest.mark.train
@beside_the_dry_run
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "adafactor", *IN_BACKWARD])
def test_training_adapters(optim: str) -> None:
    needs(optim)
    config = {**TINY, "num_hidden_layers": 2}
    assert_alike(*dry(config, method="lora", optim=optim, target_modules=("all-linear",)))


@pytest.mark.train
@beside_the_dry_run
@pytest.mark.parametrize("optim", ["adafactor", "adalomo", "lomo", "galore_adamw_layerwise"])
@pytest.mark.parametrize(
    "settings",
    [{"dtype": "float32", "mixed_precision": "no"}, {"gradient_checkpointing": True}],
    ids=["fp32", "checkpointing"],
)
def test_training_tied_embeddings(optim: str, settings: dict[str, Any]) -> None:
    needs(optim)
    config = {**TINY, "num_hidden_layers": 2, "tie_word_embeddings": True}
    assert_alike(*dry(config, method="full", optim=optim, **settings))


# Paged states are as large, and on the processor nothing else.
OF_BITSANDBYTES = [(o.name, "bfloat16") for o in OPTIMIZERS.values() if o.module == "bitsandbytes"]


@pytest.mark.train
@pytest.mark.parametrize(
    ("optim", "dtype"),
    [
        *swept(OF_BITSANDBYTES, (one for one in OF_BITSANDBYTES if not one[0].startswith("paged"))),
        *(("adamw_8bit", "float32"), ("ademamix", "float32")),
    ],
)
def test_bitsandbytes_updates_on_the_processor(
    optim: str, dtype: str, devices: dict[str, Device]
) -> None:
    needs(optim)
    from ftplan.launcher.dry_run.step import dry_run
    from tests.dry_runs import case

    config, settings = {**TINY, "num_hidden_layers": 2}, {**SHORT, "method": "full"}
    on_cpu = case(config, **{**settings, "optim": optim, "dtype": dtype, "mixed_precision": "no"})
    record = dry_run(structs.replace(on_cpu, few_layers=False)).record
    model = spec_from_config(config, "tiny")
    phases = estimate_memory(model, on_cpu.plan, device=devices["CPU"]).phases
    step = next(phase for phase in phases if phase.name == "optimizer step")
    carried_out = record.phase_peaks()["optimizer step"].allocated_bytes
    assert step.allocated_peak_bytes == pytest.approx(carried_out, abs=4 * KIB)
