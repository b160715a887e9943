"""The run directory: files whole or absent, no attempt lost, nothing taken for what it is not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftplan.launcher import manifest, run_dir
from ftplan.launcher.manifest import MANIFEST, damage, read_manifest, seal
from ftplan.launcher.run_dir import (
    RunDir,
    create_run,
    open_run,
    read_mapping,
    write_json,
    write_text,
    write_yaml,
)
from ftplan.planner.errors import InputError

# Without control characters: PyYAML writes U+0085 as it is, and reads it as a blank.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)

INPUTS = ("plan.yaml", "train.yaml", "accelerate.yaml", "command.txt", "data_profile.json")


def planned(root: Path) -> RunDir:
    """A run as the planner leaves it: all inputs, no results."""
    for name in INPUTS:
        write_text(root / name, f"name: {name}\n")
    write_text(root / "data" / "rows.jsonl", '{"text": "a"}\n')
    return RunDir(root)


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder, with its text."""
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def checkpoint(run: RunDir, name: str) -> Path:
    folder = run.checkpoints / name
    for file in ("model.safetensors", "trainer_state.json", "part/rng.pth"):
        write_text(folder / file, f"of {name}")
    seal(folder, {"metrics_bytes": 0})
    return folder


class TestNames:
    def test_the_design_s_names_lie_at_the_top(self, tmp_path: Path) -> None:
        """docs and users rely on them."""
        run = RunDir(tmp_path)
        paths = {
            name: getattr(run, name).relative_to(tmp_path).as_posix()
            for name, value in vars(RunDir).items()
            if isinstance(value, property) and name not in ("finished", "quoted")
        }
        assert paths == {
            "plan": "plan.yaml",
            "lowered": "lowered.json",
            "next_plans": "next_plans.json",
            "accelerate": "accelerate.yaml",
            "train": "train.yaml",
            "base": "base",
            "held_out": "held_out",
            "replay": "replay",
            "command": "command.txt",
            "environment": "environment.json",
            "data_profile": "data_profile.json",
            "left_out": "left_out.jsonl",
            "lock": "run.lock",
            "job": "job.json",
            "data": "data",
            "metrics": "metrics.jsonl",
            "samples": "samples.jsonl",
            "trackers": "trackers",
            "status": "status.json",
            "stdout": "stdout.log",
            "stderr": "stderr.log",
            "stacks": "stacks",
            "loss_plot": "loss.png",
            "memory_plot": "memory.png",
            "report": "report.html",
            "checkpoints": "checkpoints",
            "tokens": "tokens",
            "adapter": "adapter",
            "model": "model",
            "merged": "merged",
            "record": "record.json",
            "previous": "previous",
        }

    def test_making_the_object_touches_nothing(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path / "none")
        assert not run.finished
        assert run.last_checkpoint() is None
        assert run.read_status() == {}
        assert list(run.metric_rows()) == []
        assert not run.root.exists()


class TestWriting:
    def test_folders_are_made_and_nothing_lies_beside(self, tmp_path: Path) -> None:
        write_text(tmp_path / "a" / "b.txt", "one\n")
        write_text(tmp_path / "a" / "b.txt", "two\n")
        assert tree(tmp_path) == {"a/b.txt": "two\n"}

    @pytest.mark.parametrize("text", ["half a character: \ud800", "ok\ud800" * 5000])
    def test_a_failure_leaves_the_old_file_and_nothing_beside(
        self, tmp_path: Path, text: str
    ) -> None:
        path = tmp_path / "a.txt"
        write_text(path, "old\n")
        with pytest.raises(UnicodeEncodeError):
            write_text(path, text)
        assert tree(tmp_path) == {"a.txt": "old\n"}

    def test_a_full_disk_leaves_the_old_file_and_nothing_beside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        path = tmp_path / "a.json"
        write_json(path, {"old": 1})
        monkeypatch.setattr(run_dir.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"new": 2})
        assert tree(tmp_path) == {"a.json": '{\n "old": 1\n}\n'}

    def test_the_old_file_is_whole_until_the_new_one_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "status.json"
        write_json(path, {"stage": "old"})
        seen: list[Any] = []
        replace = Path.replace

        def watched(beside: Path, target: Path) -> Path:
            seen.append((json.loads(path.read_text()), json.loads(beside.read_text())))
            assert beside.parent == target.parent, "renaming between disks is no renaming"
            return replace(beside, target)

        monkeypatch.setattr(Path, "replace", watched)
        write_json(path, {"stage": "new"})
        assert seen == [({"stage": "old"}, {"stage": "new"})]

    def test_an_unserializable_value_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        write_json(path, {})
        with pytest.raises(TypeError):
            write_json(path, {"value": object()})
        assert tree(tmp_path) == {"a.json": "{}\n"}

    @settings(max_examples=25)
    @given(
        st.dictionaries(
            TEXT,
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner),
                max_leaves=4,
            ),
            max_size=3,
        )
    )
    def test_what_is_written_is_read_back(self, value: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, write in (("a.json", write_json), ("a.yaml", write_yaml)):
                path = Path(folder) / name
                write(path, value)
                assert read_mapping(path) == value

    @pytest.mark.parametrize("value", ["no", "on", "1e-4", "12:30", "0x10", "null", "~", "2e5", ""])
    def test_text_that_looks_like_something_else_stays_text(
        self, tmp_path: Path, value: str
    ) -> None:
        """YAML 1.1 would make `no` a truth value; a model may be called so."""
        write_yaml(tmp_path / "a.yaml", {"model": value})
        assert read_mapping(tmp_path / "a.yaml") == {"model": value}

    @pytest.mark.parametrize("value", [1e-4, 2e-05, 0.0, 1e22, 2.0, 3])
    def test_numbers_stay_numbers(self, tmp_path: Path, value: float) -> None:
        """Safe YAML writes `1e-05` without a point, and reads that as text unless told better."""
        write_yaml(tmp_path / "a.yaml", {"learning_rate": value})
        read = read_mapping(tmp_path / "a.yaml")["learning_rate"]
        assert read == value
        assert type(read) is type(value)

    def test_settings_keep_their_order_below_a_comment(self, tmp_path: Path) -> None:
        write_yaml(tmp_path / "a.yaml", {"z": 1, "a": "ü"}, "Read by the training process.")
        text = (tmp_path / "a.yaml").read_text(encoding="utf-8")
        assert text == "# Read by the training process.\nz: 1\na: ü\n"


class TestReading:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.json", b""),
            ("a.json", b'{"half": '),
            ("a.json", b"[1, 2]"),
            ("a.json", b"null"),
            ("a.json", b"\xff\xfe{}"),
            ("a.json", b'{"long": ' + b"7" * 5000 + b"}"),
            ("a.yaml", b""),
            ("a.yaml", b"a: [1, 2"),
            ("a.yaml", b"a: b: c"),
            ("a.yaml", b"- a\n- b\n"),
            ("a.yaml", b"\x00"),
            ("a.yaml", b"\xff\xfea: 1"),
            ("a.yaml", b"a: !!python/object/apply:os.getcwd []"),
            ("a.yaml", b"text"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path: Path, name: str, content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_mapping(path)

    @pytest.mark.parametrize("name", ["a.json", "a.yaml"])
    def test_a_missing_file_is_named(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match=f"cannot read `.*{name}`: No such file"):
            read_mapping(tmp_path / name)

    def test_plan_and_record_say_when_they_are_damaged(self, tmp_path: Path) -> None:
        run = planned(tmp_path)
        assert run.read_plan() == {"name": "plan.yaml"}
        write_text(run.record, "{")
        with pytest.raises(InputError, match=r"record\.json"):
            run.read_record()

    @pytest.mark.parametrize("content", ["", "{", "[]"])
    def test_a_damaged_status_counts_as_none(self, tmp_path: Path, content: str) -> None:
        run = RunDir(tmp_path)
        write_text(run.status, content)
        assert run.read_status() == {}

    def test_a_metric_row_still_being_written_is_left_out(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path)
        run.metrics.write_text('{"step": 1}\n\n[1]\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
        assert [row["step"] for row in run.metric_rows()] == [1, 2]

    def test_damaged_metrics_are_skipped(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path)
        long = b'{"step": ' + b"7" * 5000 + b"}"
        run.metrics.write_bytes(b'{"step": 1}\n\xff\xfe\x00\n' + long + b'\n{"step": 2}\n')
        assert [row["step"] for row in run.metric_rows()] == [1, 2]


class TestOpenRun:
    def test_a_planned_run_is_opened_unfinished(self, tmp_path: Path) -> None:
        planned(tmp_path)
        run = open_run(tmp_path)
        assert (run.root, run.finished) == (tmp_path, False)
        write_json(run.record, {})
        assert open_run(tmp_path).finished

    @pytest.mark.parametrize("name", ["plan.yaml", "train.yaml", "accelerate.yaml"])
    def test_a_folder_without_its_files_is_none(self, tmp_path: Path, name: str) -> None:
        planned(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=f"is not a run directory: it has no {name}"):
            open_run(tmp_path)

    def test_no_folder_and_a_file_are_told(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for name in ("none", "file", "file/below"):
            with pytest.raises(InputError, match=f"no run directory at `.*{name}`"):
                open_run(tmp_path / name)

    def test_a_folder_that_is_called_record_json_is_no_record(self, tmp_path: Path) -> None:
        (tmp_path / "record.json").mkdir()
        assert not RunDir(tmp_path).finished


class TestCreateRun:
    def test_names_are_counted_up_and_no_folder_is_used_twice(self, tmp_path: Path) -> None:
        base = tmp_path / "new" / "runs"
        made = [create_run(base, "mine").root.name for _ in range(3)]
        assert made == ["mine", "mine-2", "mine-3"]

    def test_a_file_or_a_dead_link_takes_a_name_as_well(self, tmp_path: Path) -> None:
        (tmp_path / "mine").touch()
        (tmp_path / "mine-2").symlink_to(tmp_path / "nowhere")
        run = create_run(tmp_path, "mine")
        assert run.root == tmp_path / "mine-3"
        assert tree(tmp_path) == {"mine": ""}

    def test_gaps_are_not_filled_with_what_was_there(self, tmp_path: Path) -> None:
        planned(tmp_path / "mine")
        assert list(create_run(tmp_path, "mine").root.iterdir()) == []

    @pytest.mark.parametrize("base", ["file", "file/runs"])
    def test_a_place_that_cannot_be_is_told(self, tmp_path: Path, base: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="cannot make the run directory") as caught:
            create_run(tmp_path / base, "mine")
        assert "--runs-dir" in (caught.value.hint or "")

    def test_a_name_that_is_too_long_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="File name too long"):
            create_run(tmp_path, "x" * 300)

    def test_a_dead_link_as_the_place_is_told(self, tmp_path: Path) -> None:
        """`runs` on a disk that is not mounted; in a process of its own, since it may not end."""
        (tmp_path / "runs").symlink_to(tmp_path / "not-mounted")
        script = (
            "import sys; from pathlib import Path; from ftplan.planner.errors import InputError\n"
            "from ftplan.launcher.run_dir import create_run\n"
            "try: create_run(Path(sys.argv[1]), 'mine')\n"
            "except InputError as error: print(error.message)\n"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "runs")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
        except subprocess.TimeoutExpired:
            pytest.fail("it looks for a free name for ever")
        assert done.stdout.startswith("cannot make the run directory")
        assert f"{tmp_path / 'runs'}: File exists" in done.stdout

    def test_a_name_may_lead_into_folders(self, tmp_path: Path) -> None:
        made = [create_run(tmp_path / "runs", "today/mine").root for _ in range(2)]
        assert made == [tmp_path / "runs/today" / name for name in ("mine", "mine-2")]
        (tmp_path / "runs" / "dead").symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match="dead: File exists"):
            create_run(tmp_path / "runs", "dead/mine")


class TestCheckpoints:
    def test_the_highest_step_is_the_last_not_the_last_in_the_alphabet(
        self, tmp_path: Path
    ) -> None:
        run = RunDir(tmp_path)
        for step in (9, 100, 20):
            checkpoint(run, f"checkpoint-{step}")
        assert run.last_checkpoint() == run.checkpoints / "checkpoint-100"

    @settings(max_examples=25)
    @given(st.sets(st.integers(0, 10**12), min_size=1, max_size=5))
    def test_steps_are_compared_as_numbers(self, steps: set[int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run = RunDir(Path(folder))
            for step in steps:
                checkpoint(run, f"checkpoint-{step}")
            assert run.last_checkpoint() == run.checkpoints / f"checkpoint-{max(steps)}"

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("part/rng.pth", None, "`part/rng.pth` is missing"),
            ("trainer_state.json", "", "`trainer_state.json` has 0 bytes instead of 16"),
            ("model.safetensors", "of checkpoint-9!", None),
            (MANIFEST, None, "it has no whole `manifest.json`"),
            (MANIFEST, '{"schema": 1, "files": {"a"', "it has no whole `manifest.json`"),
            (MANIFEST, '{"files": {"trainer_state.json": {}}}', "`manifest.json` is damaged"),
        ],
    )
    def test_one_that_is_not_what_was_written_is_passed_over(
        self, tmp_path: Path, name: str, content: str | None, said: str | None
    ) -> None:
        """Sizes are looked at always, what the files hold where it is asked for."""
        run = RunDir(tmp_path)
        whole, torn = checkpoint(run, "checkpoint-5"), checkpoint(run, "checkpoint-10")
        if content is None:
            (torn / name).unlink()
        else:
            (torn / name).write_text(content)
        told: list[str] = []
        assert run.last_checkpoint(told.append, hashes=True) == whole
        hashed = "`model.safetensors` holds something else than was written"
        assert told == [f"checkpoint-10 is damaged and passed over: {said or hashed}"]
        assert run.last_checkpoint() == (torn if said is None else whole)

    def test_a_large_file_is_hashed_in_pieces(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(manifest, "_PIECE_BYTES", 1000)
        folder = tmp_path / "checkpoint-1"
        folder.mkdir()
        content = bytes(range(256)) * 10
        (folder / "optimizer.pt").write_bytes(content)
        seal(folder, {})
        (kept,) = read_manifest(folder)["files"].values()
        pieces = [content[start : start + 1000] for start in (0, 1000, 2000)]
        assert kept["sha256"] == [hashlib.sha256(piece).hexdigest() for piece in pieces]
        assert damage(folder, hashes=True) is None
        (folder / "optimizer.pt").write_bytes(content[:-1] + b"\0")
        assert damage(folder) is None and damage(folder, hashes=True)

    def test_other_folders_and_files_are_passed_over(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path)
        others = ("checkpoint-best", "checkpoint-", "checkpoint--1", "checkpoint-²")
        for name in (*others, "tmp-checkpoint-9"):
            checkpoint(run, name)
        (run.checkpoints / "checkpoint-7").touch()
        assert run.last_checkpoint() is None

    def test_none_without_a_folder(self, tmp_path: Path) -> None:
        assert RunDir(tmp_path).last_checkpoint() is None


class TestSetAside:
    RESULTS = (
        "metrics.jsonl",
        "status.json",
        "stdout.log",
        "stderr.log",
        "environment.json",
        "record.json",
        "adapter/adapter_model.safetensors",
        "checkpoints/checkpoint-5/trainer_state.json",
        "notes of mine.txt",
        ".hidden",
    )

    def with_results(self, root: Path, attempt: str) -> RunDir:
        run = planned(root)
        for name in self.RESULTS:
            write_text(root / name, attempt)
        return run

    def test_results_move_inputs_stay_and_nothing_is_lost(self, tmp_path: Path) -> None:
        inputs = tree(planned(tmp_path).root)
        run = self.with_results(tmp_path, "first")
        assert run.set_results_aside() == tmp_path / "previous" / "1"
        moved = {f"previous/1/{name}": "first" for name in self.RESULTS}
        assert tree(tmp_path) == {**inputs, **moved}
        assert not run.finished
        assert run.last_checkpoint() is None

    def test_every_attempt_has_its_number(self, tmp_path: Path) -> None:
        inputs = tree(planned(tmp_path).root)
        expected = dict(inputs)
        for number, attempt in enumerate(("first", "second", "third"), start=1):
            run = self.with_results(tmp_path, attempt)
            assert run.set_results_aside() == run.previous / str(number)
            expected |= {f"previous/{number}/{name}": attempt for name in self.RESULTS}
        assert tree(tmp_path) == expected

    def test_without_results_nothing_is_moved(self, tmp_path: Path) -> None:
        run = planned(tmp_path)
        before = tree(tmp_path)
        assert run.set_results_aside() is None
        assert tree(tmp_path) == before
        assert not run.previous.exists()
        write_json(run.record, {})
        run.set_results_aside()
        assert run.set_results_aside() is None, "earlier attempts are no results"

    def test_what_a_link_points_to_stays_where_it_is(self, tmp_path: Path) -> None:
        elsewhere = tmp_path / "large disk"
        elsewhere.mkdir()
        (elsewhere / "weights").write_text("w")
        run = planned(tmp_path / "run")
        run.checkpoints.symlink_to(elsewhere)
        target = run.set_results_aside()
        assert target is not None
        assert (target / "checkpoints").is_symlink()
        assert os.path.samefile(target / "checkpoints", elsewhere)
        assert tree(elsewhere) == {"weights": "w"}

    def test_a_relative_run_is_moved_within_itself(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = self.with_results(Path("runs/mine"), "first")
        assert run.set_results_aside() == Path("runs/mine/previous/1")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
