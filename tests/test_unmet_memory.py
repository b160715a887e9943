"""Why a run measured less memory than was predicted: its longest micro-batch met no gradients."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch

from ftplan.launcher.training.measure import CpuAllocationRecorder
from ftplan.launcher.training.order import PlannedOrder
from ftplan.launcher.training.trainer import StepReporter
from ftplan.launcher.ui import Ui
from ftplan.launcher.views import report, said_unmet

GIB = 2**30


def record(**measured: Any) -> dict[str, Any]:
    """Full tuning of 135 M parameters, whose gradients take half a GiB."""
    return {
        "predicted": {"allocated_bytes": int(3.27 * GIB)},
        "num_trainable_parameters": 135_000_000,
        "measured": {
            "allocated_bytes": int(2.67 * GIB),
            "micro_batch_tokens": {"first": 660, "later": 540},
            **measured,
        },
        "evaluation": {"before": 3.0, "after": 2.0, "num_rows": 4, "num_scored": 0},
        "forgetting": None,
        "samples": [],
    }


def test_the_report_says_which_batch_was_not_met() -> None:
    said = said_unmet(record())
    assert said is not None and "of 660 tokens" in said and "had 540" in said
    out = io.StringIO()
    Ui(stdout=out, stderr=io.StringIO()).show(report(record()))
    assert "of 660 tokens" in " ".join(out.getvalue().split())


@pytest.mark.parametrize(
    "measured",
    [
        {"micro_batch_tokens": {"first": 540, "later": 660}},
        {"micro_batch_tokens": {"first": 660, "later": 0}},  # one micro-batch a step
        {"micro_batch_tokens": None},  # an older run
        {"allocated_bytes": int(3.25 * GIB)},
        {"allocated_bytes": 2 * GIB},  # more than gradients explain
        {"allocated_bytes": None},
    ],
)
def test_nothing_is_said_where_that_is_not_why(measured: dict[str, Any]) -> None:
    assert said_unmet(record(**measured)) is None


class Base:
    def training_step(self, model: Any, inputs: Any, *more: Any) -> None: ...

    def get_tp_size(self) -> int:
        return 1


class Ordered(PlannedOrder, Base):
    def __init__(self) -> None:
        self.step_tokens, self.step_longest = 0, [0, 0]


def test_the_longest_micro_batches_are_kept_while_memory_is_measured() -> None:
    reporter = StepReporter(SimpleNamespace(), CpuAllocationRecorder())  # type: ignore[arg-type]
    trainer: Any = Ordered()
    reporter.trainer = trainer
    args = SimpleNamespace(device=torch.device("cpu"))
    steps = [(9, 5, 7), (8, 6, 4), (3, 50, 60)]  # the third one is not profiled
    for number, tokens in enumerate(steps):
        state = SimpleNamespace(global_step=number)
        reporter.on_step_begin(args, state, None, model=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
        for count in tokens:
            trainer.training_step(None, {"input_ids": torch.zeros(1, count)})
        reporter.on_step_end(args, state, None)  # type: ignore[arg-type]
    assert reporter.longest == [9, 7]
    assert trainer.step_tokens == 113
