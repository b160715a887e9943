"""What a person sees of a plan: one screen, the bar, the reasons, the command that repeats it."""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec import structs
from rich.console import Console
from rich.text import Text

from ftplan.launcher import plan_views
from ftplan.launcher.cli import main
from ftplan.launcher.commands import plan as plan_command
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.plan_explained import explained
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.settings_flags import command_line
from ftplan.launcher.ui import StackedBar, Ui, facts
from ftplan.planner.explain_time import explain_time
from ftplan.planner.margin import Margin
from ftplan.planner.plan import SETTING_NAMES
from ftplan.planner.units import format_seconds
from ftplan.profiles import find_gpu

# Lines of a terminal on which a plan is one screen, at 80 columns.
SCREEN_LINES = 50


def planned_for(
    rows: Path, gpu: str, model: str, free_bytes: int | None = None, **given: Any
) -> Planned:
    device = find_gpu(gpu).device()
    if free_bytes is not None:
        device = structs.replace(device, free_bytes=free_bytes)
    return make_plan(
        Ui(as_json=True, stdout=io.StringIO(), stderr=io.StringIO()),
        asked=DataAsked(paths=(str(rows),)),
        model_name=model,
        named_device=device,
        given=given,
        runs_dir=rows.parent / "runs",
        for_launch=False,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rng = random.Random(0)
    lines = (
        {"instruction": f"Why {n}?", "output": "reason " * rng.randint(5, 300)} for n in range(300)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def planned(rows: Path) -> Planned:
    return planned_for(rows, "rtx 4090", "qwen3-8b", lora_rank=8)


def rendered(*parts: Any, width: int = 100) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    for part in parts:
        console.print(part)
    lines = cast(io.StringIO, console.file).getvalue().splitlines()
    return [line.rstrip() for line in lines]


def test_a_plan_says_how_long_it_evaluates(planned: Planned) -> None:
    told = plan_command.planned_to_dict(planned)["run"]["evaluation"]
    assert set(told["parts"]) == {"held_out", "answers", "general_text", "scoring"}
    assert 0 < told["least_seconds"] < told["seconds"] < told["most_seconds"]
    (line,) = [
        line
        for line in rendered(*plan_views.plan_parts(planned), width=120)
        if line.startswith("evaluate ")
    ]
    assert format_seconds(told["seconds"]) in line and "scoring" not in line


# --- one screen


@pytest.mark.parametrize(
    ("gpu", "model", "given"),
    [
        ("rtx 4090", "qwen3-8b", {}),
        ("rtx 4090", "smollm2-135m-instruct", {}),
        ("a100 80gb sxm", "qwen2.5-32b", {"num_gpus": 8}),
    ],
)
def test_a_plan_is_one_screen_of_80_columns(
    gpu: str, model: str, given: dict[str, Any], rows: Path
) -> None:
    planned = planned_for(rows, gpu, model, **given)
    planned = structs.replace(planned, profile=structs.replace(planned.profile, path="rows.jsonl"))
    lines = rendered(*plan_views.plan_parts(planned), width=80)
    assert len(lines) <= SCREEN_LINES
    assert len(rendered(*plan_views.plan_parts(planned), width=120)) <= len(lines)


def test_it_says_what_is_planned_for_what(planned: Planned, rows: Path) -> None:
    shown = " ".join(rendered(*plan_views.plan_parts(planned), width=200))
    lengths, run = planned.profile.summary(), planned.run_time
    for part in (
        "qwen3-8b, 8.19 B parameters: asked for",
        "RTX 4090, 24.0 GiB of 24.0 GiB free",
        f"{rows}: {planned.profile.num_train_rows} rows",
        f"median {lengths['median']} a row, {lengths['max']:,} at most",
        f"{run.steps:,} steps of {planned.chosen.plan.effective_batch_size} rows",
        "5 % margin",
        "the longest row has",
    ):
        assert part in shown


def test_settings_that_were_chosen_or_given_are_told_and_defaults_are_not(
    planned: Planned,
) -> None:
    lines = rendered(plan_views.settings_table(planned, all_of_them=False))
    named = {line.split()[0] for line in lines if line.strip()} & set(SETTING_NAMES)
    origins = {planned.chosen.reasoned.reasons[name].origin for name in named}
    assert origins == {"given", "derived"}
    assert {"method", "lora_rank", "per_device_train_batch_size", "learning_rate"} <= named
    assert re.search(r"lora_rank +8 +asked for", "\n".join(lines))


def test_all_settings_are_told_with_explain_and_where_each_is_from(planned: Planned) -> None:
    lines = rendered(plan_views.settings_table(planned, all_of_them=True), width=160)
    found = {}
    for line in lines[2:]:
        name, origin = line.split()[0], line.split()[2]
        found[name] = origin
    reasons = planned.chosen.reasoned.reasons
    assert found == {name: reasons[name].origin for name in SETTING_NAMES}
    assert "ftplan's default" not in "\n".join(lines)


# --- the bar


def test_the_bars_parts_come_to_what_is_free(planned: Planned) -> None:
    memory, free = planned.chosen.memory, planned.device.free_bytes
    parts = dict(plan_views.bar_parts(memory, free, 0.05))
    assert sum(parts.values()) == free
    assert list(parts)[-1] == "left over"
    before = [size for name, size in parts.items() if name not in ("5 % margin", "left over")]
    assert sum(before) == memory.required_bytes
    assert before[0] == max(memory.peak_phase.components.values())


@pytest.mark.parametrize("width", [1, 7, 40, 80, 133])
@pytest.mark.parametrize("sizes", [[1], [1, 1], [5, 1, 1, 0.01, 3], [0, 0, 1], [1] * 8, [3, 0]])
def test_a_stacked_bar_is_as_wide_as_there_is_room(width: int, sizes: list[float]) -> None:
    bar = StackedBar(sizes)
    (line,) = rendered(bar, width=width)
    assert len(line) == width
    cells = [line.count(bar.key(number).plain) for number in range(len(sizes))]
    assert sum(cells) == width
    for number, size in enumerate(sizes):
        assert abs(cells[number] - width * size / sum(sizes)) <= 1


def test_parts_of_a_bar_are_told_apart_without_colours() -> None:
    sizes = [1.0] * 8
    keys = [StackedBar(sizes).key(number).plain for number in range(len(sizes))]
    assert len(set(keys)) == len(keys)


def test_labels_stand_before_folded_lines() -> None:
    assert rendered(facts([("a", "one two three"), ("long", "x")]), width=14) == [
        "a     one two",
        "      three",
        "long  x",
    ]


def test_a_margin_that_was_measured_is_told(planned: Planned) -> None:
    measured = structs.replace(planned.offer, margin=Margin(share=0.018, num_runs=7))
    shown = rendered(*plan_views.memory_bar(structs.replace(planned, offer=measured)))
    assert "margin 1.8 %: 7 runs on this GPU" in shown
    assert any("1.8 % margin" in line for line in shown)
    assert not any("runs on this" in line for line in rendered(*plan_views.memory_bar(planned)))


# --- with --explain


def test_the_formulas_come_to_what_they_explain(planned: Planned) -> None:
    said = explained(planned)
    terms = sum(term.num_bytes for term in said.memory)
    assert terms == planned.chosen.memory.allocated_peak_bytes
    step = planned.chosen.step
    by_part = {term.part: term.seconds for term in said.time}
    computing = sum(by_part[part] for part in ("arithmetic", "memory traffic", "optimizer step"))
    assert max(computing, by_part["launching kernels"]) == pytest.approx(step.step_seconds)
    assert planned.ranking.best in said.front


def test_gpus_that_exchange_say_how_much(rows: Path) -> None:
    planned = planned_for(rows, "a100 80gb sxm", "qwen2.5-7b", num_gpus=2, method="full")
    terms = explain_time(planned.source.spec, planned.chosen.plan, planned.device, planned.profile)
    exchange = {term.part: term for term in terms}["exchange between GPUs"]
    assert exchange.seconds > 0 and " a second" in exchange.formula


def test_the_front_marks_what_was_chosen(planned: Planned) -> None:
    lines = rendered(*plan_views.front_parts(planned, explained(planned).front), width=80)
    (chosen,) = [line for line in lines if line.startswith("*")]
    plan = planned.chosen.plan
    assert chosen.split()[1:3] == [plan.method, str(plan.per_device_train_batch_size)]
    assert len(lines) <= 12 + 4


def test_json_has_the_counts_the_margin_and_with_explain_the_front(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(rows), "--gpu", "rtx 4090", "--model", "qwen3-8b", "--json"]
    assert main(words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*words, "--explain"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert more | plain == more
    assert set(more) - set(plain) == {
        *("explain", "explain_host", "explain_time", "front", "failures")
    }
    counts = plain["search"]
    assert counts["num_plans"] >= counts["num_timed"] >= counts["num_evaluated"] > 0
    assert plain["margin"] == {"share": 0.05, "num_runs": 0}
    (chosen,) = [one for one in more["front"] if one["chosen"]]
    assert chosen["required_bytes"] == plain["estimate"]["per_gpu"]["required_bytes"]
    assert chosen["method"] == plain["plan"]["method"]["value"]


# --- the command that repeats it


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    plan_command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        ["rows.jsonl"],
        ["my rows.jsonl", "b.jsonl", "--gpu", "RTX 4090", "--free-memory", "20GiB"],
        ["rows.jsonl", "--eval-data", "a b.jsonl", "c.jsonl", "--strict", "--test-share", "0.1"],
        ["rows.jsonl", "--learning-rate", "1e-4", "--packing", "no", "--target-modules", "q,v"],
        ["$x;'\".jsonl", "--prefer", "fastest", "--time-budget", "6h", "--runs-dir", "my runs"],
        ["rows.jsonl", "--columns", "instruction=q,label="],
    ],
)
def test_the_command_repeats_what_was_given(words: list[str]) -> None:
    arguments = parsed([*words, "--out", "plan.yaml", "--explain"])
    said = command_line(
        "plan", plan_command.add_arguments, arguments, {}, leave_out=("out", "explain")
    )
    name, verb, *again = shlex.split(said)
    assert (name, verb) == ("ftplan", "plan")
    assert parsed(again) == parsed(words)


def test_what_a_person_was_asked_is_in_the_command() -> None:
    said = command_line(
        "plan", plan_command.add_arguments, parsed(["rows.jsonl"]), {"columns": "label="}
    )
    assert said == "ftplan plan rows.jsonl --columns label="


def test_the_command_is_one_line_however_narrow_the_terminal(
    rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    words = ["plan", str(rows), "--gpu", "rtx 4090", "--model", "qwen3-8b", "--lora-rank", "8"]
    assert main(words) == 0
    (again,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("again: ")]
    assert sorted(shlex.split(again.removeprefix("again: "))) == sorted(["ftplan", *words])


def test_no_part_is_empty(planned: Planned) -> None:
    for part in plan_views.plan_parts(planned, explained(planned)):
        assert part == Text("") or rendered(part)
