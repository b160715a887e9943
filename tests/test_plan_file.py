"""A plan written to a file, changed by hand, read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.plan_file import read_plan_file, write_plan_file
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.plan import SETTING_NAMES
from ftplan.profiles import find_gpu


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = ({"q": f"Why {n}?", "a": f"Because of {n}."} for n in range(64))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return plan(DataAsked(paths=(str(path),), columns={"instruction": "q", "output": "a"}))


def plan(asked: DataAsked, given: Any = None) -> Planned:
    return make_plan(
        Ui(as_json=True, stdout=io.StringIO(), stderr=io.StringIO()),
        asked=asked,
        model_name="qwen2.5-7b",
        named_device=find_gpu("l4").device(),
        given={"lora_rank": 8} if given is None else given,
        runs_dir=Path("runs"),
        for_launch=False,
    )


@pytest.fixture
def written(planned: Planned, tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    write_plan_file(planned, path)
    return path


def changed(path: Path, **parts: Any) -> Path:
    """With other parts, dotted names from the outside in; None takes one out."""
    raw = yaml.safe_load(path.read_text())
    for name, value in parts.items():
        *outer, last = name.split("__")
        place = raw
        for key in outer:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_what_is_read_back_is_planned_again_alike(planned: Planned, written: Path) -> None:
    file = read_plan_file(written)
    assert set(file.settings) == set(file.reasons) == set(SETTING_NAMES)
    again = file.with_reasons(plan(file.asked, file.settings))
    assert again.chosen.reasoned == planned.chosen.reasoned
    assert again.data.sha256 == file.sha256 == planned.data.sha256
    twice = written.with_name("again.yaml")
    write_plan_file(again, twice)
    assert twice.read_text() == written.read_text()


def test_what_is_changed_by_hand_is_kept_and_what_is_left_out_is_chosen(
    planned: Planned, written: Path
) -> None:
    changed(
        written,
        plan__lora_rank=4,
        plan__learning_rate=1e-3,
        plan__gradient_accumulation_steps=None,
        plan__per_device_train_batch_size=None,
    )
    file = read_plan_file(written)
    again = file.with_reasons(plan(file.asked, file.settings)).chosen
    assert (again.plan.lora_rank, again.plan.learning_rate) == (4, 1e-3)
    assert again.reasoned.reasons["lora_rank"].origin == "given"
    assert again.plan.effective_batch_size == planned.chosen.plan.effective_batch_size
    assert again.reasoned.reasons["per_device_train_batch_size"].origin == "derived"


def test_a_file_that_is_there_is_left_alone(planned: Planned, written: Path) -> None:
    before = written.read_text()
    with pytest.raises(InputError, match="is there already"):
        write_plan_file(planned, written)
    assert written.read_text() == before


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"schema": 7}, "schema: 7"),
        ({"model": None}, "names no `model`"),
        ({"plan": None}, "lacks `data` or `plan`"),
        ({"data": ["rows.jsonl"]}, "lacks `data` or `plan`"),
        ({"data__paths": "rows.jsonl"}, "must be a list of files"),
        ({"data__paths": []}, "must be a list of files"),
        ({"data__paths": [3]}, "must be a list of files"),
        ({"data__columns": ["q"]}, "is a mapping"),
        ({"data__test_share": 0.9}, "not between 0 and 0.5"),
        ({"plan__lora_rank": {"from": "given"}}, "has no `value`"),
        ({"plan__lora_rank": "eight"}, "wrong type"),
        ({"plan__lora_rank": {"value": True}}, "wrong type"),
        ({"plan__target_modules": "q_proj"}, "list of names"),
    ],
)
def test_what_is_wrong_is_named(parts: dict[str, Any], said: str, written: Path) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        read_plan_file(changed(written, **parts))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("plan__lora_rnak", "lora_rank"), ("modle", "model"), ("data__column", "columns")],
)
def test_a_name_that_is_not_known_is_told_the_nearest(name: str, meant: str, written: Path) -> None:
    with pytest.raises(UnknownNameError) as refused:
        read_plan_file(changed(written, **{name: 1}))
    assert f"`{meant}`" in (refused.value.hint or "")


@pytest.mark.parametrize("text", ["", "[]", "a: b: c", "\x00", "- 1\n- 2"])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        read_plan_file(path)
