"""What is shown while a run goes on where there is no terminal, and how work that takes long tells
of itself."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from ftplan.launcher import live
from ftplan.launcher.live import LiveView, with_progress
from ftplan.launcher.ui import Ui

MIB = 1024**2
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": number,
        "loss": 2.0 - number / 100,
        "seconds": 2.0,
        "tokens_per_second": 1234.5,
        "allocated_bytes": 512 * MIB,
    }
    return {**row, **changes}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that is set by hand: `clock[0] = 5.0`."""
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    yield now
    monkeypatch.undo()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def ui(log: io.StringIO) -> Ui:
    return Ui(stdout=io.StringIO(), stderr=log, width=80)


class TestQuietLines:
    def test_rows_are_counted_while_the_data_is_read(
        self, ui: Ui, log: io.StringIO, clock: list[float]
    ) -> None:
        with LiveView(ui, total_steps=20) as view:
            view.update({"stage": "reading the data"}, [])
            for rows in (2_560, 2_816, 4_096, 20_000, 25_600):
                clock[0] += 2
                view.update({"stage": "reading the data", "rows": rows, "of_rows": 25_600}, [])
            view.update({"stage": "training", "step": 0}, [])
        assert log.getvalue() == (
            "[   0.00 s] reading the data\n"
            "[   2.00 s] reading the data: 2,560 of 25,600 rows\n"
            "[   8.00 s] reading the data: 20,000 of 25,600 rows\n"
            "[     10 s] reading the data: 25,600 of 25,600 rows\n"
            "[     10 s] training\n"
        )

    def test_a_run_of_20_steps(self, ui: Ui, log: io.StringIO, clock: list[float]) -> None:
        rows: list[dict[str, Any]] = []
        with LiveView(ui, total_steps=20) as view:
            view.update({}, rows)
            view.update({}, rows)
            clock[0] = 6.5
            view.update({"stage": "loading the model", "pid": 1}, rows)
            rows.append({"event": "evaluation", "when": "before", "eval_loss": 2.5})
            clock[0] = 13
            view.update({"stage": "training", "step": 0}, rows)
            for number in range(1, 8):
                rows.append(step(number))
                clock[0] += 2
                view.update({"stage": "training", "step": 0}, rows)
            clock[0] = 3725
            view.update({"stage": "finished"}, rows)
        assert log.getvalue() == (
            "[   0.00 s] starting\n"
            "[   6.50 s] loading the model\n"
            "[     13 s] training\n"
            "[     17 s] step 2/20, loss 1.980, 1,234 tokens/s, 512.0 MiB, 36 s left\n"
            "[     21 s] step 4/20, loss 1.960, 1,234 tokens/s, 512.0 MiB, 32 s left\n"
            "[     25 s] step 6/20, loss 1.940, 1,234 tokens/s, 512.0 MiB, 28 s left\n"
            "[1 h 02 min] finished\n"
        )
        assert isinstance(ui.stdout, io.StringIO)
        assert ui.stdout.getvalue() == "", "stdout stays data"

    @pytest.mark.parametrize("total_steps", [1, 10, 1000])
    def test_about_ten_lines_whatever_the_length(
        self, ui: Ui, log: io.StringIO, total_steps: int
    ) -> None:
        with LiveView(ui, total_steps) as view:
            for number in range(1, total_steps + 1):
                view.update({}, [step(number)])
        assert len(log.getvalue().splitlines()) == 1 + min(10, total_steps)

    def test_a_plan_that_does_not_say_how_many_steps_shows_every_one(
        self, ui: Ui, log: io.StringIO
    ) -> None:
        with LiveView(ui, total_steps=0) as view:
            view.update({"stage": "training"}, [step(1)])
        assert "step 1/0" in log.getvalue()

    @pytest.mark.parametrize("unknown", ["tokens_per_second", "allocated_bytes"])
    def test_what_is_not_known_is_left_out(
        self, ui: Ui, log: io.StringIO, clock: list[float], unknown: str
    ) -> None:
        facts = {"tokens_per_second": "1,234 tokens/s, ", "allocated_bytes": "512.0 MiB, "}
        view = LiveView(ui, total_steps=1)
        view.update({}, [step(1, **{unknown: None})])
        whole = "step 1/1, loss 1.990, 1,234 tokens/s, 512.0 MiB, 0.00 s left"
        expected = whole.replace(facts[unknown], "")
        assert log.getvalue().splitlines()[-1] == f"[   0.00 s] {expected}"

    def test_a_loss_that_has_gone_astray_is_shown(self, ui: Ui, log: io.StringIO) -> None:
        LiveView(ui, total_steps=1).update({}, [step(1, loss=float("nan"))])
        assert "loss nan," in log.getvalue()

    def test_what_happened_is_told_once_and_does_not_break_a_line(
        self, ui: Ui, log: io.StringIO
    ) -> None:
        event = {"event": "skipped", "said": "step 2 was skipped: nan\x1b[2J in\nrow 3"}
        with LiveView(ui, total_steps=0) as view:
            for rows in ([step(1)], [step(1), event], [step(1), event, step(2)]):
                view.update({"stage": "training"}, rows)
        told = [line for line in log.getvalue().splitlines() if "skipped" in line]
        assert [line.split("] ")[1] for line in told] == ["step 2 was skipped: nan [2J in row 3"]

    def test_a_resumed_run_does_not_tell_again_what_it_told_before(
        self, ui: Ui, log: io.StringIO
    ) -> None:
        before, now = {"event": "x", "said": "long ago"}, {"event": "x", "said": "just now"}
        with LiveView(ui, total_steps=0, resumes=True) as view:
            view.update({}, [before])
            view.update({}, [before, now])
            view.update({"notices": ["no room"]}, [before, now])
            view.update({"notices": ["no room", "room again"]}, [before, now])
        assert "just now" in log.getvalue() and "long ago" not in log.getvalue()
        warned = [line for line in log.getvalue().splitlines() if "warning" in line]
        assert warned == ["warning: no room", "warning: room again"]

    def test_the_time_left_follows_the_latest_steps(self, ui: Ui, log: io.StringIO) -> None:
        """The first steps hold the longest rows and warm things up."""
        rows = [step(1, seconds=500.0), *(step(number, seconds=1.0) for number in range(2, 11))]
        LiveView(ui, total_steps=20).update({}, rows)
        assert log.getvalue().endswith(" 10 s left\n")


class TestProgress:
    """Each item takes as many seconds as its number says."""

    def items(self, clock: list[float], seconds: list[float]) -> Iterator[float]:
        for number in seconds:
            clock[0] += number
            yield number

    def shown(self, ui: Ui, seconds: list[float]) -> list[float]:
        clock = [0.0]
        items = self.items(clock, seconds)
        return list(with_progress(ui, items, len(seconds), "cases", lambda: clock[0]))

    def test_what_is_soon_over_shows_none(self, ui: Ui, log: io.StringIO) -> None:
        assert self.shown(ui, [0.1] * 19) == [0.1] * 19
        assert log.getvalue() == ""

    def test_a_line_each_tenth_from_two_seconds_on(self, ui: Ui, log: io.StringIO) -> None:
        assert self.shown(ui, [0.5] * 40) == [0.5] * 40
        lines = log.getvalue().splitlines()
        assert lines == [f"{done} of 40 cases" for done in range(4, 40, 4)]

    def test_a_bar_in_a_terminal(self) -> None:
        terminal = Terminal()
        ui = Ui(stdout=io.StringIO(), stderr=terminal, width=80)
        assert self.shown(ui, [0.1] * 10) == [0.1] * 10
        assert terminal.getvalue() == ""
        assert self.shown(ui, [3.0] * 4) == [3.0] * 4
        assert HIDE_CURSOR in terminal.getvalue() and "cases" in terminal.getvalue()

    def test_the_bar_is_gone_when_work_is_interrupted(self) -> None:
        terminal = Terminal()
        ui = Ui(stdout=io.StringIO(), stderr=terminal, width=80)
        clock = [0.0]

        def items() -> Iterator[float]:
            yield from self.items(clock, [3.0] * 2)
            assert terminal.getvalue().startswith(HIDE_CURSOR)
            assert SHOW_CURSOR not in terminal.getvalue()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(with_progress(ui, items(), 4, "cases", lambda: clock[0]))
        assert SHOW_CURSOR in terminal.getvalue()
