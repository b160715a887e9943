"""Predictions beside runs that others measured on A100 cards.

`measured/rows.jsonl`: figures of `torch.cuda.max_memory_allocated` from
foundation-model-stack/fms-acceleration, scripts/benchmarks (each row names commit and line in its
`id`): transformers' trainer, FlashAttention-2, rows packed to the length given, gradient
checkpointing. They are references, not fitted to: a term that is wrong shows here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan import profiles
from ftplan.planner.memory import estimate_memory
from ftplan.planner.plan import TrainingPlan

ROWS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parent / "measured" / "rows.jsonl").read_text().splitlines()
]
# Meta-Llama-3-8B has the shape of Llama-3.1-8B; only its rotary embedding differs.
CATALOGUED = {
    "meta-llama/Meta-Llama-3-8B": "llama-3.1-8b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
}
TOLERANCE = 0.03
MEAN_TOLERANCE = 0.01


def predicted_bytes(row: dict[str, Any]) -> int:
    config = row["config"]
    adapters = {}
    if config["lora_rank"] is not None:
        adapters = {
            "lora_rank": config["lora_rank"],
            "target_modules": tuple(config["target_modules"]),
        }
    plan = TrainingPlan(
        method=config["method"],
        quantization=config["quantization"],
        double_quant=bool(config["double_quant"]),
        dtype=config["torch_dtype"],
        mixed_precision=config["mixed_precision"],
        optim=config["optim"],
        per_device_train_batch_size=config["per_device_train_batch_size"],
        max_length=config["max_length"],
        gradient_checkpointing=config["gradient_checkpointing"],
        attn_implementation=config["attn_implementation"],
        loss=config["loss_kernel"],
        trainer=config["trainer"],
        **adapters,
    )
    model = profiles.require_model(CATALOGUED[row["model"]]).spec
    return estimate_memory(model, plan).allocated_peak_bytes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_allocated_memory_is_near_the_measured(row: dict[str, Any]) -> None:
    assert predicted_bytes(row) == pytest.approx(row["allocated_bytes"], rel=TOLERANCE)


def test_predictions_lean_neither_way() -> None:
    residuals = [predicted_bytes(row) / row["allocated_bytes"] - 1 for row in ROWS]
    assert abs(sum(residuals) / len(residuals)) <= MEAN_TOLERANCE


def test_the_rows_cover_methods_losses_and_models() -> None:
    """And each says where it is from."""
    assert {row["config"]["method"] for row in ROWS} == {"full", "lora", "qlora"}
    assert {row["config"]["loss_kernel"] for row in ROWS} == {"stock", "liger"}
    assert {row["model"] for row in ROWS} == set(CATALOGUED)
    for row in ROWS:
        assert row["source"].startswith("foundation-model-stack/fms-acceleration")
        assert "A100" in row["gpu"] and "torch" in row["software"]
