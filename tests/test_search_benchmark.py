"""What `python -m benchmarks.search` measures and prints."""

from __future__ import annotations

import json

import pytest

from benchmarks import search
from benchmarks.search import CASES, Case, Measured, main, measure


def test_a_case_is_searched_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "0"]) == 0
    measured = Measured(**json.loads(capsys.readouterr().out))
    assert (measured.model, measured.num_gpus) == (CASES[0].model, 1)
    assert 0 < measured.num_evaluated <= measured.num_timed <= measured.num_plans
    assert measured.chosen == "lora on 1"
    assert measured.plans_per_second == measured.num_plans / measured.seconds


@pytest.mark.parametrize(
    ("plan_seconds", "status", "said"), [(0.5, 0, "reached"), (2, 1, "MISSED")]
)
def test_what_is_too_slow_is_said(
    plan_seconds: float,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = Case("smollm2-135m", "H100 SXM", 8)
    monkeypatch.setattr(search, "CASES", (case,))
    monkeypatch.setattr(search, "_in_a_process", measure)
    monkeypatch.setattr(search, "plan_seconds", lambda: plan_seconds)
    assert main([]) == status
    printed = capsys.readouterr()
    assert "smollm2-135m" in printed.out and said in printed.err
    assert main(["--json"]) == status
    told = json.loads(capsys.readouterr().out)
    assert told["within"] == (status == 0)
    assert told["searches"][0]["num_gpus"] == 8


def test_a_search_within_its_bar_is_reached() -> None:
    measured = measure(Case("smollm2-135m", "T4", 1, barred=True))
    assert measured.within == (measured.seconds <= search.BAR_SECONDS)
    slow = {name: getattr(measured, name) for name in Measured.__struct_fields__} | {"seconds": 9.0}
    assert not Measured(**slow).within
