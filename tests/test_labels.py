"""Data whose answers are labels: found, divided by label, counted, warned about."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ftplan.launcher import cli
from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.labels import LabelCodes
from ftplan.launcher.data.profiling import make_split, profile_data
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.split import rows_of, split_groups
from ftplan.launcher.data.survey import group_of
from ftplan.planner.labels import MAX_LABELS, LabelRows, said_labels
from tests.launcher_fixtures import chat

Write = Callable[[Sequence[str]], DataFile]


def lines(answers: Sequence[str], first: int = 0) -> str:
    rows = ({"text": f"Film {first + n}.", "label": answer} for n, answer in enumerate(answers))
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data_of(tmp_path: Path) -> Write:
    def write(answers: Sequence[str]) -> DataFile:
        path = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text(lines(answers))
        return read_data([str(path)], columns={}, objective=None, checks=False)

    return write


def test_few_answers_over_and_over_are_labels(data_of: Write) -> None:
    assert data_of(["good", "bad", " good"] * 20).labels() == ["good", "bad", "good"] * 20


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(["good"] * 40, id="always the same"),
        pytest.param([str(n) for n in range(40)], id="as many as rows"),
        pytest.param([str(n % (MAX_LABELS + 1)) for n in range(210)], id="too many"),
        pytest.param(["good", "bad " * 30] * 20, id="long"),
    ],
)
def test_other_answers_are_none(data_of: Write, answers: list[str]) -> None:
    data = data_of(answers)
    assert data.labels() is None
    assert profile_data(data, make_split(data, None)).labels == {}


def test_parts_of_a_file_are_joined() -> None:
    def codes(answers: Sequence[str]) -> LabelCodes:
        found = LabelCodes()
        for answer in answers:
            found.take(chat("Film?", answer) if answer else Row(number=1, text="plain"))
        return found

    first, later = codes(["a", "b"]), codes(["b", "", "c"])
    first.merge(later)
    assert first.of_rows([True, True, True, False, True]) == ["a", "b", "b", "c"]
    assert first.of_rows([True] * 5) is None, "a row without an answer of its own"
    first.merge(codes(["x" * 99]))
    assert first.of_rows([True] * 6) is None
    first.merge(later)
    assert first.of_rows([True] * 9) is None


@pytest.mark.parametrize("counts", [{"a": 150, "b": 40, "c": 10}, {"a": 180, "b": 18, "c": 2}])
def test_each_label_has_its_share_of_the_held_out_rows(counts: dict[str, int]) -> None:
    """Largest remainders; the rarest has a row, too."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    groups = [group_of(chat(f"Film {n}?", label)) for n, label in enumerate(labels)]
    rows = list(zip(groups, labels, strict=True))
    random.Random(1).shuffle(rows)
    split = split_groups([g for g, _ in rows], labels=[label for _, label in rows])
    held_out = Counter(label for group, label in rows if group in split.held_out)
    assert held_out.total() == 20
    for label, count in counts.items():
        assert held_out[label] >= 1 and abs(held_out[label] - count / 10) <= 1
    assert split == split_groups(groups, labels=labels), "the order of rows makes no difference"


def test_a_prompt_stays_together_whatever_its_labels() -> None:
    groups = [group_of(chat(f"Film {n % 30}?", "")) for n in range(90)]
    labels = [("good", "bad", "good")[n % 3] for n in range(90)]
    split = split_groups(groups, labels=labels)
    train, held_out, _ = rows_of(groups, split)
    assert train + held_out == 90 and 0 < held_out <= 9


def test_prompts_with_more_rows_than_room_are_held_out_as_without_labels() -> None:
    groups = [group_of(chat(f"Film {n % 2}?", "")) for n in range(40)]
    labels = [("good", "bad")[n % 2] for n in range(40)]
    assert split_groups(groups, labels=labels) == split_groups(groups)


def test_a_label_that_is_evaluated_and_never_trained_on_is_warned_of(data_of: Write) -> None:
    data, held_out = data_of(["good", "bad", "bad"] * 8), data_of(["bad", "Good", "Good"])
    profile = profile_data(data, make_split(data, held_out), held_out)
    assert profile.labels == {
        "bad": LabelRows(num_train_rows=16, num_eval_rows=1),
        "good": LabelRows(num_train_rows=8, num_eval_rows=0),
        "Good": LabelRows(num_train_rows=0, num_eval_rows=2),
    }
    assert [text for text in profile.warnings if "`Good`: 2 held-out rows" in text]
    assert said_labels(profile.labels) == ("3 labels, most often `bad`, 67 % of the training rows")


def test_ftplan_data_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(["good", "bad", "bad", "bad"] * 20))
    assert cli.main(["data", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "bad 54 75.0 % 6 good 18 25.0 % 2" in shown
    assert cli.main(["data", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == {
        "bad": {"num_train_rows": 54, "num_eval_rows": 6},
        "good": {"num_train_rows": 18, "num_eval_rows": 2},
    }
