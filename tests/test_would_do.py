"""What would do for a method that does not fit, and where nothing does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ftplan.launcher import cli
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.families import spec_from_size
from ftplan.planner.hardware_spec import Device
from ftplan.planner.remedies import (
    MOST_OF_A_MACHINE,
    NUMBERS_OF_GPUS,
    Wish,
    fewest_of,
    held_by,
    smallest_of,
)
from ftplan.planner.search import choose_plan
from ftplan.planner.units import GIB
from ftplan.profiles import find_gpu

Devices = dict[str, Device]
Capture = pytest.CaptureFixture[str]

EXAMPLE = Path(__file__).parent.parent / "examples" / "python_docs.jsonl"
ON_A_4090 = ["--model", "qwen3-8b", "--gpu", "RTX 4090"]


@pytest.mark.parametrize(("method", "size"), [("full", 8), ("lora", 70), ("qlora", 70)])
def test_the_fewest_gpus_hold_it_and_fewer_do_not(
    method: str, size: int, devices: Devices, few_short_rows: DataProfile
) -> None:
    card = structs.replace(devices["RTX 4090"], link_bytes_per_second=2e10)
    model = spec_from_size(size * 10**9, f"{size}B")
    wish = Wish(model=model, data=few_short_rows, given={"method": method})
    remedy = fewest_of(wish, card)
    assert remedy is not None and remedy.sharding == "fsdp"
    assert remedy.needed_bytes <= card.free_bytes
    given = {"method": method, "num_gpus": remedy.num_gpus, "sharding": "fsdp"}
    assert choose_plan(model, few_short_rows, card, given).best is not None
    place = NUMBERS_OF_GPUS.index(remedy.num_gpus)
    assert place == 0 or not held_by(wish, card, NUMBERS_OF_GPUS[place - 1])
    more = fewest_of(wish, card, more_than=remedy.num_gpus)
    assert more is not None and more.num_gpus > remedy.num_gpus


def test_where_no_number_is_enough_none_is_named(
    devices: Devices, few_short_rows: DataProfile
) -> None:
    small = structs.replace(devices["RTX 4090"], free_bytes=2 * GIB)
    wish = Wish(
        model=spec_from_size(70 * 10**9, "70B"), data=few_short_rows, given={"method": "full"}
    )
    assert fewest_of(wish, small) is None and smallest_of(wish, [small]) is None


def test_the_smallest_card_is_the_first_that_holds_it(few_short_rows: DataProfile) -> None:
    cards = [find_gpu(name).device() for name in ("T4", "RTX 4090", "A100 80GB SXM", "H200")]
    wish = Wish(
        model=spec_from_size(13 * 10**9, "13B"), data=few_short_rows, given={"method": "lora"}
    )
    found = smallest_of(wish, cards)
    assert found is not None and found.device is cards[2] and found.num_gpus == 1
    assert not held_by(wish, cards[1], 1)


def planned(words: list[str], capsys: Capture) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = cli.main(["plan", str(EXAMPLE), *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def flags(told: list[str]) -> list[str]:
    return [word for flag in told for word in shlex.split(flag)]


def with_flags(words: list[str], told: list[str]) -> list[str]:
    """The command line with these flags in the place of earlier ones."""
    added = flags(told)
    kept = list(words)
    for name in added[::2]:
        if name in kept:
            place = kept.index(name)
            del kept[place : place + 2]
    return [*kept, *added]


def test_what_would_do_for_a_method_does(capsys: Capture) -> None:
    status, told = planned(ON_A_4090, capsys)
    assert status == 0
    rejected = {one["method"]: one for one in told["rejected"]}
    assert rejected["full"]["needs_bytes"] > rejected["full"]["free_bytes"]
    for method, one in rejected.items():
        assert one["would_do"], method
        for remedy in one["would_do"]:
            if remedy["num_gpus"] > MOST_OF_A_MACHINE:
                continue
            status, again = planned(with_flags(ON_A_4090, remedy["flags"]), capsys)
            assert status == 0 and again["plan"]["method"]["value"] == method


def test_each_rung_that_fits_does(capsys: Capture) -> None:
    words = [*ON_A_4090, "--method", "full"]
    status, told = planned(words, capsys)
    assert status == 1 and told["plan"] is None
    rungs = [rung for rung in told["ladder"] if rung["fits"]]
    said = [rung["gives_up"] for rung in rungs]
    assert any("host's memory" in one for one in said)
    assert any("a smaller model" in one for one in said)
    assert any("with FSDP" in one for one in said)
    seconds = {one: rung["seconds"] for one, rung in zip(said, rungs, strict=True)}
    waiting = next(one for one in said if "host's memory" in one)
    assert seconds[waiting] > 3 * min(seconds.values())
    for rung in rungs:
        status, again = planned(with_flags(words, rung["flags"]), capsys)
        assert status == 0, rung
        assert again["run"]["seconds"] == pytest.approx(rung["seconds"], rel=0.02)
    alone = [rung for rung in rungs if rung["alone"] and "--gpu" in " ".join(rung["flags"])]
    assert alone and all(rung["usd"] for rung in alone)


def test_a_refusal_fits_the_screen(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plan", str(EXAMPLE), *ON_A_4090, "--method", "full"]) == 1
    shown = capsys.readouterr()
    lines = [*shown.out.splitlines(), *shown.err.splitlines()]
    assert len(lines) <= 50 and max(map(len, lines)) <= 80
    assert "does not fit on RTX 4090" in shown.err and "what would fit: " in shown.err
