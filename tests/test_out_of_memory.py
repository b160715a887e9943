"""Memory that runs out: what is given up, and real runs of a very small model that go on."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from msgspec import structs
from transformers import Trainer

from ftplan.launcher import launching
from ftplan.launcher.launching import write_run
from ftplan.launcher.ran_out import ladder_at_the_end
from ftplan.launcher.run_dir import RunDir, write_json, write_yaml
from ftplan.launcher.training import loop, preflight
from ftplan.launcher.training.out_of_memory import is_out_of_memory
from ftplan.launcher.training.trainer import PlannedTrainer
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import RunFailedError
from ftplan.planner.hardware_spec import MemoryHolder
from ftplan.planner.out_of_memory import EVENT, Lowered, Place, next_change, row_pieces
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.units import GIB
from tests.launcher_fixtures import save_tiny_llama
from tests.test_training import CPU, planned

PLAN = TrainingPlan(
    per_device_train_batch_size=4, gradient_accumulation_steps=2, gradient_checkpointing=False
)


def given_up(plan: TrainingPlan, place: Place, plans_left: int = 0) -> list[Lowered]:
    """All that is given up when memory runs out at one place again and again."""
    found = [Lowered.as_planned(plan)]
    while change := next_change(plan, found[-1], place, plans_left - found[-1].plans_used):
        found.append(change.lowered)
        assert len(found) < 20, "it ends"
    return found[1:]


# --- what is decided


def test_fewer_rows_come_first_then_checkpointing_then_the_next_plan() -> None:
    assert given_up(PLAN, "backward", plans_left=1) == [
        Lowered(train_rows=2, eval_rows=4),
        Lowered(train_rows=1, eval_rows=4),
        Lowered(train_rows=1, eval_rows=4, checkpoints_all=True),
        Lowered(train_rows=1, eval_rows=4, checkpoints_all=True, plans_used=1),
    ]


def test_evaluation_gives_up_its_own_rows_alone() -> None:
    assert given_up(PLAN, "evaluation") == [
        Lowered(train_rows=4, eval_rows=2),
        Lowered(train_rows=4, eval_rows=1),
    ]


def test_fewer_rows_do_not_help_loading_and_nothing_helps_saving() -> None:
    assert [one.plans_used for one in given_up(PLAN, "load", plans_left=2)] == [1, 2]
    assert given_up(PLAN, "save", plans_left=2) == []


@pytest.mark.parametrize("objective", ["kto", "grpo"])
def test_a_loss_that_compares_rows_is_not_computed_in_pieces(objective: str) -> None:
    plan = PLAN.replace(objective=objective)
    assert [one.train_rows for one in given_up(plan, "forward")] == [4]


def test_a_method_that_cannot_be_checkpointed_is_not() -> None:
    assert not any(
        one.checkpoints_all for one in given_up(PLAN.replace(method="prefix-tuning"), "forward")
    )


def test_pieces_hold_every_row_once_and_are_even() -> None:
    for rows in range(1, 20):
        for at_once in range(1, 20):
            pieces = row_pieces(rows, at_once)
            assert [row for piece in pieces for row in piece] == list(range(rows))
            sizes = {len(piece) for piece in pieces}
            assert max(sizes) <= at_once and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate mem"
                     "ory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_libraries_say_in_many_ways_that_memory_is_gone(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = ValueError("while loading")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
        OSError(28, "No space left on device"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


# --- before the first step


def test_a_gpu_that_others_hold_is_told_with_their_names() -> None:
    holder = MemoryHolder(pid=4711, name="python", used_bytes=30 * GIB)
    gpu = structs.replace(CPU, name="A100", kind="cuda", free_bytes=10 * GIB, holders=(holder,))
    (said,) = preflight.lacking_gpu(gpu, 20 * GIB)
    assert "10.0 GiB is free on A100" in said
    assert "python (process 4711) holds 30.0 GiB" in said
    assert not list(preflight.lacking_gpu(gpu, 9 * GIB))


@pytest.mark.train
def test_a_run_that_its_disk_cannot_hold_does_not_begin(make_run: MakeRun) -> None:
    run = make_run()
    written = run.read_plan()
    assert 0 < written["needs"]["disk_bytes"] < GIB
    write_yaml(run.plan, {**written, "needs": {**written["needs"], "disk_bytes": 2**60}})
    with pytest.raises(RunFailedError, match="checkpoints, the trained model and the rows take"):
        loop.train(run, resume=False)


@pytest.mark.train
def test_a_run_that_ends_for_want_of_memory_is_told_what_would_make_room(
    model_folder: Path, data_file: Path, runs: Path
) -> None:
    given = {name: value for name, value in SETTINGS.items() if "checkpointing" not in name}
    plan = planned(model_folder, data_file, runs, **given)
    run = write_run(plan, None, runs)
    write_json(run.status, {"stage": EVENT})
    with pytest.raises(RunFailedError) as caught, ladder_at_the_end(Ui(as_json=True), run, plan):
        raise RunFailedError("training failed: out of memory", "none yet")
    assert caught.value.message == "training failed: out of memory"
    assert "what would fit" in (caught.value.hint or "")
    with pytest.raises(RunFailedError) as anew, ladder_at_the_end(Ui(as_json=True), run):
        raise RunFailedError("training failed: out of memory", "none yet")
    assert anew.value.hint == caught.value.hint, "the run directory tells what was planned"
    write_json(run.status, {"stage": "training"})
    with pytest.raises(RunFailedError) as other, ladder_at_the_end(Ui(as_json=True), run, plan):
        raise RunFailedError("another error", "its own hint")
    assert other.value.hint == "its own hint"


# --- runs that go on


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of unlike lengths, so that a mean over rows is not one over tokens."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"instruction": f"Where is part {n}?", "output": "It is here." + " Here." * (n % 5)}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Where is part {n}?",
            "chosen": "Here." + " Yes." * (n % 4),
            "rejected": "Away.",
        }
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SETTINGS = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
}

MakeRun = Callable[..., RunDir]


@pytest.fixture(scope="module", autouse=True)
def signals() -> Iterator[None]:
    """The training loop takes over SIGINT and SIGTERM; give them back."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def make_run(model_folder: Path, data_file: Path, runs: Path) -> MakeRun:
    def make(data: Path = data_file, **given: Any) -> RunDir:
        settings = {name: v for name, v in {**SETTINGS, **given}.items() if v is not None}
        return write_run(planned(model_folder, data, runs, **settings), None, runs)

    return make


@pytest.fixture(scope="module")
def unbroken(make_run: MakeRun) -> list[float]:
    """The losses of the run in which memory suffices."""
    run = make_run()
    assert loop.train(run, resume=False) == 0
    assert not events(run) and "out_of_memory" not in run.read_record()
    return losses(run)


def losses(run: RunDir) -> list[float]:
    rows = [row for row in run.metric_rows() if "step" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "each step once"
    record = run.read_record()["evaluation"]
    return [*(row["loss"] for row in rows), record["before"], record["after"]]


def events(run: RunDir) -> list[dict[str, Any]]:
    return [row for row in run.metric_rows() if row.get("event") == EVENT]


def fail(
    patch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    *calls: int,
    midway: bool = False,
    counts: Callable[..., bool] = lambda *args: True,
) -> None:
    """Raise out of memory in calls of these numbers, of those that count: instead of the call, or
    when it has done its work and not returned."""
    real, numbers = getattr(owner, name), itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        fails = counts(*args) and next(numbers) in calls
        if fails and not midway:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        result = real(*args, **kwargs)
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return result

    patch.setattr(owner, name, functools.wraps(real)(call))


def trains(trainer: Any, *args: Any) -> bool:
    return bool(trainer.model.training)


@pytest.mark.train
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_step_is_computed_again_in_smaller_pieces(
    place: str, make_run: MakeRun, unbroken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the step's second micro-batch, when gradients of the first are there; and once more
    while it is computed again."""
    run = make_run()
    if place == "forward":
        fail(monkeypatch, PlannedTrainer, "compute_loss", 4, 5, counts=trains)
    else:
        fail(monkeypatch, torch.Tensor, "backward", 4, 6, midway=True)
    assert loop.train(run, resume=False) == 0
    assert losses(run) == pytest.approx(unbroken, rel=1e-5)
    first, second = events(run)
    assert first["place"] == second["place"] == place
    assert [event["now"]["train_rows"] for event in (first, second)] == [2, 1]
    assert first["at_step"] == 2 and first["requested_bytes"] == 2 * 2**30
    assert "2 rows at once instead of 3, 4 micro-batches a step" in first["said"]
    assert run.read_record()["out_of_memory"] == [first, second]


@pytest.mark.train
def test_the_longest_batches_are_tried_and_nothing_is_changed_by_it(
    make_run: MakeRun, unbroken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "is_tight", lambda run: True)
    run = make_run()
    assert loop.train(run, resume=False) == 0
    assert losses(run) == unbroken, "to the last digit"
    assert not events(run)
    record = run.read_record()["preflight"]
    assert record["measured"]["device_bytes"] > 0 and record["predicted"]["device_bytes"] > 0
    (said,) = [row["said"] for row in run.metric_rows() if row.get("event") == "preflight"]
    assert "taken" in said and "predicted" in said


@pytest.mark.train
def test_a_trial_that_moves_weights_is_made_once_however_often_the_run_is_started(
    make_run: MakeRun, unbroken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "is_tight", lambda run: True)
    prints = itertools.count()  # each is another one
    monkeypatch.setattr(preflight, "_fingerprint", lambda model: next(prints))
    run = make_run()
    assert loop.train(run, resume=False) == 0
    assert losses(run) == unbroken, "to the last digit"
    assert next(prints) == 2, "before the trial and after it"
    rows = [row for row in run.metric_rows() if row.get("event") == "preflight"]
    assert rows == [preflight.MOVED_ROW] and preflight.has_moved_weights(run)


@pytest.mark.train
def test_what_does_not_fit_is_replaced_before_training_starts(
    make_run: MakeRun, unbroken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first optimizer step is the trial's: the second start begins with fewer rows."""
    monkeypatch.setattr(preflight, "is_tight", lambda run: True)
    fail(monkeypatch, torch.optim.AdamW, "step", 1)
    run = make_run()
    assert loop.train(run, resume=False) == 0
    assert losses(run) == pytest.approx(unbroken, rel=1e-5)
    (event,) = events(run)
    assert event["place"] == "optimizer step" and event["at_step"] == 1
    kinds = [row.get("event", "step") for row in run.metric_rows()]
    assert kinds.index(EVENT) < kinds.index("preflight") < kinds.index("step")


@pytest.mark.train
def test_after_a_torn_step_the_run_goes_on_from_its_checkpoint(
    make_run: MakeRun, unbroken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step's update fails midway. Nothing of the first start stays in memory."""
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = loop.load_model

    def loaded(*args: Any) -> Any:
        gc.collect()
        alive.append(sum(model() is not None for model in models))
        model = load(*args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loop, "load_model", loaded)
    fail(monkeypatch, torch.optim.AdamW, "step", 3, midway=True)
    run = make_run()
    assert loop.train(run, resume=False) == 0
    assert losses(run) == pytest.approx(unbroken, rel=1e-5)
    (event,) = events(run)
    assert event["place"] == "optimizer step" and event["at_step"] == 3
    assert alive == [0, 0]


@pytest.mark.train
def test_evaluation_and_saving_go_on_without_another_start(
    make_run: MakeRun, unbroken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint and the result are each saved at the second attempt."""
    fail(monkeypatch, PlannedTrainer, "compute_loss", 1, 2, counts=lambda t, *_: not trains(t))
    fail(monkeypatch, Trainer, "_save_checkpoint", 1)
    fail(monkeypatch, Trainer, "save_model", 3)
    load = loop.load_model
    loads: list[str] = []
    monkeypatch.setattr(loop, "load_model", lambda *args: loads.append("") or load(*args))
    run = make_run()
    assert loop.train(run, resume=False) == 0
    assert losses(run) == pytest.approx(unbroken, rel=1e-5)
    assert len(loads) == 1
    assert [event["place"] for event in events(run)] == [
        *("evaluation", "evaluation"),
        *("save", "save"),
    ]
    assert [event["now"]["eval_rows"] for event in events(run)[:2]] == [2, 1]
    assert {path.name for path in run.checkpoints.glob("check*")} == {
        "checkpoint-2",
        "checkpoint-4",
    }


@pytest.mark.train
def test_a_model_that_cannot_be_loaded_gives_way_to_the_next_plan(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(per_device_train_batch_size=None)
    before = run.read_plan()["plan"]["method"]["value"]
    fail(monkeypatch, loop, "load_model", 1)
    assert loop.train(run, resume=False) == 0
    (event,) = events(run)
    assert event["place"] == "load" and "next plan" in event["what"]
    after = run.read_plan()["plan"]["method"]["value"]
    assert after != before
    assert run.read_record()["method"] == after
    assert RunDir(run.previous / "1").read_plan()["plan"]["method"]["value"] == before


@pytest.mark.train
def test_a_run_that_has_nothing_left_to_give_up_says_so(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    run.next_plans.unlink(missing_ok=True)
    fail(monkeypatch, PlannedTrainer, "compute_loss", *range(1, 99), counts=trains)
    with pytest.raises(
        RunFailedError, match="out of memory in the forward pass with 1 row at once"
    ):
        loop.train(run, resume=False)
    assert [event["what"] is None for event in events(run)] == [False, False, False, True]
    assert run.read_status()["stage"] == "failed"


@pytest.mark.train
def test_checkpointing_in_the_midst_of_a_run_leaves_the_losses(
    make_run: MakeRun, unbroken: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, PlannedTrainer, "compute_loss", 3, 4, 5, counts=trains)
    run = make_run()
    assert loop.train(run, resume=False) == 0
    assert losses(run) == pytest.approx(unbroken, rel=1e-5)
    assert [event["now"]["checkpoints_all"] for event in events(run)] == [False, False, True]
    assert json.loads(run.lowered.read_text())["checkpoints_all"]


@pytest.mark.train
@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_pairs_in_pieces_have_the_losses_of_whole_micro_batches(
    objective: str, make_run: MakeRun, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(pairs_file, objective=objective, max_steps=2)
    assert loop.train(whole, resume=False) == 0
    pieces = make_run(pairs_file, objective=objective, max_steps=2)
    fail(monkeypatch, torch.Tensor, "backward", 1, midway=True)
    assert loop.train(pieces, resume=False) == 0
    assert [event["now"]["train_rows"] for event in events(pieces)] == [2]
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.train
def test_two_ranks_agree_on_what_is_given_up(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has no memory for the third step, and rank 0 waits for it. Both are started again, and
    have the losses of one process with as many rows a step: gradients are exchanged."""
    alone = make_run(per_device_train_batch_size=6, gradient_accumulation_steps=1)
    assert loop.train(alone, resume=False) == 0
    run = make_run(gradient_accumulation_steps=1, num_gpus=2)

    def two_ranks(
        run: RunDir, checkpoint: Path | None, *, again: bool = False, **_: bool
    ) -> list[str]:
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
        module = ("-m", "tests.broken_rank", str(tmp_path / "failed"), str(run.root))
        return [sys.executable, *launcher, *module, *(["--resume"] if again else [])]

    monkeypatch.setattr(launching.emit, "launch_command", two_ranks)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    launching.run_through(run, environment, lambda status, rows: None, None)
    (event,) = events(run)
    assert event["at_step"] == 3 and event["now"]["train_rows"] == 2
    assert losses(run)[:4] == pytest.approx(losses(alone)[:4], rel=1e-4)
