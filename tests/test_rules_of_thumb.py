"""Rules of thumb: their bytes by hand, and where they say nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks import rules
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.rules_of_thumb import RULES, largest_module_parameters

PARAMETERS = 6_738_415_616  # Llama 2 7B
HEAD = 32_000 * 4096
FULL = TrainingPlan(method="full", dtype="float32", mixed_precision="bf16", optim="adamw_torch")
PURE_BF16 = FULL.replace(dtype="bfloat16", mixed_precision="no")
FSDP = FULL.replace(sharding="fsdp", num_gpus=4)
LORA = TrainingPlan(method="lora", dtype="bfloat16", mixed_precision="no")
QLORA = LORA.replace(method="qlora", quantization="nf4")
INT8 = LORA.replace(quantization="int8")

# Bytes on each GPU by hand; None where a rule says nothing.
EXPECTED: list[tuple[str, TrainingPlan, int | None]] = [
    ("17.5", FULL, 117_922_273_280),
    ("17.5", FSDP, 29_480_568_320),
    ("17.5", LORA, None),
    ("accelerate", FULL, 8 * (PARAMETERS - HEAD)),
    ("accelerate", PURE_BF16, 8 * (PARAMETERS - HEAD)),
    ("accelerate", FULL.replace(mixed_precision="no"), 16 * (PARAMETERS - HEAD)),
    ("accelerate", FSDP, 2 * (PARAMETERS - HEAD)),
    ("accelerate", QLORA, None),
    ("deepspeed", FULL, 20 * PARAMETERS),
    ("deepspeed", FULL.replace(sharding="zero2", num_gpus=4), 43_799_701_504),
    ("deepspeed", FSDP, 4 * HEAD + 30_322_870_272),
    ("deepspeed", FSDP.replace(sharding="zero3"), 4 * HEAD + 30_322_870_272),
    ("deepspeed", FULL.replace(num_gpus=4), None),
    ("deepspeed", FSDP.replace(offload="parameters"), None),
    ("deepspeed", LORA, None),
    ("llama-factory", FULL, 18 * PARAMETERS),
    ("llama-factory", PURE_BF16, 8 * PARAMETERS),
    ("llama-factory", LORA, 2 * PARAMETERS),
    ("llama-factory", LORA.replace(num_gpus=4), 2 * PARAMETERS),
    ("llama-factory", INT8, PARAMETERS),
    ("llama-factory", QLORA, PARAMETERS // 2),
    ("llama-factory", FULL.replace(sharding="zero2", num_gpus=4), None),
    ("llama-factory", LORA.replace(method="ia3"), None),
]


@pytest.mark.parametrize(("rule", "plan", "expected"), EXPECTED)
def test_each_rule_by_hand(
    rule: str, plan: TrainingPlan, expected: int | None, llama_2_7b: ModelSpec
) -> None:
    assert RULES[rule].num_bytes(llama_2_7b, plan) == expected


def test_every_rule_is_worked_out_and_says_nothing_somewhere() -> None:
    for name in RULES:
        said = [expected for rule, _, expected in EXPECTED if rule == name]
        assert None in said and len(said) > said.count(None)


def test_tied_embeddings_are_no_head_that_accelerate_misses(small_llama: ModelSpec) -> None:
    assert RULES["accelerate"].num_bytes(small_llama, PURE_BF16) == 8 * 134_515_008


def test_the_largest_module_is_a_matrix_the_embeddings_or_a_stack_of_experts(
    llama_2_7b: ModelSpec, tiny_spec: Callable[..., ModelSpec]
) -> None:
    """transformers holds a layer's experts as parameters of one module."""
    assert largest_module_parameters(llama_2_7b) == HEAD
    narrow = structs.replace(llama_2_7b, vocab_size=100)
    assert largest_module_parameters(narrow) == 4096 * 11008
    assert largest_module_parameters(tiny_spec("mixtral")) == 4 * 3 * 64 * 96


def test_the_benchmark_prints_each_rule_for_each_method(tmp_path: Path) -> None:
    """Of two runs, a line each of full tuning and of QLoRA."""
    rows = [json.loads(line) for line in rules.MEASURED.read_text().splitlines()]
    kept = [
        next(r for r in rows if r["config"]["method"] == method) for method in ("full", "qlora")
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    output = io.StringIO()
    with redirect_stdout(output):
        assert rules.main([str(path), "--json"]) == 0
    found = {(g["method"], g["rule"]): g for g in json.loads(output.getvalue())["groups"]}
    assert set(found) == {(m, r) for m in ("full", "qlora") for r in (rules.OURS, *RULES)}
    measured = kept[0]["measured"]["allocated_bytes"]
    assert found["full", "17.5"]["bias"] == pytest.approx(17.5 * 1_124_886_528 / measured - 1)
    assert found["qlora", "17.5"]["count"] == 0 and found["qlora", "17.5"]["median"] is None
    assert found["qlora", rules.OURS]["count"] == 1 and found["qlora", rules.OURS]["median"] < 0.05


def test_a_file_that_is_none_is_an_error_not_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rules.main([str(tmp_path / "none.jsonl")]) == 2
    assert "error:" in capsys.readouterr().err
