"""The whole suite on the processor, with models so small that it takes seconds: that it works is
seen before somebody pays for a GPU."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.configurations import Axes
from ftplan.launcher.cases import read_cases
from ftplan.launcher.commands.validate import closed_form, compare
from ftplan.planner.accuracy import Comparison

COUNT = 6
HANDS = 200

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
_MODELS = {
    "tiny-llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_SHAPE},
    "tiny-qwen3": {
        **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **_SHAPE},
        **{"head_dim": 16, "tie_word_embeddings": True},
    },
}

# Of a prediction that the processor measured, allocated memory; such small models keep little
# beside what a real one has a thousand times.
MOST_APART = 0.03


def axes(folder: Path) -> Axes:
    """Small ones of each kind; the models are written into the folder."""
    for name, config in _MODELS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {
        "model": {str(folder / name): 1 for name in _MODELS},
        "method": {"full": 2, "lora": 3, "freeze": 1},
        "quantization": {"none": 3, "nf4": 1, "int8": 1},
        "precision": {("float32", "no"): 2, ("bfloat16", "bf16"): 1},
        "trainer": {"trl": 2, "transformers": 2, "loop": 1},
        "loss": {"stock": 2, "trl-fused": 1},
        "optim": {"adamw_torch": 2, "adafactor": 1, "sgd": 1},
        "attn_implementation": {"sdpa": 2, "eager": 1},
        "gradient_checkpointing": {True: 1, False: 1},
        "max_length": {64: 1, 128: 1},
        "per_device_train_batch_size": {1: 1, 2: 1},
        "gradient_accumulation_steps": {1: 2, 2: 1},
        "objective": {"sft": 4, "dpo": 1},
    }


def comparisons(rows: Path) -> list[Comparison]:
    """The measured runs as `ftplan validate` compares them."""
    return list(compare(read_cases(rows), closed_form))


def complaints(compared: list[Comparison], failures: int) -> list[str]:
    """What is wrong; nothing if the suite works."""
    found = [f"{failures} runs failed: see failures.jsonl"] if failures else []
    if len(compared) + failures < COUNT:
        found.append(f"only {len(compared)} runs were measured")
    for comparison in compared:
        error = comparison.error("allocated_bytes")
        if error is None:
            found.append(f"{comparison.id}: {'; '.join(comparison.refused) or 'no memory'}")
        elif abs(error) > MOST_APART:
            found.append(f"{comparison.id}: predicted {100 * error:+.1f} % of what was allocated")
    return found
