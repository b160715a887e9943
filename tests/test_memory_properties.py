"""What holds of memory for every architecture, method, objective and sharding that is modelled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import structs

from ftplan.launcher.estimate_json import estimate_to_dict
from ftplan.planner.errors import InputError
from ftplan.planner.memory import MemoryEstimate, estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.phases import COMPONENTS
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.sharding import ZERO
from ftplan.planner.weights import weight_memory_bytes
from tests.modelled_cases import TURNS, ModelledCase, modelled_cases

# A case is as small as any other: there is nothing to shrink to.
_PHASES = (HypothesisPhase.explicit, HypothesisPhase.generate)
few = settings(max_examples=60, phases=_PHASES)
cases = st.deferred(lambda: st.sampled_from(modelled_cases()))
frozen_cases = st.deferred(
    lambda: st.sampled_from([case for case in modelled_cases() if case.plan.method == "freeze"])
)

_TOTALS = ("allocated_peak_bytes", "reserved_peak_bytes", "device_peak_bytes", "required_bytes")


def falls(before: MemoryEstimate, after: MemoryEstimate) -> dict[str, int]:
    """The totals that fell, and by how much."""
    differences = {name: getattr(after, name) - getattr(before, name) for name in _TOTALS}
    return {name: size for name, size in differences.items() if size < 0}


def changed(case: ModelledCase, **settings: object) -> MemoryEstimate:
    """The estimate with other settings; where they do not go with the rest, there is none."""
    try:
        return case.estimate(**settings)
    except InputError:
        assume(False)
        raise


def component_peak(memory: MemoryEstimate, component: str) -> int:
    return max(phase.components[component] for phase in memory.phases)


def test_every_value_has_its_cases() -> None:
    found = modelled_cases()
    seen = {
        "family": {case.model.name for case in found},
        "method": {case.plan.method for case in found},
        "objective": {case.plan.objective for case in found},
        "sharding": {case.plan.sharding for case in found},
        "quantization": {case.plan.quantization for case in found},
    }
    assert {axis: sorted(values) for axis, values in seen.items()} == {
        axis: sorted(values) for axis, (_, values) in TURNS.items()
    }


def test_components_sum_exactly() -> None:
    for case in modelled_cases():
        memory = case.estimate()
        for phase in memory.phases:
            assert set(phase.components) == set(COMPONENTS), case
            assert min(phase.components.values()) >= 0, (phase, case)
            assert sum(phase.components.values()) == phase.allocated_peak_bytes, case
        highest = max(phase.allocated_peak_bytes for phase in memory.phases)
        assert memory.allocated_peak_bytes == memory.peak_phase.allocated_peak_bytes == highest
        assert sum(memory.to_dict()["components"].values()) == memory.allocated_peak_bytes, case
        assert memory.allocated_peak_bytes <= memory.reserved_peak_bytes, case
        assert memory.reserved_peak_bytes < memory.device_peak_bytes <= memory.required_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"optim": "adamw_8bit"},
        {"gradient_checkpointing": False},
        {"loss": "stock"},
        {"attn_implementation": "eager"},
        {"per_device_train_batch_size": 7, "max_length": 96, "gradient_accumulation_steps": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_was_worked_out_for_other_plans_changes_nothing(change: dict[str, object]) -> None:
    for case in modelled_cases()[::6]:
        fresh = dataclasses.replace(case, model=structs.replace(case.model))
        seen = dataclasses.replace(case, model=structs.replace(case.model))
        try:
            expected = fresh.estimate(**change)
        except InputError:
            continue
        seen.estimate()
        assert seen.estimate(**change).to_dict() == expected.to_dict(), case
        assert seen.estimate(**change).host == expected.host, case


def test_the_json_round_trips() -> None:
    """Read back, a plan is the same plan, and an estimate has nothing that JSON does not."""
    for case in modelled_cases():
        written = json.loads(json.dumps(case.reasoned.to_dict()))
        assert ReasonedPlan.from_dict(written) == case.reasoned, case
        value = estimate_to_dict(case.model, case.reasoned, case.estimate(), None, [])
        assert json.loads(json.dumps(value)) == value, case


@few
@given(case=cases, more=st.integers(1, 16))
def test_memory_never_falls_when_the_batch_grows(case: ModelledCase, more: int) -> None:
    rows = case.plan.per_device_train_batch_size + more
    assert not falls(case.estimate(), changed(case, per_device_train_batch_size=rows))


@few
@given(case=cases, more=st.integers(1, 2048))
def test_memory_never_falls_when_rows_grow(case: ModelledCase, more: int) -> None:
    assert not falls(case.estimate(), changed(case, max_length=case.plan.max_length + more))


@few
@given(case=cases, more=st.integers(1, 64))
def test_memory_never_falls_when_the_rank_grows(case: ModelledCase, more: int) -> None:
    assert not falls(case.estimate(), changed(case, lora_rank=case.plan.lora_rank + more))


@few
@given(case=cases, times=st.integers(2, 4))
def test_memory_never_falls_when_layers_grow(case: ModelledCase, times: int) -> None:
    """All layers again, so that those trained last by freeze tuning are of the same kinds."""
    deeper = structs.replace(case.model, layers=case.model.layers * times)
    assert not falls(case.estimate(), dataclasses.replace(case, model=deeper).estimate())


def shards_evenly(case: ModelledCase) -> bool:
    """FSDP2 divides each parameter by its rows and fills up the last share. With fewer rows than
    GPUs (a stack of 4 experts on 8, a gate's single row) what is gathered grows with their number,
    in the dry run as well. A share of a tiny model falls below the size from which 8-bit optimizers
    quantize, and its states grow fourfold."""
    if case.plan.optim.endswith("8bit"):
        return False
    experts = any(layer.feed_forward.experts for layer in case.model.layers)
    return case.plan.sharding in ZERO or (case.plan.sharding == "fsdp" and not experts)


@few
@given(case=cases.filter(shards_evenly), more=st.sampled_from((2, 4)))
def test_memory_never_grows_with_more_shards(case: ModelledCase, more: int) -> None:
    assume(more == 2 or case.plan.sharding in ZERO)
    few_gpus, many = (changed(case, num_gpus=number) for number in (2, 2 * more))
    assert not falls(many, few_gpus)


@settings(max_examples=200, phases=_PHASES)
@given(case=cases)
def test_checkpointing_never_keeps_more_activations(case: ModelledCase) -> None:
    """From two layers up: a single one is computed again while its input is kept besides. Frozen
    layers below those that are trained keep nothing either way."""
    assume(case.plan.method != "freeze" or case.plan.num_trainable_layers > 1)
    without, with_it = (changed(case, gradient_checkpointing=on) for on in (False, True))
    assert component_peak(with_it, "activations") <= component_peak(without, "activations")


@few
@given(case=frozen_cases, more=st.integers(1, 2))
def test_memory_never_falls_when_freeze_trains_more_layers(case: ModelledCase, more: int) -> None:
    one, several = (changed(case, num_trainable_layers=layers) for layers in (1, 1 + more))
    assert not falls(one, several)


@few
@given(case=cases, longest=st.integers(1, 9000))
def test_rows_are_cut_at_max_length_and_no_longer_than_the_longest(
    case: ModelledCase, longest: int
) -> None:
    assume(not case.plan.resolved_objective.generates)  # rows end where the model ends them
    known = estimate_memory(case.model, case.plan, longest_row=longest)
    assert known == case.estimate(max_length=min(case.plan.max_length, longest))


@few
@given(case=cases)
def test_a_fused_loss_never_holds_more_than_stock_logits_and_their_gradients(
    case: ModelledCase,
) -> None:
    """But for what it makes early: gradients of the hidden states and of the head."""
    model = structs.replace(case.model, vocab_size=32768)
    large = dataclasses.replace(case, model=model)
    tokens = case.plan.per_device_train_batch_size * case.plan.max_length
    early = 4 * (tokens * model.hidden_size + model.embedding_parameters)
    stock, fused = (
        component_peak(changed(large, loss=loss), "logits_and_loss")
        for loss in ("stock", "trl-fused")
    )
    assert fused <= stock + early


@pytest.mark.parametrize("family", TURNS["family"][1])
def test_quantized_weights_are_smaller(family: str, tiny_spec: Callable[..., ModelSpec]) -> None:
    model = tiny_spec(family)
    if not model.quantizable_weights:
        pytest.skip("none of its modules are of the class that bitsandbytes replaces")
    sizes = [
        weight_memory_bytes(model, TrainingPlan(quantization=kind, double_quant=double))
        for kind, double in (("nf4", True), ("nf4", False), ("int8", True), ("none", True))
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


@pytest.mark.parametrize(("method", "quantization"), [("dora", "nf4"), ("shira", "int8")])
def test_methods_read_the_biases_of_a_quantized_base(
    method: str, quantization: str, tiny_spec: Callable[..., ModelSpec]
) -> None:
    """With them a layer of StarCoder 2 weighs and computes more, never less."""
    plan = TrainingPlan(method=method, quantization=quantization)
    biased, plain = (
        estimate_memory(tiny_spec("starcoder2", use_bias=bias), plan) for bias in (True, False)
    )
    assert falls(biased, plain) and not falls(plain, biased)


def test_zero_where_only_a_vision_towers_biases_are_trained(
    tiny_spec: Callable[..., ModelSpec],
) -> None:
    """Gemma 3's text part has no biases: no backward makes a gradient, and nothing is exchanged."""
    plan = TrainingPlan(method="bitfit", dtype="float32", sharding="zero2", num_gpus=2)
    memory = estimate_memory(tiny_spec("gemma3"), plan)
    backward = next(phase for phase in memory.phases if phase.name == "backward")
    assert backward.components["gradients"] == backward.components["communication"] == 0
