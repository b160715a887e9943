"""Starting, watching and ending a run, with small real processes in place of accelerate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import process
from ftplan.launcher.process import last_words, run_to_end
from ftplan.launcher.run_dir import RunDir, write_json
from ftplan.planner.errors import InterruptedRunError, RunFailedError

Watch = Callable[[dict[str, Any], list[dict[str, Any]]], None]

# What every training script below begins with. It is isolated and quick to start.
PRELUDE = """
import json, os, signal, sys, time
root = sys.argv[1]
def write(name, value):
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".tmp", "w") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)
def checkpoint():
    weights = os.path.join(root, "checkpoints/checkpoint-3/weights")
    write("checkpoints/checkpoint-3/weights", {})
    files = {"weights": {"bytes": os.path.getsize(weights), "sha256": []}}
    write("checkpoints/checkpoint-3/manifest.json", {"files": files})
def say(stage):
    write("status.json", {"stage": stage, "pid": os.getpid()})
def metric(**row):
    with open(os.path.join(root, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\\n")
def wait():
    for _ in range(600):
        time.sleep(0.05)
    sys.exit("nobody stopped it")
"""

# Saves a checkpoint when asked to stop, as the real one does.
TRAINS_UNTIL_ASKED = """
def stop(number, frame):
    checkpoint()
    write("asked.json", {"signal": number})
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop)
say("training")
wait()
"""

# Neither Ctrl-C nor a termination ends it.
DEAF = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
say("training")
wait()
"""

# As accelerate launches one process: it waits, and wraps a failure in an error of its own.
LAUNCHER = """
import json, os, signal, subprocess, sys
with open(os.path.join(sys.argv[2], "launcher.json"), "w") as file:
    json.dump(os.getpid(), file)
def note(number, frame):
    open(os.path.join(sys.argv[2], "launcher-was-asked"), "w").close()
    sys.exit(128 + number)
signal.signal(signal.SIGINT, note)
child = subprocess.Popen([sys.executable, "-S", "-E", "-c", sys.argv[1], sys.argv[2]])
child.wait()
if child.returncode != 0:
    raise subprocess.CalledProcessError(returncode=child.returncode, cmd=["python", "-m", "train"])
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    """A run directory, whose processes are ended after the test whatever happens."""
    run = RunDir(tmp_path)
    yield run
    for pid in pids(run):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def _quick_and_with_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell lets its background jobs ignore Ctrl-C; these tests need it."""
    monkeypatch.setattr(process, "_POLL_SECONDS", 0.02)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pids(run: RunDir) -> list[int]:
    """The processes that have written down who they are."""
    found = []
    if "pid" in run.read_status():
        found.append(int(run.read_status()["pid"]))
    if (run.root / "launcher.json").is_file():
        found.append(json.loads((run.root / "launcher.json").read_text()))
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state not in "ZX"


def ends(pid: int, within_seconds: float = 1.5) -> bool:
    deadline = time.monotonic() + within_seconds
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def directly(script: str, run: RunDir) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", PRELUDE + script, str(run.root)]


def through_launcher(script: str, run: RunDir) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", LAUNCHER, PRELUDE + script, str(run.root)]


def nothing(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Watch without a word."""


def interrupting(run: RunDir, *, times: int = 1, at_once: bool = False) -> Watch:
    """Presses Ctrl-C: a real SIGINT to this process, once training has begun."""
    pressed = 0

    def watch(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        nonlocal pressed
        if pressed < times and (at_once or status.get("stage") == "training"):
            pressed += 1
            signal.raise_signal(signal.SIGINT)

    return watch


def start(run: RunDir, command: list[str], watch: Watch = nothing, **environment: str) -> None:
    run_to_end(run, command, {"PATH": os.environ["PATH"], **environment}, watch)


class TestGoodEnd:
    def test_it_returns_and_the_last_state_was_seen(
        self, run: RunDir, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even if all happened between two looks."""
        monkeypatch.setattr(process, "_POLL_SECONDS", 0.4)
        script = """
for step in (1, 2, 3):
    metric(step=step)
write("record.json", {})
say("finished")
"""
        seen: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        start(run, directly(script, run), lambda status, rows: seen.append((status, rows)))
        status, rows = seen[-1]
        assert (status["stage"], [row["step"] for row in rows]) == ("finished", [1, 2, 3])

    def test_changes_are_seen_as_they_happen(self, run: RunDir) -> None:
        script = """
for step in (1, 2):
    metric(step=step)
    say("training")
    while not os.path.exists(os.path.join(root, "seen-%d" % step)):
        time.sleep(0.01)
write("record.json", {})
"""

        def watch(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
            for row in rows:
                (run.root / f"seen-{row['step']}").touch()

        start(run, directly(script, run), watch)

    def test_its_output_goes_to_the_logs_below_what_is_there(self, run: RunDir) -> None:
        """A resumed run goes on writing where the interrupted one stopped."""
        run.stdout.write_text("before\n")
        script = "print('out'); print('err', file=sys.stderr); write('record.json', {})"
        start(run, directly(script, run))
        assert run.stdout.read_text() == "before\nout\n"
        assert run.stderr.read_text() == "err\n"

    def test_it_has_the_given_environment_no_input_and_a_session_of_its_own(
        self, run: RunDir, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C in the terminal must not reach it, and nothing may wait for an answer."""
        monkeypatch.setenv("NOT_GIVEN", "1")
        script = """
write("facts.json", [os.getsid(0) == os.getpid(), sys.stdin.read(), dict(os.environ)])
write("record.json", {})
"""
        start(run, directly(script, run), GIVEN="yes")
        own_session, read, environment = json.loads((run.root / "facts.json").read_text())
        assert (own_session, read) == (True, "")
        assert environment["GIVEN"] == "yes"
        assert "NOT_GIVEN" not in environment

    def test_an_end_without_a_record_is_no_good_end(self, run: RunDir) -> None:
        with pytest.raises(RunFailedError, match="training failed"):
            start(run, directly("pass", run))

    def test_a_record_and_a_bad_exit_status_is_none_either(self, run: RunDir) -> None:
        with pytest.raises(RunFailedError, match="exit status 3"):
            start(run, directly("write('record.json', {}); sys.exit(3)", run))


class TestFailure:
    @pytest.mark.parametrize("how", [directly, through_launcher])
    @pytest.mark.parametrize(
        ("script", "said"),
        [
            ("raise ValueError('no such column')", "ValueError: no such column"),
            ("sys.exit('error: the data has changed')", "the data has changed"),
            (
                "print('error: no row is left', file=sys.stderr)\n"
                "print('hint: raise it', file=sys.stderr)\nsys.exit(2)",
                "no row is left",
            ),
            ("raise MemoryError", "MemoryError"),
            ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ],
        ids=["ValueError", "error", "error and hint", "MemoryError", "ModuleNotFoundError"],
    )
    def test_its_last_words_are_told(
        self,
        run: RunDir,
        how: Callable[[str, RunDir], list[str]],
        script: str,
        said: str,
    ) -> None:
        with pytest.raises(RunFailedError) as caught:
            start(run, how(script, run))
        assert caught.value.message == f"training failed: {said}"
        whole_output = f"the whole output is in {run.stderr}"
        assert caught.value.hint == ("raise it" if "hint: " in script else whole_output)

    def test_silence_is_told_by_its_exit_status(self, run: RunDir) -> None:
        with pytest.raises(RunFailedError) as caught:
            start(run, directly("sys.exit(7)", run))
        assert caught.value.message == "training failed: exit status 7"

    @pytest.mark.parametrize(
        "words",
        [
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has",
            "RuntimeError: CUDA error: out of memory",
        ],
    )
    def test_too_little_gpu_memory_is_told_with_what_to_change(
        self, run: RunDir, words: str
    ) -> None:
        script = f"print({words!r}, file=sys.stderr); sys.exit(1)"
        with pytest.raises(RunFailedError) as caught:
            start(run, through_launcher(script, run))
        assert words in caught.value.message
        assert "`--max-length`" in (caught.value.hint or "")

    @pytest.mark.parametrize("how", [directly, through_launcher])
    def test_a_process_that_the_system_killed_is_told_so(
        self, run: RunDir, how: Callable[[str, RunDir], list[str]]
    ) -> None:
        """Out of RAM. Under accelerate the only trace is `died with <Signals.SIGKILL: 9>`."""
        with pytest.raises(RunFailedError) as caught:
            start(run, how("os.kill(os.getpid(), signal.SIGKILL)", run))
        assert "for lack of RAM" in (caught.value.hint or "")
        assert caught.value.message == "training failed: the process was killed"

    @pytest.mark.parametrize(
        ("log", "message", "for_lack_of_ram"),
        [
            ("  traceback : Signal 9 (SIGKILL) received by PID 7", "the process was killed", True),
            (
                "  traceback : Signal 15 (SIGTERM) received by PID 8\n"
                "  traceback : Signal 9 (SIGKILL) received by PID 7",
                "the process was killed",
                True,
            ),
            (
                "[rank1]: ValueError: no such column\n"
                "  traceback : Signal 9 (SIGKILL) received by PID 7",
                "ValueError: no such column",
                False,
            ),
            (
                "subprocess.CalledProcessError: Command 'x' died with <Signals.SIGSEGV: 11>.",
                "died by SIGSEGV",
                False,
            ),
        ],
        ids=["killed", "killed and others ended", "failed and others killed", "crashed"],
    )
    def test_how_the_launchers_report_a_death(
        self, run: RunDir, log: str, message: str, for_lack_of_ram: bool
    ) -> None:
        """torchrun ends the other processes itself, at last by SIGKILL."""
        run.stderr.write_text(log)
        error = process.failed(run, 1)
        assert error.message == f"training failed: {message}"
        assert ("for lack of RAM" in (error.hint or "")) is for_lack_of_ram

    def test_an_earlier_attempt_s_words_are_not_told_again(self, run: RunDir) -> None:
        """A resumed run goes on in the same log."""
        run.stderr.write_text("torch.OutOfMemoryError: CUDA out of memory.\n")
        with pytest.raises(RunFailedError) as caught:
            start(run, directly("sys.exit(7)", run))
        assert "memory" not in f"{caught.value.message} {caught.value.hint}"


class TestLastWords:
    def log(self, tmp_path: Path, text: str) -> str:
        (tmp_path / "stderr.log").write_text(text, encoding="utf-8")
        return last_words(tmp_path / "stderr.log")

    def test_the_last_error_counts_not_what_only_speaks_of_one(self, tmp_path: Path) -> None:
        text = (
            "ValueError: an earlier one, caught\n"
            "  raise ValueError('in a listing')\n"
            "/lib/ErrorBar.py:3: UserWarning: Error bars are wide\n"
            "RuntimeError: the real one\n"
            "[rank0]: see the log: Error\n"
            "done: no Error here\n"
        )
        assert self.log(tmp_path, text) == "RuntimeError: the real one"

    def test_accelerate_s_wrapping_is_left_out(self, tmp_path: Path) -> None:
        text = "KeyError: 'loss'\nsubprocess.CalledProcessError: Command 'x' returned non-zero\n"
        assert self.log(tmp_path, text) == "KeyError: 'loss'"

    def test_torchrun_s_wrapping_is_left_out(self, tmp_path: Path) -> None:
        """On several GPUs accelerate ends with torch's own error, which says nothing."""
        text = (
            "error: the data has changed\nhint: put it back\n"
            "E1122 07:01:50.170000 11379 torch/distributed/elastic/multiprocessing/api.py:1002] "
            "failed (exitcode: 2) local_rank: 0 (pid: 11384) of binary: /bin/python\n"
            "Traceback (most recent call last):\n"
            '  File "torch/distributed/launcher/api.py", line 383, in launch_agent\n'
            "    raise ChildFailedError(\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
            "============================================================\n"
            "ftplan.launcher.train FAILED\n"
        )
        assert self.log(tmp_path, text) == "the data has changed"

    def test_on_several_gpus_every_line_begins_with_its_rank(self, tmp_path: Path) -> None:
        text = (
            "[rank1]: Traceback (most recent call last):\n"
            '[rank1]:   File "train.py", line 3, in main\n'
            "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n"
        )
        assert self.log(tmp_path, text) == "torch.OutOfMemoryError: CUDA out of memory."

    def test_a_long_one_is_cut(self, tmp_path: Path) -> None:
        assert len(self.log(tmp_path, "ValueError: " + "x" * 5000)) == 300

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"all is well\n"])
    def test_there_may_be_none(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "stderr.log").write_bytes(content)
        assert last_words(tmp_path / "stderr.log") == ""
        assert last_words(tmp_path / "none.log") == ""


class TestCtrlC:
    @pytest.mark.parametrize("how", [directly, through_launcher])
    def test_the_training_process_alone_is_asked_and_saves(
        self, run: RunDir, how: Callable[[str, RunDir], list[str]]
    ) -> None:
        with pytest.raises(InterruptedRunError) as caught:
            start(run, how(TRAINS_UNTIL_ASKED, run), interrupting(run))
        assert caught.value.message == "interrupted; checkpoint-3 is saved"
        assert caught.value.hint == f"go on with `ftplan resume {run.root}`"
        assert caught.value.exit_status == 130
        asked = json.loads((run.root / "asked.json").read_text())
        assert asked == {"signal": signal.SIGINT}
        assert not (run.root / "launcher-was-asked").exists()
        assert not any(map(alive, pids(run)))

    def test_before_training_has_begun_the_whole_session_is_ended(self, run: RunDir) -> None:
        script = "open(os.path.join(root, 'pid'), 'w').write(str(os.getpid())); wait()"
        seen: list[int] = []

        def watch(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
            path = run.root / "pid"
            if not seen and path.is_file() and path.read_text():
                seen.append(int(path.read_text()))
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(InterruptedRunError) as caught:
            start(run, through_launcher(script, run), watch)
        assert caught.value.message == "interrupted before the first checkpoint"
        assert caught.value.hint == f"start again with `ftplan launch {run.root}`"
        assert ends(seen[0])

    def test_at_the_very_first_moment_too(self, run: RunDir) -> None:
        with pytest.raises(InterruptedRunError):
            start(run, through_launcher("wait()", run), interrupting(run, at_once=True))
        assert all(map(ends, pids(run)))

    @pytest.mark.parametrize("how", [directly, through_launcher])
    def test_a_second_one_kills_and_leaves_no_orphan(
        self, run: RunDir, how: Callable[[str, RunDir], list[str]]
    ) -> None:
        began = time.monotonic()
        with pytest.raises(InterruptedRunError):
            start(run, how(DEAF, run), interrupting(run, times=2))
        assert time.monotonic() - began < 5
        assert all(map(ends, pids(run)))

    def test_a_second_one_reaches_a_worker_in_a_session_of_its_own(self, run: RunDir) -> None:
        """torchrun starts every worker so, on several GPUs."""
        command = through_launcher("os.setsid()\n" + DEAF, run)
        with pytest.raises(InterruptedRunError):
            start(run, command, interrupting(run, times=2))
        assert all(map(ends, pids(run))), "the worker goes on holding its GPU"

    def test_a_second_one_reaches_workers_that_have_told_nobody(self, run: RunDir) -> None:
        """Of several processes only the first writes status.json."""
        script = """
import subprocess
other = subprocess.Popen([sys.executable, "-S", "-E", "-c", "import time; time.sleep(30)"],
                         start_new_session=True)
write("launcher.json", other.pid)
"""
        with pytest.raises(InterruptedRunError):
            start(run, directly(script + DEAF, run), interrupting(run, times=2))
        assert len(pids(run)) == 2
        assert all(map(ends, pids(run)))

    def test_a_closed_terminal_is_no_second_one(self, run: RunDir) -> None:
        """Kernel and shell may both send SIGHUP; the checkpoint is saved all the same."""
        sent = 0

        def watch(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
            nonlocal sent
            if status.get("stage") == "training" and not sent:
                sent += 1
                for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
                    signal.raise_signal(number)

        before = signal.signal(signal.SIGHUP, signal.default_int_handler)
        try:
            with pytest.raises(InterruptedRunError, match="checkpoint-3 is saved"):
                start(run, directly(TRAINS_UNTIL_ASKED, run), watch)
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_training_process_that_somebody_else_stopped_was_interrupted(
        self, run: RunDir
    ) -> None:
        script = """
checkpoint()
say("interrupted")
sys.exit(143)
"""
        with pytest.raises(InterruptedRunError, match="checkpoint-3 is saved"):
            start(run, through_launcher(script, run))

    def test_signals_mean_what_they_did_before(self, run: RunDir) -> None:
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        start(run, directly("write('record.json', {})", run))
        after = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        assert after == before

    def test_a_process_of_an_earlier_attempt_is_left_in_peace(self, run: RunDir) -> None:
        """Its number stands in the old status, and may be anybody's by now."""
        bystander = subprocess.Popen([sys.executable, "-S", "-E", "-c", "input()"], stdin=-1)
        try:
            write_json(run.status, {"stage": "training", "pid": bystander.pid})
            with pytest.raises(InterruptedRunError):
                start(run, directly("wait()", run), interrupting(run, at_once=True))
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()
            assert bystander.stdin is not None
            bystander.stdin.close()

    def test_a_run_that_finished_all_the_same_is_finished(self, run: RunDir) -> None:
        """Asked in its last moment: the record is written, nothing needs to be done again."""
        script = """
signal.signal(signal.SIGINT, lambda number, frame: (write("record.json", {}), sys.exit(0)))
say("training")
wait()
"""
        start(run, directly(script, run), interrupting(run))
        assert run.finished

    def test_a_process_that_has_just_gone_is_no_trouble(self, run: RunDir) -> None:
        gone = subprocess.Popen([sys.executable, "-S", "-E", "-c", ""])
        gone.wait()
        script = (
            f"write('status.json', {{'stage': 'training', 'pid': {gone.pid}}}); time.sleep(0.3)"
        )
        with pytest.raises(InterruptedRunError):
            start(run, directly(script, run), interrupting(run))


class TestNoOrphans:
    def test_where_watching_fails_the_run_is_ended(self, run: RunDir) -> None:
        """A closed terminal, a full disk, a bug in the display: nobody would see to the run."""

        def watch(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
            if status.get("stage") == "training":
                raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            start(run, through_launcher(TRAINS_UNTIL_ASKED, run), watch)
        assert all(map(ends, pids(run)))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])
    def test_where_the_launcher_is_ended_the_run_is_asked_to_stop(
        self, run: RunDir, number: signal.Signals
    ) -> None:
        """A batch system ends a job by SIGTERM, a closed terminal by SIGHUP."""
        script = (
            "import signal, sys; from pathlib import Path\n"
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # ignored under nohup
            "from ftplan.launcher.process import run_to_end\n"
            "from ftplan.launcher.run_dir import RunDir\n"
            "from ftplan.planner.errors import FtplanError\n"
            "try:\n"
            "    run_to_end(RunDir(Path(sys.argv[1])), sys.argv[2:], {}, lambda *seen: None)\n"
            "except FtplanError as error:\n"
            "    sys.exit(error.exit_status)\n"
        )
        command = through_launcher(TRAINS_UNTIL_ASKED, run)
        launcher = subprocess.Popen([sys.executable, "-c", script, str(run.root), *command])
        try:
            deadline = time.monotonic() + 5
            while run.read_status().get("stage") != "training":
                assert time.monotonic() < deadline
                time.sleep(0.02)
            launcher.send_signal(number)
            launcher.wait(timeout=5)
            assert all([ends(pid, within_seconds=1) for pid in pids(run)])
            assert run.last_checkpoint() is not None
        finally:
            launcher.kill()
            launcher.wait()
