"""What holds of memory for every architecture, method, objective and sharding that is modelled."""

from __future__ import annotations

import dataclasses
import json

from hypothesis import Phase as HypothesisPhase
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ftplan.launcher.estimate_json import estimate_to_dict
from ftplan.planner.errors import InputError
from ftplan.planner.memory import COMPONENTS, MemoryEstimate
from ftplan.planner.plan import ReasonedPlan
from ftplan.planner.sharding import ZERO
from tests.modelled_cases import TURNS, ModelledCase, modelled_cases

# A case is as small as any other: there is nothing to shrink to.
_PHASES = (HypothesisPhase.explicit, HypothesisPhase.generate)
few = settings(max_examples=60, phases=_PHASES)
cases = st.deferred(lambda: st.sampled_from(modelled_cases()))

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
    deeper = dataclasses.replace(case.model, layers=case.model.layers * times)
    assert not falls(case.estimate(), dataclasses.replace(case, model=deeper).estimate())


def shards_evenly(case: ModelledCase) -> bool:
    """FSDP2 divides each parameter by its rows and fills up the last share. With fewer rows than
    GPUs (a stack of 4 experts on 8, a gate's single row) what is gathered grows with their number,
    in the dry run as well."""
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
