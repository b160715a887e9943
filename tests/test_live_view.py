"""The view of a run in a terminal: what stands in it, and how a terminal of any size shows it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from ftplan.launcher.braille import curve
from ftplan.launcher.gpu_samples import GpuSample, Sample
from ftplan.launcher.live import LiveView
from ftplan.launcher.live_view import Watched, said_events, view
from ftplan.launcher.screen import Screen
from ftplan.launcher.ui import Ui
from ftplan.planner.units import GIB

pyte = pytest.importorskip("pyte", reason="needs the `dev` extra")

PREDICTED = {
    "allocated_bytes": 10 * GIB,
    "device_bytes": 20 * GIB,
    "tokens_per_second_per_gpu": 1000.0,
    "train_seconds": 400.0,
}
GPU = GpuSample(
    index=0,
    name="NVIDIA L4",
    total_bytes=24 * GIB,
    used_bytes=21 * GIB,
    run_bytes=18 * GIB,
    utilization=0.97,
    temperature_celsius=71.0,
    power_watts=65.0,
    power_limit_watts=72.0,
)


def step(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": number,
        "loss": 1.5 + math.exp(-number / 10),
        "grad_norm": 0.8,
        "learning_rate": 2e-4,
        "epoch": number / 20,
        "seconds": 2.0,
        "tokens": 2200,
        "tokens_per_second": 1100.0,
        "allocated_bytes": 11 * GIB,
    }
    return {**row, **changes}


def watched(steps: int = 30, **changes: Any) -> Watched:
    told: dict[str, Any] = {
        "name": "tiny-llama-lora-rows",
        "total_steps": 100,
        "predicted": PREDICTED,
        "status": {"stage": "training"},
        "rows": [step(number) for number in range(1, steps + 1)],
        "sample": Sample(at=0.0, gpus=(GPU,)),
        "elapsed_seconds": 150.0,
        "checkpoint": "checkpoint-20",
    }
    return Watched(**{**told, **changes})


def lines_of(what: Watched, width: int, height: int) -> list[str]:
    return [line.plain.rstrip() for line in view(what, width, height)]


class TestView:
    def test_eighty_columns(self) -> None:
        lines = lines_of(watched(), 80, 23)
        assert lines[0] == "tiny-llama-lora-rows" + " " * 40 + "training  2 min 30 s"
        assert lines[1].startswith("━") and lines[1].endswith("30/100 steps, 2 min 20 s left")
        assert lines[-5:] == [
            "loss       1.550  learning rate 2.00e-04  gradient norm 0.8  epoch 1.50",
            "speed      1,100 tokens/s  predicted 1,000 (+10 %)  2.00 s a step",
            "tensors    11.0 GiB  predicted 10.0 GiB (+10 %)",
            "GPU 0      21.0 GiB of 24.0 GiB  97 %  71 °C  65 of 72 W",
            "saved      checkpoint-20",
        ]
        assert lines[2].strip().startswith("2.40") and "1.55" in lines[-7]

    @pytest.mark.parametrize("width", [20, 40, 80, 120, 200])
    @pytest.mark.parametrize("height", [2, 5, 9, 23, 49])
    @pytest.mark.parametrize("steps", [0, 1, 2, 500])
    def test_it_fits_whatever_the_size(self, width: int, height: int, steps: int) -> None:
        lines = view(watched(steps, sample=Sample(at=0.0, gpus=(GPU,) * 8)), width, height)
        assert 0 < len(lines) <= height
        assert all(line.cell_len <= width for line in lines)
        assert any("steps" in line.plain for line in lines) or height < 2 or width == 20

    def test_few_rows_leave_out_what_matters_least(self) -> None:
        text = "\n".join(lines_of(watched(), 40, 8))
        assert "loss" in text and "1,100 tokens/s  (+10 %)" in text
        assert "saved" not in text
        assert "⠀" in text, "a curve of two rows"

    def test_many_gpus_share_a_line_where_rows_are_few(self) -> None:
        sample = Sample(at=0.0, gpus=(GPU,) * 8)
        assert "8 GPUs" in "\n".join(lines_of(watched(sample=sample), 80, 15))
        assert "8 GPUs" not in "\n".join(lines_of(watched(sample=sample), 80, 49))

    def test_without_a_gpu_the_process_is_shown(self) -> None:
        sample = Sample(at=0.0, process_bytes=21 * GIB, cores=1.94)
        lines = lines_of(watched(sample=sample), 80, 23)
        assert "process    21.0 GiB  predicted 20.0 GiB (+5 %)  1.9 cores busy" in lines

    def test_a_gpu_that_tells_nothing_is_said(self) -> None:
        sample = Sample(at=0.0, gpus=(GpuSample(index=3, name="?"),))
        text = "\n".join(lines_of(watched(sample=sample, predicted={}), 80, 23))
        assert "GPU 3      the driver tells nothing of it" in text

    def test_before_the_first_step_the_prediction_stands_for_the_time_left(self) -> None:
        assert lines_of(watched(0), 80, 23)[1].endswith(" 0/100 steps, about 6 min 40 s")

    def test_reading_the_data_has_the_bar(self) -> None:
        status = {"stage": "reading the data", "rows": 500, "of_rows": 1000}
        bar = lines_of(watched(0, status=status), 80, 23)[1]
        assert bar.endswith(" 500 of 1,000 rows")
        assert abs(bar.count("━") - bar.count("─")) <= 1

    def test_what_happened_is_said_without_control_characters(self) -> None:
        rows = [step(1), {"event": "skipped", "said": "row\x1b[2J\u202e is nan"}]
        assert said_events(rows) == ["row [2J  is nan"]

    def test_a_terminal_without_utf_8_gets_no_braille(self) -> None:
        text = "\n".join(lines_of(watched(ascii_only=True), 80, 23))
        assert text.isascii() and "===" in text

    def test_a_loss_that_is_no_number_leaves_a_gap(self) -> None:
        rows = [step(1), step(2, loss=float("nan")), step(3, loss=float("inf"))]
        text = "\n".join(lines_of(watched(rows=rows), 80, 23))
        assert "loss       inf" in text


class TestCurve:
    def test_a_line_from_corner_to_corner(self) -> None:
        assert curve([1.0, 0.0], 2, 1) == (["⠑⢄"], 0.0, 1.0)

    def test_steps_of_a_column_are_joined(self) -> None:
        lines, _, _ = curve([0.0, 1.0], 1, 1)
        assert lines == ["⡸"]

    def test_more_values_than_columns_are_averaged(self) -> None:
        _, low, high = curve([0.0, 2.0, 4.0, 6.0], 1, 2)
        assert (low, high) == (1.0, 5.0)

    def test_nothing_and_one_value(self) -> None:
        assert curve([], 3, 1)[0] == ["⠀⠀⠀"]
        assert curve([2.0], 3, 1)[1:] == (2.0, 2.0)
        assert curve([float("nan")] * 9, 3, 2)[0] == ["⠀⠀⠀"] * 2


class FakeTerminal(io.StringIO):
    """A terminal whose screen can be looked at."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.screen = pyte.Screen(width, height)
        self.stream = pyte.Stream(self.screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.stream.feed(text.replace("\n", "\r\n"))
        return super().write(text)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]


@pytest.fixture
def terminal() -> FakeTerminal:
    return FakeTerminal(60, 12)


@pytest.fixture
def console(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setenv("TERM", "xterm-256color")
    return Console(file=terminal, width=60, height=12, highlight=False)


def texts(*lines: str) -> Sequence[Any]:
    from rich.text import Text

    return [Text(line) for line in lines]


class TestScreen:
    def test_lines_are_replaced_in_place(self, terminal: FakeTerminal, console: Console) -> None:
        console.print("above")
        with Screen(console) as screen:
            screen.paint(texts("one", "two"))
            screen.paint(texts("one", "2"))
            assert terminal.lines[:4] == ["above", "one", "2", ""]
            screen.paint(texts("1"))
            assert terminal.lines[:4] == ["above", "1", "", ""]
            screen.paint(texts("1", "2", "3"))
            assert terminal.screen.cursor.hidden
        console.print("after")
        assert terminal.lines[:6] == ["above", "1", "2", "3", "after", ""]
        assert not terminal.screen.cursor.hidden

    def test_only_what_changed_is_written(self, terminal: FakeTerminal, console: Console) -> None:
        with Screen(console) as screen:
            screen.paint(texts("first line", "second line"))
            terminal.truncate(0)
            screen.paint(texts("first line", "second line"))
            assert terminal.getvalue() == ""
            screen.paint(texts("first line", "2nd line"))
            assert "2nd line" in terminal.getvalue() and "first" not in terminal.getvalue()

    def test_what_is_printed_meanwhile_goes_above(
        self, terminal: FakeTerminal, console: Console
    ) -> None:
        with Screen(console) as screen:
            screen.paint(texts("one", "two"))
            console.print("a message of some words", soft_wrap=True)
            console.print("and another")
            screen.paint(texts("one", "three"))
        assert terminal.lines[:5] == ["a message of some words", "and another", "one", "three", ""]

    def test_a_narrower_terminal_is_drawn_anew(
        self, terminal: FakeTerminal, console: Console
    ) -> None:
        """pyte cuts lines off where other terminals break them, so that those above go too."""
        with Screen(console) as screen:
            screen.paint(texts("x" * 60, "y" * 60))
            terminal.screen.resize(12, 30)
            console.width = 30
            screen.paint(texts("x" * 30, "y" * 30))
            screen.paint(texts("a", "b"))
        assert [line for line in terminal.lines if line] == ["a", "b"]

    def test_an_interrupted_view_leaves_a_clean_terminal(
        self, terminal: FakeTerminal, console: Console
    ) -> None:
        with pytest.raises(KeyboardInterrupt), Screen(console) as screen:
            screen.paint(texts("one"))
            terminal.write("^C")
            raise KeyboardInterrupt
        console.print("after")
        assert terminal.lines[:3] == ["one", "after", ""]
        assert not terminal.screen.cursor.hidden

    def test_no_color_is_heeded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("NO_COLOR", "1")
        terminal = FakeTerminal(80, 24)
        with LiveView(Ui(stdout=io.StringIO(), stderr=terminal, width=80), 100) as live:
            live.update({"stage": "training"}, [step(1), step(2)])
        assert not re.search(r"\x1b\[[\d;]*3\dm", terminal.getvalue())
        assert "training" in terminal.getvalue()


class TestLiveView:
    def test_a_whole_run_stays_on_the_screen_at_its_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("LINES", "24")
        terminal = FakeTerminal(80, 24)
        ui = Ui(stdout=io.StringIO(), stderr=terminal, width=80)
        rows: list[dict[str, Any]] = []
        with LiveView(ui, 20, name="tiny", predicted=PREDICTED) as live:
            live.update({}, rows)
            for number in range(1, 21):
                rows.append(step(number))
                live.update({"stage": "training"}, rows)
            rows.append({"event": "x", "said": "what happened"})
            live.update({"stage": "finished"}, rows)
        ui.err.print("the report")
        shown = [line for line in terminal.lines if line]
        assert shown[0].endswith("] what happened")
        assert shown[1].startswith("tiny") and "finished" in shown[1]
        assert "20/20 steps" in shown[2]
        assert shown[-1] == "the report"
        assert sum("tokens/s" in line for line in shown) == 1

    def test_a_dumb_terminal_gets_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "dumb")
        terminal = FakeTerminal(80, 24)
        with LiveView(Ui(stdout=io.StringIO(), stderr=terminal, width=80), 1) as live:
            live.update({"stage": "training"}, [step(1)])
        assert "] step 1/1, loss" in terminal.getvalue()
