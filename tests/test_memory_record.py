"""Readings of a record: levels, peaks, what is alive, the curve; and their summary."""

from __future__ import annotations

import json
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.planner.dry_run_summary import CURVE_POINTS, DryRunSummary, summarize
from ftplan.planner.memory_record import MemoryRecord, Peak, Storage
from ftplan.planner.phases import COMPONENTS

MIB = 1024**2


def storage(
    num_bytes: int, component: str = "temporaries", module: str = "", operation: str = "aten.mm"
) -> Storage:
    return Storage(
        num_bytes=num_bytes,
        component=component,
        module=module,
        operation=operation,
        shape=(num_bytes // 4,),
        dtype="float32",
    )


STEP = MemoryRecord(
    storages=[
        storage(100, "weights", "model.layers.0.mlp"),
        storage(100, "weights", "model.layers.1.mlp"),
        storage(50, "activations", "model.layers.0.mlp"),
        storage(30),
        storage(60, "activations", "model.layers.1.mlp"),
        storage(100, "gradients", "model.layers.1.mlp"),
        storage(80, "logits_and_loss", "lm_head"),
    ],
    #       load | forward           | backward        | evaluation
    events=[0, 1, 2, 3, ~3, 4, ~4, 5, ~2, ~5, 6, ~6],
    phases=[(0, "load"), (2, "forward"), (6, "backward"), (10, "evaluation")],
)
LEVELS = [100, 200, 250, 280, 250, 310, 250, 350, 300, 200, 280, 200]


def test_levels_rise_with_births_and_fall_with_deaths() -> None:
    assert STEP.levels == LEVELS


def test_the_peak_is_the_highest_moment() -> None:
    assert STEP.peak == Peak(position=7, allocated_bytes=350)


def test_the_first_of_equal_moments_is_the_peak() -> None:
    record = MemoryRecord(
        storages=[storage(8), storage(8)], events=[0, ~0, 1, ~1], phases=[(0, "forward")]
    )
    assert record.peak == Peak(position=0, allocated_bytes=8)


def test_phases_have_ranges() -> None:
    assert STEP.phase_ranges() == [
        ("load", 0, 2),
        ("forward", 2, 6),
        ("backward", 6, 10),
        ("evaluation", 10, 12),
    ]


def test_each_phase_has_its_peak() -> None:
    assert STEP.phase_peaks() == {
        "load": Peak(position=1, allocated_bytes=200),
        "forward": Peak(position=5, allocated_bytes=310),
        "backward": Peak(position=7, allocated_bytes=350),
        "evaluation": Peak(position=10, allocated_bytes=280),
    }


def test_a_phase_starts_with_what_is_alive_before_it() -> None:
    """Nothing in the second phase is higher than the moment at which it begins."""
    record = MemoryRecord(
        storages=[storage(8), storage(2)],
        events=[0, ~0, 1],
        phases=[(0, "forward"), (1, "backward")],
    )
    assert record.phase_peaks()["backward"] == Peak(position=0, allocated_bytes=8)


def test_of_a_phase_that_comes_again_the_higher_peak_counts() -> None:
    record = MemoryRecord(
        storages=[storage(8), storage(2), storage(9)],
        events=[0, ~0, 1, ~1, 2, ~2],
        phases=[(0, "forward"), (2, "backward"), (4, "forward")],
    )
    assert record.phase_peaks() == {
        "forward": Peak(position=4, allocated_bytes=9),
        "backward": Peak(position=2, allocated_bytes=2),
    }


def test_a_phase_without_events_stands_where_the_one_before_it_ended() -> None:
    record = MemoryRecord(
        storages=[storage(8), storage(2)],
        events=[0, 1, ~1],
        phases=[(0, "load"), (3, "save")],
    )
    assert record.phase_ranges()[-1] == ("save", 3, 3)
    assert record.phase_peaks()["save"] == Peak(position=2, allocated_bytes=8)


@pytest.mark.parametrize(
    ("position", "phase"),
    [(0, "load"), (1, "load"), (2, "forward"), (5, "forward"), (6, "backward"), (11, "evaluation")],
)
def test_the_phase_of_a_moment(position: int, phase: str) -> None:
    assert STEP.phase_at(position) == phase


def test_of_phases_that_begin_together_the_last_counts() -> None:
    record = MemoryRecord(
        storages=[storage(8)], events=[0], phases=[(0, "load"), (0, "forward"), (0, "backward")]
    )
    assert record.phase_at(0) == "backward"


@pytest.mark.parametrize(
    ("position", "alive"),
    [(0, [0]), (3, [0, 1, 2, 3]), (4, [0, 1, 2]), (7, [0, 1, 2, 5]), (11, [0, 1])],
)
def test_who_is_alive(position: int, alive: list[int]) -> None:
    assert STEP.alive_at(position) == alive


def test_components_at_the_peak() -> None:
    components = STEP.components_at(STEP.peak.position)
    assert set(components) == set(COMPONENTS)
    assert {name: size for name, size in components.items() if size} == {
        "weights": 200,
        "activations": 50,
        "gradients": 100,
    }


def test_a_curve_of_few_points_keeps_the_highest_of_each_stretch() -> None:
    assert STEP.curve(4) == [(2, 250), (5, 310), (7, 350), (10, 280)]


def test_a_curve_with_room_for_all_is_the_levels() -> None:
    assert STEP.curve(100) == list(enumerate(LEVELS))


def test_an_empty_record_has_no_curve_and_a_peak_of_nothing() -> None:
    record = MemoryRecord(storages=[], events=[], phases=[(0, "load")])
    assert record.levels == []
    assert record.curve(10) == []
    assert record.peak == Peak(position=0, allocated_bytes=0)


@st.composite
def records(draw: st.DrawFn) -> MemoryRecord:
    """Any births and deaths in any phases."""
    names = tuple(COMPONENTS)
    storages: list[Storage] = []
    events: list[int] = []
    alive: list[int] = []
    for _ in range(draw(st.integers(1, 40))):
        if alive and draw(st.booleans()):
            events.append(~alive.pop(draw(st.integers(0, len(alive) - 1))))
        else:
            component = draw(st.sampled_from(names))
            module = draw(st.sampled_from(["", "model.layers.0.mlp", "model.layers.1.mlp"]))
            storages.append(storage(draw(st.integers(0, 3 * MIB)), component, module))
            events.append(len(storages) - 1)
            alive.append(events[-1])
    starts = draw(st.lists(st.integers(0, len(events)), max_size=4))
    phases = [(at, draw(st.sampled_from("abc"))) for at in sorted([0, *starts])]
    return MemoryRecord(storages=storages, events=events, phases=phases)


@given(record=records())
def test_levels_are_sums_of_what_is_alive(record: MemoryRecord) -> None:
    changes = [record.sizes[e] if e >= 0 else -record.sizes[~e] for e in record.events]
    assert record.levels == list(accumulate(changes))
    for position, level in enumerate(record.levels):
        assert sum(record.sizes[i] for i in record.alive_at(position)) == level
        assert sum(record.components_at(position).values()) == level


@given(record=records())
def test_the_highest_phase_holds_the_peak(record: MemoryRecord) -> None:
    peaks = record.phase_peaks().values()
    assert max(peak.allocated_bytes for peak in peaks) == record.peak.allocated_bytes
    assert record.levels[record.peak.position] == record.peak.allocated_bytes
    assert set(record.phase_peaks()) == {name for _, name in record.phases}


@given(record=records(), points=st.integers(1, 50))
def test_a_curve_is_short_true_and_has_the_peak(record: MemoryRecord, points: int) -> None:
    curve = record.curve(points)
    assert 1 <= len(curve) <= points
    assert all(record.levels[position] == level for position, level in curve)
    assert [position for position, _ in curve] == sorted({position for position, _ in curve})
    assert max(level for _, level in curve) == record.peak.allocated_bytes


# --- summary -------------------------------------------------------------------------------------


def summary_of(record: MemoryRecord) -> DryRunSummary:
    return summarize(
        record,
        num_parameters=11,
        num_trainable_parameters=7,
        trained_weight_bytes=28,
        num_layers=5,
        num_layers_traced=3,
    )


def test_a_summary_says_what_the_record_says() -> None:
    summary = summary_of(STEP)
    assert summary.num_parameters == 11
    assert summary.num_trainable_parameters == 7
    assert (summary.num_layers, summary.num_layers_traced) == (5, 3)
    assert {phase.name: phase.allocated_peak_bytes for phase in summary.phases} == {
        "load": 200,
        "forward": 310,
        "backward": 350,
        "evaluation": 280,
    }
    assert summary.peak_phase.name == "backward"
    assert summary.peak_position == 7
    assert summary.num_events == len(STEP.events)
    assert summary.curve == tuple(enumerate(LEVELS))
    assert summary.phase_starts == tuple(STEP.phases)


def test_modules_of_all_layers_are_one_line() -> None:
    assert summary_of(STEP).modules == (("model.layers.*.mlp", 350),)


def test_equal_tensors_alive_at_the_peak_are_one_line() -> None:
    tensors = summary_of(STEP).tensors
    assert [(t.component, t.num_bytes, t.count) for t in tensors] == [
        ("weights", 100, 2),
        ("gradients", 100, 1),
        ("activations", 50, 1),
    ]
    assert {t.module for t in tensors} == {"model.layers.*.mlp"}
    assert (tensors[0].shape, tensors[0].dtype) == ((25,), "float32")


def test_the_largest_tensors_together_come_first() -> None:
    """Many small ones may take more than a large one."""
    record = MemoryRecord(
        storages=[storage(100, operation="large"), *[storage(30, operation="small")] * 4],
        events=[0, 1, 2, 3, 4],
        phases=[(0, "load")],
    )
    assert [t.operation for t in summary_of(record).tensors] == ["small", "large"]


def test_module_and_tensor_lists_are_short() -> None:
    many = [storage(i + 1, module=f"module{i}") for i in range(100)]
    record = MemoryRecord(storages=many, events=list(range(100)), phases=[(0, "load")])
    summary = summary_of(record)
    assert len(summary.modules) == len(summary.tensors) == 12
    assert summary.modules[0] == ("module99", 100)


def test_a_long_record_has_a_short_curve() -> None:
    size = 2 * CURVE_POINTS + 1
    record = MemoryRecord(
        storages=[storage(1)] * size, events=list(range(size)), phases=[(0, "load")]
    )
    curve = summary_of(record).curve
    assert len(curve) <= CURVE_POINTS
    assert curve[-1] == (size - 1, size)


def test_what_the_allocator_holds_is_told_with_and_without_expandable_segments() -> None:
    """A segment of 12 MiB for each storage of 11, or one segment that grows by 20 MiB."""
    record = MemoryRecord(storages=[storage(11 * MIB)] * 3, events=[0, 1, 2], phases=[(0, "load")])
    summary = summary_of(record)
    assert summary.allocator.reserved_peak_bytes == 36 * MIB
    assert summary.expandable.reserved_peak_bytes == 40 * MIB
    for peaks in (summary.allocator, summary.expandable):
        assert 33 * MIB <= peaks.required_bytes <= peaks.reserved_peak_bytes


@given(record=records())
def test_a_summary_survives_json(record: MemoryRecord) -> None:
    summary = summary_of(record)
    assert DryRunSummary.from_dict(json.loads(json.dumps(summary.to_dict()))) == summary
