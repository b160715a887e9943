"""Rank and method from the amount of data, by what adapters hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ftplan.planner import policy
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.goals import why_not
from ftplan.planner.hardware_spec import Device
from ftplan.planner.methods import METHODS
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.policy import LORA_RANKS, lora_rank, preferred_methods
from ftplan.planner.recipe import data_recipe
from ftplan.planner.search import choose_plan
from ftplan.planner.trained import MethodSettings
from ftplan.profiles import require_model

MakeData = Callable[[Iterable[int]], DataProfile]

# Adapters of rank 1 on the linear layers of Llama-2-7B: 32 layers of four 4096 x 4096, two
# 4096 x 11008 and one 11008 x 4096.
ADAPTED_PER_RANK = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))

ADAPTERS, FULL_FIRST = ("lora", "qlora"), ("full", "lora", "qlora")


def holding(make_data: MakeData, tokens: int) -> DataProfile:
    """A hundred rows, however much they are said to tell."""
    return structs.replace(make_data([300] * 100), trained_tokens=tokens)


@pytest.mark.parametrize(("rank", "next_rank"), list(itertools.pairwise(LORA_RANKS)))
def test_a_rank_holds_two_tokens_a_parameter(
    llama_2_7b: ModelSpec, make_data: MakeData, rank: int, next_rank: int
) -> None:
    held = 2 * rank * ADAPTED_PER_RANK
    assert lora_rank(llama_2_7b, holding(make_data, held)).value == rank
    assert lora_rank(llama_2_7b, holding(make_data, held + 1)).value == next_rank


def test_the_highest_rank_says_what_it_does_not_hold(
    llama_2_7b: ModelSpec, make_data: MakeData
) -> None:
    advice = lora_rank(llama_2_7b, holding(make_data, 5_000_000_000))
    assert advice.value == LORA_RANKS[-1]
    assert "about 1.28 B of the 5.00 B trained tokens" in advice.why


@given(st.integers(0, 10**10), st.integers(0, 10**10))
def test_more_data_never_lower_the_rank(
    llama_2_7b: ModelSpec, make_data: MakeData, one: int, other: int
) -> None:
    few, many = sorted((one, other))
    ranks = [lora_rank(llama_2_7b, holding(make_data, tokens)).value for tokens in (few, many)]
    assert ranks == sorted(ranks)


def test_adapters_of_fewer_modules_get_a_higher_rank(
    llama_2_7b: ModelSpec, make_data: MakeData
) -> None:
    data = holding(make_data, 2 * 16 * ADAPTED_PER_RANK)
    few = MethodSettings(target_modules=("q_proj",))
    assert lora_rank(llama_2_7b, data).value == 16
    assert lora_rank(llama_2_7b, data, settings=few).value == 256


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward", "grpo"])
def test_preferences_tell_little(
    llama_2_7b: ModelSpec, make_data: MakeData, objective: str
) -> None:
    data = structs.replace(holding(make_data, 10**11), trains=objective)
    assert lora_rank(llama_2_7b, data).value == 16
    assert preferred_methods(llama_2_7b, data, "cuda", {}).value == ADAPTERS


def test_full_tuning_comes_first_beyond_what_the_highest_rank_holds(
    llama_2_7b: ModelSpec, make_data: MakeData
) -> None:
    held = 2 * 256 * ADAPTED_PER_RANK
    within, beyond = holding(make_data, held), holding(make_data, held + 1)
    assert preferred_methods(llama_2_7b, within, "cuda", {}).value == ADAPTERS
    advice = preferred_methods(llama_2_7b, beyond, "cuda", {})
    assert advice.value == FULL_FIRST and "1.28 B trained tokens" in advice.why


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        ("cpu", {}, ADAPTERS),
        ("cuda", {"lora_rank": 8}, ADAPTERS),
        ("cuda", {"target_modules": ("q_proj",)}, ADAPTERS),
        ("cuda", {"quantization": "nf4"}, ("qlora",)),
        ("cuda", {"quantization": "none"}, FULL_FIRST),
        ("cuda", {"method": "freeze"}, ("freeze",)),
    ],
)
def test_what_is_asked_for_goes_before_capacity(
    llama_2_7b: ModelSpec,
    make_data: MakeData,
    kind: str,
    asked: dict[str, object],
    expected: object,
) -> None:
    data = holding(make_data, 10**11)
    assert preferred_methods(llama_2_7b, data, kind, asked).value == expected  # type: ignore[arg-type]


def test_a_plan_says_why_it_trains_everything(
    devices: dict[str, Device], make_data: MakeData
) -> None:
    model = require_model("qwen2.5-0.5b").spec
    ranking = choose_plan(model, holding(make_data, 10**10), devices["A100"], {})
    best = ranking.best
    assert best is not None and best.plan.method == "full"
    assert "hold less than 10.0 B trained tokens tell" in best.reasoned.reasons["method"].why
    reasons = {other.plan.method: why_not(other, best, "quality") for other in ranking.alternatives}
    assert reasons["lora"] == "trains less than the data tell"
    (lora,) = (other for other in ranking.alternatives if other.plan.method == "lora")
    assert lora.plan.lora_rank == 256 and lora.plan.lora_alpha == 512
    assert "next best" in lora.reasoned.reasons["method"].why


def test_a_method_without_a_rank_keeps_the_default(
    small_llama: ModelSpec, devices: dict[str, Device], make_data: MakeData
) -> None:
    for name in ("full", "ia3", "prompt-tuning"):
        recipe = data_recipe(
            small_llama, holding(make_data, 10**10), devices["A100"], METHODS[name], {}
        )
        assert recipe.reasons["lora_rank"].origin == "default", name


def test_what_data_advise_names_the_rank_of_the_model(make_data: MakeData) -> None:
    data = holding(make_data, 20_000_000)
    ranks = {
        name: policy.data_advice(data, require_model(name).spec)["lora_rank"].value
        for name in ("smollm2-135m", "qwen2.5-7b")
    }
    assert ranks == {"smollm2-135m": 64, "qwen2.5-7b": 16}
