"""`ftplan runs`: what has become of runs, told from their files; following one."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import cli
from ftplan.launcher.processes import named_process
from ftplan.launcher.run_dir import RunDir, write_json, write_yaml
from ftplan.launcher.run_states import QUIET_SECONDS, is_alive, runs_in, state_of, summary_of
from ftplan.launcher.ui import Ui
from ftplan.launcher.watching import follow
from ftplan.planner.units import MIB

PLAN = {
    "model": {"name": "tiny-llama"},
    "device": {"name": "CPU", "kind": "cpu"},
    "steps": 20,
    "plan": {
        "method": {"value": "lora", "from": "derived", "why": ""},
        "lora_rank": {"value": 8, "from": "default", "why": ""},
        "quantization": {"value": "none", "from": "default", "why": ""},
    },
    "predicted": {"allocated_bytes": 10 * MIB, "device_bytes": 20 * MIB, "step_seconds": 2.0},
}
RECORD = {
    "model": {"name": "tiny-llama"},
    "device": "CPU",
    "method": "lora",
    "steps": 20,
    "output": "adapter",
    "predicted": PLAN["predicted"],
    "measured": {"allocated_bytes": 11 * MIB, "device_bytes": 21 * MIB, "step_seconds": 2.5},
    "evaluation": {"before": 2.0, "after": 1.0, "num_rows": 5},
}


def make_run(root: Path, name: str, steps: int = 0, **files: Any) -> RunDir:
    """A run's folder as ftplan and training write it; `status` and `record` are given."""
    run = RunDir(root / name)
    write_yaml(run.plan, PLAN)
    write_yaml(run.train, {})
    write_yaml(run.accelerate, {})
    rows = [
        {"step": n, "loss": 3 - n / 10, "seconds": 2.0, "tokens": 10, "allocated_bytes": 11 * MIB}
        for n in range(1, steps + 1)
    ]
    if rows:
        run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for file, value in files.items():
        write_json(getattr(run, file), value)
    return run


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


class TestStates:
    @pytest.mark.parametrize(
        ("stage", "finished", "alive", "state"),
        [
            ("finished", True, False, "finished"),
            ("training", True, True, "finished"),
            ("training", False, True, "running"),
            ("starting", False, True, "running"),
            ("training", False, False, "stale"),
            ("finished", False, False, "stale"),
            ("interrupted", False, True, "interrupted"),
            ("failed", False, False, "failed"),
            (None, False, False, "not started"),
        ],
    )
    def test_what_the_files_say(
        self, stage: str | None, finished: bool, alive: bool, state: str
    ) -> None:
        assert state_of(stage, finished=finished, alive=alive) == state

    def test_a_process_that_lives_and_one_whose_number_another_has(self) -> None:
        told = named_process()
        assert is_alive({"process": told, "pid": told["pid"]}, 0)
        assert not is_alive({"process": {**told, "started": "boot/1"}, "pid": told["pid"]}, 0)
        assert is_alive({"launcher": told}, 0), "training has not said anything yet"
        assert is_alive({"pid": os.getpid()}, 0), "a run of an older version"
        assert not is_alive({}, 0)

    def test_of_another_machine_the_files_tell(self) -> None:
        told = {"process": {**named_process(), "host": "node-7"}}
        assert is_alive(told, 60)
        assert not is_alive(told, QUIET_SECONDS + 1)


class TestList:
    @pytest.fixture
    def runs(self, tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> Path:
        process = {"process": named_process(sleeper.pid), "pid": sleeper.pid}
        gone = {"process": {**named_process(), "started": "boot/1"}, "pid": 1}
        make_run(tmp_path, "going", 5, status={"stage": "training", **process})
        make_run(tmp_path, "killed", 3, status={"stage": "training", **gone})
        failed = {"stage": "failed", "error": "training failed: no room", **gone}
        make_run(tmp_path, "group/failed", 1, status=failed)
        make_run(tmp_path, "new")
        make_run(tmp_path, "done", 20, status={"stage": "finished", **gone}, record=RECORD)
        stopped = make_run(tmp_path, "stopped", 10, status={"stage": "interrupted", **gone})
        (stopped.checkpoints / "checkpoint-10").mkdir(parents=True)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken/plan.yaml").write_text("{[", encoding="utf-8")
        (tmp_path / "not a run").mkdir()
        (tmp_path / ".hidden").mkdir()
        return tmp_path

    def test_each_run_has_its_state(self, runs: Path) -> None:
        found = {run.name: run for run in runs_in(runs)}
        assert {name: run.state for name, run in found.items()} == {
            "going": "running",
            "killed": "stale",
            "group/failed": "failed",
            "new": "not started",
            "done": "finished",
            "stopped": "interrupted",
            "broken": "damaged",
        }
        going, stopped = found["going"], found["stopped"]
        assert (going.model, going.method, going.step, going.steps) == ("tiny-llama", "lora", 5, 20)
        assert going.loss == 2.5 and going.size_bytes > 100
        assert stopped.checkpoint == "checkpoint-10" and going.checkpoint is None
        assert found["group/failed"].why == "training failed: no room"
        assert "no train.yaml" in (found["broken"].why or "")

    def test_the_newest_come_first(self, runs: Path) -> None:
        later = time.time() + 100
        os.utime(runs / "killed/status.json", (later, later))
        assert runs_in(runs)[0].name == "killed"

    def test_json(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["runs", "--runs-dir", str(runs), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["schema"] == 1 and len(told["runs"]) == 7
        broken = next(run for run in told["runs"] if run["name"] == "broken")
        assert broken["state"] == "damaged" and broken["steps"] is None

    @pytest.mark.parametrize("columns", ["40", "80", "160"])
    def test_a_person_sees_every_run(
        self,
        runs: Path,
        columns: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(["runs", "--runs-dir", str(runs)]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") >= 9
        if columns != "40":
            assert "not started" in out and "interrupted" in out and "10/20" in out

    def test_no_runs_are_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["runs", "--runs-dir", str(tmp_path / "none")]) == 0
        assert "no runs in" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "damage",
        [
            lambda run: run.plan.write_text("- 1\n"),
            lambda run: run.plan.write_text("model: 3\nplan: 4\n"),
            lambda run: run.record.write_text("{}"),
            lambda run: run.record.write_bytes(b"\xff\x00"),
            lambda run: run.status.write_text('{"stage": 7, "process": []}'),
            lambda run: run.metrics.write_bytes(b'{"step": "x", "loss": null}\n\xff'),
            lambda run: (
                shutil.rmtree(run.root / "..", ignore_errors=True) or run.root.mkdir(parents=True)
            ),
        ],
    )
    def test_no_damage_ends_the_list(self, tmp_path: Path, damage: Any) -> None:
        run = make_run(tmp_path / "all", "one", 3, status={"stage": "training", "pid": 1})
        damage(run)
        cli.main(["runs", "--runs-dir", str(tmp_path / "all")])
        assert len(runs_in(tmp_path / "all")) <= 1

    def test_stages_have_a_line_each(self, tmp_path: Path) -> None:
        gone = {"process": {**named_process(), "started": "boot/1"}, "pid": 1}
        root = tmp_path / "two"
        make_run(root, "1-a", 20, status={"stage": "finished", **gone}, record=RECORD)
        make_run(root, "2-b", 4, status={"stage": "training", **gone})
        stage = {"begin": None, "objective": "sft", "method": "lora"}
        stages = [{"folder": f, "name": f[2:], **stage} for f in ("1-a", "2-b")]
        write_yaml(root / "stages.yaml", {"schema": 1, "stages": stages})
        (found,) = runs_in(tmp_path)
        assert (found.name, found.state, found.stage) == ("two", "stale", "stage 2 of 2")
        assert [part.state for part in found.stages] == ["finished", "stale"]
        shutil.rmtree(root / "2-b")
        assert summary_of(root).state == "damaged"
        make_run(root, "2-b")
        assert summary_of(root).state == "interrupted", "between two stages"


class TestShow:
    def shown(self, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        assert cli.main(["runs", "show", *words]) == 0
        return " ".join(capsys.readouterr().out.split())

    def test_one_that_was_stopped(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        gone = {"stage": "interrupted", "pid": 1}
        run = make_run(tmp_path, "one", 10, status=gone)
        (run.checkpoints / "checkpoint-10").mkdir(parents=True)
        out = self.shown(capsys, str(run.root))
        for said in (
            "tiny-llama",
            "interrupted",
            "lora_rank 8",
            "10/20",
            "memory, allocated 10.0 MiB 11.0 MiB",
            f"go on ftplan resume {run.root}",
            f"from the start ftplan launch {run.root}",
        ):
            assert said in out, said
        assert "quantization" not in out

    def test_one_that_finished(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sampled = {
            "index": 0,
            "name": "L4",
            "used_peak_bytes": 30 * MIB,
            "run_peak_bytes": None,
            "utilization_mean": 0.9,
            "temperature_peak_celsius": 71.0,
            "power_mean_watts": 65.0,
            "energy_joules": 100,
        }
        record = {**RECORD, "sampled": {"gpus": [sampled]}}
        run = make_run(tmp_path, "one", 20, status={"stage": "finished"}, record=record)
        out = self.shown(capsys, "one", "--runs-dir", str(tmp_path))
        assert f"ftplan merge {run.root}" in out and "resume" not in out
        assert "loss, 5 rows 2.000 1.000 -50.0 %" in out
        assert "GPU 0: 30.0 MiB at most, 90 % busy, 71 °C at most, 65 W in the mean" in out

    def test_json_has_figures_and_commands(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = make_run(tmp_path, "one", 4, status={"stage": "failed", "error": "no room"})
        assert cli.main(["runs", "show", "one", "--runs-dir", str(tmp_path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["state"], told["why"], told["step"]) == ("failed", "no room", 4)
        assert told["measured"]["step_seconds"] == 2.0
        assert told["commands"] == [f"ftplan {verb} {run.root}" for verb in ("launch", "report")]

    def test_what_is_none_is_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_run(tmp_path, "first-run")
        folder = ["--runs-dir", str(tmp_path)]
        assert cli.main(["runs", "show", "first-rum", *folder]) == 2
        assert "did you mean `first-run`?" in " ".join(capsys.readouterr().err.split())
        assert cli.main(["runs", "sow", *folder]) == 2
        assert "`ftplan runs show sow`" in " ".join(capsys.readouterr().err.split())
        assert cli.main(["runs", "--follow", *folder]) == 2
        assert "goes on" in capsys.readouterr().err


# A run of five steps, which says what training says, and ends as it is told.
RUNS = """
import json, sys, time
from pathlib import Path
from ftplan.launcher.processes import named_process
from ftplan.launcher.run_dir import RunDir, write_json
run, end = RunDir(Path(sys.argv[1])), sys.argv[2]
told = {"pid": named_process()["pid"], "process": named_process()}
write_json(run.status, {"stage": "training", **told})
for step in range(1, 6):
    row = {"step": step, "loss": 3 - step / 10, "seconds": 0.1, "tokens": 9}
    with run.metrics.open("a") as file:
        file.write(json.dumps(row) + "\\n")
    time.sleep(0.3)
if end == "finished":
    write_json(run.record, json.loads(sys.argv[3]))
if end != "killed":
    write_json(run.status, {"stage": end, "error": "no room", **told})
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [("finished", 0, "finished"), ("failed", 1, "failed: no room"), ("killed", 1, "stale"),
     ("interrupted", 130, "interrupted")],
)  # fmt: skip
def test_following_ends_as_the_run_does(tmp_path: Path, end: str, status: int, said: str) -> None:
    run = make_run(tmp_path, "one")
    command = [sys.executable, "-c", RUNS, str(run.root), end, json.dumps(RECORD)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 30
        while not run.metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        err = io.StringIO()
        assert follow(Ui(stdout=io.StringIO(), stderr=err, width=80), run.root) == status
    finally:
        process.kill()
        process.wait()
    assert "step 4/20, loss 2.600" in err.getvalue()
    assert f"one: {said}" in err.getvalue()


def test_ctrl_c_ends_the_view_and_not_the_run(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    process = {"process": named_process(sleeper.pid), "pid": sleeper.pid}
    run = make_run(tmp_path, "one", 2, status={"stage": "training", **process})
    command = [sys.executable, "-m", "ftplan", "runs", "show", str(run.root), "--follow"]
    follower = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert follower.stderr is not None
    assert "training" in follower.stderr.readline()
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert "the run goes on" in err
    assert sleeper.poll() is None
