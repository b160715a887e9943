"""Checkpointing of one layer in n: the closed form beside the dry run, and what holds of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import structs

from ftplan.launcher.commands.estimate import _checkpointing
from ftplan.launcher.emit import training_arguments
from ftplan.planner import step_trace
from ftplan.planner.closed_form import check_closed_form
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.step_time import estimate_step_time, micro_batch_flops
from tests.modelled_cases import ModelledCase, modelled_cases

cases = st.deferred(lambda: st.sampled_from(modelled_cases()))
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


def activations(memory: MemoryEstimate) -> int:
    return max(phase.components["activations"] for phase in memory.phases)


@settings(max_examples=30)
@given(case=cases, n=st.integers(2, 4), times=st.integers(2, 3))
def test_the_more_layers_are_checkpointed_the_less_is_kept(
    case: ModelledCase, n: int, times: int
) -> None:
    """All of them keep least, none most; of the layers of `n * times` those of `n` leave none out.

    Frozen layers below those that are trained keep nothing either way. Where the last layer is
    checkpointed, it is computed again beside all that the others keep, its input on top of that.
    """
    assume(case.plan.method != "freeze")
    deep = structs.replace(case.model, layers=case.model.layers * 3)
    assume((len(deep.layers) - 1) % n != 0)
    case = dataclasses.replace(case, model=deep)
    try:
        kept = [
            activations(case.estimate(gradient_checkpointing=True, every_n_layers=every))
            for every in (1, n, n * times, 1000)
        ]
        none = activations(case.estimate(gradient_checkpointing=False))
    except InputError:
        assume(False)
        raise
    assert kept == sorted(kept)
    assert kept[-1] <= none


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_memory_is_between_that_of_all_and_of_none(method: str, llama_2_7b: ModelSpec) -> None:
    quantization = "nf4" if method == "qlora" else "none"
    plan = TrainingPlan(method=method, quantization=quantization, per_device_train_batch_size=4)
    plans = [
        *(plan.replace(every_n_layers=n) for n in (1, 2, 4, 8, 16, 32)),
        plan.replace(gradient_checkpointing=False),
    ]
    peaks = [estimate_memory(llama_2_7b, each).allocated_peak_bytes for each in plans]
    assert peaks == sorted(peaks) and len(set(peaks)) == len(peaks)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mixtral", "deepseek_v3"])
def test_no_layer_is_higher_than_those_looked_at(
    family: str, n: int, tiny_spec: Callable[..., ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each kind, checkpointed or not, the first and the last."""

    def peaks() -> list[int]:
        model = tiny_spec(family)
        deep = structs.replace(model, layers=model.layers * 5)
        memories = [
            estimate_memory(
                deep,
                TrainingPlan(method=method, max_length=length, every_n_layers=n, **EAGER),
            )
            for method in ("full", "lora")
            for length in range(8, 200, 8)
        ]
        return [phase.allocated_peak_bytes for memory in memories for phase in memory.phases]

    known = peaks()
    monkeypatch.setattr(step_trace, "_extremes", lambda labels: set(range(len(labels))))
    assert peaks() == known


@pytest.mark.parametrize(("n", "recomputed"), [(1, 32), (2, 16), (3, 11), (32, 1)])
def test_layers_that_are_not_checkpointed_are_not_computed_again(
    n: int, recomputed: int, llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    """What comes on top of a step without checkpointing is a forward pass of the others."""

    def flops(plan: TrainingPlan) -> float:
        return micro_batch_flops(llama_2_7b, plan, 512, 512)

    def seconds(plan: TrainingPlan) -> float:
        device = devices["A100"]
        return estimate_step_time(
            llama_2_7b, plan, device, tokens_per_micro_batch=512, mean_length=512
        ).step_seconds

    plan = TrainingPlan(method="full")
    none, every, some = (
        plan.replace(gradient_checkpointing=False),
        plan,
        plan.replace(every_n_layers=n),
    )
    for of in (flops, seconds):
        share = (of(some) - of(none)) / (of(every) - of(none))
        assert share == pytest.approx(recomputed / 32, rel=0.01)


def test_the_trainer_is_told() -> None:
    def told(plan: TrainingPlan) -> object:
        return training_arguments(plan, "cpu")["gradient_checkpointing_kwargs"]

    assert told(TrainingPlan()) == {"use_reentrant": False}
    assert told(TrainingPlan(every_n_layers=3)) == {"use_reentrant": False, "every_n_layers": 3}


def test_a_configuration_says_it() -> None:
    plan = TrainingPlan(every_n_layers=3)
    assert _checkpointing(plan) == "gradient checkpointing of one layer in 3"


def test_without_checkpointing_it_means_nothing() -> None:
    with pytest.raises(InputError, match="it is off") as refused:
        TrainingPlan(gradient_checkpointing=False, every_n_layers=2)
    assert "--gradient-checkpointing true" in (refused.value.hint or "")
    with pytest.raises(InputError, match="above 0"):
        TrainingPlan(every_n_layers=0)


def test_layers_of_a_vision_tower_are_counted_too(tiny_spec: Callable[..., ModelSpec]) -> None:
    """They come first, and how many there are the closed form does not know."""
    model = tiny_spec("gemma3")
    check_closed_form(TrainingPlan(), model)
    with pytest.raises(InputError, match="parts beside the decoder") as refused:
        check_closed_form(TrainingPlan(every_n_layers=2), model)
    assert "--exact" in (refused.value.hint or "")
