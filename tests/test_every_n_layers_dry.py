"""Checkpointing of one layer in n: the closed form beside the dry run, which carries it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from transformers.modeling_layers import GradientCheckpointingLayer

from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.emit import method_settings
from ftplan.launcher.training.build import decoder_layers, meta_model
from ftplan.planner.families import FAMILIES, spec_from_config
from ftplan.planner.memory import estimate_memory
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stack import Stack
from ftplan.planner.trained import target_names
from tests.dry_runs import GPT2, LLAMA, cuda_case
from tests.sweeps import named

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
WINDOWS: dict[str, Any] = {"head_dim": 64, "sliding_window": 64}
LLAMA_ = {**LLAMA, **WIDE}
GPT2_ = {**GPT2, "n_embd": 256, "n_positions": 512}
GEMMA2 = {**LLAMA_, **WINDOWS, "model_type": "gemma2", "query_pre_attn_scalar": 64}
GEMMA3 = {**LLAMA_, **WINDOWS, "model_type": "gemma3_text", "sliding_window_pattern": 3}
FULL: dict[str, Any] = {"method": "full"}
QLORA: dict[str, Any] = {"method": "qlora", "quantization": "nf4"}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
SHARDED: dict[str, Any] = {"sharding": "fsdp", "num_gpus": 4}
ZERO3: dict[str, Any] = {"sharding": "zero3", "num_gpus": 4}
TOLERANCE = 0.005

JOINED = {
    *("llama, full, mixed", "llama, lora, dropout", "llama, full, loop", "llama, padded"),
    *("gpt2, qlora", "gemma2, full", "gemma2, qlora", "llama, fsdp, full"),
}

# Families that transformers itself cannot build, and one whose vision tower's layers come first.
ELSEWHERE = {"baichuan", "chatglm", "internlm2", "qwen", "mistral3", "gemma3"}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        named(name, config, {"every_n_layers": n, **settings}, joined=JOINED)
        for name, config, n, settings in (
            ("llama, full", LLAMA_, 2, FULL),
            ("llama, full, mixed", LLAMA_, 3, {**FULL, "dtype": "float32"}),
            ("llama, lora", LLAMA_, 3, {}),
            ("llama, qlora", LLAMA_, 2, QLORA),
            ("llama, lora, reentrant", LLAMA_, 2, {"use_reentrant": True}),
            ("llama, freeze", LLAMA_, 2, {"method": "freeze", "num_trainable_layers": 3}),
            ("llama, lora, dropout", LLAMA_, 3, {"trainer": "transformers", "lora_dropout": 0.1}),
            ("llama, full, loop", LLAMA_, 2, {**FULL, "trainer": "loop"}),
            ("llama, padded", LLAMA_, 3, {"padded": True}),
            ("llama, reward", LLAMA_, 2, {"objective": "reward"}),
            (
                "llama, dpo",
                LLAMA_,
                2,
                {"objective": "dpo", "precompute_ref_log_probs": True, "loss": "trl-fused"},
            ),
            ("gpt2, full", GPT2_, 3, FULL),
            ("gpt2, qlora", GPT2_, 2, QLORA),
            # Both kinds of its layers need a mask; one in two of them are all of one kind.
            ("gemma2, full", GEMMA2, 2, {**FULL, **EAGER}),
            ("gemma2, lora", GEMMA2, 3, EAGER),
            ("gemma2, qlora", GEMMA2, 2, {**QLORA, **EAGER}),
            ("gemma3, lora", GEMMA3, 2, {}),
            ("llama, fsdp, full", LLAMA_, 2, {**FULL, **SHARDED}),
            ("llama, fsdp, lora", LLAMA_, 3, SHARDED),
            ("llama, zero2", LLAMA_, 2, {**SHARDED, "sharding": "zero2"}),
            ("llama, zero3", LLAMA_, 2, {**FULL, "dtype": "float32", **ZERO3}),
            ("llama, zero3, lora", LLAMA_, 3, {"use_reentrant": True, **ZERO3}),
        )
    ],
)
def test_it_takes_what_its_step_takes(config: dict[str, Any], settings: dict[str, Any]) -> None:
    """On a model of an odd number of layers."""
    layers = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
    spec = spec_from_config({**config, layers: 7}, "tiny")
    given = {
        **{"per_device_train_batch_size": 2, "max_length": 256, "lora_rank": 8},
        **{"gradient_checkpointing": True, "target_modules": target_names(spec, ("all-linear",))},
        **settings,
    }
    case = cuda_case(config, 7, **given)
    carried_out = dry_run(case).record.peak.allocated_bytes
    known = estimate_memory(spec, case.plan, stack=Stack(padded=case.padded))
    assert known.allocated_peak_bytes == pytest.approx(carried_out, rel=TOLERANCE)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - ELSEWHERE))
def test_transformers_counts_the_layers_that_the_closed_form_counts(
    family: str, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    settings = method_settings(TrainingPlan(attn_implementation="eager"))
    model = meta_model(tiny_config(family), settings)
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    layers: list[Any] = decoder_layers(model)
    assert [layer.gradient_checkpointing for layer in layers] == [
        place % 2 == 0 for place in range(len(layers))
    ]
    counted = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(counted) == len(layers)
