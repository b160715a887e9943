"""Ray's jobs: through a stand-in of its client, and on a cluster of its own where Ray is here."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ftplan.launcher.backends import on_ray, ray
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from tests.engine_jobs import COMMAND, StandIn, job, run_directory

# What `ray job status` of Ray 2.60 prints, the last of its lines.
SAID = "2026-11-23 23:05:13,246\tSUCC cli.py:67 -- \x1b[32mJob 'raysubmit_SBRG' {}\x1b[39m\n"


def test_a_job_names_its_machines_and_what_each_needs(tmp_path: Path) -> None:
    options = {"address": "http://head:8265", "accelerator-type": "H100", "restarts": "5"}
    text = ray.Backend().files(job(tmp_path / "it's", ray.Backend(), options))[ray.RUNTIME_ENV]
    variables = yaml.safe_load(text)["env_vars"]
    assert variables["PYTHONSAFEPATH"] == "1" and variables["FTPLAN_GRACE_SECONDS"] == "300"
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > 300
    assert all(isinstance(value, str) for value in variables.values())
    words = shlex.split(text.splitlines()[0].removeprefix("# "))
    assert words[:6] == ["ray", "job", "submit", "--no-wait", "--address", "http://head:8265"]
    entry = words[words.index("--") + 1 :]
    assert entry[:4] == ["python", "-m", on_ray.MODULE, str(tmp_path / "it's")]
    asked = dict(zip(entry[4:16:2], entry[5:16:2], strict=True))
    assert asked == {
        "--num-machines": "2",
        "--num-gpus": "8",
        "--num-cpus": "32",
        "--memory": str(200 * 1024**3 + 1),
        "--restarts": "5",
        "--accelerator-type": "H100",
    }
    assert tuple(entry[17:]) == COMMAND[1:]


def test_secrets_are_not_taken_as_ray_shows_a_jobs_environment(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown option `secret-env`"):
        job(tmp_path, ray.Backend(), {"secret-env": "HF_TOKEN"})
    with pytest.raises(InputError, match="`HF_TOKEN` is not written"):
        ray.Backend().files(job(tmp_path, ray.Backend(), {}, environment={"HF_TOKEN": "hf_abc"}))


def test_a_job_is_submitted_asked_for_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "ray", monkeypatch)
    client.answers(SAID.format("submitted successfully"))
    wanted = job(tmp_path / "run", ray.Backend(), {"address": "http://head:8265"})
    job_id = ray.Backend().submit(Ui(), wanted)
    assert job_id == "raysubmit_SBRG@http://head:8265"
    written = (wanted.run.root / ray.RUNTIME_ENV).read_text()
    assert written == ray.Backend().files(wanted)[ray.RUNTIME_ENV]
    assert written.startswith(f"# ray {shlex.join(client.calls[0])}\n")
    where = ["--address", "http://head:8265"]
    assert ray.Backend().state(job_id) == "unknown"
    assert client.calls[-1] == ["job", "status", *where, "raysubmit_SBRG"]
    ray.Backend().cancel(job_id)
    assert client.calls[-1] == ["job", "stop", *where, "raysubmit_SBRG", "--no-wait"]
    client.answers("nothing to be found\n")
    with pytest.raises(InputError, match="did not say which job"):
        ray.Backend().submit(Ui(), wanted)


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (SAID.format("succeeded"), "finished"),
        (SAID.format("was stopped"), "cancelled"),
        (SAID.format("failed"), "failed"),
        ("INFO cli.py:92 -- Status for job 'raysubmit_SBRG': RUNNING\n", "running"),
        ("INFO cli.py:92 -- Status for job 'raysubmit_SBRG': PENDING\n", "pending"),
    ],
)
def test_the_state_is_what_ray_says(
    said: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIn(tmp_path, "ray", monkeypatch).answers(said)
    assert ray.Backend().state("raysubmit_SBRG") == state


def test_an_id_that_ray_would_take_for_an_option_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "ray", monkeypatch)
    for job_id in ("--address=x", "one@--verify", "one two"):
        assert ray.Backend().state(job_id) == "unknown"
        with pytest.raises(InputError, match="is not the id of a job"):
            ray.Backend().cancel(job_id)
    assert client.calls == []


def parts(root: Path, *arguments: str) -> on_ray.Parts:
    return on_ray.Parts(
        root=str(root), num_machines=2, resources={"CPU": 1}, arguments=tuple(arguments)
    )


@pytest.mark.parametrize(
    ("attempts", "restarts", "status", "left"),
    [
        ([0], 3, 0, 0),
        ([1, 1, 0], 3, 0, 0),
        ([1, 1, 0], 1, 1, 1),
        ([2, 0], 3, 2, 1),  # input that cannot be used is not tried again
    ],
)
def test_all_machines_begin_again_after_a_failure(
    attempts: list[int],
    restarts: int,
    status: int,
    left: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=lambda **given: None))
    monkeypatch.setattr(on_ray.signal, "signal", lambda *given: None)
    monkeypatch.setattr(on_ray, "_attempt", lambda *given: attempts.pop(0))
    assert on_ray._with_restarts(Ui(), parts(tmp_path), restarts, on_ray._Stop()) == status
    assert len(attempts) == left


def test_a_cluster_without_such_machines_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 4.0, "GPU": 8.0}},
    ]
    asked = on_ray.Parts(root="", num_machines=2, resources={"GPU": 8, "CPU": 4}, arguments=())
    on_ray._tell_the_wait(Ui(), asked, nodes)
    said = " ".join(capsys.readouterr().err.split())
    assert "waiting for 2 machines with GPU 8, CPU 4 each" in said
    assert "1 of this cluster's 2 machines have that much" in said
    on_ray._tell_the_wait(Ui(), asked, [nodes[0]] * 2)
    assert "warning" not in capsys.readouterr().err


class FakeRay:
    """Tasks are names; each ends after so many looks with its status, or when it is cancelled."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, **tasks: tuple[int, int | None]) -> None:
        self.tasks = tasks
        self.cancelled: list[tuple[str, bool]] = []
        self.looks = 0

    def wait(self, running: list[str], *, num_returns: int, timeout: float) -> Any:
        self.looks += 1
        gone = {name for name, _ in self.cancelled}
        ended = [name for name in running if self.looks >= self.tasks[name][0] or name in gone]
        return ended[:1], [name for name in running if name not in ended[:1]]

    def get(self, task: str) -> int:
        status = self.tasks[task][1]
        if status is None:
            raise RuntimeError("the node has died")
        return status

    def cancel(self, task: str, force: bool = False) -> None:
        self.cancelled.append((task, force))


@pytest.mark.parametrize(
    ("tasks", "status", "cancelled"),
    [
        ({"one": (1, 0), "two": (3, 0)}, 0, []),
        ({"one": (99, 130), "two": (2, 1)}, 1, [("one", False)]),
        ({"one": (99, 130), "two": (2, None)}, 1, [("one", False)]),
    ],
)
def test_where_one_part_fails_the_others_are_asked_to_end(
    tasks: dict[str, tuple[int, int | None]],
    status: int,
    cancelled: list[tuple[str, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRay(**tasks)
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert on_ray._first_failure(list(tasks), on_ray._Stop()) == status
    assert fake.cancelled == cancelled


def test_a_stop_reaches_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(one=(99, 143), two=(99, 143))
    monkeypatch.setitem(sys.modules, "ray", fake)
    stop = on_ray._Stop()
    stop.ask(15, None)
    assert on_ray._first_failure(["one", "two"], stop) == 143
    assert fake.cancelled == [("one", False), ("two", False)]


# Writes what it was told, and fails the first time on the second machine.
PART = """
import os, pathlib, sys
folder, rank, number, address, port = pathlib.Path(sys.argv[1]), *sys.argv[2:]
told = folder / f"rank-{rank}"
again = told.exists()
told.write_text(f"{number} {address} {port}")
sys.exit(0 if again or rank == "0" else 1)
"""


@pytest.mark.slow
def test_two_machines_of_a_cluster_meet_and_begin_again(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is 80 MB: `pip install 'ray[default]'` runs this test")
    from ray.cluster_utils import Cluster

    (tmp_path / "model").mkdir()
    run = run_directory(tmp_path / "runs" / "one", str(tmp_path / "model"))
    variables = ("MACHINE_RANK", "NUM_MACHINES", "MAIN_ADDRESS", "MAIN_PORT")
    words = ["-c", PART, str(tmp_path), *(f"$FTPLAN_{name}" for name in variables)]
    given = {"num_cpus": 1, "object_store_memory": 10**8}
    cluster = Cluster(initialize_head=True, head_node_args={**given, "include_dashboard": False})
    try:
        cluster.add_node(**given)
        command = [sys.executable, "-m", on_ray.MODULE, str(run.root), "--num-machines", "2"]
        done = subprocess.run(
            [*command, "--num-cpus", "1", "--restarts", "1", "--", *words],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all begin again (1 left)" in " ".join(done.stderr.split())
    told = [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1] and told[0].startswith("2 ")
