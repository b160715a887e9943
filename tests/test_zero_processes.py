"""DeepSpeed's ZeRO in two processes on the processor, through `accelerate launch`."""

from __future__ import annotations

import json
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
from ftplan.planner.units import FLOAT32_BYTES
from ftplan.planner.zero import REDUCE_BUCKET_SIZE
from tests.quick import little_asked
from tests.test_several_processes import (
    Launch,
    assert_alike,
    carry_out,
    kept_signals,
    least_measured,
    tiny,
    write,
)

__all__ = ["kept_signals", "tiny", "write"]

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("kept_signals", "little")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one length, as memory is predicted for the longest."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    made = [
        {"instruction": f"Say {n:03d} and more", "output": f"{n:03d} it is so"} for n in range(64)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


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
    done: dict[tuple[str, int], RunDir] = {}

    def one(run: RunDir) -> RunDir:
        train = read_mapping(run.train) | {"deepspeed": None}
        key = train["method"], train["training_arguments"]["per_device_train_batch_size"]
        if key not in done:
            alone = RunDir(tmp_path_factory.mktemp("alone") / "run")
            shutil.copytree(run.data, alone.data)
            shutil.copy(run.plan, alone.plan)
            write_yaml(alone.train, train)
            assert loop.train(alone, resume=False) == 0
            done[key] = alone
        return done[key]

    return one


@pytest.mark.parametrize(("sharding", "num_rows"), [("zero2", 2), ("zero3", 4)])
def test_two_processes_train_as_one_in_the_memory_that_is_predicted(
    sharding: str, num_rows: int, write: Launch, one: Callable[[RunDir], RunDir]
) -> None:
    given = {"per_device_train_batch_size": num_rows, "gradient_accumulation_steps": 4 // num_rows}
    run = write(2, sharding=sharding, method="lora", **given)
    carry_out(run)
    assert_alike(run, one(run))
    # Beside the bucket, which is a thousand times as large as this model.
    bucket = REDUCE_BUCKET_SIZE * FLOAT32_BYTES
    predicted = run.read_record()["predicted"]["allocated_bytes"] - bucket
    measured = least_measured(run, bucket + 1.03 * predicted) - bucket
    assert predicted == pytest.approx(measured, rel=0.03)


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
