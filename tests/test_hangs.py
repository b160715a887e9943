"""A run that hangs is told with the stack of every rank."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import hangs
from ftplan.launcher.hangs import HangWatch, ask_for_stacks
from ftplan.launcher.run_dir import RunDir, write_json
from ftplan.launcher.ui import Ui
from ftplan.planner.hangs import FEWEST_SECONDS, SECONDS_OF_A_FIRST_STEP, patience_seconds

# A training process as the launcher sees it: its frame is to be named.
HANGS = """
import os, sys, time
from pathlib import Path
from ftplan.launcher.hangs import write_stack_when_asked
from ftplan.launcher.run_dir import RunDir
def collate_for_ever():
    print("ready", flush=True)
    while True:
        pass
write_stack_when_asked(RunDir(Path(sys.argv[1])))
collate_for_ever()
"""


def test_patience_follows_the_steps_and_never_falls_below_minutes() -> None:
    assert patience_seconds("training", 1.0, []) == SECONDS_OF_A_FIRST_STEP
    assert patience_seconds("training", 500.0, []) == 5000
    assert patience_seconds("training", 1.0, [0.1] * 50) == FEWEST_SECONDS
    assert patience_seconds("training", 1.0, [600.0, 90.0, 90.0]) == 900
    assert patience_seconds("loading the model", 1.0, []) > FEWEST_SECONDS


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(screen: io.StringIO) -> str:
    return " ".join(screen.getvalue().split())


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Any]:
    """A watch, its clock and its screen, on a run that has no process."""
    run = RunDir(tmp_path)
    write_json(run.status, {"stage": "training"})
    clock, screen = Clock(), io.StringIO()
    yield HangWatch(Ui(stderr=screen), run, 1.0, clock), clock, screen, run


def steps(count: int) -> list[dict[str, Any]]:
    return [{"step": number, "seconds": 2.0} for number in range(1, count + 1)]


def test_a_silent_run_is_told_of_again_when_the_silence_has_doubled(watched: Any) -> None:
    watch, clock, screen, _ = watched
    status = {"stage": "training"}
    watch.update(status, [])
    clock.now = 10
    watch.update(status, steps(3))
    for clock.now in range(20, 300, 10):
        watch.update(status, steps(3))
    assert lines(screen) == ""
    for clock.now in range(300, 600, 10):
        watch.update(status, steps(3))
    assert lines(screen).count("seems to hang") == 1
    assert "a step takes 2.00 s" in lines(screen)
    for clock.now in range(600, 1000, 10):
        watch.update(status, steps(3))
    assert lines(screen).count("seems to hang") == 2
    clock.now += 10
    watch.update(status, steps(4))
    assert "the run goes on, after" in lines(screen)


def test_a_checkpoint_that_grows_and_a_heartbeat_are_signs_of_life(watched: Any) -> None:
    watch, clock, screen, run = watched
    status = {"stage": "training"}
    checkpoint = run.checkpoints / "checkpoint-3" / "model.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    for clock.now in range(0, 2000, 100):
        with checkpoint.open("ab") as file:
            file.write(b"more")
        watch.update(status, steps(3))
    for clock.now in range(2000, 4000, 100):
        os.utime(run.status, (clock.now, clock.now))
        watch.update(status, steps(3))
    assert lines(screen) == ""


def start(run: RunDir, rank: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(run.root)],
        env={**os.environ, "RANK": str(rank)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_each_rank_says_where_it_is_and_lives_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.stacks.mkdir()
    processes = [start(run, rank) for rank in (0, 1)]
    try:
        for _ in range(2):  # it can be asked again
            stacks = ask_for_stacks(run)
            assert [stack.rank for stack in stacks] == [0, 1]
            assert [stack.pid for stack in stacks] == [process.pid for process in processes]
            assert all(stack.frames[0].function == "collate_for_ever" for stack in stacks)
        assert "is in collate_for_ever (" in str(stacks[0])
        assert [process.poll() for process in processes] == [None, None]
        processes[1].send_signal(signal.SIGSTOP)  # as one that the system has frozen
        silent = ask_for_stacks(run, answer_seconds=0.2)[1]
        assert "rank 1" in str(silent) and "does not answer" in str(silent)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert ask_for_stacks(run) == [], "of processes that are gone"


def test_the_report_of_a_hang_names_the_frame_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, screen = RunDir(tmp_path), io.StringIO()
    write_json(run.status, {"stage": "training"})
    monkeypatch.setattr(hangs, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(hangs, "patience_seconds", lambda *_: 0.2)
    process = start(run, 0)
    try:
        watch = HangWatch(Ui(stderr=screen), run, None)
        deadline = time.monotonic() + 20
        while "whole stacks" not in lines(screen) and time.monotonic() < deadline:
            watch.update(run.read_status(), [])
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    assert "rank 0" in lines(screen) and "collate_for_ever" in lines(screen)
