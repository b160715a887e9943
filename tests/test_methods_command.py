"""`ftplan methods`: what is listed, what is said of one, and the page that has the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher.cli import main
from ftplan.planner.method_guide import FAMILIES, GUIDE
from ftplan.planner.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["methods", *words]) == 0
    return capsys.readouterr().out


def described(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(said(capsys, *words, "--json"))


def test_every_method_is_listed_once_in_its_family(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys)
    first_words = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert sorted(word for word in first_words if word in METHODS) == sorted(METHODS)
    for family in FAMILIES.values():
        assert f"{family.title}: {family.when}." in shown


def test_there_is_a_guide_to_every_method_and_no_other() -> None:
    assert set(GUIDE) == set(METHODS)
    assert {guide.family for guide in GUIDE.values()} == set(FAMILIES)


def test_the_figures_are_those_of_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    listed = described(capsys)
    by_name = {method["name"]: method for method in listed["methods"]}
    for name in ("lora", "full", "ia3"):
        assert main(["estimate", "llama-3.1-8b", "--compare", name, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["compare"]
        trained = row["num_trainable_parameters"]
        assert by_name[name]["num_trainable_parameters"] == trained
        assert by_name[name]["share"] == pytest.approx(trained / listed["num_parameters"])
        allocated = row["per_gpu"]["allocated_peak_bytes"]
        assert by_name[name]["per_gpu"]["allocated_peak_bytes"] == allocated


def test_a_method_that_does_not_go_with_the_model_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bitfit = described(capsys, "bitfit", "--model", "mistral-7b-v0.1")
    assert bitfit["share"] is None
    assert "nor can have any" in bitfit["refused"]
    assert "ln-tuning" in said(capsys, "bitfit", "--model", "mistral-7b-v0.1")
    assert described(capsys, "bitfit", "--model", "gpt2")["share"] > 0


def test_one_method_says_what_it_goes_with(capsys: pytest.CaptureFixture[str]) -> None:
    full = described(capsys, "full")
    assert full["quantizations"] == ["none"]
    assert described(capsys, "qlora")["quantizations"] == ["nf4", "fp4", "int8"]
    assert "sft" in full["objectives"]
    assert described(capsys, "dora")["peft_options"] == {"use_dora": True}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, name)
    assert METHODS[name].title in shown
    assert GUIDE[name].when in shown
    assert f"--method {name}" in shown


def test_a_misspelt_method_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["methods", "lora-plas"]) == 2
    assert "lora-plus" in capsys.readouterr().err


def test_the_page_says_what_the_command_says() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for name, guide in GUIDE.items():
        method = METHODS[name]
        cells = (f"`{name}`", method.trains, guide.when, guide.but, method.source)
        assert f"| {' | '.join(cells)} |" in lines
    for family in FAMILIES.values():
        assert f"Take them when: {family.when}." in lines
