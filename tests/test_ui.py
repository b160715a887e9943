"""The terminal: tables and messages exactly as they are printed, and where they go."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.text import Text

from ftplan.launcher.ui import Ui, bar, table
from ftplan.planner.errors import FtplanError, InputError


class Terminal(io.StringIO):
    """A stream that says that a person reads it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def err() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def ui(out: io.StringIO, err: io.StringIO) -> Ui:
    return Ui(stdout=out, stderr=err, width=80)


def printed(stream: io.StringIO) -> str:
    """What was printed, without the blanks that fill a table's lines."""
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


class TestTables:
    def test_a_table_at_80_columns(self, ui: Ui, out: io.StringIO, err: io.StringIO) -> None:
        long = "a note that is long enough to go on in a second line"
        rows: list[list[Any]] = [
            ["NVIDIA H100 80GB HBM3", "79.6 GiB", bar(0.5), long],
            ["T4", "0 B", bar(0.001), ""],
            ["[red]x[/red]", "1", bar(2), ":smile:"],
        ]
        ui.show(table("GPUs", ("name", ">free", "share", "note"), rows), "", "the end")
        assert printed(out) == (
            "GPUs\n"
            "name                        free   share                  note\n"
            "────────────────────────────────────────────────────────────────────────────────\n"
            "NVIDIA H100 80GB HBM3   79.6 GiB   ██████████··········   a note that is long\n"
            "                                                          enough to go on in a\n"
            "                                                          second line\n"
            "T4                           0 B   ▏\n"
            "[red]x[/red]                   1   ████████████████████   :smile:\n"
            "\n"
            "the end"
        )
        assert err.getvalue() == ""

    def test_where_room_is_short_only_the_last_column_folds(self, out: io.StringIO) -> None:
        rows = [["a name that is long", "12", "word by word"]]
        Ui(stdout=out, width=31).show(table("", ("name", ">n", "note"), rows))
        assert printed(out).strip().splitlines() == [
            "name                   n   note",
            "───────────────────────────────",
            "a name that is long   12   word",
            "                           by",
            "                           word",
        ]

    def test_without_rows_the_heads_are_left(self, ui: Ui, out: io.StringIO) -> None:
        ui.show(table("None", ("name", ">size"), []))
        assert printed(out).splitlines()[:2] == ["None", "name   size"]

    @pytest.mark.parametrize(
        ("share", "text"),
        [
            (0, "·" * 20),
            (-1, "·" * 20),
            (1e-9, "▏" + " " * 19),
            (0.024, "▏" + " " * 19),
            (0.026, "█" + "·" * 19),
            (0.5, "█" * 10 + "·" * 10),
            (1, "█" * 20),
            (1.5, "█" * 20),
        ],
    )
    def test_a_bar_has_one_width(self, share: float, text: str) -> None:
        assert bar(share).plain == text


class TestMessages:
    def test_they_go_to_stderr_whole_words_at_80_columns(
        self, ui: Ui, out: io.StringIO, err: io.StringIO
    ) -> None:
        ui.say("reading the rows with the model's tokenizer ...")
        ui.warn(
            "the plan needs 31.4 GiB, 22.0 GiB is free on NVIDIA L4 now; it may end with an "
            "out-of-memory error"
        )
        ui.fail(InputError("`[b]x[/b]` is not a run directory", "runs are made by `ftplan auto`"))
        ui.fail(FtplanError("nothing to be done"))
        assert err.getvalue() == (
            "reading the rows with the model's tokenizer ...\n"
            "warning: the plan needs 31.4 GiB, 22.0 GiB is free on NVIDIA L4 now; it may end \n"
            "with an out-of-memory error\n"
            "error: `[b]x[/b]` is not a run directory\n"
            "hint: runs are made by `ftplan auto`\n"
            "error: nothing to be done\n"
        )
        assert out.getvalue() == ""

    def test_lines_to_be_copied_are_never_broken(self, ui: Ui, out: io.StringIO) -> None:
        line = "ftplan launch " + "a/long/path/" * 12
        ui.show_lines([line, "second"])
        assert out.getvalue() == f"{line}\nsecond\n"

    def test_under_json_stdout_holds_one_object_and_nothing_else(
        self, out: io.StringIO, err: io.StringIO
    ) -> None:
        ui = Ui(as_json=True, stdout=out, stderr=err, width=80)
        ui.show("a table")
        ui.show_lines(["a line"])
        ui.say("a word")
        ui.json({"a": "é 数 \ud800", "b": [1.5, None]})
        assert json.loads(out.getvalue()) == {"a": "é 数 \ud800", "b": [1.5, None]}
        assert out.getvalue().isascii(), "valid in any encoding"
        assert err.getvalue() == "a word\n"

    def test_without_json_no_object_is_printed(self, ui: Ui, out: io.StringIO) -> None:
        ui.json({"a": 1})
        assert out.getvalue() == ""


class TestQuestions:
    @pytest.mark.parametrize(
        ("answer", "agreed"),
        [("", True), ("y", True), (" YES ", True), ("n", False), ("no", False), ("what", False)],
    )
    def test_the_empty_answer_is_yes(
        self,
        ui: Ui,
        err: io.StringIO,
        monkeypatch: pytest.MonkeyPatch,
        answer: str,
        agreed: bool,
    ) -> None:
        monkeypatch.setattr("builtins.input", lambda *prompt: answer)
        assert ui.confirm("Start this run?") is agreed
        assert err.getvalue() == "Start this run? [Y/n] "

    def test_the_end_of_the_input_is_no(self, ui: Ui, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert not ui.confirm("Start this run?")

    @pytest.mark.parametrize("stdin", [io.StringIO, Terminal])
    @pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
    def test_somebody_is_there_where_both_ends_are_terminals(
        self,
        stdin: Callable[[], io.StringIO],
        stderr: Callable[[], io.StringIO],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("sys.stdin", stdin())
        assert Ui(stdout=io.StringIO(), stderr=stderr()).interactive is (
            stdin is stderr is Terminal
        )


class TestWidth:
    @pytest.mark.parametrize(
        ("columns", "width"),
        [(None, 100), ("60", 60), ("0", 100), ("", 100), ("wide", 100), ("-5", 100)],
    )
    def test_away_from_a_terminal_it_is_100_or_as_told(
        self, monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
    ) -> None:
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        assert Ui(stdout=io.StringIO(), stderr=io.StringIO()).out.width == width

    @pytest.mark.parametrize("columns", ["0", "60"])
    def test_a_terminal_of_no_width_shows_something(
        self, monkeypatch: pytest.MonkeyPatch, columns: str
    ) -> None:
        """Emacs' shell and some CI systems set COLUMNS=0."""
        monkeypatch.setenv("COLUMNS", columns)
        terminal = Terminal()
        ui = Ui(stdout=terminal, stderr=terminal)
        assert ui.out.width >= 20
        ui.show("a table")
        assert "a table" in terminal.getvalue()


class TestColours:
    def warned(self, stream: io.StringIO) -> str:
        Ui(stdout=io.StringIO(), stderr=stream, width=80).warn("careful")
        return stream.getvalue()

    def test_only_a_terminal_has_them(self) -> None:
        assert self.warned(io.StringIO()) == "warning: careful\n"
        assert self.warned(Terminal()) == "\x1b[33mwarning: \x1b[0mcareful\n"

    def test_no_color_is_respected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        assert self.warned(Terminal()) == "warning: careful\n"

    def test_numbers_and_names_are_not_coloured_by_guesswork(self) -> None:
        terminal = Terminal()
        Ui(stdout=terminal, stderr=terminal, width=80).show("'text' 12 /a/path", Text("12"))
        assert terminal.getvalue() == "'text' 12 /a/path\n12\n"


class TestStreams:
    def test_a_sign_that_the_encoding_lacks_is_replaced(self) -> None:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
        Ui(stdout=stream, stderr=stream, width=40).show("déjà", bar(1))
        assert raw.getvalue() == b"d?j?\n" + b"?" * 20 + b"\n"

    def test_a_reader_that_has_gone_is_left_to_the_caller(self) -> None:
        """rich itself would end the program with status 1: `does not fit`."""

        class Closed(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            Ui(stdout=Closed(), stderr=io.StringIO(), width=80).show("a table")
