"""Which base model is taken when none is named: the order, the bounds, and the reasons."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
from msgspec import structs

from ftplan.launcher.data import languages
from ftplan.planner import base_models
from ftplan.planner.base_models import (
    LANGUAGES_OF,
    Available,
    BaseModel,
    ModelChoice,
    Obstacle,
    RunnerUp,
    choose_base_model,
    in_order,
    least_run_seconds,
    too_large,
    too_slow,
)
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.memory import fits
from ftplan.planner.run_time import RunTime
from ftplan.planner.search import choose_plan
from ftplan.profiles import find_gpu, model_catalog, require_model
from ftplan.profiles.text_facts import function_words

MakeData = Callable[[Iterable[int]], DataProfile]


def model(name: str, billions: float, **more: Any) -> BaseModel:
    fields: dict[str, Any] = {"kind": "chat", "licence": "MIT", "languages": ("English",), **more}
    return BaseModel(name=name, num_parameters=round(billions * 1e9), **fields)


def names(models: Iterable[BaseModel]) -> list[str]:
    return [each.name for each in models]


# --- the order


def test_the_largest_free_general_model_comes_first() -> None:
    models = [
        model("small-1b", 1),
        model("large-9b", 9),
        model("closed-70b", 70, licence="Llama"),
        model("coder-30b", 30, specialty="code"),
    ]
    assert names(in_order(models, "chat", "English")) == ["large-9b", "small-1b"]


def test_the_later_version_of_a_size_comes_first() -> None:
    models = [
        model("yi-34b", 34.386),
        model("yi-1.5-34b", 34.389),
        model("qwen2.5-32b-instruct", 32.764),
        model("qwen3-32b", 32.762),
        model("mixtral-8x7b-instruct-v0.1", 5),
        model("mixtral-8x7b-instruct-v0.2", 5),
    ]
    assert names(in_order(models, "chat", "")) == [
        *("yi-1.5-34b", "yi-34b", "qwen3-32b", "qwen2.5-32b-instruct"),
        *("mixtral-8x7b-instruct-v0.2", "mixtral-8x7b-instruct-v0.1"),
    ]


def test_language_counts_before_kind_and_kind_before_size() -> None:
    german = ("English", "German")
    models = [
        model("english-chat", 9),
        model("german-chat", 1, languages=german),
        model("german-base", 5, languages=german, kind="base"),
        model("unknown-chat", 2, languages=()),
    ]
    expected = ["unknown-chat", "german-chat", "german-base", "english-chat"]
    assert names(in_order(models, "chat", "German")) == expected
    assert names(in_order(models, "base", "German"))[0] == "german-base"
    assert names(in_order(models, "chat", ""))[0] == "english-chat"


@pytest.mark.parametrize(
    ("language", "expected"),
    [("Cyrillic script", True), ("Devanagari", False), ("Russian", True), ("", True)],
)
def test_a_script_is_known_by_a_language_that_is_written_in_it(
    language: str, expected: bool
) -> None:
    assert model("m", 1, languages=("Russian",)).knows(language) is expected


# --- the choice


def choose(
    models: list[BaseModel],
    data: DataProfile,
    tried: dict[str, Obstacle] | None = None,
    bounded: dict[str, Obstacle] | None = None,
) -> ModelChoice | None:
    return choose_base_model(
        models,
        data,
        lambda each: (bounded or {}).get(each.name),
        lambda each: (tried or {}).get(each.name),
        within=" and trains within 6 hours",
    )


CHATS = [model("a-30b", 30), model("b-9b", 9), model("c-8b", 8), model("d-3b", 3)]
LARGE, LATE = Obstacle("too large"), Obstacle("takes 9 h 00 min, over 6 h 00 min", late=True)


def test_the_next_smaller_that_may_fit_is_the_runner_up(make_data: MakeData) -> None:
    choice = choose(CHATS, make_data([100] * 50), {"a-30b": LARGE}, {"c-8b": LARGE})
    assert choice is not None and choice.name == "b-9b"
    assert choice.runner_up == RunnerUp(name="d-3b", why_not="smaller: 3.00 B parameters")
    assert choice.why.startswith(
        "the largest free chat model of the catalog that fits and trains within 6 hours; 50 rows"
    )


def test_a_larger_one_that_takes_too_long_is_the_runner_up(make_data: MakeData) -> None:
    for where in ("tried", "bounded"):
        choice = choose(CHATS, make_data([100] * 50), **{where: {"a-30b": LATE, "b-9b": LATE}})
        assert choice is not None and choice.name == "c-8b"
        assert choice.runner_up == RunnerUp(name="b-9b", why_not=LATE.reason)


def test_nothing_is_tried_that_a_bound_rules_out(make_data: MakeData) -> None:
    tried: list[str] = []

    def fails(each: BaseModel) -> Obstacle:
        tried.append(each.name)
        return LARGE

    bounded = {"a-30b": LARGE, "c-8b": LARGE}
    found = choose_base_model(CHATS, make_data([100]), lambda each: bounded.get(each.name), fails)
    assert found is None and tried == ["b-9b", "d-3b"]


def test_many_rows_and_plain_text_want_a_base_model(make_data: MakeData) -> None:
    models = [*CHATS, model("base-7b", 7, kind="base")]
    few = make_data([100] * 50)
    for data in (
        structs.replace(few, objective="pretraining"),
        structs.replace(few, rows_each=2_000.0),
    ):
        choice = choose(models, data)
        assert choice is not None and choice.name == "base-7b"
        assert "the largest free base model" in choice.why
        assert choice.runner_up is not None
        assert choice.runner_up.why_not == "a chat model, where a base one is advised"


def test_the_other_kind_is_taken_where_there_is_none_and_said(make_data: MakeData) -> None:
    plain = structs.replace(make_data([100]), objective="pretraining")
    choice = choose(CHATS, plain)
    assert choice is not None and choice.name == "a-30b"
    assert "no base model does, which is advised (plain text goes on" in choice.why


def test_what_is_known_of_the_language_is_said(make_data: MakeData) -> None:
    data = structs.replace(make_data([100]), language="German")
    german = model("german-2b", 2, languages=("German",))
    unknown = model("unknown-1b", 1, languages=())
    for models, name, words in (
        ([*CHATS, german], "german-2b", "its makers name the data's language (German)"),
        (
            [*CHATS, unknown],
            "unknown-1b",
            "whether it knows the data's language (German) is not published",
        ),
        (CHATS, "a-30b", "no model does whose makers name the data's language (German)"),
    ):
        choice = choose(models, data)
        assert choice is not None and choice.name == name and words in choice.why
        if name == "german-2b":
            assert choice.runner_up is not None
            assert choice.runner_up.why_not == "its makers do not name the data's language (German)"


# --- bounds: what they rule out has no plan


SMALL_ONES = (
    "smollm2-135m",
    "qwen2.5-0.5b",
    "pythia-1.4b",
    "granite-3.0-1b-a400m-instruct",
    "gpt2",
    "qwen2.5-3b",
)


@pytest.mark.parametrize("name", SMALL_ONES)
@pytest.mark.parametrize("asked", [{}, {"method": "full"}, {"method": "freeze"}], ids=str)
def test_no_run_is_faster_than_its_bound(
    name: str, asked: dict[str, Any], make_data: MakeData
) -> None:
    rng = random.Random(name)
    data = make_data([rng.randint(20, 900) for _ in range(300)])
    spec, gpu = require_model(name).spec, find_gpu("a100-80gb-sxm").device()
    for gpus in ([gpu], [structs.replace(gpu, index=index) for index in range(2)]):
        least = least_run_seconds(spec, data, Available(gpus=gpus, given=asked))
        ranking = choose_plan(spec, data, gpus, asked, goal="fastest")
        assert ranking.best is not None
        for plan in (ranking.best, *ranking.alternatives):
            run = RunTime.of(plan.plan, plan.step, data.num_train_rows)
            assert 0 < least <= run.seconds, plan.plan.method
        slow = too_slow(spec, data, Available(gpus=gpus, given=asked), least / 2)
        assert slow is not None and slow.late
        assert too_slow(spec, data, Available(gpus=gpus, given=asked), least) is None


def test_a_given_number_of_steps_has_no_bound(make_data: MakeData) -> None:
    available = Available(gpus=[find_gpu("l4").device()], given={"max_steps": 1})
    assert least_run_seconds(require_model("qwen2.5-3b").spec, make_data([100]), available) == 0


@pytest.mark.parametrize("name", ["smollm2-135m", "granite-3.0-1b-a400m-instruct", "gpt2"])
@pytest.mark.parametrize("asked", [{}, {"method": "full"}, {"quantization": "none"}], ids=str)
def test_what_is_too_large_has_no_plan_and_what_fits_is_not(
    name: str, asked: dict[str, Any], make_data: MakeData
) -> None:
    entry, data, card = model_catalog()[name], make_data([64] * 20), find_gpu("l4").device()
    published = model(name, entry.num_parameters / 1e9)
    spec = entry.spec
    ruled_out = 0
    for share in (0.002, 0.02, 0.1, 1.0):
        gpu = structs.replace(card, free_bytes=round(share * card.total_bytes))
        available = Available(gpus=[gpu], given=asked)
        obstacle = too_large(published, lambda: spec, data, available)
        best = choose_plan(spec, data, gpu, asked).best
        if obstacle is not None:
            ruled_out += 1
            assert best is None and not obstacle.late
        elif best is not None:
            assert fits(best.memory, gpu)
    assert ruled_out


def test_of_a_giant_not_even_the_shape_is_looked_at(make_data: MakeData) -> None:
    def never() -> Any:
        raise AssertionError

    gpus = [find_gpu("l4").device()] * 4
    giant = model("giant", 200)
    divided = partial(too_large, giant, never, make_data([64]))
    assert divided(Available(gpus=gpus, given={})) is not None


# --- the catalog


def test_the_catalogs_languages_are_such_as_data_are_told_to_be_in() -> None:
    scripts = {*languages._LEADS, *(name for name, _ in languages._SCRIPTS_OF_E0), "Japanese"}
    told = {*function_words().words, *scripts}
    assert set(LANGUAGES_OF) <= told
    known = (told - set(LANGUAGES_OF)) | {name for some in LANGUAGES_OF.values() for name in some}
    for entry in model_catalog().values():
        assert set(entry.languages) <= known, entry.name
        assert len(set(entry.languages)) == len(entry.languages), entry.name


def test_specialties_are_those_that_their_names_tell() -> None:
    of = {entry.name: entry.specialty for entry in model_catalog().values() if entry.specialty}
    assert of["qwen2.5-coder-7b-instruct"] == "code"
    assert of["qwq-32b"] == of["deepseek-r1"] == "reasoning"
    assert set(of.values()) == {"code", "mathematics", "reasoning"}


def test_the_free_licences_are_the_catalogs() -> None:
    licences = {entry.licence for entry in model_catalog().values()}
    assert set(base_models.FREE_LICENCES) < licences
