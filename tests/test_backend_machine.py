"""One machine's part of a run: what it brings, how it passes signals on, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftplan.launcher.backends import machine, needs
from ftplan.launcher.processes import descendants
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from tests.engine_jobs import run_directory

# As accelerate's launcher: it starts training, and dies of SIGTERM. Training takes its time.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]]).returncode)
"""
TRAINING = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.6)
    open(sys.argv[1], "w").write("saved")
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("training", file=sys.stderr, flush=True)
time.sleep(30)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "model").mkdir()
    return run_directory(tmp_path / "runs" / "one", str(tmp_path / "model"))


def started(run: RunDir, *words: str, **variables: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", needs.MACHINE_MODULE, str(run.root), "--", *words]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
    return subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )


def until_training(process: subprocess.Popen[bytes]) -> None:
    assert process.stderr is not None
    while b"training" not in process.stderr.readline():
        assert process.poll() is None


@pytest.mark.parametrize("all_processes", [False, True])
def test_a_signal_lets_training_save_before_the_machine_ends(
    all_processes: bool, run: RunDir, tmp_path: Path
) -> None:
    """Kubernetes and `ray job stop` signal the first process; a cloud that takes a machine away
    signals every one, and accelerate's launcher ends by it."""
    saved = tmp_path / "saved"
    process = started(run, "-c", LAUNCHER, TRAINING, str(saved))
    until_training(process)
    if all_processes:
        for pid in descendants(process.pid):
            os.kill(pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert saved.read_text() == "saved"
    assert out == b"saved\n" and run.stdout.read_text() == "saved\n"
    assert "training" in run.stderr.read_text()


def test_training_that_fails_ends_with_its_status_and_a_report(run: RunDir) -> None:
    process = started(run, "-c", "import sys; print('error: no', file=sys.stderr); sys.exit(1)")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"error: no" in err and "error: no" in run.stderr.read_text()


def test_training_that_ran_out_of_memory_is_started_again(run: RunDir) -> None:
    script = (
        "import json, pathlib, sys\n"
        "status = pathlib.Path(sys.argv[1])\n"
        "mark = status.with_name('once')\n"
        "again = not mark.exists()\n"
        "mark.touch()\n"
        "status.write_text(json.dumps({'again': again}))\n"
        "sys.exit(75 if again else 3)\n"
    )
    environ = dict(os.environ)
    status = machine.carry_out_here(Ui(), run.root, ["-c", script, str(run.status)], environ)
    assert status == 3
    assert json.loads(run.status.read_text())["again"] is False


def test_a_run_that_has_finished_is_not_started(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run.record.write_text("{}")
    assert machine.carry_out_here(Ui(), run.root, ["-c", "1/0"], {}) == 0
    assert "has finished" in " ".join(capsys.readouterr().err.split())


def test_only_the_first_machine_writes_the_runs_logs(run: RunDir) -> None:
    environ = {**os.environ, "FTPLAN_MACHINE_RANK": "1"}
    words = ["-c", "import sys; sys.exit(0 if sys.argv[1] == 'rank=1' else 4)"]
    words.append("rank=$FTPLAN_MACHINE_RANK")
    assert machine.carry_out_here(Ui(), run.root, words, environ) == 0
    assert not run.stdout.exists() and not run.stderr.exists()


def test_only_ftplans_own_variables_are_filled_in() -> None:
    environ = {"FTPLAN_MAIN_PORT": "29500", "HOME": "/root"}
    assert machine.filled("$HOME:$FTPLAN_MAIN_PORT", environ) == "$HOME:29500"
    with pytest.raises(InputError, match="has not set FTPLAN_MAIN_ADDRESS"):
        machine.filled("$FTPLAN_MAIN_ADDRESS", environ)


def test_the_first_machine_brings_the_inputs_and_keeps_what_is_there(
    run: RunDir, tmp_path: Path
) -> None:
    (run.root / "data").mkdir()
    (run.root / "data" / "rows.jsonl").write_text("{}\n")
    there = RunDir(tmp_path / "volume" / "one")
    there.metrics.parent.mkdir(parents=True)
    there.train.write_text("kept: true\n")
    machine.take_inputs(there.root, run.root, is_first=True)
    assert there.train.read_text() == "kept: true\n"
    assert there.plan.is_file() and (there.data / "rows.jsonl").is_file()
    assert not list(there.root.glob(".*"))


def test_other_machines_wait_for_the_inputs(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_LOOK_SECONDS", 0.02)
    there = tmp_path / "volume" / "one"
    first = threading.Timer(0.1, machine.take_inputs, (there, run.root), {"is_first": True})
    first.start()
    began = time.monotonic()
    machine.take_inputs(there, run.root, is_first=False)
    assert time.monotonic() - began >= 0.08 and RunDir(there).plan.is_file()
    monkeypatch.setattr(machine, "_BRINGING_SECONDS", 0.05)
    with pytest.raises(InputError, match="is not seen by this one"):
        machine.take_inputs(tmp_path / "elsewhere", run.root, is_first=False)


def test_models_of_the_hub_are_fetched_to_the_path_that_the_run_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the `train` extra")
    fetched = []

    def snapshot_download(
        hub_id: str, *, revision: str, cache_dir: Path, ignore_patterns: list[str]
    ) -> None:
        assert "*.pth" in ignore_patterns
        fetched.append((hub_id, revision, cache_dir))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    cache = tmp_path / "hub"
    model = cache / "models--org--a-model" / "snapshots" / "0123abc"
    machine.fetch_models(Ui(), run_directory(tmp_path / "run", str(model)))
    assert fetched == [("org/a-model", "0123abc", cache)]
    with pytest.raises(InputError, match="is not on this machine"):
        machine.fetch_models(Ui(), run_directory(tmp_path / "two", "/models/own"))
    model.mkdir(parents=True)
    machine.fetch_models(Ui(), RunDir(tmp_path / "run"))
    assert len(fetched) == 1


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make"):
        machine.make_folder(tmp_path / "file" / "run")


def test_a_missing_run_directory_is_said_without_a_traceback(tmp_path: Path) -> None:
    process = started(RunDir(tmp_path / "none"), "-c", "1")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err.startswith(b"error: no run directory") and b"Traceback" not in err
