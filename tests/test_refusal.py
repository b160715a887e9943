"""What `ftplan plan` says of methods that do not fit, and where nothing does."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import cli
from ftplan.launcher.cards import cards_by_memory, smallest_card
from ftplan.launcher.refusal import _how_far, _in_words
from ftplan.planner.ladder import Rung

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def told() -> dict[tuple[str, ...], tuple[int, str, str]]:
    """What was said of words that several tests ask with: each plan takes seconds."""
    return {}


@pytest.fixture
def plan(
    told: dict[tuple[str, ...], tuple[int, str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Plan:
    """`ftplan plan rows.jsonl WORDS` at 80 columns: status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    rows = ({"instruction": f"Why {n}?", "output": f"Because of {n}." * 9} for n in range(64))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*words: str) -> tuple[int, str, str]:
        if words not in told:
            status = cli.main(["plan", "rows.jsonl", *words])
            captured = capsys.readouterr()
            told[words] = status, captured.out, captured.err
        return told[words]

    return run


def answered(plan: Plan, *words: str) -> tuple[int, dict[str, Any]]:
    status, out, _ = plan(*words, "--json")
    return status, json.loads(out)


def again(plan: Plan, words: list[str], flags: list[str]) -> tuple[int, dict[str, Any]]:
    """What is planned with these flags in the place of those that they replace."""
    return answered(plan, *words, *(part for flag in flags for part in shlex.split(flag)))


def test_what_would_do_for_a_method_does(plan: Plan) -> None:
    words = ["--model", "llama-3.1-8b", "--gpu", "RTX 4090"]
    status, found = answered(plan, *words)
    rejected = {item["method"]: item for item in found["rejected"]}
    assert status == 0 and set(rejected) == {"freeze", "full"}
    for method, item in rejected.items():
        assert item["needs_bytes"] > item["free_bytes"] and item["num_gpus"] == 1
        assert {offer["num_gpus"] == 1 for offer in item["would_do"]} == {True, False}
        prices = [o["usd_per_hour"] for o in item["would_do"] if o["usd_per_hour"] is not None]
        assert prices == sorted(prices)
        for offer in item["would_do"]:
            status, there = again(plan, words, offer["flags"])
            assert status == 0
            value = {name: there["plan"][name]["value"] for name in ("method", "num_gpus")}
            assert value == {"method": method, "num_gpus": offer["num_gpus"]}
            assert there["estimate"]["fits"]["gpu"] == offer["gpu"]


def test_a_methods_line_says_what_would_do(plan: Plan) -> None:
    _, out, _ = plan("--model", "llama-3.1-8b", "--gpu", "RTX 4090")
    told = " ".join(out[out.index("Not possible here") :].split())
    assert "full needs " in told and "24.0 GiB free; would do: " in told
    assert " RTX 4090 with FSDP, " in told and " USD/h; " in told
    assert max(map(len, out.splitlines())) <= 80


def test_what_the_device_cannot_do_has_no_remedy(plan: Plan) -> None:
    _, found = answered(plan, "--model", "qwen2.5-7b", "--gpu", "M1 Max")
    (refused,) = (item for item in found["rejected"] if item["needs_bytes"] is None)
    assert refused["free_bytes"] is None and refused["would_do"] == []
    (large,) = (item for item in found["rejected"] if item["needs_bytes"])
    assert [offer["num_gpus"] for offer in large["would_do"]] == [1]  # Apple's are not joined


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "llama-3.1-8b", "--gpu", "RTX 4090", "--method", "full"],
        ["--model", "mixtral-8x7b", "--gpu", "T4", "--free-memory", "14GiB"],
        ["--model", "deepseek-v3", "--gpu", "H100 SXM", "--num-gpus", "8"],
    ],
    ids=lambda words: f"{words[1]} on {words[3]}",
)
def test_each_rung_that_fits_fits(words: list[str], plan: Plan) -> None:
    status, found = answered(plan, *words)
    assert status == 1 and found["plan"] is None
    nearest, rungs = found["nearest"], found["ladder"]
    assert nearest["needs_bytes"] > nearest["free_bytes"]
    assert nearest["needs_bytes"] == min(
        item["needs_bytes"] for item in found["rejected"] if item["needs_bytes"]
    )
    fitting = [rung for rung in rungs if rung["fits"]]
    assert any(rung["flags"][0].startswith("--model ") for rung in fitting)
    assert any(rung["flags"][0].startswith("--gpu ") for rung in fitting)
    for rung in fitting:
        status, there = again(plan, words, rung["flags"])
        assert status == 0, rung
        assert there["run"]["seconds"] == pytest.approx(rung["seconds"])
        assert there["plan"]["num_gpus"]["value"] == rung["num_gpus"]
    others = [r for r in fitting if r["alone"] and "host's memory" not in r["gives_up"]]
    bought = [r["usd"] for r in others if not r["flags"][0].startswith("--model")]
    known = [usd for usd in bought if usd is not None]
    assert known == sorted(known) and bought[: len(known)] == known


def test_a_refusal_stays_on_a_screen_and_tells_the_flags(plan: Plan) -> None:
    status, out, err = plan("--model", "llama-3.1-405b", "--gpu", "RTX 4090", "--method", "full")
    assert status == 1
    text = out + err
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 24
    assert "…" not in text
    told = " ".join(err.split())
    assert "what would fit: `--model llama-3.2-1b`; or `--gpu " in told


def test_several_machines_have_no_time(plan: Plan) -> None:
    """How fast they are together is not modelled."""
    words = ("--model", "qwen2.5-32b", "--gpu", "RTX 4090", "--method", "full")
    _, found = answered(plan, *words)
    (many,) = (rung for rung in found["ladder"] if rung["num_gpus"] > 8)
    assert many["fits"] and many["seconds"] is None and "machines" in many["gives_up"]
    assert answered(plan, *words, *many["flags"][0].split())[0] == 0


def test_a_budget_that_other_gpus_do_not_keep_is_kept(plan: Plan) -> None:
    model = ("--model", "llama-3.2-1b", "--gpu", "T4", "--method", "full")
    words = (*model, "--time-budget", "1s")
    status, found = answered(plan, *words)
    assert status == 1
    assert all(rung["seconds"] <= 1 for rung in found["ladder"] if rung["fits"])


@pytest.mark.parametrize(
    ("one", "other", "far"),
    [
        ("llama-3.1-8b", "llama-3.1-405b", 0),
        ("llama-3.1-8b-instruct", "meta-llama/Meta-Llama-3.1-70B-Instruct", 0),
        ("llama-3.2-1b", "llama-3.1-405b", 1),
        ("mixtral-8x7b", "mixtral-8x22b", 0),
        ("qwen2.5-7b", "qwen3-32b", 1),
        ("qwen2.5-coder-7b", "qwen2.5-72b", 1),
        ("deepseek-v2-lite", "deepseek-v3", 1),
        ("gemma-3-4b-it", "llama-3.1-8b", 2),
        ("llama-3.1-8b", "70B", 2),
    ],
)
def test_how_near_a_models_name_is(one: str, other: str, far: int) -> None:
    assert _how_far(one, other) == far


def test_the_smallest_card_has_the_memory() -> None:
    cards = cards_by_memory()
    sizes = [card.memory_bytes for card in cards]
    assert sizes == sorted(sizes) and len({card.name for card in cards}) == len(cards)
    for card in cards:
        assert "and larger" in smallest_card(card.memory_bytes)
    assert smallest_card(sizes[-1] + 1) == "no single GPU of the catalog"


@pytest.mark.parametrize(
    ("flags", "told_to_launch"),
    [
        (("--method lora",), "`--method lora`"),
        (('--gpu "L40S"', "--num-gpus 1"), "L40S (45.0 GiB)"),  # `auto` has no `--gpu`
    ],
)
def test_flags_are_told_to_the_command_that_has_them(
    flags: tuple[str, ...], told_to_launch: str
) -> None:
    rung = Rung(gives_up="L40S (45.0 GiB)", flags=flags, needed_bytes=1, fits=True)
    assert _in_words(rung, launches=False) == f"`{' '.join(flags)}`"
    assert _in_words(rung, launches=True) == told_to_launch


def test_the_model_may_wait_in_the_hosts_memory(plan: Plan) -> None:
    words = ["--model", "llama-3.1-8b", "--gpu", "RTX 4090", "--method", "full"]
    _, told = answered(plan, *words)
    (rung,) = [one for one in told["ladder"] if "host's memory" in one["gives_up"]]
    assert rung["alone"] and rung["fits"]
    others = [one["seconds"] for one in told["ladder"] if one["fits"] and one is not rung]
    assert rung["seconds"] > 3 * min(others)
