"""Stages that are trained one after the other: planned together, written to a file, read back."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftplan.launcher.cli import main
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.stage_file import AskedStage, read_stage_file, write_stage_file
from ftplan.launcher.stages import PlannedStage, plan_stages
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import DoesNotFitError, InputError, UnknownNameError
from ftplan.planner.goals import Wanted
from ftplan.planner.methods import METHODS
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.stages import (
    Kept,
    backward_transfer,
    begin_of,
    evenly,
    inherited,
    merges,
    replayed_rows,
    what_helps,
)
from ftplan.profiles import find_gpu

LORA = TrainingPlan(lora_rank=8)
FULL = TrainingPlan(method="full")
DPO = TrainingPlan(lora_rank=8, objective="dpo")


def test_a_stage_takes_over_the_adapter_of_the_one_before() -> None:
    assert inherited(LORA, {})["lora_rank"] == 8
    assert inherited(LORA, {"learning_rate": 1e-5})["method"] == "lora"


def test_another_rank_takes_over_the_method_alone_and_another_method_nothing() -> None:
    assert inherited(LORA, {"lora_rank": 4}) == {"method": "lora", "quantization": "none"}
    assert inherited(LORA, {"lora_rank": 8})["lora_alpha"] == 32
    assert inherited(LORA, {"method": "full"}) == {}
    assert inherited(FULL, {}) == {"method": "full", "quantization": "none"}


@pytest.mark.parametrize(
    ("before", "plan", "begin"),
    [
        (LORA, LORA, "adapter"),
        (LORA, LORA.replace(learning_rate=1e-6, max_length=64), "adapter"),
        (LORA, LORA.replace(lora_rank=16), "merged"),
        (LORA, FULL, "merged"),
        (FULL, FULL, "model"),
        (FULL, LORA, "model"),
        # The adapter off is not the model as the stage found it.
        (LORA, DPO, "merged"),
        (LORA, DPO.replace(precompute_ref_log_probs=True), "adapter"),
        (FULL, FULL.replace(objective="dpo"), "model"),
        # One has an output projection, the other a score.
        (LORA, LORA.replace(objective="reward", loss="stock"), "merged"),
    ],
)
def test_what_a_stage_begins_from(before: TrainingPlan, plan: TrainingPlan, begin: str) -> None:
    assert begin_of(before, plan) == begin


def test_what_cannot_be_merged_can_only_go_on() -> None:
    prompts = TrainingPlan(method="prompt-tuning")
    assert begin_of(prompts, prompts) == "adapter"
    with pytest.raises(InputError, match="cannot be merged"):
        begin_of(prompts, LORA)
    with pytest.raises(InputError, match="gives scores and no text"):
        begin_of(LORA.replace(objective="reward", loss="stock"), LORA)


def test_methods_that_peft_merges_are_those_said_to() -> None:
    """All but prompts, and the tuners whose `merge` raises or is missing."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    for method in METHODS.values():
        if method.peft_type is not None:
            tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[method.peft_type])
            assert hasattr(tuner, "merge_and_unload") or not merges(method), method.name


def test_rows_to_replay_are_a_share_of_all_and_evenly_spaced() -> None:
    assert replayed_rows(0.05, 95, [1000]) == [5]
    assert replayed_rows(0.2, 80, [30, 10]) == [15, 5]
    assert replayed_rows(0.5, 100, [10]) == [10]  # no more than there are
    assert replayed_rows(0.1, 90, []) == []
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(2, 5) == [0, 1] and evenly(0, 3) == []


def kept(objective: str, before: float, end: float, after: float) -> Kept:
    return Kept(stage="1-a", objective=objective, before=before, at_its_end=end, after=after)


def test_backward_transfer_is_the_mean_of_what_was_lost_by_objective() -> None:
    """Lopez-Paz & Ranzato's R is an accuracy: a loss counts with its sign turned."""
    found = backward_transfer(
        [kept("sft", 3, 2, 2.5), kept("sft", 3, 1, 0.9), kept("dpo", 0.7, 0.2, 0.3)]
    )
    assert found["sft"] == pytest.approx(-0.2)
    assert found["dpo"] == pytest.approx(-0.1)
    assert backward_transfer([]) == {}


def test_a_tenth_of_the_perplexity_or_of_the_gain_is_lost() -> None:
    assert kept("sft", 5, 2, 2 + math.log(1.11)).is_lost
    assert not kept("sft", 5, 2, 2 + math.log(1.09)).is_lost
    assert kept("dpo", 0.7, 0.2, 0.26).is_lost
    assert not kept("dpo", 0.7, 0.2, 0.24).is_lost
    assert not kept("dpo", 0.2, 0.3, 0.9).is_lost  # it had learned nothing


def test_replay_helps_where_texts_follow_texts() -> None:
    stages = {"1-a": LORA, "2-b": FULL, "3-c": DPO}
    assert any("replay" in one for one in what_helps(["1-a"], stages))
    assert any("adapters" in one for one in what_helps(["1-a"], stages))
    assert not any("replay" in one or "adapters" in one for one in what_helps(["2-b"], stages))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "facts": [{"instruction": f"Why {n}?", "output": f"It is {n}. " * (n % 7)} for n in
                  range(1, 90)],
        "style": [{"instruction": f"Say {n}.", "output": f"{n}, of course."} for n in range(60)],
        "prefs": [{"prompt": f"{n}?", "chosen": f"{n}!", "rejected": "no"} for n in range(60)],
    }  # fmt: skip
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def stage(path: str, replay_share: float = 0.0, **settings: Any) -> AskedStage:
    asked = DataAsked(paths=(path,))
    return AskedStage(
        name=Path(path).stem, asked=asked, settings=settings, replay_share=replay_share
    )


def plans(*asked: AskedStage, model: str = "qwen2.5-7b", **more: Any) -> list[PlannedStage]:
    return plan_stages(
        Ui(as_json=True, stdout=io.StringIO(), stderr=io.StringIO()),
        asked,
        model=model,
        named_device=find_gpu("l4").device(),
        runs_dir=Path("runs"),
        for_launch=False,
        **more,
    )


def test_an_adapter_goes_on_through_texts_and_preferences(files: dict[str, str]) -> None:
    """The reference of the preferences is the model as that stage finds it."""
    first, second, third = plans(
        stage(files["facts"], lora_rank=8), stage(files["style"]), stage(files["prefs"])
    )
    assert [one.begin for one in (first, second, third)] == [None, "adapter", "adapter"]
    assert second.plan.lora_rank == third.plan.lora_rank == 8
    assert third.plan.objective == "dpo" and third.plan.precompute_ref_log_probs
    reasons = third.planned.chosen.reasoned.reasons
    assert "before it changes" in reasons["precompute_ref_log_probs"].why
    assert reasons["lora_rank"].origin == "derived"
    assert "adapter goes on" in reasons["lora_rank"].why


def test_a_reference_that_is_asked_while_training_has_the_adapter_merged(
    files: dict[str, str],
) -> None:
    last = plans(stage(files["facts"]), stage(files["prefs"], precompute_ref_log_probs=False))[-1]
    assert last.begin == "merged" and not last.plan.precompute_ref_log_probs


def test_a_stage_that_does_not_fit_is_told_with_its_number(files: dict[str, str]) -> None:
    with pytest.raises(DoesNotFitError, match=r"^stage 2: "):
        plans(stage(files["facts"], method="lora"), stage(files["style"], method="full"))
    with pytest.raises(DoesNotFitError, match=r"^stage 2: ") as told:
        plans(stage(files["facts"]), stage(files["style"], per_device_train_batch_size=4096))
    assert "a `method` of its own" in str(told.value.hint)


def test_what_is_wrong_with_a_later_stage_is_told_before_the_first_is_planned(
    files: dict[str, str],
) -> None:
    with pytest.raises(InputError, match=r"^stage 2: no such file"):
        plans(stage(files["facts"], method="full"), stage("nowhere.jsonl"))
    with pytest.raises(InputError, match=r"^stage 2: .*lroa"):
        plans(stage(files["facts"], method="full"), stage(files["style"], method="lroa"))


def test_a_budget_is_of_all_stages_together(files: dict[str, str]) -> None:
    alone = plans(stage(files["facts"]))[0].seconds
    budget = Wanted(seconds=1.5 * alone)
    assert plans(stage(files["facts"]), wanted=budget)
    with pytest.raises(DoesNotFitError, match="together, more than"):
        plans(stage(files["facts"]), stage(files["facts"]), wanted=budget)


def test_replayed_rows_are_planned_for(files: dict[str, str]) -> None:
    """Their number is the share asked for, and they are whole rows of the earlier stage that the
    later one can take."""
    plain = plans(stage(files["facts"]), stage(files["style"]))[1]
    mixed = plans(stage(files["facts"]), stage(files["style"], replay_share=0.2))[1]
    (rows,) = mixed.replayed
    own, together = plain.planned.profile.num_train_rows, mixed.planned.profile.num_train_rows
    assert together == own + rows.rows
    assert rows.rows / together == pytest.approx(0.2, abs=0.01)
    assert mixed.planned.profile.trained_lengths[0] <= mixed.plan.max_length
    assert mixed.planned.steps >= plain.planned.steps
    assert plans(stage(files["facts"]), stage(files["prefs"], replay_share=0.2))[1].replayed == ()


def test_a_file_of_stages_gives_the_same_plans(files: dict[str, str], tmp_path: Path) -> None:
    asked = (stage(files["facts"], lora_rank=4), stage(files["prefs"], learning_rate=1e-6))
    stages = plans(*asked)
    path = tmp_path / "stages.yaml"
    write_stage_file(stages, path)
    file = read_stage_file(path)
    again = plans(*file.stages, model=file.model)
    assert [one.plan for one in again] == [one.plan for one in stages]
    assert [one.begin for one in again] == [one.begin for one in stages]
    written = tmp_path / "again.yaml"
    write_stage_file(again, written)
    assert written.read_text() == path.read_text()
    with pytest.raises(InputError, match="is there already"):
        write_stage_file(stages, path)


def test_data_that_changed_since_the_file_was_written_are_refused(
    files: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "stages.yaml"
    write_stage_file(plans(stage(files["facts"]), stage(files["style"])), path)
    changed = read_stage_file(written(path, sha256="0" * 64))
    with pytest.raises(InputError, match=r"^stage 2: the data of `style` have changed"):
        plans(*changed.stages)


def written(path: Path, **data: Any) -> Path:
    """With other data of the second stage."""
    raw = yaml.safe_load(path.read_text())
    raw["stages"][1]["data"].update(data)
    path.write_text(yaml.safe_dump(raw))
    return path


SHORT = """
schema: 1
model: qwen2.5-7b
replay_share: 0.01
plan: {lora_rank: 8, seed: 7}
stages:
- data: one.jsonl
- name: my style!
  data: [two.jsonl, three.jsonl]
  replay_share: 0.05
  plan: {lora_rank: 4}
"""


def test_a_file_may_be_as_short_as_its_data(tmp_path: Path) -> None:
    """Settings for all stages stand above, those of one below it."""
    path = tmp_path / "short.yaml"
    path.write_text(SHORT)
    first, second = read_stage_file(path).stages
    assert first.name == "one" and first.asked.paths == ("one.jsonl",)
    assert second.name == "my-style" and second.asked.paths == ("two.jsonl", "three.jsonl")
    assert first.settings == {"lora_rank": 8, "seed": 7}
    assert second.settings == {"lora_rank": 4, "seed": 7}
    assert (first.replay_share, second.replay_share) == (0.01, 0.05)


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        ("schema: 1", "schema: 2", InputError, "schema: 2"),
        ("model: qwen2.5-7b", "", InputError, "names no `model`"),
        ("replay_share: 0.01", "replay_shar: 0.01", UnknownNameError, "replay_shar"),
        ("- data: one.jsonl", "- dta: one.jsonl", InputError, "stage 1: unknown part"),
        ("- data: one.jsonl", "- name: one", InputError, "stage 1: it has no `data`"),
        ("- data: one.jsonl", "- one.jsonl", InputError, "stage 1: it must be a mapping"),
        ("{lora_rank: 4}", "{lora_rnak: 4}", InputError, "stage 2: unknown plan setting"),
        ("{lora_rank: 4}", "{lora_rank: four}", InputError, "stage 2: plan setting `lora_rank`"),
        ("replay_share: 0.05", "replay_share: 5", InputError, "stage 2: `replay_share` is 5"),
        ("name: my style!", "name: 3", InputError, "stage 2: its `name` is 3"),
    ],
)
def test_a_wrong_file_is_refused_where_it_is_wrong(
    old: str, new: str, error: type[InputError], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(SHORT.replace(old, new))
    with pytest.raises(error) as told:
        read_stage_file(path)
    assert said in told.value.message
    if "unknown" in said:
        assert "did you mean" in str(told.value.hint)


def test_a_file_without_stages_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    path.write_text("schema: 1\nmodel: 7B\nstages: []\n")
    with pytest.raises(InputError, match="must be a list of stages"):
        read_stage_file(path)


def test_the_command_line_makes_a_file_of_stages(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stages.yaml"
    words = ["plan", files["facts"], "--then", files["style"], "--then", files["prefs"]]
    words += ["--model", "qwen2.5-7b", "--gpu", "l4", "--replay-share", "0.1"]
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "the adapter of stage 2, which goes on" in shown and "rows of facts" in shown
    assert [one.name for one in read_stage_file(out).stages] == ["facts", "style", "prefs"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["begin"] for one in told["stages"]] == [None, "adapter", "adapter"]
    run_seconds = [one["run"]["seconds"] for one in told["stages"]]
    assert told["total"]["seconds"] == pytest.approx(sum(run_seconds))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--then", "style", "--columns", "output=a"], "`--columns` is of one data file"),
        (["--then", "style", "--eval-data", "facts"], "`--eval-data` is of one data file"),
        (["--then", "style", "--explain"], "`--explain` is of one plan"),
        (["--then", "style", "--replay-share", "2"], "`replay_share` is 2.0"),
        (["--replay-share", "0.1"], "there is one stage"),
    ],
)
def test_flags_that_stages_cannot_have_are_refused(
    words: list[str], said: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [files.get(word, word) for word in words]
    assert main(["plan", files["facts"], "--model", "qwen2.5-7b", "--gpu", "l4", *given]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
