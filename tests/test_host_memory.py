"""RAM of the machine: figures worked out by hand, and a process that loads a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ftplan.planner import memory as memory_module
from ftplan.planner.allocator import pinned_bytes
from ftplan.planner.errors import InputError
from ftplan.planner.explain_host import explain_host
from ftplan.planner.families import spec_from_config
from ftplan.planner.hardware_spec import CPU_PROCESS_BYTES, CUDA_HOST_BYTES, Device
from ftplan.planner.host_memory import HOST_COMPONENTS, SAVED_AT_ONCE_BYTES, HostMemory
from ftplan.planner.memory import estimate_memory, memory_from_phases
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import trained_part
from ftplan.planner.plan import TrainingPlan
from tests.sweeps import swept

PROCESS = CPU_PROCESS_BYTES + CUDA_HOST_BYTES
LLAMA_2_7B = 6_738_415_616


def _host(model: ModelSpec, **settings: Any) -> HostMemory:
    return estimate_memory(model, TrainingPlan(**settings)).host


def _phase(host: HostMemory, name: str) -> dict[str, int]:
    return next(dict(phase.components) for phase in host.phases if phase.name == name)


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_processes_share_the_mapped_files(llama_2_7b: ModelSpec, num_gpus: int) -> None:
    """The kernel takes their pages back where it must: they are resident, and not required."""
    llama_2_7b = structs.replace(llama_2_7b, native_dtype="float16")
    host = _host(llama_2_7b, num_gpus=num_gpus)
    loading = _phase(host, "loading")
    assert loading == {"processes": num_gpus * PROCESS, "mapped_files": 2 * LLAMA_2_7B}
    assert host.peak_bytes == num_gpus * PROCESS + 2 * LLAMA_2_7B
    assert host.required_bytes < host.peak_bytes


def test_a_save_copies_what_it_writes(llama_2_7b: ModelSpec) -> None:
    """fp32 weights; of a larger model no more than one file at a time."""
    assert _phase(_host(llama_2_7b, method="full", dtype="float32"), "saving")["copies"] == (
        4 * LLAMA_2_7B
    )
    assert SAVED_AT_ONCE_BYTES < 8 * LLAMA_2_7B


def test_zero_divides_on_the_host(llama_2_7b: ModelSpec) -> None:
    """Every process has the 16-bit weights twice."""
    host = _host(llama_2_7b, method="full", num_gpus=4, sharding="zero2")
    assert _phase(host, "dividing")["copies"] == 4 * 2 * 2 * LLAMA_2_7B


def test_zeros_offloading_takes_eighteen_bytes_a_parameter(llama_2_7b: ModelSpec) -> None:
    """Master, its gradient and two states in fp32 and a copy in 16 bits; with accumulation a
    gradient in 16 bits too. A buffer of the largest parameter stands beside."""
    settings = {"method": "full", "num_gpus": 4, "sharding": "zero2", "offload": "optimizer"}
    largest = 32000 * 4096
    for steps, width in ((1, 18), (4, 20)):
        training = _phase(
            _host(llama_2_7b, gradient_accumulation_steps=steps, **settings), "training"
        )
        offloaded = sum(training.values()) - training["processes"]
        assert offloaded == pytest.approx(width * LLAMA_2_7B + 4 * 2 * largest, rel=1e-4)


def test_pinned_tensors_take_powers_of_two(llama_2_7b: ModelSpec) -> None:
    """FSDP pins each share: 4096 x 4096 / 4 in fp32 is a power of two, 4096 x 11008 / 4 is not."""
    assert [pinned_bytes(size) for size in (0, 1, 512, 513)] == [0, 1, 512, 1024]
    host = _host(llama_2_7b, method="full", num_gpus=4, sharding="fsdp", offload="parameters")
    training = _phase(host, "training")
    layer = 4 * 4 * 2**22 + 3 * 2**26 + 2 * 2**12
    outside = 2 * 2**27 + 2**12
    assert training["weights"] == training["gradients"] == 4 * (32 * layer + outside)
    assert training["optimizer_states"] == pytest.approx(8 * LLAMA_2_7B, rel=1e-4)


def test_fsdp_loads_on_the_host_first(llama_2_7b: ModelSpec) -> None:
    """One process has the model, and the fp32 masters of what it trains."""
    loading = _phase(_host(llama_2_7b, method="full", num_gpus=4, sharding="fsdp"), "loading")
    assert loading["copies"] == 4 * LLAMA_2_7B


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_stacked_experts_are_apart_from_the_file(
    family: str, tiny_spec: Callable[..., ModelSpec], devices: dict[str, Device]
) -> None:
    """654 MB of a mixture in bf16 took 0.65 GB mapped and 0.78 GB apart, on a processor."""
    model = tiny_spec(family, torch_dtype="bfloat16")
    plan = TrainingPlan(method="full", dtype="bfloat16", mixed_precision="no")
    host = estimate_memory(model, plan, device=devices["CPU"]).host
    apart = 2 * model.num_parameters if family == "mixtral" else 0
    assert _phase(host, "loading").get("weights", 0) == apart


def test_names_of_components_are_known(llama_2_7b: ModelSpec) -> None:
    several: tuple[dict[str, Any], ...] = (
        {},
        {"num_gpus": 2, "sharding": "zero2", "offload": "optimizer"},
    )
    for settings in several:
        for phase in _host(llama_2_7b, **settings).phases:
            assert set(phase.components) <= set(HOST_COMPONENTS)


def test_merging_is_for_low_rank_adapters(llama_2_7b: ModelSpec) -> None:
    """16-bit weights in a process without CUDA."""
    merging = CPU_PROCESS_BYTES + 2 * LLAMA_2_7B
    assert _host(llama_2_7b, method="lora").merging_bytes == merging
    assert _host(llama_2_7b, method="full").merging_bytes is None


# --- beside a process that loads

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_LOAD = """
import sys
import torch, transformers, peft, trl, datasets
from trl import SFTTrainer
def peak():
    status = open("/proc/self/status").read()
    return next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
imported = peak()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
for parameter in model.parameters():  # as a copy to a GPU would
    parameter.data.view(-1)[::256].sum()
print(imported, peak())
"""


@pytest.mark.train
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("dtype", swept(["bfloat16", "float32"], ["float32"]))
def test_a_process_that_loads_is_as_large_as_predicted(
    dtype: str, tmp_path: Path, devices: dict[str, Device]
) -> None:
    """0.5 GB of random weights, on the processor. How much of the libraries' files is in memory
    differs from machine to machine."""
    torch = pytest.importorskip("torch", reason="loads for real")
    pytest.importorskip("trl", reason="needs the `train` extra")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIG)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    command = [sys.executable, "-c", _LOAD, str(tmp_path), dtype]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plan = TrainingPlan(method="full", dtype=dtype, mixed_precision="no")
    host = estimate_memory(spec_from_config(CONFIG, "half"), plan, device=devices["CPU"]).host
    imported, peak = (1024 * int(number) for number in shown.split()[-2:])
    assert pytest.approx(imported, rel=0.4) == CPU_PROCESS_BYTES
    loaded = host.phases[0].peak_bytes - CPU_PROCESS_BYTES
    assert loaded == pytest.approx(peak - imported, rel=0.08)


def test_terms_of_host_and_disk_sum_to_them(llama_2_7b: ModelSpec) -> None:
    plan = TrainingPlan(method="full", num_gpus=4, sharding="zero2", offload="optimizer")
    memory = estimate_memory(llama_2_7b, plan)
    sums: dict[str, int] = {}
    for term in explain_host(memory, plan):
        sums[term["where"]] = sums.get(term["where"], 0) + term["num_bytes"]
    assert sums == {"host RAM, saving": memory.host_ram_peak_bytes, "disk": memory.disk_bytes}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_dry_run_alone_tells_host_and_disk(
    method: str, llama_2_7b: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no closed form, its figures are those of what the dry run counted."""
    plan = TrainingPlan(method=method, dtype="float32", mixed_precision="no", optim="sgd")
    closed = estimate_memory(llama_2_7b, plan)

    def refuse(*_: object) -> None:
        raise InputError("no closed form")

    monkeypatch.setattr(memory_module, "compiled_step", refuse)
    trained = trained_part(llama_2_7b, plan).num_trainable_parameters
    dry = memory_from_phases(
        closed.phases,
        llama_2_7b,
        plan,
        None,
        trained_weight_bytes=4 * trained,
        reserved_bytes=closed.reserved_peak_bytes,
        required_reserved_bytes=closed.reserved_peak_bytes,
    )
    assert dry.host == closed.host
    assert dry.disk.to_dict() == closed.disk.to_dict()
