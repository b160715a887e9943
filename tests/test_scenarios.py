"""Machines that people have, and the kind of plan that each should get, and why."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from msgspec import Struct, structs

from ftplan.planner.data_profile import DataProfile
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import fits
from ftplan.planner.ranking import Ranking
from ftplan.planner.search import choose_plan
from ftplan.planner.units import GIB
from ftplan.profiles import find_gpu, require_model


def rows(number: int, median: float, longest: int = 2400, **more: Any) -> DataProfile:
    """Rows with log-normal lengths, as instruction data has; always the same."""
    rng = random.Random(number)
    drawn = (round(rng.lognormvariate(math.log(median), 0.6)) for _ in range(min(number, 5000)))
    lengths = sorted((min(longest, 10 + length) for length in drawn), reverse=True)
    return DataProfile(
        path="rows.jsonl",
        sha256="0" * 64,
        format="instruction",
        objective="supervised",
        num_rows=number,
        num_usable_rows=number,
        num_eval_rows=number // 10,
        lengths=(longest, *lengths[1:]),
        exact=True,
        rows_each=number / len(lengths),
        trained_tokens=round(0.6 * number * sum(lengths) / len(lengths)),
        **more,
    )


FEW, SOME, MANY = rows(200, 200), rows(5_000, 250), rows(200_000, 300)
LONG = rows(500, 16_000, longest=32_000)
MILLIONS = rows(20_000_000, 300)
PAIRS = structs.replace(rows(2_000, 300), trains="dpo", format="preference", objective="preference")


def machine(*names: str, held_gib: float = 0.0) -> list[Device]:
    """GPUs of the catalog, of which a desktop holds so much each."""
    return [
        structs.replace(device, index=index, free_bytes=device.free_bytes - round(held_gib * GIB))
        for index, device in enumerate(find_gpu(name).device() for name in names)
    ]


PROCESSOR = Device(
    name="a processor",
    kind="cpu",
    total_bytes=32 * GIB,
    free_bytes=28 * GIB,
    memory_bandwidth_bytes_per_second=4e10,
    peak_flops_per_second={"float32": 5e11},
    context_bytes=0,
)


class Scenario(Struct, frozen=True):
    """`expected`: settings of the best plan; None where there is none. `rejected`: methods that are
    not possible, and words of the reason."""

    devices: Device | list[Device]
    model: str
    data: DataProfile
    expected: dict[str, Any] | None
    rejected: dict[str, str] = {}
    given: dict[str, Any] = {}


MEMORY = "needs more memory"

SCENARIOS = {
    "7B on a T4: fp16, a 4-bit base": Scenario(
        machine("T4"),
        "qwen2.5-7b",
        SOME,
        {"method": "qlora", "mixed_precision": "fp16", "attn_implementation": "sdpa"},
        {"lora": MEMORY, "freeze": MEMORY, "full": MEMORY},
    ),
    "3B on a T4": Scenario(
        machine("T4"), "qwen2.5-3b", SOME, {"method": "lora", "dtype": "float16"}, {"full": MEMORY}
    ),
    "7B on an RTX 3060": Scenario(
        machine("RTX 3060 12GB"), "qwen2.5-7b", SOME, {"method": "qlora"}, {"lora": MEMORY}
    ),
    "7B on an RTX 4090 of which a desktop holds 3 GiB": Scenario(
        machine("RTX 4090", held_gib=3),
        "qwen2.5-7b",
        SOME,
        {"method": "lora", "dtype": "bfloat16", "gradient_checkpointing": True},
        {"freeze": MEMORY, "full": MEMORY},
    ),
    "14B on an RTX 4090": Scenario(
        machine("RTX 4090"), "qwen2.5-14b", SOME, {"method": "qlora"}, {"lora": MEMORY}
    ),
    "3B on two unlike GPUs": Scenario(
        machine("RTX 3090", "RTX 4080"),
        "qwen2.5-3b",
        SOME,
        {"method": "lora", "num_gpus": 2, "sharding": "none"},
        {"full": MEMORY},
    ),
    "7B on two unlike GPUs, of which the faster one alone holds it": Scenario(
        machine("RTX 3090", "RTX 4060 Ti 16GB"),
        "qwen2.5-7b",
        SOME,
        {"method": "lora", "num_gpus": 1},
        {"full": MEMORY},
    ),
    "7B on an A100": Scenario(
        machine("A100 80GB SXM"),
        "qwen2.5-7b",
        SOME,
        {"method": "lora", "gradient_checkpointing": False},
        {"full": MEMORY},
    ),
    "32B on an A100": Scenario(
        machine("A100 80GB SXM"),
        "qwen2.5-32b",
        SOME,
        {"method": "lora", "gradient_checkpointing": True},
        {"full": MEMORY},
    ),
    "70B on an A100": Scenario(
        machine("A100 80GB SXM"), "llama-3.1-70b", SOME, {"method": "qlora"}, {"lora": MEMORY}
    ),
    "70B on eight H100": Scenario(
        machine(*["H100 SXM"] * 8),
        "llama-3.1-70b",
        SOME,
        {"method": "lora", "num_gpus": 8, "sharding": "fsdp"},
        {"full": MEMORY},
    ),
    "full tuning of 7B on eight H100": Scenario(
        machine(*["H100 SXM"] * 8),
        "qwen2.5-7b",
        MANY,
        {"method": "full", "num_gpus": 8, "dtype": "float32", "effective_batch_size": 32},
        given={"method": "full"},
    ),
    "a mixture on eight H100": Scenario(
        machine(*["H100 SXM"] * 8),
        "mixtral-8x7b-v0.1",
        SOME,
        {"method": "lora", "sharding": "fsdp"},  # on four: their links bind, and eight send more
        {"full": MEMORY},
    ),
    "671B on eight H100: nothing": Scenario(
        machine(*["H100 SXM"] * 8),
        "deepseek-v3",
        SOME,
        None,
        {"lora": MEMORY, "qlora": MEMORY, "full": MEMORY},
    ),
    "671B on eight B300": Scenario(
        machine(*["B300 SXM"] * 8), "deepseek-v3", SOME, {"num_gpus": 8, "sharding": "fsdp"}
    ),
    "32B on an H200": Scenario(machine("H200"), "qwen2.5-32b", SOME, {"method": "lora"}),
    "70B on an H200": Scenario(
        machine("H200"), "llama-3.1-70b", SOME, {"method": "qlora"}, {"lora": MEMORY}
    ),
    "7B on a Mac": Scenario(
        machine("M3 Max"),
        "qwen2.5-7b",
        SOME,
        {"method": "lora", "quantization": "none"},
        {"qlora": "no kernels for nf4"},
    ),
    "0.5B on a processor": Scenario(
        PROCESSOR,
        "qwen2.5-0.5b",
        FEW,
        {"method": "lora", "dtype": "float32", "mixed_precision": "no"},
        {"qlora": "are for GPUs"},
    ),
    "7B on a processor: nothing": Scenario(PROCESSOR, "qwen2.5-7b", FEW, None, {"lora": MEMORY}),
    "200 rows": Scenario(
        machine("A100 80GB SXM"),
        "qwen2.5-7b",
        FEW,
        {"effective_batch_size": 8, "lora_rank": 16, "num_train_epochs": 3.0},
    ),
    "200,000 rows": Scenario(
        machine("A100 80GB SXM"),
        "qwen2.5-7b",
        MANY,
        # 40 M tokens of answers, of which adapters of rank 16 hold 80 M
        {"effective_batch_size": 32, "lora_rank": 16, "num_train_epochs": 1.0},
    ),
    "billions of tokens, 7B on one card": Scenario(
        machine("A100 80GB SXM"),
        "qwen2.5-7b",
        MILLIONS,
        {"method": "lora", "lora_rank": 256},
        {"full": MEMORY},
    ),
    "billions of tokens, 0.5B": Scenario(
        machine("A100 80GB SXM"), "qwen2.5-0.5b", MILLIONS, {"method": "full", "dtype": "float32"}
    ),
    "billions of tokens, 0.5B, and adapters asked for": Scenario(
        machine("A100 80GB SXM"),
        "qwen2.5-0.5b",
        MILLIONS,
        {"method": "lora"},
        given={"target_modules": ("q_proj", "v_proj")},
    ),
    "rows of 32,000 tokens on an A100": Scenario(
        machine("A100 80GB SXM"),
        "qwen2.5-7b",
        LONG,
        {
            "method": "lora",
            "max_length": 32_000,
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": True,
        },
    ),
    "rows of 32,000 tokens on an RTX 4090": Scenario(
        machine("RTX 4090"),
        "qwen2.5-7b",
        LONG,
        {"method": "qlora", "max_length": 32_000},
        {"lora": MEMORY},
    ),
    "preferences": Scenario(
        machine("A100 80GB SXM"),
        "qwen2.5-7b",
        PAIRS,
        {"method": "lora", "objective": "dpo"},
        {"full": MEMORY},
    ),
}


def plan(scenario: Scenario) -> Ranking:
    spec = require_model(scenario.model).spec
    return choose_plan(spec, scenario.data, scenario.devices, scenario.given)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_machine_gets_the_plan_that_it_should(name: str) -> None:
    scenario = SCENARIOS[name]
    ranking = plan(scenario)
    best = ranking.best
    if scenario.expected is None:
        assert best is None and ranking.nearest is not None
    else:
        assert best is not None and fits(best.memory, best.device)
        got = {setting: getattr(best.plan, setting) for setting in scenario.expected}
        assert got == scenario.expected
        assert all(reason.why for reason in best.reasoned.reasons.values())
    reasons = {rejection.method: rejection.reason for rejection in ranking.rejected}
    for method, words in scenario.rejected.items():
        assert words in reasons[method]


def test_what_a_desktop_holds_is_not_planned_with() -> None:
    free = plan(SCENARIOS["7B on an RTX 4090 of which a desktop holds 3 GiB"]).best
    assert free is not None
    assert 1.05 * free.memory.required_bytes <= 21 * GIB


def test_unlike_gpus_train_within_the_smaller_one() -> None:
    best = plan(SCENARIOS["3B on two unlike GPUs"]).best
    assert best is not None
    assert best.device.free_bytes == find_gpu("RTX 4080").device().free_bytes
    assert "and" in best.device.name
