"""`ftplan calibrate`, and plans on a machine that it has learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ftplan.launcher import planning
from ftplan.launcher.calibrating import learned, past_run, why_left_out
from ftplan.launcher.calibration_file import (
    MachineStack,
    Stored,
    keep_calibrations,
    read_calibrations,
)
from ftplan.launcher.cli import main
from ftplan.launcher.history import stored_run
from ftplan.launcher.own_stack import torch_release
from ftplan.launcher.past_runs import margin_of
from ftplan.launcher.version import version
from ftplan.planner.calibration import Calibration
from ftplan.planner.hardware_spec import Device, Host, Machine
from ftplan.planner.units import GIB
from ftplan.profiles import find_gpu
from tests.past_runs import past_runs
from tests.run_directories import write_finished

TRUTH = Calibration(context=0.3, reserved=1.03, arithmetic=0.8, traffic=1.25, launching=1.6)
L4 = MachineStack("L4", "cuda", "580", "2.13")

Answer = tuple[int, dict[str, Any], str]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "ftplan"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Twelve finished runs on an L4."""
    for number, run in enumerate(past_runs(TRUTH, 12)):
        write_finished(tmp_path / "runs" / f"run-{number:02}", run, number)
    return tmp_path / "runs"


@pytest.fixture
def calibrate(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def call(*words: str | Path) -> Answer:
        status = main(["calibrate", "--json", *map(str, words)])
        said = capsys.readouterr()
        return status, json.loads(said.out or "{}"), " ".join(said.err.split())

    return call


def machine(gpu: Device | None, cpu: Device, driver: str | None = "580.82") -> Machine:
    host = Host(
        cpu_name=cpu.name,
        num_cores=8,
        ram_total_bytes=64 * GIB,
        ram_available_bytes=60 * GIB,
        disk_free_bytes=900 * GIB,
        disk_path="/",
    )
    return Machine(gpus=(gpu,) if gpu else (), cpu=cpu, host=host, driver_version=driver)


@pytest.fixture
def on_an_l4(monkeypatch: pytest.MonkeyPatch, devices: dict[str, Device]) -> None:
    """This machine has an L4 and the driver that the runs had, and their torch."""
    there = machine(find_gpu("l4").device(), devices["CPU"])
    monkeypatch.setattr(planning, "probe_machine", lambda **_: there)
    monkeypatch.setattr("ftplan.launcher.calibration_file.torch_release", lambda: (2, 13))


@pytest.fixture
def plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    data = tmp_path / "rows.jsonl"
    rows = ({"prompt": f"Why {n}?", "completion": "A reason."} for n in range(40))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*words: str) -> tuple[dict[str, Any], str]:
        given = ["--model", "qwen2.5-1.5b", "--method", "lora", "--runs-dir", str(tmp_path / "new")]
        assert main(["plan", str(data), *given, "--json", *words]) == 0
        said = capsys.readouterr()
        return json.loads(said.out), said.err

    return call


# --- the command


def test_it_learns_from_imported_runs(
    home: Path, runs: Path, calibrate: Callable[..., Answer]
) -> None:
    status, found, said = calibrate("--import", runs)
    assert status == 0
    assert "12 of 12 runs are new" in said
    (one,) = found["calibrations"]
    assert one["stack"] == {"device": "L4", "kind": "cuda", "driver": "580", "torch": "2.13"}
    assert one["calibration"]["context"] == pytest.approx(0.3, rel=0.1)
    assert one["calibration"]["num_runs"] == 12
    assert {row["quantity"] for row in one["held_out"]} == {
        "context",
        "reserved over allocated",
        "seconds a step",
        "device memory",
    }
    assert all(row["median_after"] < row["median_before"] for row in one["held_out"])
    assert read_calibrations(home)[L4].calibration == Calibration(**one["calibration"])
    again, same, said = calibrate("--import", runs / "run-03", runs / "run-05")
    assert (again, same) == (0, found)
    assert "0 of 2 runs are new" in said


def test_what_it_found_is_shown(home: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--import", str(runs)]) == 0
    first = capsys.readouterr()
    assert main(["calibrate", "--show"]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == first.out.strip()
    text = " ".join(shown.split())
    assert "L4, driver 580, torch 2.13: 12 runs" in text
    assert "context x 0.3" in text and "reserved x 1.03" in text
    assert "where 5 % would be assumed" in text
    assert "on runs that they were not fitted to: each configuration in turn" in text
    assert "--no-calibration" in first.err


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_runs_are_too_few(
    count: int, home: Path, runs: Path, calibrate: Callable[..., Answer]
) -> None:
    status, found, said = calibrate("--import", *sorted(runs.iterdir())[:count])
    assert status == 1
    assert found["calibrations"] == []
    assert found["too_few"] == {"L4, driver 580, torch 2.13": count}
    assert "too few, 3 are needed" in said
    assert read_calibrations(home) == {}


def test_without_runs_it_says_how_to_get_some(home: Path, calibrate: Callable[..., Answer]) -> None:
    status, found, said = calibrate()
    assert status == 1 and not found["calibrations"]
    assert "has no runs to learn from" in said and "--import" in said
    assert not home.exists()


def test_reset_forgets_the_corrections_and_keeps_the_history(
    home: Path, runs: Path, calibrate: Callable[..., Answer]
) -> None:
    calibrate("--import", runs)
    assert calibrate("--reset")[:2] == (0, {"schema": 1, "num_forgotten": 1})
    assert read_calibrations(home) == {}
    assert calibrate("--show")[1]["calibrations"] == []
    assert calibrate("--reset")[1]["num_forgotten"] == 0
    assert calibrate()[1]["calibrations"][0]["calibration"]["num_runs"] == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--import", "nowhere"], "no run directory at `nowhere`"),
        (["--import", "."], "is not a run directory, and has none in it that has finished"),
        (["--show", "--reset"], "not allowed with"),
    ],
)
def test_mistakes_are_told(
    words: list[str],
    said: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_that_has_not_finished_is_not_taken_in(
    home: Path, runs: Path, calibrate: Callable[..., Answer]
) -> None:
    (runs / "run-04" / "record.json").unlink()
    status, _, said = calibrate("--import", runs / "run-04")
    assert status == 2 and "has not finished" in said
    assert "11 of 11 runs are new" in calibrate("--import", runs)[2]


def test_one_run_of_a_folder_that_cannot_be_used_is_passed_over(
    home: Path, runs: Path, calibrate: Callable[..., Answer]
) -> None:
    (runs / "run-04" / "environment.json").unlink()
    status, found, said = calibrate("--import", runs)
    assert status == 0 and found["calibrations"][0]["calibration"]["num_runs"] == 11
    assert "passed over" in said and "run-04" in said
    assert calibrate("--import", runs / "run-04")[0] == 2


def test_a_damaged_history_is_no_traceback(
    home: Path, runs: Path, calibrate: Callable[..., Answer]
) -> None:
    calibrate("--import", runs)
    (home / "history.sqlite").write_bytes(b"damage" * 1000)
    status, found, said = calibrate()
    assert status == 1 and not found["calibrations"]
    assert "was damaged: kept as" in said
    assert read_calibrations(home)  # what was learned before stays


# --- which runs count


def changed(tmp_path: Path, **changes: Any) -> Any:
    return stored_run(write_finished(tmp_path / "run", past_runs(TRUTH, 1)[0], **changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"ftplan": "0.0.1"}, "another version"),
        ({"environment": {"gpu": "Tesla T4"}}, "another GPU"),
        ({"environment": {"gpu": None}}, "another GPU"),
        ({"environment": {"gpu": "a card that the catalog lacks"}}, None),
        ({"environment": {"packages": {}}}, "without torch"),
        ({"device": {"name": "AMD EPYC", "kind": "cpu", "rates_source": "assumed"}}, "assumed"),
        ({"device": {"name": "Xeon", "kind": "cpu", "rates_source": "measured"}}, "processor"),
        ({"device": {"name": "AMD EPYC", "kind": "cpu", "rates_source": "measured"}}, None),
    ],
)
def test_runs_that_say_nothing_are_left_out(
    changes: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    found = why_left_out(changed(tmp_path, **changes), version())
    assert found is None if why is None else found and why in found


def test_each_machine_and_stack_learns_of_its_own_runs(tmp_path: Path) -> None:
    rows = []
    for number, run in enumerate(past_runs(TRUTH, 8)):
        driver = {"driver": "595.1"} if number % 2 else {}
        folder = tmp_path / str(number)
        rows.append(stored_run(write_finished(folder, run, number, environment=driver)))
    found, left_out = learned(rows, version(), "2026-11-23")
    assert [(str(one.stack), one.num_runs) for one in found] == [
        ("L4, driver 580, torch 2.13", 4),
        ("L4, driver 595, torch 2.13", 4),
    ]
    assert not left_out


def test_a_steps_seconds_are_of_as_many_tokens_as_predicted(tmp_path: Path) -> None:
    run = past_runs(TRUTH, 1)[0]
    kept = past_run(stored_run(write_finished(tmp_path / "run", run)))
    assert kept.step_seconds == pytest.approx(run.step_seconds)
    assert structs.replace(kept, step_seconds=None, configuration="") == structs.replace(
        run, step_seconds=None, configuration=""
    )


def test_a_name_of_another_machine_prints_as_one_line(tmp_path: Path) -> None:
    odd = "\x1b[2JL4\n" + "x" * 500
    row = changed(tmp_path, device={"name": odd, "kind": "cuda"})
    assert row.device.isprintable() and len(row.device) == 100


# --- plans


def test_a_plan_here_is_corrected_and_says_so(
    home: Path,
    runs: Path,
    on_an_l4: None,
    calibrate: Callable[..., Answer],
    plan: Callable[..., tuple[dict[str, Any], str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    before, _ = plan()
    assert before["calibration"] is None and "calibration" not in before["estimate"]
    calibrate("--import", runs)
    after, _ = plan()
    used = after["calibration"]
    assert used["num_runs"] == 12 and used == after["estimate"]["calibration"]
    assert after["margin"] == {"share": used["margin"], "num_runs": 12}
    assert used["margin"] < before["margin"]["share"]
    for name in ("reserved_peak_bytes", "device_peak_bytes"):
        assert after["estimate"]["per_gpu"][name] != before["estimate"]["per_gpu"][name]
    assert after["estimate"]["step"]["step_seconds"] != before["estimate"]["step"]["step_seconds"]
    assert plan("--no-calibration")[0]["estimate"] == before["estimate"]
    named = plan("--gpu", "l4")[0]
    assert named["calibration"] is None and named["margin"] == before["margin"]
    words = ["--model", "qwen2.5-1.5b", "--runs-dir", str(tmp_path / "new"), "--no-calibration"]
    assert main(["plan", str(tmp_path / "rows.jsonl"), *words[:-1]]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "calibrated on 12 runs, 20" in text and "`--no-calibration` leaves it out" in text
    assert main(["plan", str(tmp_path / "rows.jsonl"), *words]) == 0
    text = capsys.readouterr().out
    assert "calibrated" not in text and "--no-calibration" in text.split("again:")[1]


@pytest.mark.parametrize(
    "stack",
    [
        MachineStack("L4", "cuda", "595", "2.13"),
        MachineStack("L4", "cuda", "580", "2.12"),
        MachineStack("T4", "cuda", "580", "2.13"),
        MachineStack("CPU", "cpu", None, "2.13"),
    ],
)
def test_what_was_learned_of_another_stack_is_not_used(
    stack: MachineStack,
    home: Path,
    on_an_l4: None,
    plan: Callable[..., tuple[dict[str, Any], str]],
) -> None:
    other = Calibration(context=0.5, num_runs=9, fitted_on="2026-11-23")
    keep_calibrations(home, [Stored(stack=stack, ftplan=version(), calibration=other)])
    assert plan()[0]["calibration"] is None


def test_what_was_learned_of_another_versions_formulas_is_told_and_left_out(
    home: Path, on_an_l4: None, plan: Callable[..., tuple[dict[str, Any], str]]
) -> None:
    stored = Stored(stack=L4, ftplan="0.0.1", calibration=Calibration(context=0.5, num_runs=9))
    keep_calibrations(home, [stored])
    found, said = plan()
    assert found["calibration"] is None
    assert "is of ftplan 0.0.1" in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"schema": 2, "calibrations": []}',
        '{"schema": 1}',
        '{"schema": 1, "calibrations": [3]}',
        '{"schema": 1, "calibrations": [{"stack": {"device": "L4", "kind": "cuda", "driver": null, '
        '"torch": "2.13"}, "ftplan": "0", "calibration": {"context": 9.0}}]}',
    ],
)
def test_a_damaged_file_is_told_and_plans_go_on_without(
    text: str,
    home: Path,
    on_an_l4: None,
    runs: Path,
    plan: Callable[..., tuple[dict[str, Any], str]],
    calibrate: Callable[..., Answer],
) -> None:
    home.mkdir(parents=True)
    (home / "calibrations.json").write_text(text)
    found, said = plan()
    assert found["calibration"] is None
    assert "warning: planned without a calibration" in said
    status, _, said = calibrate("--show")
    assert status == 2 and "calibrations.json" in said
    assert calibrate("--reset")[0] == 0
    assert calibrate("--import", runs)[0] == 0


def test_a_processor_whose_rates_are_assumed_is_not_corrected(
    home: Path,
    devices: dict[str, Device],
    monkeypatch: pytest.MonkeyPatch,
    plan: Callable[..., tuple[dict[str, Any], str]],
) -> None:
    torch = ".".join(map(str, torch_release()))
    stack = MachineStack("CPU", "cpu", None, torch)
    learned = Calibration(traffic=0.5, num_runs=9)
    keep_calibrations(home, [Stored(stack=stack, ftplan=version(), calibration=learned)])
    for source, used in (("measured on this machine", True), ("assumed", False)):
        cpu = structs.replace(devices["CPU"], rates_source=source)
        there = machine(None, cpu)
        monkeypatch.setattr(planning, "probe_machine", lambda there=there, **_: there)
        found = plan("--model", "smollm2-135m")[0]["calibration"]
        assert (found is not None) == used


def test_the_margin_is_raised_by_runs_planned_since(
    tmp_path: Path, devices: dict[str, Device]
) -> None:
    learned = Calibration(context=0.9, margin=0.012, num_runs=9, fitted_on="2026-11-23")
    gpu = structs.replace(devices["T4"], calibration=learned)
    assert margin_of(gpu, tmp_path).share == 0.012

    def finished(name: str, measured: int, calibration: Any) -> None:
        (tmp_path / name).mkdir()
        predicted = {"device_bytes": 1000, "calibration": calibration}
        record = {"device": "T4", "measured": {"device_bytes": measured}, "predicted": predicted}
        (tmp_path / name / "record.json").write_text(json.dumps(record))

    finished("before", 1100, None)
    finished("under another", 1100, Calibration(context=0.8).to_dict())
    assert margin_of(gpu, tmp_path).share == 0.012
    finished("since", 1020, learned.to_dict())
    found = margin_of(gpu, tmp_path)
    assert found.share == pytest.approx(0.03) and found.num_runs == 10
