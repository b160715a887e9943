"""The dry run before a launch: what it changes in a plan, and what happens when it disagrees."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ftplan.launcher import confirm as confirm_module
from ftplan.launcher.confirm import confirm
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.launching import predicted
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.ui import Ui
from ftplan.planner.allocator import AllocatorPeaks
from ftplan.planner.dry_run_summary import DryRunSummary
from ftplan.planner.errors import DoesNotFitError, InputError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.margin import Margin
from ftplan.planner.phases import COMPONENTS, Phase
from ftplan.planner.units import GIB
from ftplan.profiles import find_gpu


def summary_of(required_bytes: int) -> DryRunSummary:
    """A dry run that needs so much."""
    peaks = AllocatorPeaks(reserved_peak_bytes=required_bytes, required_bytes=required_bytes)
    components = dict.fromkeys(COMPONENTS, 0) | {"weights": required_bytes}
    return DryRunSummary(
        num_parameters=1,
        num_trainable_parameters=1,
        trained_weight_bytes=4,
        num_layers=1,
        num_layers_traced=1,
        phases=(Phase(name="forward", components=components),),
        allocator=peaks,
        expandable=peaks,
        peak_position=0,
        modules=(),
        tensors=(),
        num_events=1,
        curve=((0, required_bytes),),
        phase_starts=((0, "forward"),),
    )


class Runner:
    """Answers dry runs in order and remembers what it was asked."""

    def __init__(self, answers: list[int | InputError]) -> None:
        self.answers = answers
        self.cases: list[DryRunCase] = []

    def run(self, case: DryRunCase) -> DryRunSummary:
        self.cases.append(case)
        answer = self.answers.pop(0)
        if isinstance(answer, InputError):
            raise answer
        return summary_of(answer)


def row(name: str, repeats: int) -> str:
    return json.dumps({"prompt": f"Why {name}?", "completion": "A reason. " * repeats}) + "\n"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row(f"{number:02d}", repeats=1) for number in range(64)))
    return path


@pytest.fixture
def ui() -> Ui:
    return Ui(stdout=io.StringIO(), stderr=io.StringIO(), width=100)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    def answer(*answers: int | InputError) -> Runner:
        runner = Runner(list(answers))

        @contextmanager
        def runs(ui: Ui) -> Iterator[Runner]:
            yield runner

        monkeypatch.setattr(confirm_module, "shown_dry_runs", runs)
        return runner

    return answer


def planned(ui: Ui, rows: Path, device: Device, **given: Any) -> Planned:
    return make_plan(
        ui,
        asked=DataAsked(paths=(str(rows),)),
        model_name="qwen2.5-7b",
        named_device=device,
        given=given,
        runs_dir=rows.parent / "runs",
        for_launch=False,
    )


def told(ui: Ui) -> str:
    file = ui.err.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


L4 = find_gpu("l4").device()


def test_a_plan_that_fits_takes_the_dry_runs_memory(
    ui: Ui, rows: Path, answering: Callable[..., Runner]
) -> None:
    before = planned(ui, rows, L4)
    runner = answering(17 * GIB)
    after = confirm(ui, before)
    assert after.confirmed and not before.confirmed
    assert after.chosen.memory.allocated_peak_bytes == 17 * GIB
    assert after.chosen.reasoned == before.chosen.reasoned
    assert runner.cases[0].row_length == before.profile.longest
    assert not runner.cases[0].padded, "all rows have one length"


def test_what_was_estimated_before_is_kept_for_the_record(
    ui: Ui, rows: Path, answering: Callable[..., Runner]
) -> None:
    before = planned(ui, rows, L4)
    answering(17 * GIB)
    after = confirm(ui, before)
    closed_form = before.chosen.memory
    assert after.closed_form == closed_form
    figures = predicted(after)
    assert figures["closed_form_device_bytes"] == closed_form.device_peak_bytes
    assert figures["device_bytes"] == after.chosen.memory.device_peak_bytes
    assert predicted(before)["closed_form_device_bytes"] is None


@pytest.mark.parametrize(("share", "confirmed"), [(0.01, True), (0.05, False)])
def test_runs_on_the_card_decide_what_a_dry_run_leaves_free(
    share: float, confirmed: bool, ui: Ui, rows: Path, answering: Callable[..., Runner]
) -> None:
    before = planned(ui, rows, L4)
    offer = structs.replace(before.offer, margin=Margin(share=share, num_runs=3))
    most = round(L4.free_bytes / 1.03) - L4.context_bytes
    answering(most, 8 * GIB)
    after = confirm(ui, structs.replace(before, offer=offer))
    assert (after.chosen.plan == before.chosen.plan) is confirmed


def test_the_next_plan_is_tried_when_the_dry_run_needs_too_much(
    ui: Ui, rows: Path, answering: Callable[..., Runner]
) -> None:
    before = planned(ui, rows, L4)
    assert before.ranking.alternatives
    answering(40 * GIB, 8 * GIB)
    after = confirm(ui, before)
    assert after.chosen.plan == before.ranking.alternatives[0].plan
    assert f"{before.chosen.plan.method} needs" in told(ui)


def test_no_plan_left_is_an_error_that_says_by_how_much(
    ui: Ui, rows: Path, answering: Callable[..., Runner]
) -> None:
    before = planned(ui, rows, L4)
    answering(*[40 * GIB] * (1 + len(before.ranking.alternatives)))
    with pytest.raises(DoesNotFitError, match=r"by dry run no plan fits L4: .* GiB are missing"):
        confirm(ui, before)


def test_a_dry_run_that_fails_leaves_the_closed_form(
    ui: Ui, rows: Path, answering: Callable[..., Runner]
) -> None:
    before = planned(ui, rows, L4)
    answering(InputError("a dry run needs trl"))
    assert confirm(ui, before) is before
    assert "a dry run needs trl; the closed form's figures stand" in told(ui)


def test_a_processor_with_plenty_of_memory_is_not_kept_waiting(
    ui: Ui, rows: Path, answering: Callable[..., Runner]
) -> None:
    cpu = structs.replace(L4, kind="cpu", name="CPU", free_bytes=900 * GIB, total_bytes=900 * GIB)
    before = planned(ui, rows, cpu, max_steps=1)
    runner = answering()
    assert confirm(ui, before) is before
    assert not runner.cases


def test_rows_of_unlike_length_are_padded(
    ui: Ui, rows: Path, answering: Callable[..., Runner]
) -> None:
    with rows.open("a") as file:
        file.writelines(row("?", repeats) for repeats in range(2, 40))
    before = planned(ui, rows, L4, per_device_train_batch_size=4)
    runner = answering(8 * GIB)
    confirm(ui, before)
    assert runner.cases[0].padded
    assert runner.cases[0].row_length == min(before.profile.longest, before.chosen.plan.max_length)
