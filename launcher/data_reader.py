"""Reading a data file: JSON or JSON lines, in the shapes people have.

One reader serves profiling and training, so what was profiled is what is trained.

Shapes, recognized row by row:
- messages: `messages` or `conversations` (OpenAI's `role`/`content`, ShareGPT's `from`/`value`)
- instruction: `instruction`, optional `input`, `history`; `output`
- prompt/completion: `prompt` and `completion` (or `response`); `question` and `answer`
- text: `text`

A `system` beside any but the last opens the conversation, unless that has a system message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from ftplan.planner.data_profile import Problem
from ftplan.planner.errors import InputError

_FIRST_LINES = 5

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}

_ANSWER_FIELDS = {
    "prompt": ("completion", "response", "output", "answer"),
    "question": ("answer", "response", "output"),
}


class Message(Struct, frozen=True):
    role: str
    content: str


class Row(Struct, frozen=True, kw_only=True):
    """A usable row: a conversation that ends with the assistant, or plain text."""

    line: int
    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content if self.messages else self.text


class DataFile(Struct, frozen=True, kw_only=True):
    """A data file, read. `num_rows` counts all rows, `rows` holds the usable ones.

    `unit` says what `Row.line` and `Problem.first_lines` count: a JSON array's rows have no lines.
    """

    path: Path
    sha256: str
    format: str
    num_rows: int
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    unit: Literal["line", "row"] = "line"

    @property
    def duplicates(self) -> int:
        """Rows that repeat an earlier one word for word."""
        return len(self.rows) - len({(row.messages, row.text) for row in self.rows})

    @property
    def objective(self) -> str:
        return "pretraining" if any(row.text for row in self.rows) else "supervised"


class _Unusable(Exception):
    """Why a row cannot be trained on."""


def read_data(path: Path) -> DataFile:
    """Read a `.json` or `.jsonl` file.

    Raises InputError for a missing or empty file, for broken JSON (with its line), and when no
    row is usable. Rows that are not usable are counted by kind in `problems`.
    """
    _check_suffix(path)
    content = read_bytes(path)
    text = decode(path, content)
    unit: Literal["line", "row"] = "row" if _is_array(path, text) else "line"
    rows: list[Row] = []
    formats: dict[str, int] = {}
    troubles: dict[str, list[int]] = {}
    num_rows = 0
    for line, value in _values(path, text):
        num_rows += 1
        try:
            row, shape = _row(line, value)
        except _Unusable as trouble:
            troubles.setdefault(str(trouble), []).append(line)
            continue
        rows.append(row)
        formats[shape] = formats.get(shape, 0) + 1
    problems = tuple(
        Problem(kind=kind, count=len(lines), first_lines=tuple(lines[:_FIRST_LINES]))
        for kind, lines in sorted(troubles.items(), key=lambda item: -len(item[1]))
    )
    if not rows:
        raise _no_usable_row(path, num_rows, problems, unit)
    return DataFile(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        format=max(formats, key=lambda shape: formats[shape]),
        num_rows=num_rows,
        rows=tuple(rows),
        problems=problems,
        unit=unit,
    )


def where(problem: Problem, unit: str) -> str:
    """`line 3, 8, 9, ...`: where a problem stands."""
    more = ", ..." if problem.count > len(problem.first_lines) else ""
    return f"{unit} {', '.join(map(str, problem.first_lines))}{more}"


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".json", ".jsonl"):
        if not path.exists():
            raise InputError(f"no such file: `{path}`", "give a .json or .jsonl file")
        raise InputError(
            f"`{path}` is not a .json or .jsonl file",
            'write one JSON object a line, for example {"instruction": "...", "output": "..."}',
        )


def read_bytes(path: Path) -> bytes:
    """What is in a file; raises InputError where that is nothing, or cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no such file: `{path}`", "check the path") from None
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    if not content.strip():
        raise InputError(f"`{path}` is empty", "it needs one JSON object a line")
    return content


def decode(path: Path, content: bytes) -> str:
    """UTF-8, with or without a byte-order mark; raises InputError with the line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"`{path}`, line {line}: not UTF-8 text (byte {error.start})",
            "convert it first, for example `iconv -f UTF-16 -t UTF-8`",
        ) from error


def _is_array(path: Path, text: str) -> bool:
    return path.suffix == ".json" and text.lstrip().startswith("[")


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line number, parsed value) of every row; an array's rows carry their ordinal."""
    if _is_array(path, text):
        rows = _parse(path, text, first_line=1)
        yield from enumerate(rows, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(path, line, first_line=number)


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"`{path}`, line {line}, column {error.colno}: broken JSON: {error.msg.lower()}",
            "mend or remove that line; every line must be one whole JSON object",
        ) from error
    except RecursionError as error:
        raise InputError(f"`{path}`, line {first_line}: JSON nested too deeply") from error
    except ValueError as error:  # not JSONDecodeError: Python's limit on the digits of a number
        raise InputError(
            f"`{path}`: a number with thousands of digits, in what begins at line {first_line}",
            "write it as text, in quotes, or leave it out",
        ) from error


def _row(line: int, value: Any) -> tuple[Row, str]:
    """The row and its shape; raises _Unusable."""
    row, shape = _shaped_row(line, value)
    try:
        "".join([row.text, *(message.content for message in row.messages)]).encode()
    except UnicodeEncodeError:  # valid JSON, but no tokenizer takes it and no file can hold it
        raise _Unusable("half a character (a lone surrogate)") from None
    return row, shape


def _shaped_row(line: int, value: Any) -> tuple[Row, str]:
    if not isinstance(value, Mapping):
        raise _Unusable("not a JSON object")
    for key in ("messages", "conversations"):
        if key in value:
            return Row(line=line, messages=_opened(value, _conversation(value[key]))), "messages"
    if "output" in value and ("instruction" in value or "input" in value):
        return Row(line=line, messages=_opened(value, _instruction(value))), "instruction"
    for question, answers in _ANSWER_FIELDS.items():
        answer = next((a for a in answers if a in value), None)
        if question in value and answer:
            messages = (
                Message("user", _text(value, question)),
                Message("assistant", _text(value, answer)),
            )
            return Row(line=line, messages=_opened(value, messages)), f"{question}/{answer}"
    if "text" in value:
        return Row(line=line, text=_text(value, "text")), "text"
    raise _Unusable("no usable field")


def _text(value: Mapping[str, Any], key: str) -> str:
    content = value[key]
    if not isinstance(content, str):
        raise _Unusable(f"`{key}` is not text")
    if not content.strip():
        raise _Unusable(f"`{key}` is empty")
    return content


def _optional_text(value: Mapping[str, Any], key: str) -> str:
    content = value.get(key)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise _Unusable(f"`{key}` is not text")
    return content


def _opened(value: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation with the row's own `system`, if it has none."""
    system = _optional_text(value, "system")
    if not system.strip() or messages[0].role == "system":
        return messages
    return (Message("system", system), *messages)


def _instruction(value: Mapping[str, Any]) -> tuple[Message, ...]:
    instruction = _optional_text(value, "instruction")
    request = "\n\n".join(filter(None, (instruction, _optional_text(value, "input"))))
    if not request.strip():
        raise _Unusable("`instruction` and `input` are empty")
    messages: list[Message] = []
    for asked, answered in _history(value):
        messages += [Message("user", asked), Message("assistant", answered)]
    messages += [Message("user", request), Message("assistant", _text(value, "output"))]
    return tuple(messages)


def _history(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    turns = value.get("history") or []  # exported tables have "" for none
    pairs = isinstance(turns, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    )
    if not pairs:
        raise _Unusable("`history` is not a list of [question, answer]")
    return [(asked, answered) for asked, answered in turns]


def _conversation(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise _Unusable("the conversation is not a list of messages")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise _Unusable("a message is not an object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise _Unusable("a message's role is not system, user or assistant")
        if not isinstance(content, str) or not content.strip():
            raise _Unusable("a message has no text")
        messages.append(Message(_ROLES[role], content))
    while messages and messages[-1].role != "assistant":
        messages.pop()
    roles = [m.role for m in messages if m.role != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise _Unusable("user and assistant do not take turns")
    return tuple(messages)


def _no_usable_row(
    path: Path, num_rows: int, problems: tuple[Problem, ...], unit: str
) -> InputError:
    if not problems:
        return InputError(f"`{path}` holds no row", "it needs one JSON object a line")
    worst = problems[0]
    return InputError(
        f"`{path}`: none of its {num_rows} rows can be trained on: {worst.kind} "
        f"({where(worst, unit)})",
        "a row needs `instruction` and `output`, `prompt` and `completion`, `messages`, or `text`",
    )
