"""Tiny models of several architectures, a task that a few steps teach, and whole runs on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from msgspec import Struct

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.emit import method_settings
from ftplan.launcher.launching import write_run
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training import bottlenecks, loop
from ftplan.launcher.training.adapters import tells_tasks_apart
from ftplan.launcher.training.build import keep_differentiable, quantization_config
from ftplan.launcher.training.evaluation import Evaluator
from ftplan.launcher.ui import Ui
from ftplan.planner.hardware_spec import Device
from ftplan.planner.units import GIB
from tests.launcher_fixtures import CHATML, tiny_tokenizer

NUM_LAYERS = 2

_SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": NUM_LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    # The usual 0.02 bounds a frozen head of this width to logits of about 1: nothing to learn.
    "initializer_range": 0.25,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SHAPE, "tie_word_embeddings": True},
    "qwen3": {**_SHAPE, "head_dim": 16},
    "gpt2": {
        **{"n_embd": 64, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 256},
        "initializer_range": 0.25,
    },
    "qwen3_moe": {
        **{**_SHAPE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
        "moe_intermediate_size": 64,
    },
}

CPU = Device(
    name="a processor",
    kind="cpu",
    total_bytes=8 * GIB,
    free_bytes=8 * GIB,
    memory_bandwidth_bytes_per_second=1e10,
    peak_flops_per_second={"float32": 1e11},
    context_bytes=0,
    rates_source="assumed",
)

_NOTHING_ASKED = {"scores": None, "num_scored": 0, "shown": []}

_WORDS = ("list", "text", "file", "sets", "dict", "loop", "name", "type")


def save_model(architecture: str, folder: Path) -> Path:
    """A model with random weights, as `save_pretrained` writes it."""
    tokenizer = tiny_tokenizer(CHATML, pad_token="<|bos|>")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        **ARCHITECTURES[architecture],
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answered() -> list[dict[str, Any]]:
    """Questions with one kind of answer."""
    return [
        {"instruction": f"Where is the {word} {n}?", "output": f"The {word} {n} is here."}
        for word in _WORDS
        for n in range(4)
    ]


def compared() -> list[dict[str, Any]]:
    """Questions with a better answer and a worse one."""
    return [
        {
            "prompt": f"Where is the {word} {n}?",
            "chosen": f"The {word} {n} is here.",
            "rejected": f"A {word} {n} was there.",
        }
        for word in _WORDS
        for n in range(4)
    ]


def labelled() -> list[dict[str, Any]]:
    """Questions with answers that are good or bad."""
    rows = []
    for row in compared():
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        rows.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Done(Struct):
    """A run: what was planned, what it left, and the logits of the model that was saved."""

    plan: Planned
    run: RunDir
    logits: torch.Tensor

    @property
    def record(self) -> dict[str, Any]:
        return self.run.read_record()

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.run.metric_rows() if "loss" in row]


def plan_of(model: Path, data: Path, runs: Path, given: Mapping[str, Any]) -> Planned:
    """A plan that is to be launched."""
    return make_plan(
        Ui(as_json=True),
        asked=DataAsked(paths=(str(data),)),
        model_name=str(model),
        named_device=CPU,
        given=given,
        runs_dir=runs,
        for_launch=True,
    )


def carry_out(model: Path, data: Path, runs: Path, given: Mapping[str, Any]) -> Done:
    """Plan and train, in this process; without answers, general text, which take
    longer."""
    plan = plan_of(model, data, runs, given)
    run = write_run(plan, None, runs)
    seen: list[torch.Tensor] = []
    saved: Callable[..., str] = loop.save

    def save(session: Any, trainer: Any) -> str:
        seen.append(logits_of(trainer.accelerator.unwrap_model(trainer.model)))
        return saved(session, trainer)

    with (
        mock.patch.object(loop, "save", save),
        mock.patch.object(Evaluator, "_answered", lambda *args: _NOTHING_ASKED),
        mock.patch.object(Evaluator, "_general", lambda *args: None),
        mock.patch("signal.signal"),
    ):
        assert loop.train(run, resume=False) == 0
    return Done(plan, run, seen[0])


def logits_of(model: Any) -> torch.Tensor:
    """Of some tokens, as the model is asked after training."""
    tokens = torch.arange(4, 24).reshape(2, 10)
    training = model.training
    model.eval()
    with torch.no_grad():
        task = {"task_ids": tokens.new_zeros(len(tokens))} if tells_tasks_apart(model) else {}
        result = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **task).logits
    model.train(training)
    return result.float()


def reloaded(done: Done) -> PreTrainedModel:
    """What was saved, loaded as other programs do."""
    output = done.run.root / done.record["output"]
    plan = done.plan.chosen.plan
    scores = plan.objective == "reward"
    if plan.method == "bottleneck":
        return bottlenecks.load(output)
    if (output / "adapter_config.json").exists():
        kind = AutoPeftModelForSequenceClassification if scores else AutoPeftModelForCausalLM
        more: dict[str, Any] = {"num_labels": 1} if scores else {}
        if plan.quantization != "none":
            more["quantization_config"] = quantization_config(method_settings(plan))
        model = kind.from_pretrained(output, **more)
        if plan.quantization != "none":
            keep_differentiable(model)  # else bitsandbytes answers from weights in fewer bits
            for name, parameter in model.named_parameters():
                if "lora_" in name:  # TRL computes with them in bf16 beside a quantized base
                    parameter.data = parameter.data.to(torch.bfloat16)
        return model
    return (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_pretrained(
        output
    )
