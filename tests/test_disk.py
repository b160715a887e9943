"""Disk: figures worked out by hand, and the folders that transformers' trainer writes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ftplan.planner.disk import CHECKPOINTS_KEPT, disk_needs, stored_bytes
from ftplan.planner.families import spec_from_config
from ftplan.planner.families.sizes import spec_from_size
from ftplan.planner.memory import estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from tests.sweeps import only_whole

LORA_7B = 39_976_960
LLAMA_2_7B = 6_738_415_616
# Configurations, schedules and the like, beside 84 bytes a parameter and more.
SMALL = 30_000

# 5 M parameters: large beside the names and small files that are not modelled.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def test_adapters_alone_are_saved(llama_2_7b: ModelSpec) -> None:
    """Checkpoints of fp32 adapters and two states, three at a time."""
    disk = estimate_memory(llama_2_7b, TrainingPlan(method="lora")).disk
    assert disk.weights == stored_bytes(llama_2_7b)
    assert disk.final_model == pytest.approx(4 * LORA_7B, abs=SMALL)
    # A step counter of each of 448 tensors is counted as a block.
    assert disk.checkpoint == pytest.approx(12 * LORA_7B + 448 * 512, abs=SMALL)
    assert disk.checkpoints == (CHECKPOINTS_KEPT + 1) * disk.checkpoint
    assert disk.total == disk.weights + disk.checkpoints + disk.final_model


def test_a_method_without_adapters_saves_the_whole_model(llama_2_7b: ModelSpec) -> None:
    for method in ("full", "freeze"):
        plan = TrainingPlan(method=method, dtype="float32", optim="sgd")
        disk = estimate_memory(llama_2_7b, plan).disk
        assert disk.final_model == disk.checkpoint
        assert disk.final_model == pytest.approx(4 * LLAMA_2_7B, abs=SMALL)


@pytest.mark.parametrize(
    ("sharding", "bytes_a_parameter"),
    [("zero1", 2 + 2 + 12), ("zero2", 2 + 2 + 12), ("fsdp", 4 + 8)],
)
def test_sharded_checkpoints_hold_the_masters(
    llama_2_7b: ModelSpec, sharding: str, bytes_a_parameter: int
) -> None:
    """ZeRO's have fp32 masters and two states, and 16-bit weights twice; FSDP's weights are the
    masters."""
    plan = TrainingPlan(method="full", num_gpus=4, sharding=sharding)
    disk = estimate_memory(llama_2_7b, plan).disk
    assert disk.checkpoint == pytest.approx(bytes_a_parameter * LLAMA_2_7B, rel=1e-3)


def test_the_models_files_have_its_own_dtype(llama_2_7b: ModelSpec) -> None:
    """fp32 where the configuration does not say; a bare size stands for 16 bits."""
    assert stored_bytes(llama_2_7b) == 4 * LLAMA_2_7B
    assert stored_bytes(spec_from_size(7 * 10**9, "7B")) == 2 * LLAMA_2_7B


def test_what_is_kept_grows_with_what_is_saved(llama_2_7b: ModelSpec) -> None:
    plan = TrainingPlan()
    needs = [
        disk_needs(llama_2_7b, plan, saved_bytes=saved, state_bytes=states).total
        for saved, states in ((0, 0), (1000, 0), (1000, 1000))
    ]
    assert [more - less for less, more in itertools.pairwise(needs)] == [4000, 3000]


# --- beside what transformers writes


def _plan(**settings: Any) -> TrainingPlan:
    """On the processor: no autocast, and the optimizer that is named."""
    return TrainingPlan(
        **{"dtype": "float32", "mixed_precision": "no", "gradient_checkpointing": False} | settings
    )


def _written(plan: TrainingPlan, folder: Path) -> Mapping[str, int]:
    """The files of a checkpoint after one step, without a tokenizer."""
    torch = pytest.importorskip("torch", reason="trains for real")
    pytest.importorskip("trl", reason="needs the `train` extra")
    peft = pytest.importorskip("peft")
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    from ftplan.launcher.emit import method_settings
    from ftplan.launcher.training.build import apply_method

    if plan.optimizer.module:
        pytest.importorskip(plan.optimizer.module)
    config = AutoConfig.for_model(**CONFIG)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, plan.dtype))
    adapter = apply_method(model, plan.method, method_settings(plan))
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        save_steps=1,
        optim=plan.optim,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trained = peft.get_peft_model(model, adapter) if adapter else model
    Trainer(model=trained, args=arguments, train_dataset=rows).train()
    return {file.name: file.stat().st_size for file in (folder / "checkpoint-1").iterdir()}


@pytest.mark.train
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full", "optim": "adamw_torch"},
        only_whole({"method": "full", "optim": "adamw_torch", "dtype": "bfloat16"}),
        {"method": "full", "optim": "adafactor"},
        only_whole({"method": "full", "optim": "sgd"}),
        only_whole({"method": "full", "optim": "lion_8bit"}),
        {"method": "full", "optim": "adamw_8bit"},
        {"method": "freeze", "optim": "adamw_torch"},
        {"method": "lora", "optim": "adamw_torch", "dtype": "bfloat16", "lora_rank": 64},
        {"method": "lora", "optim": "adamw_torch", "modules_to_save": ("lm_head",)},
        {"method": "vera", "optim": "adamw_torch", "dtype": "bfloat16"},
        only_whole({"method": "randlora", "optim": "adamw_torch", "dtype": "bfloat16"}),
        {"method": "shira", "optim": "adamw_torch", "dtype": "bfloat16"},
        {"method": "p-tuning", "optim": "adamw_torch", "dtype": "bfloat16"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_checkpoints_are_as_large_as_predicted(settings: dict[str, Any], tmp_path: Path) -> None:
    plan = _plan(**settings)
    files = _written(plan, tmp_path)
    disk = estimate_memory(spec_from_config(CONFIG, "tiny"), plan).disk
    assert disk.checkpoint == pytest.approx(sum(files.values()), rel=0.02)
    without_states = sum(size for name, size in files.items() if name != "optimizer.pt")
    assert disk.final_model == pytest.approx(without_states, rel=0.02)
