"""Rows of several tasks in real training: drawn as planned, told apart, and resumed alike."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.launching import write_run
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training import loop
from ftplan.launcher.ui import Ui
from tests.launcher_fixtures import save_tiny_llama
from tests.test_tasks import CPU

pytestmark = pytest.mark.train

WORDS = ("list", "tuple", "set", "dict", "end", "start", "rest")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of one answer, which is learned at once, and a small one of chance."""
    rng = random.Random(1)
    rows = [{"task": "same", "input": f"{n}?", "output": "here it is"} for n in range(60)]
    rows += [
        {"task": "chance", "input": f"{n} please", "output": " ".join(rng.choices(WORDS, k=4))}
        for n in range(60, 90)
    ]
    rng.shuffle(rows)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def kept_signals() -> Iterator[None]:
    """The training loop takes over SIGINT and SIGTERM; give them back."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def planned(model_folder: Path, data_file: Path, runs: Path, **given: Any) -> Planned:
    return make_plan(
        Ui(as_json=True),
        asked=DataAsked(paths=(str(data_file),)),
        model_name=str(model_folder),
        named_device=CPU,
        given={"learning_rate": 0.01, **given},
        runs_dir=runs,
        for_launch=True,
    )


def trained(plan: Planned, runs: Path) -> RunDir:
    run = write_run(plan, None, runs)
    assert loop.train(run, resume=False) == 0
    return run


def step_rows(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in run.metric_rows() if "step" in row]


@pytest.mark.parametrize("loss", ["trl-fused", "stock"])
def test_rows_are_drawn_by_the_weights_and_losses_told_apart(
    loss: str, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    plan = planned(
        model_folder,
        data_file,
        tmp_path,
        num_train_epochs=2.0,
        task_weights=("same=1", "chance=3"),
        loss=loss,
        per_device_train_batch_size=4,
    )
    run = trained(plan, tmp_path)
    record, rows = run.read_record(), step_rows(run)
    assert record["steps"] == plan.steps == len(rows)
    assert record["tasks"]["chance"]["share"] == pytest.approx(0.75, abs=0.01)
    assert record["tasks"]["same"]["num_rows"] == plan.profile.tasks["same"]
    for task in record["tasks"].values():
        assert task["after"] < task["before"]
    for row in rows:
        told = [loss for loss in row["task_losses"].values() if loss is not None]
        assert min(told) - 1e-4 <= row["loss"] <= max(told) + 1e-4


def test_every_task_s_held_out_loss_makes_up_the_whole(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """One row at once, so that the loss is the mean of the rows', answers of one length each."""
    plan = planned(model_folder, data_file, tmp_path, max_steps=1, per_device_train_batch_size=1)
    run = trained(plan, tmp_path)
    before, _ = (row for row in run.metric_rows() if "when" in row)
    losses = before["eval_loss_by_task"]
    assert min(losses.values()) < before["eval_loss"] < max(losses.values())


def test_dynamic_weights_raise_the_task_that_lags_and_a_resumed_run_goes_on_alike(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    plan = planned(
        model_folder,
        data_file,
        tmp_path,
        num_train_epochs=6.0,
        task_weighting="dynamic",
        save_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    run = trained(plan, tmp_path)
    rows = step_rows(run)
    assert len(rows) == plan.steps
    first, last = (rows[place]["task_shares"]["chance"] for place in (0, -1))
    assert last > first + 0.1
    assert run.read_record()["tasks"]["chance"]["share"] > first

    cut = RunDir(tmp_path / "cut")
    shutil.copytree(run.root, cut.root)
    cut.record.unlink()
    last_checkpoint, earlier = cut.last_checkpoint(), len(list(cut.checkpoints.glob("*-*")))
    assert last_checkpoint is not None and earlier == 2
    shutil.rmtree(last_checkpoint)
    assert loop.train(cut, resume=True) == 0
    again = step_rows(cut)
    told = ("step", "loss", "task_losses", "task_shares", "tokens", "learning_rate")
    assert [[row[key] for key in told] for row in again] == [
        [row[key] for key in told] for row in rows
    ]
    assert cut.read_record()["tasks"] == run.read_record()["tasks"]


@pytest.mark.parametrize("method", ["multitask-prompt-tuning", "poly"])
def test_tuners_of_many_tasks_are_given_each_row_s(
    method: str, model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """The part of each task is trained, and there are as many as planned."""
    from safetensors.torch import load_file

    plan = planned(
        model_folder,
        data_file,
        tmp_path,
        method=method,
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    run = trained(plan, tmp_path)
    chosen = plan.chosen.plan
    counted = chosen.resolved_method.count(plan.source.spec, chosen.method_settings)
    record = run.read_record()
    assert chosen.num_tasks == 2
    assert record["num_trainable_parameters"] == counted.num_trainable_parameters
    assert all(sample["after"] is not None for sample in record["samples"])
    assert record["samples"]
    weights = load_file(run.adapter / "adapter_model.safetensors")
    of_tasks = "prefix_task_rows" if method != "poly" else "module_logits"
    (name, *_) = (name for name in weights if of_tasks in name)
    first, second = weights[name]
    assert not (first == second).all()
