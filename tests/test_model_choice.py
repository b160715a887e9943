"""The base model that a plan takes when none is named: what is read, reached and tried for it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import model_choice, planning
from ftplan.launcher.commands.plan import planned_to_dict
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.data.checks import row_language
from ftplan.launcher.data.data_file import read_data
from ftplan.launcher.data.overlong import Rule
from ftplan.launcher.data.profiling import make_split, profile_data
from ftplan.launcher.model_source import find_source
from ftplan.launcher.offer import Offer
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.ui import Ui
from ftplan.planner.goals import ANY_PLAN, Wanted
from ftplan.planner.hardware_spec import Device
from ftplan.planner.policy import COMPLETION_LENGTH
from ftplan.planner.ranking import Ranking
from ftplan.profiles import find_gpu, require_model

ENGLISH = "The man went to the house of his friend and it was not there, as he had been told."
GERMAN = (
    "Der Mann ging mit dem Hund in die Stadt und kaufte ein Buch, das er nicht lesen wollte, weil "
    "es auf dem Tisch von der Frau lag und sie es noch nicht hatte."
)
GPU = "RTX 4090"


def write(tmp_path: Path, *texts: str) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"{n} {text}", "output": f"{text} {n}"} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plan(path: Path, gpu: str = GPU, wanted: Wanted = ANY_PLAN, **given: Any) -> Planned:
    return make_plan(
        Ui(as_json=True, stdout=io.StringIO(), stderr=io.StringIO()),
        asked=DataAsked(paths=(str(path),)),
        model_name=None,
        named_device=find_gpu(gpu).device(),
        given=given,
        wanted=wanted,
        runs_dir=Path("runs"),
        for_launch=False,
    )


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_choice, "_hub_is_out_of_reach", lambda: True)
    monkeypatch.setattr(model_choice, "cached_folder", lambda hub_id: None)


def offer(device: Device) -> Offer:
    return Offer(devices=device, given={}, wanted=ANY_PLAN)


def test_for_a_card_elsewhere_the_whole_catalog_is_there(
    unreachable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    ranking = Offer.ranking

    def counted(self: Offer, model: Any, profile: Any, **more: Any) -> Ranking:
        tried.append(model.name)
        return ranking(self, model, profile, **more)

    monkeypatch.setattr(Offer, "ranking", counted)
    planned = plan(write(tmp_path, *[ENGLISH] * 60))
    assert planned.source.origin == "catalog" and planned.runner_up is not None
    told = planned_to_dict(planned)["model"]
    assert told["name"] == planned.source.spec.name and told["why"] == planned.model_why
    assert set(told["runner_up"]) == {"name", "why_not"}
    assert "trains within 6 h" in told["why"]
    # Bounds leave one model to be tried, and it is not worked out twice.
    assert len(set(tried)) == 1 and len(tried) <= 3
    assert require_model(told["runner_up"]["name"]).num_parameters < 40e9


def test_here_without_a_hub_only_the_cache_counts(unreachable: None, tmp_path: Path) -> None:
    asked = DataAsked(paths=(str(write(tmp_path, *[ENGLISH] * 60)),))
    here = offer(find_gpu(GPU).device())
    source, choice = model_choice.choose_model(asked, here, here=True)
    assert source.origin == "default" and choice.runner_up is None
    assert "no larger model" in choice.why
    assert model_choice.choose_model(asked, here, here=False)[0].origin == "catalog"


class Seen(Exception):
    """The choice of a model has been asked for."""


def test_a_model_is_chosen_for_prompts_with_completions_and_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def choose(asked: DataAsked, offer: Offer, **more: Any) -> None:
        seen.update(more, rule=asked.rule)
        raise Seen

    judge = find_source("qwen2.5-7b")
    monkeypatch.setattr(planning, "choose_model", choose)
    monkeypatch.setattr(planning, "reward_source", lambda given: judge)
    path = write(tmp_path, *[ENGLISH] * 10)
    with pytest.raises(Seen):
        plan(path, objective="grpo", reward_model="judge")
    assert seen["judge"] is judge and seen["rule"].completion_length == COMPLETION_LENGTH
    with pytest.raises(Seen):
        plan(path, objective="grpo", reward_model="judge", max_completion_length=40)
    assert seen["rule"].completion_length == 40
    with pytest.raises(Seen):
        plan(path)
    assert seen["rule"].completion_length == 0


def test_a_reward_model_takes_room_beside_each(tmp_path: Path) -> None:
    rule = Rule("truncate", None, completion_length=64)
    data = read_data([write(tmp_path, *[ENGLISH] * 60)], objective="grpo", rule=rule)
    profile = profile_data(data, make_split(data, None))
    given = {
        **{"objective": "grpo", "method": "lora", "max_steps": 2, "max_completion_length": 64},
        **{"per_device_train_batch_size": 4, "num_generations": 4, "gradient_checkpointing": True},
    }
    there = Offer(devices=find_gpu(GPU).device(), given=given, wanted=ANY_PLAN)
    model = model_choice._published(model_choice.model_catalog()["qwen2.5-7b"])
    assert model_choice._Trials(profile, there).tried(model) is None
    judged = model_choice._Trials(profile, there, find_source("qwen2.5-7b")).tried(model)
    assert judged is not None


def test_a_processor_trains_the_embedded_default(tmp_path: Path) -> None:
    processor = Device(
        name="a processor",
        kind="cpu",
        total_bytes=2**35,
        free_bytes=2**34,
        memory_bandwidth_bytes_per_second=4e10,
        peak_flops_per_second={"float32": 5e11},
        context_bytes=0,
    )
    asked = DataAsked(paths=(str(tmp_path / "never read"),))
    source, choice = model_choice.choose_model(asked, offer(processor), here=True)
    assert source.spec.name == choice.name == "smollm2-135m-instruct"
    assert choice.runner_up is not None and choice.runner_up.name == "smollm2-360m-instruct"
    assert "2.7 times as large" in choice.runner_up.why_not


def test_a_time_budget_takes_a_smaller_model_and_names_the_larger(tmp_path: Path) -> None:
    path = write(tmp_path, *[ENGLISH] * 800)
    free = plan(path)
    seconds = 0.3 * free.run_time.seconds
    short = plan(path, wanted=Wanted(seconds=seconds))
    assert short.source.spec.num_parameters < free.source.spec.num_parameters
    assert short.run_time.seconds <= seconds
    assert short.runner_up is not None and ", over " in short.runner_up.why_not
    named = require_model(short.runner_up.name)
    assert named.num_parameters > short.source.spec.num_parameters


def test_a_given_method_is_what_is_tried(tmp_path: Path) -> None:
    planned = plan(write(tmp_path, *[ENGLISH] * 60), method="full")
    assert planned.chosen.plan.method == "full" and planned.source.origin == "catalog"
    assert planned.source.spec.num_parameters < 2e9


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([GERMAN] * 30 + [ENGLISH] * 10, "German"),
        ([GERMAN] * 10 + [ENGLISH] * 30, "English"),
        (["x = 1"] * 40, ""),
    ],
)
def test_the_language_is_that_of_most_rows(
    tmp_path: Path, texts: list[str], expected: str, checks: bool
) -> None:
    assert read_data([write(tmp_path, *texts)], checks=checks).survey.language == expected


def test_a_short_answer_is_judged_with_its_question() -> None:
    assert row_language(GERMAN, "Ja.") == "German"
    assert row_language(GERMAN, f"{ENGLISH} {ENGLISH}") == "English"


def test_german_rows_get_a_model_whose_makers_name_german(tmp_path: Path) -> None:
    planned = plan(write(tmp_path, *[GERMAN] * 60), gpu="RTX 2080 Ti")
    assert planned.profile.language == "German"
    entry = require_model(planned.source.spec.name)
    assert "German" in entry.languages and "(German)" in planned.model_why
