"""`ftplan models`: what is listed, and how it reads."""

from __future__ import annotations

import json

import pytest

from ftplan.launcher.cli import main
from ftplan.profiles import model_catalog


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["models", *words]) == 0
    return capsys.readouterr().out


def test_models_stand_below_their_publisher_from_small_to_large(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [line.split() for line in listed(capsys, "olmo").splitlines()[2:]]
    assert lines[0] == ["allenai/"]
    assert lines[1][0] == "OLMo-1B-hf"
    assert "32.2" in lines[-1]


def test_every_model_of_the_catalog_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [line.split()[0] for line in listed(capsys).splitlines()[2:]]
    publisher, ids = "", []
    for word in shown:
        if word.endswith("/"):
            publisher = word
        else:
            ids.append(publisher + word)
    assert sorted(ids) == sorted(entry.hub_id for entry in model_catalog().values())


def test_a_pattern_is_found_in_aliases_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "chatglm3-6b" in listed(capsys, "zai-org")
    assert "Llama-2-7b-hf" in listed(capsys, "llama2-7b")


def test_the_json_goes_from_small_to_large(capsys: pytest.CaptureFixture[str]) -> None:
    models = json.loads(listed(capsys, "--json"))["models"]
    counts = [model["num_parameters"] for model in models]
    assert counts == sorted(counts) and len(counts) == len(model_catalog())
    assert set(models[0]) == {"name", "hub_id", "num_parameters", "kind", "licence"}
