"""The closed form beside the dry run, on configurations drawn at random."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks import accuracy
from benchmarks.comparison import BARS, Bars, Compared, Report, closed_form, compare
from benchmarks.draws import (
    AXES,
    CATALOG_MODELS,
    EACH_VALUE,
    SEED,
    Configuration,
    Draw,
    Weights,
    axis_values,
    draw,
)
from benchmarks.references import REFERENCE, Reference, carry_out, case_for, read
from benchmarks.shapes import FAMILIES
from ftplan.planner import families
from ftplan.planner.accuracy import GroupStatistics
from ftplan.planner.phases import Phase

NEEDS_TRAINING = pytest.mark.skipif(find_spec("trl") is None, reason="needs the `train` extra")

# What a draw on one GPU is held to.
SMALL_BARS = Bars(least_count=5, median=0.01, p95=0.03, farthest=0.08)

# Quick to carry out.
SMALL_COUNT = 5
SMALL_METHODS = ("full", "freeze", "lora", "qlora")
SMALL_AXES: dict[str, Weights] = {
    **{axis: weights for axis, weights in AXES.items() if axis != "precompute_ref_log_probs"},
    "method": dict.fromkeys(SMALL_METHODS, 1),
    "objective": {"sft": 1},
    "sharding": {"none": 1},
    "offload": {"none": 1},
    "modules_to_save": {"": 1},
    "optim": dict.fromkeys(("adamw_torch_fused", "adamw_torch", "adamw_8bit", "sgd"), 1),
}
SMALL_MODELS = ("smollm2-135m", "gpt2")


@pytest.fixture(scope="module")
def full_draw() -> Draw:
    return draw()


def test_the_same_seed_draws_the_same_and_more_of_it_begin_with_the_same(full_draw: Draw) -> None:
    few, again = draw(count=30), draw(count=30)
    assert few.configurations == again.configurations == full_draw.configurations[:30]
    assert few.redrawn == again.redrawn


def test_another_seed_draws_others(full_draw: Draw) -> None:
    others = {c.key for c in draw(SEED + 1, 30).configurations}
    assert not others & {c.key for c in full_draw.configurations}


def test_every_value_of_every_axis_is_drawn(full_draw: Draw) -> None:
    counts: Counter[tuple[str, object]] = Counter()
    for drawn in full_draw.configurations[:300]:
        counts.update(axis_values(drawn).items())
    seldom = {
        (axis, value): counts[axis, value]
        for axis in AXES
        for value in AXES[axis]
        if counts[axis, value] < EACH_VALUE
    }
    assert not seldom


def test_half_are_shapes_that_nobody_released(full_draw: Draw) -> None:
    models = Counter(c.model for c in full_draw.configurations if c.model)
    shapes = Counter(c.config["model_type"] for c in full_draw.configurations if c.config)
    assert set(models) == set(CATALOG_MODELS)
    assert set(shapes) == set(FAMILIES)
    assert models.total() == shapes.total()


def test_a_value_that_goes_with_nothing_is_told() -> None:
    only_sft = {**AXES, "objective": {"sft": 1}, "precompute_ref_log_probs": {True: 1}}
    with pytest.raises(RuntimeError, match="precompute_ref_log_probs"):
        draw(count=300, axes=only_sft)


def test_configurations_differ_and_survive_json(full_draw: Draw) -> None:
    assert len({c.key for c in full_draw.configurations}) == len(full_draw.configurations)
    for drawn in full_draw.configurations[:40]:
        read_back = Configuration.from_dict(json.loads(json.dumps(drawn.to_dict())))
        assert read_back.plan == drawn.plan
        assert read_back.key == drawn.key


def _reference(drawn: Configuration, allocated_bytes: int) -> Reference:
    phase = Phase(name="backward", components={"weights": allocated_bytes})
    modules = case_for(drawn).plan.target_modules
    return Reference(
        configuration=drawn, versions={}, seconds=1.0, target_modules=modules, phases=(phase,)
    )


@pytest.fixture(scope="module")
def modelled() -> Configuration:
    return Configuration(model="smollm2-135m", config=None, given={"method": "lora"})


def test_an_error_is_counted_with_its_sign_and_its_components(modelled: Configuration) -> None:
    predicted = closed_form(modelled)
    compared = compare(_reference(modelled, 2 * predicted.allocated_peak_bytes))
    assert compared.error == pytest.approx(-0.5)
    assert sum(compared.differences.values()) == -predicted.allocated_peak_bytes


def test_what_is_refused_is_counted_apart(modelled: Configuration) -> None:
    unmodelled = Configuration(model="smollm2-135m", config=None, given={"method": "shadow"})
    refused = structs.replace(_reference(modelled, 1), phases=(), refused="no such kernel")
    report = Report.of([compare(_reference(unmodelled, 1)), compare(refused)])
    assert report.refused_by_closed_form == {"the closed form does not model `--method`": 1}
    assert report.refused_by_dry_run == {"no such kernel": 1}
    assert not report.within


def test_figures_of_other_modules_are_not_compared(modelled: Configuration) -> None:
    stale = structs.replace(_reference(modelled, 1), target_modules=("q_proj",))
    assert compare(stale).estimate is None


@pytest.mark.parametrize(
    ("errors", "reached"),
    [
        ([0.005] * 300, True),
        ([-0.005] * 299, False),
        ([0.011] * 300, False),
        ([0.005] * 280 + [0.04] * 20, False),
        ([0.005] * 299 + [-0.09], False),
    ],
    ids=["within", "too few", "median", "95th percentile", "farthest"],
)
def test_each_bar_can_be_missed(errors: list[float], reached: bool) -> None:
    assert BARS.reached(errors) is reached


@pytest.fixture(scope="module")
def committed() -> list[Compared]:
    return [compare(reference) for reference in read()]


def test_the_committed_rows_are_what_they_say() -> None:
    rows = [json.loads(line) for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        reference = Reference.from_dict(row)
        assert reference.configuration.key == row["key"]
        if reference.refused is None:
            assert reference.peak_phase.allocated_peak_bytes == row["allocated_peak_bytes"]
            assert reference.peak_phase.name == row["peak_phase"]


def test_the_closed_form_agrees_with_the_committed_references(committed: list[Compared]) -> None:
    errors = {c.reference.configuration.key: c.error for c in committed if c.estimate}
    farthest = sorted(errors.items(), key=lambda e: -abs(e[1]))[:9]
    assert BARS.reached(list(errors.values())), (len(errors), farthest)


def test_the_report_says_whether_the_bars_are_reached(
    committed: list[Compared], capsys: pytest.CaptureFixture[str]
) -> None:
    status = accuracy.main(["compare", "--json"])
    said = json.loads(capsys.readouterr().out)
    errors = [c.error for c in committed if c.estimate]
    assert said["all"]["median"] == GroupStatistics.of(errors).median
    assert said["within"] is BARS.reached(errors)
    assert status == (0 if said["within"] else 1)


@NEEDS_TRAINING
def test_a_small_draw_is_carried_out_and_compared(tmp_path: Path) -> None:
    drawn = draw(
        SEED,
        SMALL_COUNT,
        axes=SMALL_AXES,
        catalog=SMALL_MODELS,
        families=[name for name in FAMILIES if name in families.FAMILIES],
    )
    path = tmp_path / "draw.jsonl"
    carried_out = list(carry_out(drawn.configurations, path, jobs=1))
    assert [json.dumps(r.to_dict()) for r in read(path)] == [
        json.dumps(r.to_dict()) for r in carried_out
    ]
    report = Report.of([compare(reference) for reference in carried_out])
    assert SMALL_BARS.reached(report.errors), [c.to_dict() for c in report.worst[:3]]
