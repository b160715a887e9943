"""The held-out rows that a model is asked, as the time of answers is predicted by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftplan.launcher.data.data_file import read_data
from ftplan.launcher.data.overlong import Rule
from ftplan.launcher.data.profiling import make_split, profile_data
from ftplan.planner.evaluating import ASKED_ROWS, Questions

PROMPT = "which of these two is it, and why would you say so? " * 4


def asked(tmp_path: Path, rows: list[dict[str, Any]], **read: Any) -> Questions:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_data([path], **read)
    return profile_data(data, make_split(data, None)).questions


def test_short_answers_are_known_by_their_tokens(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"{n} {PROMPT}", "output": "yes" if n % 2 else "no"} for n in range(200)
    ]
    found = asked(tmp_path, rows)
    assert found.are_short and found.num_rows == 20 and found.answer_tokens < 4
    assert found.shown_prompt_tokens <= found.prompt_tokens <= found.longest_prompt_tokens


def test_long_answers_are_shown_and_some_rows_are_asked(tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}?", "output": f"{n} {PROMPT}"} for n in range(2000)]
    found = asked(tmp_path, rows)
    assert not found.are_short and found.num_rows == ASKED_ROWS
    assert found.prompt_tokens < found.answer_tokens


def test_plain_text_is_asked_nothing(tmp_path: Path) -> None:
    assert asked(tmp_path, [{"text": f"{n} {PROMPT}"} for n in range(50)]) == Questions()


def test_prompts_are_counted_without_their_completions(tmp_path: Path) -> None:
    rows = [{"instruction": f"{n} {PROMPT}", "output": "yes"} for n in range(50)]
    alone = asked(tmp_path, rows)
    rule = Rule("truncate", None, completion_length=500)
    completed = asked(tmp_path, rows, objective="grpo", rule=rule)
    assert abs(completed.prompt_tokens - alone.prompt_tokens) < 10
