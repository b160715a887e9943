"""What may happen to a run while it trains: kills, signals, a full disk. Real processes, real
signals, the real training loop; nothing may be lost or torn."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.launching import write_run
from ftplan.launcher.lock import held, is_held
from ftplan.launcher.manifest import damage
from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.planner.errors import InputError
from tests.launcher_fixtures import save_tiny_llama
from tests.test_training import environment, ftplan, planned

pytestmark = pytest.mark.train

KILLS = 20
STEPS = 50  # of the run that is killed: more than are done between so many kills
FEW_STEPS = 16


class Forks:
    """Training in forks of one warm process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_training"],
            cwd=Path(__file__).parent.parent,
            env={**environment(), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def start(self, run: RunDir, *, resume: bool, **more: Any) -> int:
        """The fork's process number."""
        assert self.process.stdin is not None
        asked = {"run": str(run.root), "resume": resume, **more}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self._answer()["pid"])

    def status(self) -> int:
        """Its exit status once it has ended; of a signal, the negative number."""
        return int(self._answer()["status"])

    def train(self, run: RunDir, *, resume: bool, **more: Any) -> int:
        self.start(run, resume=resume, **more)
        return self.status()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that saves after every step, and whose losses depend on the random state."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_llama(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {"instruction": f"Where is {n}?", "output": "Here." + " Or there." * (n % 5)}
            )
            + "\n"
            for n in range(48)
        )
    )
    given = {
        **{"method": "lora", "lora_rank": 4, "lora_dropout": 0.2, "learning_rate": 0.01},
        **{"max_steps": STEPS, "save_steps": 1},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    return write_run(planned(folder / "model", rows, folder, **given), "run", folder)


@pytest.fixture(scope="module")
def unbroken(written: RunDir, forks: Forks) -> RunDir:
    """The run as it goes when nothing happens."""
    return finished(written, forks)


@pytest.fixture(scope="module")
def short(written: RunDir) -> RunDir:
    """The same with fewer steps."""
    run = copied(written, "short")
    text = run.train.read_text()
    run.train.write_text(text.replace(f"max_steps: {STEPS}", f"max_steps: {FEW_STEPS}"))
    return run


@pytest.fixture(scope="module")
def short_unbroken(short: RunDir, forks: Forks) -> RunDir:
    return finished(short, forks)


def finished(written: RunDir, forks: Forks) -> RunDir:
    run = copied(written, f"{written.root.name}-unbroken")
    assert forks.train(run, resume=False) == 0, run.stderr.read_text()
    return run


def copied(run: RunDir, name: str, folder: Path | None = None) -> RunDir:
    root = (folder or run.root.parent) / name
    shutil.copytree(run.root, root)
    return RunDir(root)


def until(condition: Callable[[], Any], why: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


def until_training(run: RunDir, pid: int) -> None:
    def trains() -> bool:
        status = run.read_status()
        return status.get("pid") == pid and status.get("stage") == "training"

    until(trains, "it did not train")


def until_steps(run: RunDir, number: int) -> None:
    until(lambda: len(steps(run)) >= number, f"there was no step {number}")


def steps(run: RunDir) -> list[int]:
    return [row["step"] for row in run.metric_rows() if "step" in row]


def check_same(run: RunDir, unbroken: RunDir, *, asked_alike: bool = True) -> None:
    """Final weights bit by bit; every row of metrics once, to the last digit. `asked_alike`: both
    gave answers of as many tokens to as many questions (`tests.quick` asks little)."""
    rows, wanted = told(run), told(unbroken)
    if not asked_alike:
        rows, wanted = ([row for row in found if "step" in row] for found in (rows, wanted))
    assert rows == wanted
    weights = [one.adapter / "adapter_model.safetensors" for one in (run, unbroken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert run.read_record()["evaluation"] == unbroken.read_record()["evaluation"]
    assert run.read_record()["steps"] == unbroken.read_record()["steps"]


def told(run: RunDir) -> list[dict[str, Any]]:
    """Rows without what a clock, a profiler or the kernel's count of memory says."""
    varies = ("seconds", "tokens_per_second", "allocated_bytes")
    rows = map(json.loads, run.metrics.read_text().splitlines())
    of_steps = (row for row in rows if row.get("event") != "memory")
    return [{k: v for k, v in row.items() if k not in varies} for row in of_steps]


def check_nothing_torn(run: RunDir) -> None:
    """What is called a checkpoint is whole."""
    found = run.checkpoint_steps()
    assert [damage(path, hashes=True) for path in found.values()] == [None] * len(found)


def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(
    written: RunDir, unbroken: RunDir, forks: Forks
) -> None:
    """Twenty times at random, before that at the four places where saving could be torn, and once
    by a batch system that gives no time to finish the step."""
    run = copied(written, "killed")
    chance = random.Random(20)
    resume = False
    for place in ("written", "sealed", "renamed", "removing"):
        assert forks.train(run, resume=resume, kill_at=place) == -signal.SIGKILL, place
        check_nothing_torn(run)
        left = (run.checkpoints / ".saving").exists()
        assert left, f"killed at `{place}`, something half done is left"
        resume = True
    pid = forks.start(run, resume=True, environ={"FTPLAN_GRACE_SECONDS": "0"})
    until_training(run, pid)
    until_steps(run, len(steps(run)) + 1)
    os.kill(pid, signal.SIGTERM)
    assert forks.status() == 128 + signal.SIGTERM
    for number in range(KILLS):
        done = len(steps(run))
        pid = forks.start(run, resume=True)
        # The rows of repeated steps go when training begins; then they come again.
        wanted = chance.choice((None, 0, 1, 1, 2))
        if wanted is None:
            time.sleep(chance.uniform(0, 1.5))
        else:
            until_training(run, pid)
            until_steps(run, done + wanted)
            time.sleep(chance.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
        assert forks.status() == -signal.SIGKILL, f"kill {number}: {run.stderr.read_text()[-2000:]}"
        check_nothing_torn(run)
    assert forks.train(run, resume=True) == 0, run.stderr.read_text()
    check_same(run, unbroken)
    assert not (run.checkpoints / ".saving").exists()
    assert sorted(run.checkpoint_steps()) == [STEPS - 1, STEPS]


def test_a_damaged_checkpoint_is_passed_over_and_said(short_unbroken: RunDir, forks: Forks) -> None:
    """Its steps are done again, to the same end."""
    run = copied(short_unbroken, "damaged")
    for path in (run.record, run.adapter / "adapter_model.safetensors"):
        path.unlink()
    torn = run.checkpoints / f"checkpoint-{FEW_STEPS}" / "optimizer.pt"
    content = bytearray(torn.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    torn.write_bytes(content)
    assert forks.train(run, resume=True) == 0, run.stderr.read_text()
    (notice,) = run.read_status()["notices"]
    assert notice == (
        f"checkpoint-{FEW_STEPS} is damaged and passed over: `optimizer.pt` holds something else "
        "than was written"
    )
    check_nothing_torn(run)
    check_same(run, short_unbroken)


def test_ctrl_c_ends_with_a_checkpoint_and_a_second_one_at_once(
    short: RunDir, forks: Forks
) -> None:
    run = copied(short, "stopped")
    pid = forks.start(run, resume=False)
    until_steps(run, 2)
    os.kill(pid, signal.SIGINT)
    assert forks.status() == 130
    first = run.last_checkpoint()
    assert first is not None and first.name == f"checkpoint-{steps(run)[-1]}"
    assert run.read_status()["checkpoint"] == first.name
    pid = forks.start(run, resume=True)
    until_training(run, pid)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGINT)
    assert forks.status() == 130
    check_nothing_torn(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take all the room that there is."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def test_a_full_disk_pauses_saving_and_nothing_else(
    written: RunDir, unbroken: RunDir, forks: Forks, small_disk: Path
) -> None:
    run = copied(written, "full", small_disk)
    pid = forks.start(run, resume=False)
    until_steps(run, 2)
    fill(small_disk / "filler")
    until(lambda: run.read_status().get("notices"), "nothing is said")
    kept = run.last_checkpoint()
    assert kept is not None and damage(kept, hashes=True) is None
    said = run.read_status()["notices"][0]
    assert "no room for a checkpoint" in said and f"{kept.name} is kept" in said
    time.sleep(0.2)  # steps go on; their rows wait in memory
    os.kill(pid, signal.SIGSTOP)  # lest they be over
    assert run.last_checkpoint() == kept
    (small_disk / "filler").unlink()
    os.kill(pid, signal.SIGCONT)
    assert forks.status() == 0, run.stderr.read_text()
    again = run.read_status()["notices"][-1]
    assert again.startswith("there is room again: checkpoint-") and again.endswith(" is saved")
    check_same(run, unbroken)


def test_a_quota_in_the_middle_of_a_file_tears_nothing_and_results_wait(
    short: RunDir, short_unbroken: RunDir, forks: Forks
) -> None:
    """Free room does not show it: writing fails. The weights wait in memory until it is lifted."""
    run = copied(short, "quota")
    pid = forks.start(run, resume=False)
    until(lambda: run.last_checkpoint(), "no checkpoint")
    limit = (short_unbroken.adapter / "adapter_model.safetensors").stat().st_size // 2
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    until(lambda: run.read_status().get("notices"), "nothing is said")
    assert "the disk or a quota refused it" in run.read_status()["notices"][0]
    check_nothing_torn(run)
    until(lambda: any("waits" in n for n in run.read_status().get("notices", ())), "no waiting")
    assert not run.adapter.exists() and not run.finished
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert forks.status() == 0, run.stderr.read_text()
    assert f"`{run.adapter}` is saved" in run.read_status()["notices"][-1]
    check_same(run, short_unbroken)


def test_a_launched_run_outlives_its_launcher_and_is_resumed_after_kill_9(
    short: RunDir, short_unbroken: RunDir, tmp_path: Path
) -> None:
    """`ftplan launch`, SIGKILL, `ftplan resume`; meanwhile nobody else may have the directory."""
    run = copied(short, "launched")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "ftplan", "launch", str(run.root)],
        cwd=tmp_path,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: len(steps(run)) >= 3 or launcher.poll() is not None, "no step", 180)
        pid = int(run.read_status()["pid"])
        with (
            pytest.raises(InputError, match=f"is running: process {launcher.pid} on "),
            held(run.root),
        ):
            pass
        os.kill(pid, signal.SIGSTOP)  # lest it finish meanwhile
        launcher.kill()
        launcher.communicate()
        assert is_held(run.root), "the training process goes on"
        for verb in ("resume", "launch", "merge"):
            refused = ftplan(verb, run.root, cwd=tmp_path)
            assert refused.returncode == 2, refused.stderr
            assert "is running: process" in refused.stderr
        os.kill(pid, signal.SIGKILL)
    finally:
        launcher.kill()
    until(lambda: not is_held(run.root), "a dead process holds nothing")
    done = ftplan("resume", run.root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from checkpoint-" in done.stderr
    check_same(open_run(run.root), short_unbroken, asked_alike=False)
