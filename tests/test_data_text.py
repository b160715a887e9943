"""Plain text as rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftplan.launcher.data.data_file import read_data
from ftplan.launcher.data.text_rows import PASSAGE_CHARACTERS
from ftplan.planner.errors import InputError


def texts(path: Path) -> list[tuple[int, str]]:
    return [(row.number, row.text) for row in read_data([path]).rows()]


def paragraph(number: int, characters: int = 600) -> str:
    """With a comma in each line, as prose has."""
    words = f"Paragraph {number}, of a book. "
    return (words * (characters // len(words) + 1))[:characters].strip()


@pytest.mark.parametrize("name", ["book.txt", "notes.md"])
def test_a_text_is_passages_of_whole_paragraphs(name: str, tmp_path: Path) -> None:
    """In order, each numbered by its first line; nothing is lost."""
    paragraphs = [paragraph(number) for number in range(20)]
    path = tmp_path / name
    path.write_text("\n\n" + "\n\n".join(paragraphs) + "\n")
    rows = texts(path)
    assert "\n\n".join(text for _, text in rows) == "\n\n".join(paragraphs)
    assert all(text.startswith("Paragraph") for _, text in rows)
    assert all(len(text) >= PASSAGE_CHARACTERS for _, text in rows[:-1])
    assert all(len(text) <= PASSAGE_CHARACTERS + 602 for _, text in rows)
    lines = path.read_text().splitlines()
    assert all(lines[number - 1] == text.splitlines()[0] for number, text in rows)
    data = read_data([path])
    assert (data.format, data.kind, data.objective) == ("text", "pretraining", "sft")


def test_lines_without_blank_ones_are_cut_at_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    lines = [f"line {number}, and more" for number in range(2_000)]
    path.write_text("\n".join(lines))
    rows = texts(path)
    assert "\n".join(text for _, text in rows) == "\n".join(lines)
    assert len(rows) > 2 and all(len(text) < 2 * PASSAGE_CHARACTERS + 30 for _, text in rows)


def test_a_table_under_a_texts_name_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("question,answer\n" + "".join(f"q {i},a {i}\n" for i in range(9)))
    assert read_data([path]).format == "prompt/completion"


def test_rows_of_json_under_a_texts_name_stay_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text('{"prompt": "q", "completion": "a"}\n' * 3)
    assert read_data([path]).format == "prompt/completion"


def test_text_under_another_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "book.dat"
    path.write_text(paragraph(1, 900).replace(",", ""))
    with pytest.raises(InputError, match="no rows of a format"):
        read_data([path])


def test_a_passage_that_is_not_utf8_is_left_out_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    good = paragraph(1, PASSAGE_CHARACTERS + 1).encode()
    path.write_bytes(good + b"\n\n" + b"caf\xe9 " * 900 + b"\n\n" + good)
    data = read_data([path])
    assert [row.number for row in data.rows()] == [1, 5]
    (kind,) = data.troubles
    assert "not UTF-8" in kind and data.troubles[kind].first == [(0, 3)]
