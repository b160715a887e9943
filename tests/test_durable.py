"""What keeps a run whole, part by part: the lock, rotation, room, waiting, the grace period."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftplan.launcher import lock, metrics_file, versions
from ftplan.launcher.disk_full import is_disk_full
from ftplan.launcher.lock import HELD_BY_LAUNCHER, held, held_for_training, is_held
from ftplan.launcher.run_dir import RunDir, overwrite_json, read_mapping, write_json
from ftplan.planner.errors import InputError

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from safetensors.torch import save_file

from ftplan.launcher.training import checkpoints, saving
from ftplan.launcher.training.checkpoints import CheckpointKeeper, DurableCheckpoints
from ftplan.launcher.training.saving import write_whole
from ftplan.launcher.training.stopping import StopOnSignal, Stopped

FULL = OSError(errno.ENOSPC, "No space left on device")


class TestLock:
    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.1)

    def test_who_has_a_directory_is_told_to_the_next_one(self, tmp_path: Path) -> None:
        with held(tmp_path):
            assert is_held(tmp_path)
            with pytest.raises(InputError, match=f"is running: process {os.getpid()}") as told:
                held(tmp_path).__enter__()
            assert f"`kill {os.getpid()}`" in str(told.value.hint)
        assert not is_held(tmp_path)

    def test_a_merge_is_not_told_to_be_killed(self, tmp_path: Path) -> None:
        with held(tmp_path, "being merged"), pytest.raises(InputError, match="merged") as told:
            held(tmp_path).__enter__()
        assert "kill" not in str(told.value.hint)

    def test_training_holds_it_beside_its_launcher_and_after_it(self, tmp_path: Path) -> None:
        launcher = held(tmp_path)
        launcher.__enter__()
        with pytest.raises(InputError):
            held_for_training(tmp_path, {}).__enter__()
        with held_for_training(tmp_path, {HELD_BY_LAUNCHER: "1"}):
            launcher.__exit__(None, None, None)
            assert is_held(tmp_path)
            with pytest.raises(InputError):
                held(tmp_path).__enter__()
        assert not is_held(tmp_path)

    def test_one_rank_is_enough(self, tmp_path: Path) -> None:
        with held(tmp_path), held_for_training(tmp_path, {"RANK": "1"}):
            pass

    def test_what_a_dead_process_has_left_locks_nothing(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_hold_and_die, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == process.pid
        with held(tmp_path):
            pass

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_a_file_system_without_locks_is_no_hindrance(
        self, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none(descriptor: int, kind: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(lock.fcntl, "flock", none)
        with held(tmp_path), held(tmp_path):
            assert not is_held(tmp_path)

    def test_a_folder_that_cannot_be_written_can_be_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(lock.os, "open", read_only)
        with held(tmp_path, "being merged"):
            pass


def _hold_and_die(root: Path) -> None:
    with held(root):
        os.kill(os.getpid(), signal.SIGKILL)


class Writes:
    """The part of a trainer that writes a checkpoint, of `size` bytes."""

    def __init__(self, run: RunDir, size: int = 1000) -> None:
        self.run, self.size = run, size
        self.args = SimpleNamespace(world_size=1, save_total_limit=2, device="cpu")
        self.state = SimpleNamespace(global_step=0, max_steps=100, best_global_step=None)
        self.optimizer = None
        self.model = torch.nn.Linear(10, 10)
        self.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        self.fails: Exception | None = None

    def is_world_process_zero(self) -> bool:
        return True

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.checkpoints)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"\1" * self.size)
        if self.fails:
            raise self.fails
        (folder / "trainer_state.json").write_text("{}")


class Trainer(DurableCheckpoints, Writes):
    """With what makes it durable."""


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def trainer(tmp_path: Path, told: list[str]) -> Trainer:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    made = Trainer(run)
    made.keeper = CheckpointKeeper(run, made, told.append, [])
    return made


def save(trainer: Trainer, step: int) -> set[str]:
    """The names that stand in `checkpoints` afterwards."""
    trainer.state.global_step = step
    trainer._save_checkpoint(None, None)
    return {path.name for path in trainer.run.checkpoints.iterdir()}


def room(monkeypatch: pytest.MonkeyPatch, free: Callable[[], int]) -> None:
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: free())


class TestKeeping:
    def test_the_newest_and_the_best_are_kept(self, trainer: Trainer) -> None:
        for step in (1, 2, 3):
            save(trainer, step)
        trainer.state.best_global_step = 2
        assert save(trainer, 4) == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
        assert save(trainer, 5) == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
        trainer.state.best_global_step = 5
        assert save(trainer, 6) == {"checkpoint-5", "checkpoint-6"}

    def test_what_lies_beyond_the_step_goes_when_there_is_a_new_one(self, trainer: Trainer) -> None:
        """Damaged ones, which the run has gone back behind."""
        for step in (3, 8, 9):
            save(trainer, step)
        assert save(trainer, 4) == {"checkpoint-4"}

    def test_an_error_leaves_nothing_and_is_raised(self, trainer: Trainer) -> None:
        save(trainer, 1)
        trainer.fails = ValueError("not a matter of room")
        with pytest.raises(ValueError, match="room"):
            save(trainer, 2)
        assert [p.name for p in trainer.run.checkpoints.iterdir()] == ["checkpoint-1"]

    def test_what_a_kill_has_left_is_removed(self, trainer: Trainer, told: list[str]) -> None:
        left = trainer.run.checkpoints / ".saving" / "checkpoint-7"
        left.mkdir(parents=True)
        CheckpointKeeper(trainer.run, trainer, told.append, [])
        assert list(trainer.run.checkpoints.iterdir()) == []


class TestRoom:
    def test_the_older_one_makes_room_where_that_is_enough(
        self, trainer: Trainer, told: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(trainer, 1)
        save(trainer, 2)
        assert trainer.keeper is not None
        needed = trainer.keeper._needed_bytes()
        gone = trainer.run.checkpoints / "checkpoint-1"
        room(monkeypatch, lambda: needed if not gone.exists() else needed - 500)
        assert save(trainer, 3) == {"checkpoint-2", "checkpoint-3"}
        assert not told

    def test_without_room_all_that_there_is_stays_and_it_is_said_once(
        self, trainer: Trainer, told: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(trainer, 1)
        save(trainer, 2)
        free = 10
        room(monkeypatch, lambda: free)
        assert save(trainer, 3) == save(trainer, 4) == {"checkpoint-1", "checkpoint-2"}
        (said,) = told
        assert "10 B is free" in said and "checkpoint-2 is kept" in said
        assert trainer.keeper is not None and not trainer.keeper.room_again()
        free = 10**9
        assert trainer.keeper.room_again()
        assert save(trainer, 5) == {"checkpoint-2", "checkpoint-5"}
        assert told[1:] == ["there is room again: checkpoint-5 is saved"]

    def test_a_disk_that_fills_up_meanwhile_tears_nothing(
        self, trainer: Trainer, told: list[str]
    ) -> None:
        save(trainer, 1)
        trainer.fails = FULL
        assert save(trainer, 2) == {"checkpoint-1"}
        assert len(told) == 1 and trainer.keeper is not None
        assert not trainer.keeper.room_again(), "free room says nothing of a quota"

    @pytest.mark.parametrize("writer", ["torch", "safetensors", "python"])
    def test_every_writer_s_error_is_known(self, writer: str, tmp_path: Path) -> None:
        """A limit on the size of files refuses the writing in its middle."""
        tensors = {"a": torch.zeros(10**6)}
        path = tmp_path / "file"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(Exception) as caught:
                if writer == "torch":
                    torch.save(tensors, path)
                elif writer == "safetensors":
                    save_file(tensors, path)
                else:
                    path.write_bytes(b"a" * 10**6)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert is_disk_full(caught.value), caught.value
        assert not is_disk_full(ValueError("size mismatch"))

    def test_results_wait_for_room(
        self, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saving, "_WAIT_SECONDS", 0)
        tries = [FULL, FULL, FULL, None]

        def write(beside: Path) -> None:
            beside.mkdir()
            (beside / "weights").write_text("half")
            if error := tries.pop(0):
                raise error

        spared: list[int] = []
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "old").touch()
        write_whole(tmp_path / "adapter", write, told.append, lambda: spared.append(1))
        assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["weights"]
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        assert len(told) == 2 and "waits" in told[0] and "is saved" in told[1]
        assert spared

    def test_rows_wait_for_room_and_come_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2, "lo')  # cut off by a kill
        real, allowed = os.write, [5]

        def limited(descriptor: int, data: bytes) -> int:
            if not allowed[0]:
                raise FULL
            count = real(descriptor, data[: allowed[0]])
            allowed[0] -= count
            return count

        monkeypatch.setattr(metrics_file.os, "write", limited)
        before = path.read_bytes()
        metrics_file.append_row(path, {"step": 3})
        assert path.read_bytes() == before
        metrics_file.append_row(path, {"step": 4})
        allowed[0] = 10**6
        metrics_file.append_row(path, {"step": 5})
        assert [row["step"] for row in RunDir(tmp_path).metric_rows()] == [1, 3, 4, 5]

    def test_a_status_is_told_where_there_is_no_room_for_a_second_file(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "status.json"
        write_json(path, {"stage": "training", "a": "long" * 9})
        overwrite_json(path, {"stage": "saving"})
        assert read_mapping(path) == {"stage": "saving"}


class TestGrace:
    @pytest.mark.parametrize(
        ("micro_batch_seconds", "save_seconds", "grace", "breaks_off"),
        [
            (1.0, 5.0, None, False),  # 7 left and 5: within 30
            (1.0, 25.0, None, True),  # 32
            (10.0, 0.0, None, True),  # 70
            (10.0, 25.0, "300", False),
            (1.0, 0.0, "5", True),
        ],
    )
    def test_a_step_is_finished_where_it_and_a_checkpoint_fit(
        self,
        micro_batch_seconds: float,
        save_seconds: float,
        grace: str | None,
        breaks_off: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if grace:
            monkeypatch.setenv("FTPLAN_GRACE_SECONDS", grace)
        now = [100.0]
        stopping = StopOnSignal(clock=lambda: now[0])
        keeper: Any = SimpleNamespace(save_seconds=save_seconds, room_again=lambda: False)
        stopping.keeper = keeper
        args: Any = SimpleNamespace(gradient_accumulation_steps=8, world_size=1, device="cpu")
        control: Any = SimpleNamespace(should_save=False, should_training_stop=False)
        stopping.on_step_begin(args, None, control)  # type: ignore[arg-type]
        torch.rand(3)
        now[0] += micro_batch_seconds
        stopping.ask(signal.SIGTERM)
        stopping.on_substep_end(args, None, control)  # type: ignore[arg-type]
        assert control.should_training_stop == control.should_save == breaks_off
        stopping.on_step_end(args, None, control)  # type: ignore[arg-type]
        assert control.should_training_stop and control.should_save
        assert stopping.exit_status == 143

    def test_a_broken_off_step_leaves_the_random_state_of_its_beginning(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FTPLAN_GRACE_SECONDS", "0")
        stopping = StopOnSignal()
        args: Any = SimpleNamespace(gradient_accumulation_steps=2, world_size=1)
        control: Any = SimpleNamespace()
        stopping.on_step_begin(args, None, control)  # type: ignore[arg-type]
        first = torch.rand(3)
        stopping.ask(signal.SIGTERM)
        stopping.on_substep_end(args, None, control)  # type: ignore[arg-type]
        assert torch.equal(torch.rand(3), first)

    def test_only_a_second_ctrl_c_ends_at_once(self) -> None:
        """A batch system signals all processes, and the launcher passes on what it got."""
        stopping = StopOnSignal()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            stopping.ask(number)
        assert stopping.exit_status == 143
        stopping = StopOnSignal()
        stopping.ask(signal.SIGINT)
        with pytest.raises(Stopped):
            stopping.ask(signal.SIGINT)


class TestVersions:
    def test_what_is_unlike_is_said_with_what_it_may_mean(self) -> None:
        packages = versions.installed()
        assert list(versions.unlike({"python": "3.2.1", "packages": packages})) != []
        assert list(versions.unlike({"packages": packages})) == []
        before = {**packages, "torch": "1.0", "bitsandbytes": "0.1", "unknown": "1"}
        if packages["bitsandbytes"]:
            before["bitsandbytes"] = None
        torch_said, bitsandbytes_said = versions.unlike({"packages": before})
        assert torch_said == (
            f"the run began with torch 1.0, {packages['torch']} is here: losses may differ in "
            "their last digits, and random numbers altogether"
        )
        assert "bitsandbytes" in bitsandbytes_said

    def test_a_checkpoint_that_cannot_be_read_says_what_would(self) -> None:
        class Reads:
            def _load_from_checkpoint(self, checkpoint: str, model: Any) -> None:
                raise KeyError("exp_avg")

        class Reader(DurableCheckpoints, Reads):
            pass

        with pytest.raises(InputError, match=r"checkpoint `c-3` cannot be read here: 'exp_avg'"):
            Reader()._load_from_checkpoint("c-3")
