"""Cases of dry runs, the same steps for real, and how records are compared."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, set_seed

from benchmarks.gpu.meters import held_bytes, mark, phase_peaks
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.emit import method_settings, training_arguments
from ftplan.launcher.training.build import apply_method, quantization_config, switched_on
from ftplan.launcher.training.loop import sft_arguments
from ftplan.launcher.training.optimizers import settle_optimizer
from ftplan.launcher.training.stacks import blank_tokenizer
from ftplan.launcher.training.trainer import PlannedTrainer
from ftplan.planner.memory_record import MemoryRecord
from ftplan.planner.plan import TrainingPlan

STEPS = 2
PHASES = ("forward", "backward", "optimizer step")
NUM_LAYERS = 2

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 256,
}
MIXTURE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LLAMA = {"model_type": "llama", **SHAPE}
QWEN3 = {"model_type": "qwen3", **SHAPE, "head_dim": 16, "tie_word_embeddings": True}
GPT2 = {
    **{"model_type": "gpt2", "n_embd": 64, "n_layer": NUM_LAYERS, "n_head": 4},
    **{"vocab_size": 500, "n_positions": 256},
}
GEMMA3 = {
    **{"model_type": "gemma3_text", **SHAPE, "head_dim": 16},
    **{"sliding_window": 32, "sliding_window_pattern": 2},
}
QWEN3_MOE = {"model_type": "qwen3_moe", **SHAPE, **MIXTURE, "head_dim": 16, "num_experts": 8}
DEEPSEEK = {
    **{"model_type": "deepseek_v3", **SHAPE, **MIXTURE, "num_key_value_heads": 4},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    **{"first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
}
GPT2_MODULES = ("c_attn", "c_proj", "c_fc")


def case(config: dict[str, Any] = LLAMA, **settings: Any) -> DryRunCase:
    """A case on the processor, in fp32 unless `settings` say otherwise."""
    fields = set(DryRunCase.__struct_fields__)
    further = {name: settings.pop(name) for name in fields & set(settings)}
    plan = TrainingPlan(
        **{
            **{"dtype": "float32", "mixed_precision": "no", "optim": "adamw_torch"},
            **{"loss": "stock", "gradient_checkpointing": False, "max_length": 96},
            "per_device_train_batch_size": 2,
            **settings,
        }
    )
    return DryRunCase(
        **{"config": config, "plan": plan, "kind": "cpu", "row_length": plan.max_length, **further}
    )


# --- the same steps for real ---------------------------------------------------------------------


class MarkedSFTTrainer(PlannedTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        mark("forward")
        return super().training_step(*args, **kwargs)


class MarkedTrainer(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        mark("forward")
        return super().training_step(*args, **kwargs)


class MarkedLoop:
    """A training loop as people write it, a function for the step."""

    def __init__(self, model: Any, arguments: Any, length: int) -> None:
        self.model, self.arguments, self.length = model, arguments, length

    def train(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(self.arguments)
        optimizer = optimizer_class(trained, **settings)
        if self.arguments.gradient_checkpointing:
            settings = dict(self.arguments.gradient_checkpointing_kwargs)
            every = settings.pop("every_n_layers", 1)
            self.model.gradient_checkpointing_enable(settings, every_n_layers=every)
        self.model.train()
        rows = self.arguments.per_device_train_batch_size
        batch = torch.ones((rows, self.length), dtype=torch.int64)
        for _ in range(STEPS):
            self.step(optimizer, batch)

    def step(self, optimizer: Any, batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        for _ in range(self.arguments.gradient_accumulation_steps):
            mark("forward")
            outputs = self.model(input_ids=batch, labels=batch, use_cache=False)
            mark("backward")
            outputs.loss.backward()
        mark("optimizer step")
        optimizer.step()


def real_model(case: DryRunCase, folder: Path) -> Any:
    """The model with random weights; a quantized one as `from_pretrained` loads it."""
    plan = case.plan
    loaded = {
        "dtype": getattr(torch, plan.dtype),
        "attn_implementation": plan.attn_implementation,
    }
    switched = switched_on(case.config, method_settings(plan))
    config = AutoConfig.for_model(**{**case.config, **switched})
    quantization = quantization_config(method_settings(plan))
    if quantization is None:
        return AutoModelForCausalLM.from_config(config, **loaded)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, **loaded)


def real_trainer(case: DryRunCase, folder: Path) -> Any:
    """The trainer of the case's plan, whose model has random weights."""
    trainer, plan = _real_trainer(case, folder), case.plan
    settle_optimizer(trainer, plan.method, plan.optim, method_settings(plan))
    return trainer


def _real_trainer(case: DryRunCase, folder: Path) -> Any:
    plan, length = case.plan, case.row_length
    set_seed(0)
    model = real_model(case, folder)
    peft_config = apply_method(model, plan.method, method_settings(plan))
    rows = STEPS * plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    planned = training_arguments(plan, "cpu") | {"max_steps": STEPS}
    arguments = sft_arguments(planned, str(folder))
    arguments.save_strategy = "no"
    common = {"model": model, "args": arguments, "processing_class": blank_tokenizer()}
    if plan.trainer == "trl":
        row = {"input_ids": [1] * length, "completion_mask": [1] * length}
        return MarkedSFTTrainer(
            train_dataset=Dataset.from_list([row] * rows),
            peft_config=peft_config,
            row_lengths=[length] * rows,
            stock_loss=plan.loss == "stock",
            **common,
        )
    if case.kbit_prepare:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=plan.gradient_checkpointing
        )
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
        if plan.gradient_checkpointing:
            model.enable_input_require_grads()
    if plan.trainer == "loop":
        return MarkedLoop(model, arguments, length)
    row = {name: [1] * length for name in ("input_ids", "labels", "attention_mask")}
    return MarkedTrainer(train_dataset=Dataset.from_list([row] * rows), **common | {"model": model})


def mark_backward(accelerator: Any) -> None:
    """Backward and the optimizer's step leave their names in the profile too."""
    backward = accelerator.backward

    def marked(loss: Any, **kwargs: Any) -> None:
        mark("backward")
        backward(loss, **kwargs)
        if accelerator.sync_gradients:
            mark("optimizer step")

    accelerator.backward = marked


def measured_peaks(trainer: Any, *, evaluates: bool = False) -> dict[str, int]:
    """Tensor bytes at the highest moment of each phase, by torch's profiler."""
    if not isinstance(trainer, MarkedLoop):
        mark_backward(trainer.accelerator)
    gc.collect()  # what earlier tests left must not die in the profile
    level = held_bytes(trainer.model)
    gc.disable()  # as in the dry run
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
        if evaluates:
            mark("evaluation")
            trainer.evaluate(eval_dataset=trainer.train_dataset)
    gc.enable()
    return phase_peaks(profiler, level)


def num_checkpointed(plan: TrainingPlan, num_layers: int = NUM_LAYERS) -> int:
    """Layers that the plan has computed again."""
    return plan.gradient_checkpointing * -(-num_layers // plan.every_n_layers)


# What a layer under checkpointing keeps on the processor beside its input: the random generator's
# state. It is made outside of the dispatcher, so the dry run does not see it; real layers keep
# thousands of times as much.
GENERATOR_STATE_BYTES = 5056

# oneDNN's own buffers for a product in 16 bits on the processor (torch 2.13), whatever its size.
WORKSPACE_BYTES = 190 * 1024

FREEZE: dict[str, Any] = {"method": "freeze", "num_trainable_layers": 1}
REENTRANT: dict[str, Any] = {"gradient_checkpointing": True, "use_reentrant": True}
EVERY_SECOND: dict[str, Any] = {"gradient_checkpointing": True, "every_n_layers": 2}
QLORA: dict[str, Any] = {"method": "qlora", "quantization": "nf4"}
BF16: dict[str, Any] = {"dtype": "bfloat16", "mixed_precision": "bf16"}


def cuda_case(config: dict[str, Any], num_layers: int = 6, **settings: Any) -> DryRunCase:
    """A case on a GPU, in bf16, with few adapters."""
    deep = {**config, "n_layer" if config is GPT2 else "num_hidden_layers": num_layers}
    target = ("c_attn",) if config is GPT2 else ("q_proj",)
    return case(
        deep, **{"kind": "cuda", **BF16, "max_length": 64, "target_modules": target, **settings}
    )


def assert_equal_records(few: MemoryRecord, every: MemoryRecord) -> None:
    assert few.peak == every.peak
    assert few.phases == every.phases
    assert few.phase_peaks() == every.phase_peaks()
    for peak in every.phase_peaks().values():
        assert few.components_at(peak.position) == every.components_at(peak.position)
    assert few.events == every.events
    pairs = zip(few.storages, every.storages, strict=True)
    unequal = [(one, other) for one, other in pairs if one != other]
    assert {storage.operation for pair in unequal for storage in pair} <= {"aten.stack.default"}
    assert len(unequal) <= STEPS  # see the test
    assert all(abs(one.num_bytes - other.num_bytes) <= 512 for one, other in unequal)
