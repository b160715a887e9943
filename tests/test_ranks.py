"""Several training processes under torch's launcher, on the processor: one dies, all skip alike."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher import process
from ftplan.launcher.launching import write_run
from ftplan.launcher.oom_kills import oom_kills
from ftplan.launcher.run_dir import RunDir
from ftplan.planner.errors import RunFailedError
from tests.test_bad_steps import data_file, events, spoiled
from tests.test_training import environment, planned

__all__ = ["spoiled"]

# As torchrun 2.13 reports that a rank was killed, the words of the other one before it.
REPORT = """
[rank0]: RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer.
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
ftplan.launcher.train FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-01_00:00:02
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 29897)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:01
  host      : localhost
  rank      : 3 (local_rank: 1)
  exitcode  : {exitcode}
  error_file: <N/A>
============================================================
"""


def test_the_rank_that_died_first_is_named_not_what_the_others_say(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.stderr.write_text(REPORT.format(exitcode="-9 (pid: 29901)  (SIGKILL)"))
    error = process.failed(run, 1)
    assert error.message == "training failed: rank 3 was ended by SIGKILL"
    assert "lack of RAM" in str(error.hint)
    run.stderr.write_text(REPORT.format(exitcode="-11 (pid: 29901)  (SIGSEGV)"))
    error = process.failed(run, 1)
    assert error.message == "training failed: rank 3 was ended by SIGSEGV"
    assert "RAM" not in str(error.hint)


def test_the_words_of_the_rank_that_failed_first_are_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    words = "[rank3]: ValueError: no such column\n"
    run.stderr.write_text(words + REPORT.format(exitcode="1 (pid: 29901)"))
    assert process.failed(run, 1).message == "training failed: ValueError: no such column"


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"cgroup/jobs/7/memory.events": "low 0\noom 1\noom_kill 2\n"}, 2),
        ({"cgroup/memory/jobs/7/memory.oom_control": "under_oom 0\noom_kill 3\n"}, 3),
        ({"proc/vmstat": "nr_free_pages 5\noom_kill 4\n"}, 4),
        ({}, None),
    ],
)
def test_kills_for_lack_of_memory_are_counted(
    files: dict[str, str], kills: int | None, tmp_path: Path
) -> None:
    for name, text in {**files, "proc/self/cgroup": "0::/jobs/7\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path / "proc", tmp_path / "cgroup") == kills


def test_a_kill_that_the_system_counted_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "oom_kills", lambda: 4)
    assert "by its own count" in str(process.failed(RunDir(tmp_path), -9, 0, 3).hint)
    assert "has not risen" in str(process.failed(RunDir(tmp_path), -9, 0, 4).hint)


def two_ranks(run: RunDir, resume: bool = False) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "ftplan.launcher.train", str(run.root)]
    return [*command, "--resume"] if resume else command


@pytest.mark.train
def test_where_one_of_two_ranks_is_killed_the_run_ends_with_its_name_and_resumes(
    spoiled: Path,
    tmp_path: Path,
) -> None:
    """One row makes NaN on one of the ranks: both skip its step, or they would wait for each other
    for ever."""
    settings: dict[str, Any] = {"method": "lora", "save_steps": 2, "per_device_train_batch_size": 2}
    data = data_file(tmp_path, (6,))
    run = write_run(planned(spoiled, data, tmp_path, max_steps=5000, **settings), None, tmp_path)

    killed: list[int] = []

    def kill_one(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        if not killed and max([row.get("step", 0) for row in rows], default=0) > 4:
            heading = (run.stacks / "rank-1.txt").read_text().split()
            killed.append(int(heading[-1]))
            os.kill(killed[0], signal.SIGKILL)

    child = {**os.environ, **environment(), "OMP_NUM_THREADS": "1"}
    with pytest.raises(RunFailedError, match="rank 1 was ended by SIGKILL") as raised:
        process.run_to_end(run, two_ranks(run), child, kill_one)
    assert f"go on with `ftplan resume {run.root}`" in str(raised.value.hint)
    done = run.last_checkpoint()
    assert done is not None
    left = int(done.name.removeprefix("checkpoint-")) + 2
    run.train.write_text(run.train.read_text().replace("max_steps: 5000", f"max_steps: {left}"))
    process.run_to_end(run, two_ranks(run, resume=True), child, lambda status, rows: None)
    assert run.finished
    skipped = events(run, "skipped step")
    assert skipped
    for event in skipped:
        assert event["num_rows"] == 2 and 7 in [row["number"] for row in event["rows"]]
    assert json.loads(run.record.read_text())["steps"] == left
