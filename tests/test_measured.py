"""Predictions beside runs that others measured.

`measured/rows.jsonl`: figures of `torch.cuda.max_memory_allocated` with source, software and
configuration of each run, on one, two and four A100 (foundation-model-stack/fms-acceleration,
scripts/benchmarks) and on a T4 (fitcheck-llm's measurements). `measured/fsdp_qlora.jsonl`: what the
allocator reserved on each of two GPUs under a script of its own around FSDP1
(AnswerDotAI/fsdp_qlora). They are references, nothing is fitted to them: a term that is wrong shows
here. `tolerance` is each run's own.
"""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import several_gpus
from ftplan.launcher.cases import Case, read_cases
from ftplan.launcher.commands import validate
from ftplan.planner.accuracy import GroupStatistics, Prediction
from ftplan.planner.errors import InputError

PATH = Path(__file__).parent / "measured" / "rows.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in PATH.read_text().splitlines()]
MEAN_TOLERANCE = 0.0005


@cache
def cases() -> dict[str, Case]:
    found = read_cases(PATH, {"HF_HOME": "/nonexistent"})
    assert all(isinstance(case, Case) for case in found), found
    return {case.id: case for case in found if isinstance(case, Case)}


@cache
def prediction(id_: str) -> Prediction:
    return validate.closed_form(cases()[id_])


def error(id_: str) -> float:
    """Relative, of allocated memory."""
    measured = cases()[id_].measured["allocated_bytes"]
    assert measured
    return prediction(id_).allocated_bytes / measured - 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_allocated_memory_is_near_the_measured(row: dict[str, Any]) -> None:
    assert abs(error(row["id"])) <= row["tolerance"]


def test_predictions_lean_neither_way() -> None:
    assert abs(statistics.mean(error(row["id"]) for row in ROWS)) <= MEAN_TOLERANCE


def test_most_are_within_a_few_thousandths() -> None:
    errors = sorted(abs(error(row["id"])) for row in ROWS)
    assert statistics.median(errors) <= 0.001
    assert errors[len(errors) * 19 // 20] <= 0.025


def test_runs_on_several_gpus_are_within_the_bars() -> None:
    """Of all a median of 4 % and a 95th percentile of 12 %; fms-acceleration's by far. fsdp_qlora's
    alone miss them (docs/accuracy.md says why), and are not to get worse."""
    found = several_gpus.errors(
        several_gpus.cases_of(),
        lambda case: prediction(case.id) if case.id in cases() else validate.closed_form(case),
    )
    said = {group: GroupStatistics.of(errors) for group, errors in found.items()}
    assert {group: of.count for group, of in said.items()} == {
        ("transformers", "allocated"): 74,
        ("fsdp_qlora", "reserved"): 14,
        ("all", ""): 88,
    }
    whole, script = said["all", ""], said["fsdp_qlora", "reserved"]
    assert whole.median <= 0.04 and whole.p95 <= 0.12
    assert said["transformers", "allocated"].median <= 0.004
    assert said["transformers", "allocated"].p95 <= 0.012
    assert script.median <= 0.043 and script.p95 <= 0.17


def test_a_script_around_fsdp_is_followed_as_it_is_written() -> None:
    """Its options, and the number and the memory of cards that its benchmarks name."""
    case = next(case for case in several_gpus.cases_of() if case.id.endswith("RTX409024GB-5"))
    assert case.gpu is not None and case.gpu.name == "RTX 4090"
    plan = case.plan
    assert (plan.lora_dropout, plan.double_quant, plan.autocast_adapter_dtype) == (0.1, True, False)
    assert (plan.sharding, plan.offload, case.fsdp_version) == ("fsdp", "parameters", 1)
    with pytest.raises(InputError, match="in closed form only"):
        validate.dry_run(Any, case)  # type: ignore[arg-type]


def test_the_rows_cover_methods_losses_precisions_and_sharding() -> None:
    """And each says where it is from."""
    seen = {
        key: {row["config"][key] for row in ROWS}
        for key in ("method", "quantization", "loss_kernel", "mixed_precision", "sharding")
    }
    assert seen == {
        "method": {"full", "lora", "qlora"},
        "quantization": {"none", "nf4", "gptq-int4"},
        "loss_kernel": {"stock", "liger", "triton_ce"},
        "mixed_precision": {"no", "bf16", "fp16"},
        "sharding": {"none", "fsdp_full_shard"},
    }
    for row in ROWS:
        assert row["source"] and row["gpu"] and "torch" in row["software"]


def test_speed_is_near_the_measured() -> None:
    """Of the rows that state it. Nothing in the time model was fitted to them."""
    errors, within = [], []
    for case in cases().values():
        measured = case.measured.get("tokens_per_second_per_gpu")
        of = prediction(case.id)
        least, most = of.least_tokens_per_second_per_gpu, of.most_tokens_per_second_per_gpu
        if measured and of.tokens_per_second_per_gpu and least and most:
            errors.append(abs(of.tokens_per_second_per_gpu / measured - 1))
            within.append(least <= measured <= most)
    assert len(errors) > 100
    errors.sort()
    assert statistics.median(errors) <= 0.12
    assert errors[len(errors) * 9 // 10] <= 0.30
    assert sum(within) >= 0.95 * len(within)
