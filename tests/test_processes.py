"""Whether a process still runs, and is the one that was meant."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ftplan.launcher import processes
from ftplan.launcher.processes import lives, named_process


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_this_process_lives() -> None:
    assert lives(named_process())
    assert processes.is_here(named_process())


def test_one_that_has_ended_does_not_even_before_it_is_waited_for(
    sleeper: subprocess.Popen[bytes],
) -> None:
    told = named_process(sleeper.pid)
    assert lives(told)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert not lives(told)
    sleeper.wait()
    assert not lives(told)


def test_a_number_that_was_given_again_is_another_process() -> None:
    told = named_process()
    assert not lives({**told, "started": "another-boot/1"})


@pytest.mark.parametrize("pid", [None, 0, -1, "7", True, 2**22 + 1])
def test_what_is_no_process_does_not_live(pid: object) -> None:
    assert not lives({"pid": pid})


def test_another_machine_is_not_here() -> None:
    assert not processes.is_here({**named_process(), "host": "elsewhere"})


def test_parents_children_and_what_they_hold(sleeper: subprocess.Popen[bytes]) -> None:
    assert processes.parent_of(sleeper.pid) == os.getpid()
    assert sleeper.pid in processes.descendants(os.getpid())
    seconds = processes.running_seconds(sleeper.pid)
    assert seconds is not None and -1 < seconds < 60
    sleeper.kill()
    sleeper.wait()
    assert processes.resident_bytes(sleeper.pid) is None
    assert processes.processor_seconds(sleeper.pid) is None
