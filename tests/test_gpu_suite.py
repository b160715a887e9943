"""The suite that measures GPUs, on the processor and on paper."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import processes, self_test
from benchmarks.gpu.configurations import PACKAGES_OF, TIGHT_SHARES, Run, choose
from benchmarks.gpu.rows import Lines, row
from benchmarks.gpu.task import WARM_UP_STEPS, Task
from ftplan.launcher.cases import Case, read_cases
from ftplan.planner.accuracy import Comparison, Prediction
from ftplan.planner.hardware_spec import Device
from ftplan.profiles import find_gpu

# Enough hands for the choice to be one, few enough to be quick.
HANDS = 500
EVERYTHING = tuple(PACKAGES_OF)

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs the `train` extra")


def device(name: str) -> Device:
    return find_gpu(name).device()


@pytest.fixture(scope="module")
def on_a_small_card() -> list[Run]:
    return choose(device("rtx 4060"), EVERYTHING, hands=HANDS, count=30)


class TestChoice:
    def test_runs_fit_the_card_and_differ(self, on_a_small_card: list[Run]) -> None:
        free = device("rtx 4060").free_bytes
        measured = [run for run in on_a_small_card if run.tight_share is None]
        assert len(measured) == 30
        assert len({run.key for run in on_a_small_card}) == len(on_a_small_card)
        assert all(0 < run.candidate.required_bytes < free for run in measured)

    def test_the_first_show_what_people_run_most(self, on_a_small_card: list[Run]) -> None:
        first = [run.candidate.plan for run in on_a_small_card[:10]]
        assert {"full", "lora"} <= {plan.method for plan in first}
        assert {"trl", "transformers", "loop"} == {plan.trainer for plan in first}
        assert {"none", "nf4"} <= {plan.quantization for plan in first}
        assert {True, False} == {plan.gradient_checkpointing for plan in first}

    def test_a_larger_card_gets_larger_models(self, on_a_small_card: list[Run]) -> None:
        def largest(runs: list[Run]) -> int:
            return max(run.candidate.source.spec.num_parameters for run in runs)

        assert largest(choose(device("h200"), EVERYTHING, hands=HANDS)) > 5 * largest(
            on_a_small_card
        )

    def test_without_packages_what_needs_them_is_left_out(self) -> None:
        plans = [r.candidate.plan for r in choose(device("l4"), (), hands=HANDS, count=20)]
        assert len(plans) >= 20
        assert {plan.trainer for plan in plans} == {"transformers", "loop"}
        assert {plan.quantization for plan in plans} == {"none"}
        assert not any("8bit" in plan.optim for plan in plans)

    def test_some_are_left_little_memory(self, on_a_small_card: list[Run]) -> None:
        """Just more, and just less, than a run requires; never beside paged states."""
        tight = [run for run in on_a_small_card if run.tight_share is not None]
        assert [run.tight_share for run in tight] == list(TIGHT_SHARES) * (len(tight) // 2)
        assert len(tight) >= 8
        for run in tight:
            assert run.free_bytes is not None and run.tight_share is not None
            ratio = run.free_bytes / run.candidate.required_bytes
            assert ratio == pytest.approx(1 + run.tight_share)
            assert not run.candidate.plan.optimizer.paged

    def test_the_same_every_time(self, on_a_small_card: list[Run]) -> None:
        again = choose(device("rtx 4060"), EVERYTHING, hands=HANDS, count=30)
        assert [run.key for run in again] == [run.key for run in on_a_small_card]


MEASURED = {"allocated_bytes": 5 * 10**9, "reserved_bytes": None, "step_seconds": 0.5}


def kept(run: Run, answer: dict[str, Any]) -> dict[str, Any] | None:
    return row(run, answer, gpu="NVIDIA L4", software="torch 2.11.0", free_bytes=7 * 10**9)


class TestRows:
    def test_validate_reads_the_plan_that_was_run(
        self, on_a_small_card: list[Run], tmp_path: Path
    ) -> None:
        lines = Lines(tmp_path / "rows.jsonl")
        for run in on_a_small_card:
            line = kept(run, {"measured": MEASURED})
            assert line is not None
            lines.append(line)
        for run, case in zip(on_a_small_card, read_cases(lines.path), strict=True):
            assert isinstance(case, Case), case
            plan = run.candidate.case.plan
            if "target_modules" not in plan.resolved_method.takes.values():
                plan = plan.replace(target_modules=case.plan.target_modules)
            assert case.plan == plan
            assert case.kbit_prepare == run.candidate.kbit_prepare

    def test_what_was_not_measured_is_left_out(self, on_a_small_card: list[Run]) -> None:
        line = kept(on_a_small_card[0], {"measured": MEASURED, "num_parameters": 3})
        assert line is not None
        assert line["measured"] == {"allocated_bytes": 5 * 10**9, "step_seconds": 0.5}
        assert line["num_parameters"] == 3

    def test_too_little_memory_is_a_finding_and_another_failure_is_none(
        self, on_a_small_card: list[Run]
    ) -> None:
        run = on_a_small_card[0]
        tight = structs.replace(run, tight_share=-0.03)
        out = {"out_of_memory": "CUDA out of memory"}
        assert (kept(run, out) or {})["measured"] == {"failed_free_bytes": 7 * 10**9}
        assert (kept(tight, out) or {})["measured"] == {"failed_free_bytes": tight.free_bytes}
        survived = kept(tight, {"measured": MEASURED})
        assert (survived or {})["measured"] == {"survived_free_bytes": tight.free_bytes}
        assert kept(run, {"failed": "no such kernel"}) is None
        assert kept(tight, {"failed": "no such kernel"}) is None

    def test_a_line_that_was_being_written_is_cut_off(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "rows.jsonl"
        Lines(path).append({"id": "one"})
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"id": "tw')
        lines = Lines(path)
        lines.append({"id": "three"})
        assert [line["id"] for line in lines] == ["one", "three"]
        assert path.read_text() == '{"id": "one"}\n{"id": "three"}\n'


def tiny(tmp_path: Path, **axes: dict[Any, float]) -> Run:
    """A run of the self-test."""
    from ftplan.launcher.probe import probe_machine

    machine = probe_machine(environ={"CUDA_VISIBLE_DEVICES": ""})
    all_axes = {**self_test.axes(tmp_path), **axes}
    return choose(machine.cpu, (), axes=all_axes, count=1, hands=20)[0]


@needs_peft
@pytest.mark.train
class TestProcesses:
    def answer(self, run: Run, **changes: Any) -> dict[str, Any]:
        task = Task(case=structs.replace(run.candidate.case, **changes), steps=WARM_UP_STEPS + 1)
        return processes.carry_out(task, run.candidate.device, 1, 1.0)

    def test_what_cannot_be_built_is_one_failure(self, tmp_path: Path) -> None:
        run = tiny(tmp_path, trainer={"loop": 1})
        answer = self.answer(run, config={"model_type": "nonesuch"})
        assert answer["failed"].startswith("transformers cannot build this model")

    def test_a_process_that_dies_says_how(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = tmp_path / "broken" / "torch"
        broken.mkdir(parents=True)
        (broken / "__init__.py").write_text("raise SystemExit('the library is broken')")
        monkeypatch.setenv("PYTHONPATH", str(broken.parent))
        answer = self.answer(tiny(tmp_path))
        assert answer["failed"] == "ended with status 1"
        assert "the library is broken" in answer["log"]


@needs_peft
@pytest.mark.train
@pytest.mark.slow
class TestSelfTest:
    def test_the_whole_path_on_the_processor(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Runs, rows, ceilings and the comparison; a second time nothing is left to measure."""
        monkeypatch.setattr(self_test, "COUNT", 3)  # each in a process, for ten seconds
        words = ["--self-test", "--out", str(tmp_path)]
        assert command.main(words) == 0, capsys.readouterr()
        written = (tmp_path / "rows.jsonl").read_text()
        rows = [json.loads(line) for line in written.splitlines()]
        assert len(rows) == self_test.COUNT
        for line in rows:
            measured = line["measured"]
            peaks = [
                measured[f"peak_{phase}_bytes"] for phase in ("forward", "backward", "optimizer")
            ]
            assert measured["allocated_bytes"] == max(peaks)
            assert 0 < measured["after_load_bytes"] < min(peaks)
            assert 0 < measured["step_seconds"] < 60
        whats = {line["what"] for line in Lines(tmp_path / "ceilings.jsonl")}
        assert whats == {"matmul", "attention", "copy", "add", "adamw", "launch"}
        assert all("failed" not in line for line in Lines(tmp_path / "ceilings.jsonl"))
        capsys.readouterr()
        assert command.main(words) == 0
        shown = capsys.readouterr()
        assert f"{self_test.COUNT} of them there already" in shown.err
        assert (tmp_path / "rows.jsonl").read_text() == written


class TestComplaints:
    def compared(self, predicted: int) -> Comparison:
        return Comparison(
            id="one",
            source="s",
            trainer="trl",
            method="lora",
            measured={"allocated_bytes": 100},
            predicted=Prediction(
                allocated_bytes=predicted, reserved_bytes=1, device_bytes=1, required_bytes=1
            ),
        )

    def test_none_where_all_is_near(self) -> None:
        assert self_test.complaints([self.compared(102)] * self_test.COUNT, 0) == []

    def test_far_predictions_failures_and_missing_runs(self) -> None:
        far = self_test.complaints([self.compared(90)] * (self_test.COUNT - 1), 1)
        assert far[0].startswith("1 runs failed") and "-10.0 %" in far[1]
        assert self_test.complaints([self.compared(100)], 0) == ["only 1 runs were measured"]


class TestCommand:
    def test_without_a_gpu_it_says_what_can_be_done(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert command.main(["--out", "nowhere"]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: no GPU to measure") and "--self-test" in shown
        assert not Path("nowhere").exists()


class FakeAllocator:
    """torch.cuda's counters, as far as a meter looks at them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        self.now, self.peak, self.reserved, self.waits = 0, 0, 0, 0
        answers = {
            "memory_allocated": lambda: self.now,
            "max_memory_allocated": lambda: self.peak,
            "memory_reserved": lambda: self.reserved,
            "max_memory_reserved": lambda: self.reserved,
            "reset_peak_memory_stats": self.reset,
            "empty_cache": lambda: None,
            "synchronize": self.wait,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr("benchmarks.gpu.meters.bytes_beside_cache", lambda: 500)

    def reset(self) -> None:
        self.peak = self.now

    def wait(self) -> None:
        self.waits += 1

    def rise(self, to: int, *, then: int) -> None:
        """Up to so many bytes, then down again."""
        self.peak, self.now = max(self.peak, to), then
        self.reserved = max(self.reserved, to)


@needs_peft
@pytest.mark.train
def test_a_gpus_meter_keeps_the_peak_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.meters import CudaMeter

    allocator = FakeAllocator(monkeypatch)
    allocator.rise(900, then=100)  # while the model is made
    meter = CudaMeter()
    for forward, backward in ((300, 700), (350, 650)):
        meter.forward_begins()
        allocator.rise(forward, then=250)
        meter.backward_begins()
        allocator.rise(backward, then=200)
        meter.backward_ended(steps_next=True)
        allocator.rise(400, then=150)
        meter.optimizer_ended(None, None)  # type: ignore[arg-type]
    assert meter.finish() == {
        "allocated_bytes": 700,
        "reserved_bytes": 900,  # which making the model left, here where no cache is emptied
        "device_bytes": 1400,
        "after_load_bytes": 100,
        "peak_forward_bytes": 350,
        "peak_backward_bytes": 700,
        "peak_optimizer_bytes": 400,
    }
    assert allocator.waits == 2 and len(meter.step_seconds(warm_up=1)) == 1


def test_what_an_earlier_profile_left_is_not_seen_to_go() -> None:
    """torch tells of a tensor that goes, though it came before the profile, where an earlier one
    saw another come at its address."""
    torch = pytest.importorskip("torch")
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.gpu.meters import phase_peaks

    settings = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    with profile(**settings):
        earlier = [torch.ones(64 * 64) for _ in range(20)]
    del earlier
    before = [torch.ones(64 * 32) for _ in range(40)]
    with profile(**settings) as profiler:
        before.clear()
        new = torch.ones(1000)
    assert phase_peaks(profiler, 0) == {"load": new.nbytes}
