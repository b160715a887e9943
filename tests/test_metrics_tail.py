"""Rows of a metrics.jsonl that grows."""

from __future__ import annotations

from pathlib import Path

from ftplan.launcher.metrics_tail import MetricsTail
from ftplan.launcher.run_dir import write_text


def test_rows_come_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.rows() == []
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 1}\n{"st')
        file.flush()
        assert tail.rows() == [{"step": 1}]
        file.write('ep": 2}\nno row\n[]\n')
        file.flush()
        assert tail.rows() == [{"step": 1}, {"step": 2}]


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    """As a resume replaces it, without the steps that are going to be repeated."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
    tail = MetricsTail(path)
    assert len(tail.rows()) == 2
    write_text(path, '{"step": 1}\n{"step": 3}\n')
    assert tail.rows() == [{"step": 1}, {"step": 3}]
    path.unlink()
    assert tail.rows() == []
