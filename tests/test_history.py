"""The history of runs: what it holds, and that it neither fails a run nor loses one."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ftplan.launcher import history
from ftplan.launcher.history import History, StoredRun, stored_run
from ftplan.launcher.ui import Ui
from ftplan.launcher.user_data import data_folder, remember
from ftplan.planner.calibration import Calibration
from ftplan.planner.errors import InputError
from tests.past_runs import past_runs
from tests.run_directories import SECRET, write_finished

PAST = past_runs(Calibration(context=0.5), 4)


@pytest.fixture
def rows(tmp_path: Path) -> list[StoredRun]:
    return [
        stored_run(write_finished(tmp_path / f"run-{number}", run, number))
        for number, run in enumerate(PAST)
    ]


def said(error: InputError) -> str:
    return " ".join(f"{error.message} {error.hint}".split())


def opened(folder: Path) -> tuple[History, list[str]]:
    told: list[str] = []
    return History(folder / "data", told.append), told


def test_a_run_is_kept_as_it_was_measured(tmp_path: Path, rows: list[StoredRun]) -> None:
    kept, told = opened(tmp_path)
    assert kept.runs() == []
    assert not kept.path.exists()  # looking makes nothing
    assert kept.add(rows) == 4
    assert kept.runs() == rows
    first = rows[0]
    assert (first.device, first.driver, first.torch) == ("L4", "580.65.06", "2.13.0+cu130")
    assert first.settings == {"method": "lora", "lora_rank": 8, "max_length": 512}
    assert first.measured["device_bytes"] == PAST[0].measured_device_bytes
    assert not told


def test_a_run_is_there_once(tmp_path: Path, rows: list[StoredRun]) -> None:
    kept, _ = opened(tmp_path)
    assert kept.add(rows[:3]) == 3
    assert kept.add(rows) == 1
    assert len(kept.runs()) == 4


def test_no_name_path_or_secret_is_in_it(tmp_path: Path, rows: list[StoredRun]) -> None:
    kept, _ = opened(tmp_path)
    kept.add(rows)
    text = b"".join(path.read_bytes() for path in kept.folder.iterdir())
    assert b"LlamaForCausalLM" in text
    assert SECRET.encode() not in text and b"somebody" not in text
    assert str(tmp_path).encode() not in text
    assert kept.folder.stat().st_mode & 0o077 == 0


def test_processes_that_end_at_once_all_write(tmp_path: Path) -> None:
    """Eight processes begin a file that is not there, and write five runs each."""
    code = """
import sys
from pathlib import Path
from msgspec import structs
from ftplan.launcher.history import History, stored_run
from ftplan.launcher.run_dir import RunDir
run = stored_run(RunDir(Path(sys.argv[1])))
kept = History(Path(sys.argv[2]), print)
print("ready", flush=True)
sys.stdin.readline()
for number in range(5):
    kept.add([structs.replace(run, run_id=f"{sys.argv[3]}-{number}")])
"""
    run, folder = write_finished(tmp_path / "run", PAST[0]), tmp_path / "data"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(run.root), str(folder), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(8)
    ]  # fmt: skip
    for child in children:
        assert child.stdout and child.stdout.readline() == "ready\n"
    output = [child.communicate("\n")[0] for child in children]
    assert [child.returncode for child in children] == [0] * 8, output
    assert len(History(folder, print).runs()) == 40


@pytest.mark.parametrize("damage", ["text", "cut", "middle", "empty page"])
def test_a_damaged_file_is_set_aside_and_said(
    damage: str, tmp_path: Path, rows: list[StoredRun]
) -> None:
    kept, told = opened(tmp_path)
    kept.add(rows)
    whole = kept.path.read_bytes()
    kept.path.write_bytes(
        {
            "text": b"no database at all" * 100,
            "cut": whole[: len(whole) // 2],
            "middle": whole[:4096] + b"\xff" * (len(whole) - 4096),
            "empty page": whole[:100] + bytes(3996) + whole[4096:],
        }[damage]
    )
    damaged = kept.path.read_bytes()
    assert kept.add(rows[:1]) == 1
    assert kept.runs() == rows[:1]
    aside = kept.folder / "history.sqlite.damaged-1"
    assert aside.read_bytes() == damaged
    assert len(told) == 1 and str(aside) in told[0]
    kept.path.write_text("again" * 1000)
    assert kept.runs() == []
    assert (kept.folder / "history.sqlite.damaged-2").exists()


def test_an_older_schema_is_brought_up_to_date(
    tmp_path: Path, rows: list[StoredRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = opened(tmp_path)
    kept.add(rows)
    added = "ALTER TABLE runs ADD COLUMN note TEXT NOT NULL DEFAULT 'old';"
    with monkeypatch.context() as later:
        later.setattr(history, "MIGRATIONS", (*history.MIGRATIONS, added))
        assert kept.runs() == rows
        assert kept.runs() == rows  # carried out once
        with sqlite3.connect(kept.path) as connection:
            assert set(connection.execute("SELECT note FROM runs")) == {("old",)}
            assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    with pytest.raises(InputError) as later_schema:
        kept.runs()
    assert "later ftplan" in said(later_schema.value)


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, rows: list[StoredRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = opened(tmp_path)
    kept.add(rows)
    broken = "ALTER TABLE runs ADD COLUMN note TEXT; ALTER TABLE nothing ADD COLUMN note TEXT;"
    with monkeypatch.context() as later:
        later.setattr(history, "MIGRATIONS", (*history.MIGRATIONS, broken))
        with pytest.raises(InputError, match="cannot be used"):
            kept.runs()
    assert kept.runs() == rows


def test_a_row_of_something_else_is_passed_over(tmp_path: Path, rows: list[StoredRun]) -> None:
    kept, _ = opened(tmp_path)
    kept.add(rows)
    with sqlite3.connect(kept.path) as connection:
        connection.execute("UPDATE runs SET measured = '{' WHERE run_id = ?", (rows[0].run_id,))
    assert kept.runs() == rows[1:]


@pytest.mark.parametrize("file", ["plan.yaml", "environment.json", "record.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"plan": {}, "predicted": 3}'])
def test_what_is_no_finished_run_is_refused(file: str, text: str, tmp_path: Path) -> None:
    run = write_finished(tmp_path / "run", PAST[0])
    (run.root / file).write_text(text)
    with pytest.raises(InputError):
        stored_run(run)


def test_a_run_of_before_there_was_a_history_is_told(tmp_path: Path) -> None:
    run = write_finished(tmp_path / "run", PAST[0])
    record = run.read_record()
    del record["predicted"]["formula"]
    run.record.write_text(json.dumps(record))
    with pytest.raises(InputError) as error:
        stored_run(run)
    assert "lacks figures" in said(error.value)


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = write_finished(tmp_path / "run", PAST[0])
    record = run.read_record()
    record["measured"] |= {"device_bytes": float("nan"), "reserved_bytes": True, "odd": "text"}
    run.record.write_text(json.dumps(record))
    assert set(stored_run(run).measured) == {
        "allocated_bytes",
        "settled_tokens_per_second_per_gpu",
    }


# --- remembering a run


def test_a_run_whose_history_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stderr = write_finished(tmp_path / "run", PAST[0]), io.StringIO()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    remember(Ui(stderr=stderr), run)
    text = " ".join(stderr.getvalue().split())
    assert text.startswith("warning: this run is not kept in the history")
    assert text.count("warning") == 1 and "Traceback" not in text


def test_a_python_without_sqlite_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stderr = write_finished(tmp_path / "run", PAST[0]), io.StringIO()
    monkeypatch.setitem(sys.modules, "ftplan.launcher.history", None)
    remember(Ui(stderr=stderr), run)
    assert "not kept in the history" in stderr.getvalue()


def test_remembering_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stderr = write_finished(tmp_path / "run", PAST[0]), io.StringIO()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    remember(Ui(stderr=stderr), run)
    assert not stderr.getvalue()
    assert History(tmp_path / "home" / "ftplan", print).runs() == [stored_run(run)]


def test_the_folder_is_the_users(tmp_path: Path) -> None:
    assert data_folder({"XDG_DATA_HOME": str(tmp_path)}) == tmp_path / "ftplan"
    home = Path(os.path.expanduser("~/.local/share/ftplan"))
    assert data_folder({}) == data_folder({"XDG_DATA_HOME": "relative"}) == home
