"""Rows that fit two formats: what is asked, of whom, and how the answer is repeated unasked."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher.commands import data as data_command
from ftplan.launcher.data.asked import DataAsked, read_columns
from ftplan.launcher.data.data_file import read_data
from ftplan.launcher.data.files import open_source
from ftplan.launcher.data.readings import Reading, readings, said_columns
from ftplan.launcher.ui import Ui

Write = Callable[[dict[str, Any]], Path]

TURNS = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Four."}]
LABELLED = {"prompt": "2 + 2?", "completion": "5", "label": False}

# What a row has, what it is read as, what else it could be, and which field tells.
AMBIGUOUS = [
    ({"instruction": "Add.", "output": "4", "text": "### Add."}, "instruction", "text", "output"),
    ({"text": "I hate it", "label": "bad"}, "classification", "text", "label"),
    (LABELLED, "labelled", "prompt/completion", "label"),
    ({**LABELLED, "kto_tag": True, "label": None}, "labelled", "prompt/completion", "kto_tag"),
    (
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "messages": TURNS},
        "preference",
        "messages",
        "chosen",
    ),
    ({"task": "add", "input": "2 + 2", "output": "4"}, "multi-task", "instruction", "task"),
]

PLAIN = [
    {"instruction": "Add.", "output": "4"},
    {"prompt": "2 + 2?", "completion": "4"},
    {"messages": TURNS, "prompt": "2 + 2?", "prompt_id": "a"},
    {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    {"text": "Two and two are four."},
    {"instruction": "Add.", "output": "4", "text": ""},  # as plain text it is of no use
]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(row: dict[str, Any]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({**row, "id": n}) + "\n" for n in range(12)))
        return path

    return write


def found_in(path: Path, columns: str = "", objective: str | None = None) -> list[Reading]:
    records = open_source([path]).records()
    return list(readings(records, read_columns(columns), objective))


@pytest.mark.parametrize(("row", "taken", "other", "field"), AMBIGUOUS)
class TestTwoReadings:
    def test_both_are_found_and_each_is_had_by_its_columns(
        self, row: dict[str, Any], taken: str, other: str, field: str, write: Write
    ) -> None:
        path = write(row)
        found = found_in(path)
        assert [reading.format for reading in found] == [taken, other]
        assert [said_columns(reading.columns) for reading in found] == [
            f"{field}={field}",
            f"{field}=",
        ]
        assert read_data([path]).format == taken
        for reading in found:
            data = read_data([path], columns=reading.columns)
            assert (data.format, data.objective) == (reading.format, reading.objective)
            assert len(data.groups()) == 12

    def test_who_has_told_is_not_asked_again(
        self, row: dict[str, Any], taken: str, other: str, field: str, write: Write
    ) -> None:
        path = write(row)
        for columns in (f"{field}={field}", f"{field}="):
            assert found_in(path, columns) == []
            assert list(read_data([path], columns=read_columns(columns)).notes()) == []

    def test_without_a_question_what_was_taken_is_told(
        self, row: dict[str, Any], taken: str, other: str, field: str, write: Write
    ) -> None:
        (note,) = read_data([write(row)]).notes()
        assert f"read as {other}, too; they are read as {taken}, which" in note
        assert f"`--columns {field}=`" in note


@pytest.mark.parametrize("row", PLAIN)
def test_rows_of_one_format_raise_no_question(row: dict[str, Any], write: Write) -> None:
    path = write(row)
    assert found_in(path) == []
    assert list(read_data([path]).notes()) == []


def test_an_objective_that_only_one_reading_trains_answers_the_question(write: Write) -> None:
    path = write(LABELLED)
    assert found_in(path, objective="kto") == found_in(path, objective="dpo") == []
    preferred = write({"prompt": "a", "chosen": "b", "rejected": "c", "messages": TURNS})
    assert [reading.objective for reading in found_in(preferred, objective="sft")] == ["sft", "sft"]


def test_a_few_rows_that_fit_two_formats_raise_no_question(tmp_path: Path) -> None:
    rows = [{"text": f"words {n}"} for n in range(9)] + [{"text": "a", "label": 1}] * 8
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert found_in(path) == []


def test_an_example_shows_what_differs(write: Write) -> None:
    found = found_in(write({"task": "add", "input": "2 + 2", "output": "4\n" * 99}))
    assert [str(reading) for reading in found] == [
        f"multi-task: trains sft, `add 2 + 2` -> `{'4 ' * 16}4...`",
        f"instruction: trains sft, `2 + 2` -> `{'4 ' * 16}4...`",
    ]


class TestColumns:
    def test_a_field_without_a_name_is_left_out(self) -> None:
        assert read_columns("label=, output = a") == {"label": "", "output": "a"}

    def test_a_column_without_a_name_is_never_taken_for_one(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        path.write_text(",text,label\n1,a,x\n2,b,y\n")
        data = read_data([path], columns={"label": ""})
        assert [row.text for row in data.rows()] == ["a", "b"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestWhoIsAsked:
    @pytest.fixture(autouse=True)
    def nobody_types(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", _Terminal("2\n"))

    def settled(self, path: Path, ask: bool = True, **more: Any) -> tuple[DataAsked, str]:
        streams = {"stdout": _Terminal(), "stderr": _Terminal(), **more}
        asked = DataAsked(paths=(str(path),), ask=ask).settled(Ui(width=80, **streams))
        return asked, streams["stderr"].getvalue()

    def test_a_person_at_a_terminal(self, write: Write) -> None:
        asked, said = self.settled(write(LABELLED))
        assert asked.columns == {"label": ""}
        assert "1  labelled: trains kto, `2 + 2?` -> `5`" in said
        assert "2  prompt/completion: trains sft, `2 + 2?` -> `5`" in said
        assert "read as prompt/completion, as `--columns label=` says unasked" in said

    @pytest.mark.parametrize(
        "more", [{"stdout": io.StringIO()}, {"stderr": io.StringIO()}, {"as_json": True}]
    )
    def test_nobody_in_a_pipe_or_under_json(self, more: dict[str, Any], write: Write) -> None:
        asked, said = self.settled(write(LABELLED), **more)
        assert (asked.columns, said) == ({}, "")

    def test_nobody_under_yes(self, write: Write) -> None:
        assert self.settled(write(LABELLED), ask=False) == (
            DataAsked(paths=(str(write(LABELLED)),)),
            "",
        )

    def test_nobody_whose_input_is_no_terminal(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
        assert self.settled(write(LABELLED))[0].columns == {}

    @pytest.mark.parametrize(
        ("typed", "chosen"), [("", 0), ("\n", 0), (" 2 \n", 1), ("3\n0\nno\n2\n", 1), ("9\n", 0)]
    )
    def test_an_answer_is_a_number(
        self, typed: str, chosen: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        err = _Terminal()
        assert Ui(stderr=err, width=80).choose("Which?", ["one", "two"]) == chosen
        assert err.getvalue().count("from 1 to 2") == sum(a in "3 0 no 9" for a in typed.split())


SCRIPT = """
import sys
from ftplan.launcher import cli
from ftplan.launcher.commands import data
data.tokenizer_of = lambda ui, source, given: None
sys.exit(cli.main(sys.argv[1:]))
"""


def at_a_terminal(*words: str, typed: str, stdout: int | None = None) -> tuple[int, str]:
    """Exit status of `ftplan` and what its terminal shows."""
    ours, theirs = pty.openpty()
    streams: dict[str, Any] = {"stdin": theirs, "stderr": theirs, "stdout": stdout or theirs}
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "100"}
    command = [sys.executable, "-c", SCRIPT, *words]
    with subprocess.Popen(command, env=environment, **streams) as process:
        os.close(theirs)
        os.write(ours, typed.encode())
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # Linux: nobody has it open any more
            pass
    os.close(ours)
    return process.returncode, shown.decode()


class TestAtATerminal:
    @pytest.fixture
    def reviews(self, tmp_path: Path) -> str:
        path = tmp_path / "reviews.jsonl"
        rows = [{"text": f"I hate it {n}", "label": "bad"} for n in range(9)]
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    def test_the_answer_decides(self, reviews: str) -> None:
        status, shown = at_a_terminal("data", reviews, typed="2\n")
        assert status == 0
        assert "How are they meant?" in shown and "Which one? [1]" in shown
        assert "`--columns label=` says unasked" in shown
        assert "text, for pretraining training" in shown

    def test_what_was_told_repeats_it_unasked(self, reviews: str) -> None:
        status, shown = at_a_terminal("data", reviews, "--columns", "label=", typed="")
        assert status == 0
        assert "Which one?" not in shown
        assert "text, for pretraining training" in shown

    def test_yes_takes_what_is_usual(self, reviews: str) -> None:
        status, shown = at_a_terminal("data", reviews, "--yes", typed="2\n")
        assert status == 0
        assert "Which one?" not in shown
        assert "classification, for supervised training" in shown
        assert "could be read as text, too" in " ".join(shown.split())

    def test_a_pipe_is_never_asked(self, reviews: str, tmp_path: Path) -> None:
        with open(tmp_path / "out.txt", "wb") as file:
            status, shown = at_a_terminal("data", reviews, typed="2\n", stdout=file.fileno())
        assert status == 0
        assert "Which one?" not in shown
        assert "classification, for" in (tmp_path / "out.txt").read_text()


def test_planning_asks_before_anything_slow(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data` has its answer before the pass over the rows."""
    monkeypatch.setattr(sys, "stdin", _Terminal("2\n"))
    monkeypatch.setattr(data_command, "tokenizer_of", lambda ui, source, given: None)
    read: list[DataAsked] = []
    monkeypatch.setattr(
        DataAsked, "read", lambda self, ui, tokenizer: read.append(self) or sys.exit(3)
    )
    from ftplan.launcher import cli

    err = _Terminal()
    monkeypatch.setattr(sys, "stdout", _Terminal())
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit):
        cli.main(["data", str(write(LABELLED))])
    assert read[0].columns == {"label": ""}
