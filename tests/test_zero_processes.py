"""DeepSpeed's ZeRO in two processes on the processor, through `accelerate launch`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")
pytest.importorskip("deepspeed", reason="needs the `deepspeed` extra")

from ftplan.launcher import emit
from ftplan.launcher.run_dir import RunDir, read_mapping, write_yaml
from ftplan.launcher.training import loop
from ftplan.planner.errors import RunFailedError
from tests.quick import little_asked
from tests.test_several_processes import (
    Launch,
    assert_alike,
    carry_out,
    kept_signals,
    rows,
    tiny,
    write,
)

__all__ = ["kept_signals", "rows", "tiny", "write"]

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("kept_signals", "little")]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short evaluations, in the processes that are started too."""
    monkeypatch.setattr(emit, "TRAIN_MODULE", "tests.little_asked_train")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with little_asked():
        yield


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunDir], RunDir]:
    """The same run in this process alone, without DeepSpeed."""
    done: dict[str, RunDir] = {}

    def one(run: RunDir) -> RunDir:
        train = read_mapping(run.train) | {"deepspeed": None}
        if train["method"] not in done:
            alone = RunDir(tmp_path_factory.mktemp("alone") / "run")
            shutil.copytree(run.data, alone.data)
            shutil.copy(run.plan, alone.plan)
            write_yaml(alone.train, train)
            assert loop.train(alone, resume=False) == 0
            done[train["method"]] = alone
        return done[train["method"]]

    return one


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_two_processes_train_as_one(
    sharding: str, write: Launch, one: Callable[[RunDir], RunDir], tmp_path: Path
) -> None:
    run = write(2, sharding=sharding, method="lora")
    carry_out(run)
    assert_alike(run, one(run))


def test_one_of_two_processes_is_killed_and_the_run_goes_on(
    write: Launch, one: Callable[[RunDir], RunDir]
) -> None:
    run = write(2, sharding="zero1", method="full", optim="adamw_torch", save_steps=1)
    plan = run.read_plan()  # the trial of the longest batches is made where memory is tight
    plan["estimate"]["per_gpu"]["required_bytes"] = 2**60
    write_yaml(run.plan, plan)
    killed: list[int] = []

    def kill_one(status: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        if not killed and run.last_checkpoint() is not None:
            killed.append(int((run.stacks / "rank-1.txt").read_text().split()[-1]))
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(RunFailedError, match="rank 1 was ended by SIGKILL"):
        carry_out(run, watch=kill_one)
    assert any(row.get("event") == "preflight" and "measured" in row for row in run.metric_rows())
    carry_out(run, resume=True)
    assert_alike(run, one(run))
