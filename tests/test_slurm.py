"""Slurm for real: its controller and two simulated nodes on this machine, on processors."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher import cli
from ftplan.launcher.backends.jobs import handed_over, job_state
from ftplan.launcher.launching import write_run
from ftplan.launcher.lock import is_held
from ftplan.launcher.run_dir import RunDir, read_mapping, write_yaml
from tests.launcher_fixtures import save_tiny_llama
from tests.slurm_cluster import missing_programs, slurm_cluster
from tests.test_training import planned

pytestmark = [pytest.mark.train, pytest.mark.slow]

_PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    if missing := missing_programs():
        pytest.skip(f"Slurm is not installed here: no {', '.join(missing)}")
    with pytest.MonkeyPatch.context() as patch, slurm_cluster() as environment:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, environment[name])
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield environment


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunDir]:
    """A run directory of a very small model, with settings."""
    folder = tmp_path_factory.mktemp("slurm")
    save_tiny_llama(folder / "tiny")
    rows = [{"instruction": f"Number {n}?", "output": f"It is {n}."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**settings: Any) -> RunDir:
        chosen = planned(folder / "tiny", folder / "rows.jsonl", folder, method="lora", **settings)
        return write_run(chosen, None, folder / "runs")

    return make


def until(true: Callable[[], Any], run: RunDir) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not true():
        if time.monotonic() > deadline:
            log = run.stderr.read_text()[-2000:] if run.stderr.exists() else "no log"
            pytest.fail(f"nothing after {_PATIENCE_SECONDS} s; {run.read_status()}: {log}")
        time.sleep(0.1)


def submit(run: RunDir, *words: str) -> str:
    assert cli.main(["launch", str(run.root), "--backend", "slurm", *words]) == 0
    handed = handed_over(run)
    assert handed is not None
    return handed.id


def state(run: RunDir) -> str:
    handed = handed_over(run)
    assert handed is not None
    return job_state(handed)


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in run.metric_rows() if "step" in row]


def test_a_job_that_is_requeued_goes_on_to_the_same_losses(
    cluster: dict[str, str], make_run: Callable[..., RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    run, unbroken = (make_run(max_steps=60, save_steps=10) for _ in range(2))
    submit(run, "--backend-option", "begin=now+1hour")
    assert state(run) == "pending"
    assert cli.main(["cancel", str(run.root)]) == 0
    assert state(run) == "cancelled"

    submit(unbroken)  # beside the other, on as many cores
    job_id = submit(run)
    until(lambda: len(run.checkpoint_steps()) > 0, run)
    subprocess.run(["scontrol", "requeue", job_id], check=True)
    until(lambda: state(run) == "requeued", run)
    assert not run.finished and not is_held(run.root)
    saved = max(run.checkpoint_steps())
    assert saved == losses(run)[-1][0], "SIGTERM leaves a checkpoint of the last step"
    capsys.readouterr()
    assert cli.main(["runs", "show", str(run.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "pending"

    for each in (unbroken, run):
        until(lambda each=each: state(each) == "finished", each)
        assert each.finished and each.report.is_file()
    assert losses(run) == losses(unbroken)


def test_two_machines_meet_and_end_with_a_checkpoint_when_cancelled(
    cluster: dict[str, str], make_run: Callable[..., RunDir]
) -> None:
    run = make_run(max_steps=3000, save_steps=5)
    plan = run.read_plan()
    two = {"value": 2, "from": "given", "why": "asked for"}
    plan["plan"] |= {"num_gpus": two, "num_machines": two}
    write_yaml(run.plan, plan)
    accelerate = read_mapping(run.accelerate)
    write_yaml(run.accelerate, accelerate | {"distributed_type": "MULTI_GPU", "num_processes": 2})
    write_yaml(run.train, read_mapping(run.train) | {"num_processes": 2})

    submit(run)
    until(lambda: len(run.checkpoint_steps()) > 0, run)
    assert sorted(path.name for path in run.stacks.iterdir()) == ["rank-0.txt", "rank-1.txt"]
    assert cli.main(["cancel", str(run.root)]) == 0
    until(lambda: state(run) not in ("running", "pending", "requeued"), run)
    assert not run.finished and run.read_status()["stage"] == "interrupted"
    assert max(run.checkpoint_steps()) == losses(run)[-1][0] < 3000
