"""Weights of tasks: shares, the rows that follow, and what a plan makes of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.launcher.data.data_file import read_data
from ftplan.launcher.data.profiling import make_split, profile_data, weighting_to_dict
from ftplan.launcher.data.tasks import tasks_of
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.methods import METHODS
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import data_recipe
from ftplan.planner.search import choose_plan
from ftplan.planner.task_draws import RecentLosses, TaskDraws
from ftplan.planner.tasks import TaskWeighting, allotted, drawn_lengths, read_task_weights
from ftplan.planner.units import GIB
from ftplan.profiles import require_model

COUNTS = {"large": 900, "middle": 90, "small": 10}
MODEL = require_model("smollm2-135m").spec
CPU = Device(
    name="a processor",
    kind="cpu",
    total_bytes=8 * GIB,
    free_bytes=8 * GIB,
    memory_bandwidth_bytes_per_second=1e10,
    peak_flops_per_second={"float32": 1e11},
    context_bytes=0,
    rates_source="assumed",
)


def rounded(shares: dict[str, float]) -> dict[str, float]:
    return {task: round(share, 4) for task, share in shares.items()}


def test_shares_follow_the_rows_to_a_power() -> None:
    assert rounded(TaskWeighting().shares(COUNTS)) == {"large": 0.9, "middle": 0.09, "small": 0.01}
    roots = {task: count**0.5 for task, count in COUNTS.items()}
    square = TaskWeighting(weighting="temperature").shares(COUNTS)
    assert square == pytest.approx({t: r / sum(roots.values()) for t, r in roots.items()})
    # mT5's exponent 0.3
    mt5 = TaskWeighting(weighting="temperature", temperature=1 / 0.3).shares(COUNTS)
    powers = {task: count**0.3 for task, count in COUNTS.items()}
    assert mt5 == pytest.approx({t: p / sum(powers.values()) for t, p in powers.items()})
    assert set(TaskWeighting(weighting="equal").shares(COUNTS).values()) == {1 / 3}


def test_a_temperature_goes_from_proportional_to_equal() -> None:
    def shares(temperature: float) -> dict[str, float]:
        return TaskWeighting(weighting="temperature", temperature=temperature).shares(COUNTS)

    assert shares(1) == pytest.approx(TaskWeighting().shares(COUNTS))
    assert shares(1e9) == pytest.approx(TaskWeighting(weighting="equal").shares(COUNTS))
    assert shares(1e-3)["large"] == pytest.approx(1)


def test_fixed_weights_are_of_tasks_not_of_rows() -> None:
    weights = ("large=1", "middle=0", "small=3")
    shares = TaskWeighting(weighting="fixed", weights=weights).shares(COUNTS)
    assert shares == {"large": 0.25, "middle": 0.0, "small": 0.75}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (("large=1", "midle=1", "small=1"), "unknown task `midle`"),
        (("large=1", "small=1"), "has none for task `middle`"),
        (("large",), "a task and a number"),
        (("large=-1",), "a task and a number"),
        (("large=nan",), "a task and a number"),
        (("=2",), "a task and a number"),
        (("large=0", "small=0"), "every task has a weight of 0"),
    ],
)
def test_weights_that_cannot_be(weights: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TaskWeighting(weighting="fixed", weights=weights).shares(COUNTS)


def test_a_task_s_name_may_have_an_equals_sign() -> None:
    assert read_task_weights(["a=b=2", " c = 1 "]) == {"a=b": 2.0, "c": 1.0}


def test_a_task_without_a_training_row_has_no_share() -> None:
    shares = TaskWeighting(weighting="equal").shares({"a": 3, "held out": 0})
    assert shares == {"a": 1.0, "held out": 0.0}


@given(
    st.lists(st.floats(min_value=0, max_value=50), min_size=1, max_size=8),
    st.integers(min_value=0, max_value=40),
)
def test_what_is_allotted_sums_to_the_count(weights: list[float], count: int) -> None:
    if not sum(weights):
        return
    wanted = [weight / sum(weights) * count for weight in weights]
    quotas = allotted(wanted, count)
    assert sum(quotas) == count
    for quota, number in zip(quotas, wanted, strict=True):
        assert abs(quota - number) < 1 + 1e-9 and (quota == 0 or number > 0)


def tasks_and_lengths(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    rng = random.Random(0)
    tasks = [task for task, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(tasks)
    return tasks, [rng.randint(5, 500) for _ in tasks]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(min_value=1, max_value=40), min_size=2, max_size=5),
    st.lists(st.integers(min_value=1, max_value=30), min_size=1, max_size=20),
)
def test_drawn_shares_are_exact_to_a_row(counts: list[int], sizes: list[int]) -> None:
    tasks, lengths = tasks_and_lengths(counts)
    named = {str(task): count for task, count in enumerate(counts)}
    shares = list(TaskWeighting(weighting="temperature").shares(named).values())
    draws, drawn = TaskDraws(tasks, lengths, seed=1), Counter[int]()
    for size in sizes:
        drawn.update(tasks[row] for row in draws.take(shares, size))
        total = drawn.total()
        for task, share in enumerate(shares):
            # The longest row's task may have a row early.
            assert abs(drawn[task] - share * total) <= 2


def test_every_row_of_a_task_comes_before_one_comes_again() -> None:
    tasks, lengths = tasks_and_lengths([20, 4])
    draws, seen = TaskDraws(tasks, lengths, seed=3), Counter[int]()
    for _ in range(6):
        seen.update(draws.take([0.5, 0.5], 8))
        for task in (0, 1):
            times = [seen[row] for row in range(24) if tasks[row] == task]
            assert max(times) - min(times) <= 1
    assert {seen[row] for row in range(24) if tasks[row] == 1} == {6}


def test_the_longest_row_is_among_the_first() -> None:
    tasks, lengths = tasks_and_lengths([200, 3])
    lengths[tasks.index(1)] = 1000
    rows = TaskDraws(tasks, lengths, seed=3).take([0.99, 0.01], 10)
    assert max(lengths[row] for row in rows) == 1000


def test_rows_that_are_skipped_are_those_that_would_have_come() -> None:
    tasks, lengths = tasks_and_lengths([20, 7, 3])
    taken, skipped = (TaskDraws(tasks, lengths, seed=5) for _ in range(2))
    for shares in ([0.2, 0.3, 0.5], [0.6, 0.3, 0.1]):
        taken.take(shares, 13)
        skipped.skip(shares, 13)
    assert taken.take([0.3, 0.3, 0.4], 11) == skipped.take([0.3, 0.3, 0.4], 11)


class TestDynamic:
    def seen(self, *steps: Sequence[float]) -> RecentLosses:
        losses = RecentLosses(2)
        for number, step in enumerate(steps):
            losses.observe([10 * loss for loss in step], [10, 10])
            if number == 0:
                losses.end_round()
        return losses

    def test_the_task_that_lags_comes_more_often(self) -> None:
        shares = self.seen([4, 2], [1, 2], [1, 2], [1, 2]).shares([0.5, 0.5])
        assert shares[1] > 0.5 > shares[0] and sum(shares) == pytest.approx(1)

    def test_losses_of_other_heights_that_fall_alike_change_nothing(self) -> None:
        shares = self.seen([8, 2], [4, 1], [2, 0.5]).shares([0.7, 0.3])
        assert shares == pytest.approx([0.7, 0.3])

    def test_a_task_that_is_learned_keeps_a_tenth_of_its_weight(self) -> None:
        steps = [[1.0, 1.0]] + [[0.0, 1.0]] * 500
        assert self.seen(*steps).shares([0.6, 0.4])[0] == pytest.approx(0.06)

    def test_a_task_that_was_not_seen_yet_is_of_the_mean(self) -> None:
        losses = RecentLosses(3)
        losses.observe([4, 2, 0], [2, 2, 0])
        losses.end_round()
        assert losses.shares([0.2, 0.2, 0.6]) == pytest.approx([0.2, 0.2, 0.6])

    def test_its_state_is_all_there_is(self) -> None:
        losses = self.seen([4, 2], [1, 2])
        again = RecentLosses(2)
        again.restore(json.loads(json.dumps(losses.state())))
        for one in (losses, again):
            one.observe([3, 3], [2, 2])
        assert again.shares([0.5, 0.5]) == losses.shares([0.5, 0.5])


def test_an_epoch_s_lengths_are_of_as_many_rows_by_share() -> None:
    lengths = {"long": tuple(range(200, 100, -1)), "short": (20, 10)}
    drawn = drawn_lengths(lengths, {"long": 0.5, "short": 0.5})
    assert len(drawn) == 102 and drawn[0] == 200
    assert sum(length > 20 for length in drawn) == 51
    assert Counter(drawn)[20] == 26 and Counter(drawn)[10] == 25


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return put


def task_row(task: str, number: int, words: int = 1) -> dict[str, Any]:
    return {"task": task, "input": f"{task} {number}", "output": "word " * words}


def profiled(*paths: Path, files_are_tasks: bool = False) -> DataProfile:
    data = read_data(paths, files_are_tasks=files_are_tasks)
    return profile_data(data, make_split(data, None))


def two_tasks() -> list[dict[str, Any]]:
    """Forty short rows, ten long ones."""
    return [task_row("short", n) for n in range(40)] + [task_row("long", n, 400) for n in range(10)]


class TestPlan:
    def test_tasks_of_rows_are_weighted_by_their_roots(self, write: Write) -> None:
        profile = profiled(write(two_tasks()))
        settings = data_recipe(MODEL, profile, CPU, METHODS["lora"], {})
        assert settings.plan.task_weighting == "temperature"
        assert settings.reasons["task_weighting"].origin == "derived"
        assert "square root" in settings.reasons["task_weighting"].why
        assert sum(profile.tasks.values()) == profile.num_train_rows

    def test_rows_without_tasks_come_once_each(self, write: Write) -> None:
        profile = profiled(write([{"input": f"q {n}", "output": "a"} for n in range(30)]))
        assert not profile.tasks
        settings = data_recipe(MODEL, profile, CPU, METHODS["lora"], {})
        assert settings.plan.task_weighting == "proportional"
        with pytest.raises(InputError, match="names no tasks"):
            data_recipe(MODEL, profile, CPU, METHODS["lora"], {"task_weighting": "equal"})

    def test_rows_of_no_task_are_a_task_beside_others(self, write: Write) -> None:
        rows = [*two_tasks(), *({"input": f"q {n}", "output": "a"} for n in range(20))]
        assert set(profiled(write(rows)).tasks) == {"long", "short", "other"}

    def test_weights_alone_make_them_fixed(self, write: Write) -> None:
        given = {"task_weights": ("short=1", "long=1")}
        settings = data_recipe(MODEL, profiled(write(two_tasks())), CPU, METHODS["lora"], given)
        assert settings.plan.task_weighting == "fixed"

    def test_a_step_s_time_is_that_of_the_rows_that_are_drawn(self, write: Write) -> None:
        """Long rows come more often, so that steps take longer; there are as many."""
        profile = profiled(write(two_tasks()))

        def planned(**given: Any) -> Any:
            fixed = {"per_device_train_batch_size": 1, "max_steps": 20, "method": "lora"}
            best = choose_plan(MODEL, profile, CPU, {**fixed, **given}).best
            assert best is not None
            return best

        once = planned(task_weighting="proportional")
        often = planned(task_weights=("short=1", "long=3"))
        long, short = (sum(profile.task_lengths[t]) / profile.tasks[t] for t in ("long", "short"))
        assert 0.7 * long + 0.3 * short > 2 * profile.mean_length
        assert often.step.step_seconds > 1.5 * once.step.step_seconds

    def test_files_are_tasks_where_weights_are_asked_for(self, write: Write) -> None:
        rows = [{"input": f"q {n}", "output": "a"} for n in range(30)]
        paths = write(rows, "ask.jsonl"), write(rows[:10], "tell.jsonl")
        assert not profiled(*paths).tasks
        assert set(profiled(*paths, files_are_tasks=True).tasks) == {"ask", "tell"}
        found = tasks_of(read_data(paths, files_are_tasks=True))
        assert found is not None and found.files == ("ask", "tell")

    @pytest.mark.parametrize("method", ["multitask-prompt-tuning", "poly"])
    def test_methods_that_tell_tasks_apart_have_as_many(self, method: str, write: Write) -> None:
        rows = [task_row(task, n) for task in "abc" for n in range(10)]
        profile = profiled(write(rows))
        found = METHODS[method]
        settings = data_recipe(MODEL, profile, CPU, found, {"method": method})
        assert settings.plan.num_tasks == 3
        count = found.count(MODEL, settings.plan.method_settings).num_trainable_parameters
        one_more = settings.plan.replace(num_tasks=4).method_settings
        assert found.count(MODEL, one_more).num_trainable_parameters > count
        name = "num_tasks" if method != "poly" else "n_tasks"
        few = {"method": method, "peft_config": (f"{name}=2",)}
        with pytest.raises(InputError, match="has 3 tasks"):
            data_recipe(MODEL, profile, CPU, found, few)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"task_weighting": "fixed"}, "has no weights"),
            ({"task_weighting": "equal", "task_weights": ("a=1",)}, "are for fixed weights"),
            ({"task_weighting": "dynamic", "objective": "dpo"}, "dynamic weights follow"),
            (
                {
                    "task_weighting": "equal",
                    "objective": "kto",
                    "per_device_train_batch_size": 2,
                },
                "paired within micro-batches",
            ),
            ({"task_temperature": 0.0}, "--task-temperature"),
        ],
    )
    def test_weightings_that_cannot_be(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            TrainingPlan(**changes)

    def test_an_unknown_task_is_named_with_the_nearest(self, write: Write) -> None:
        profile = profiled(write(two_tasks()))
        with pytest.raises(UnknownNameError, match="`lang`"):
            profile.epoch_lengths(TaskWeighting(weighting="fixed", weights=("lang=1", "short=1")))


def test_what_an_epoch_has_of_each_task_is_told(write: Write) -> None:
    told = weighting_to_dict(profiled(write(two_tasks())), TaskWeighting(weighting="equal"))
    tasks = told["tasks"]
    assert {task["share"] for task in tasks.values()} == {0.5}
    for task in tasks.values():
        total = sum(other["num_rows"] for other in tasks.values())
        assert task["times_each_row"] == pytest.approx(total / 2 / task["num_rows"])


def test_tasks_of_parts_that_are_read_side_by_side_are_joined(write: Write) -> None:
    from ftplan.launcher.data.survey import RowMeasure, survey_records

    one, other = (
        read_data([write(rows, f"{len(rows)}.jsonl")]).source
        for rows in (
            [task_row("a", 1), task_row("b", 2)],
            [task_row("b", 3), task_row("c", 4), {"text": "x"}],
        )
    )
    first, later = (survey_records(s.records(), {}, RowMeasure(None)) for s in (one, other))
    first.merge(later)
    assert first.tasks == {"a": 1, "b": 2, "c": 1} and list(first.task_codes) == [1, 2, 2, 3, 0]
