"""Reading data files: every shape people have, and what is said about files that cannot be used."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.launcher.data_reader import DataFile, Message, Row, read_data
from ftplan.planner.data_profile import Problem
from ftplan.planner.errors import InputError

GOOD = {"instruction": "Add 1 and 2.", "output": "3"}
Q, A = Message("user", "q"), Message("assistant", "a")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(row, row)`: a JSON-lines file; text and bytes are written as they are."""

    def make(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [r if isinstance(r, bytes) else _line(r).encode() for r in rows]
        path.write_bytes(b"\n".join(lines))
        return path

    return make


def _line(row: Any) -> str:
    return row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)


def only(data: DataFile) -> Row:
    (row,) = data.rows
    return row


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_data(path)
    return caught.value


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("a"), inner),
    max_leaves=4,
)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A usable row, damaged in up to two places."""
    turns = [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]
    usable: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"messages": turns},
                {**GOOD, "input": "i", "system": "s", "history": [["q", "a"]]},
                {"prompt": "q", "completion": "a"},
                {"question": "q", "answer": "a"},
                {"text": "t"},
            ]
        )
    )
    row: dict[str, Any] = json.loads(json.dumps(usable))
    for _ in range(draw(st.integers(0, 2))):
        place = row
        if isinstance(row.get("messages"), list) and draw(st.booleans()):
            place = draw(st.sampled_from(row["messages"]))
        place[draw(st.sampled_from(sorted(place)))] = draw(JUNK)
    return row


class TestShapes:
    @pytest.mark.parametrize(
        ("row", "shape", "messages"),
        [
            ({"prompt": "q", "completion": "a"}, "prompt/completion", (Q, A)),
            ({"prompt": "q", "response": "a"}, "prompt/response", (Q, A)),
            ({"prompt": "q", "output": "a"}, "prompt/output", (Q, A)),
            ({"prompt": "q", "answer": "a"}, "prompt/answer", (Q, A)),
            ({"question": "q", "answer": "a"}, "question/answer", (Q, A)),
            ({"question": "q", "response": "a"}, "question/response", (Q, A)),
            ({"instruction": "q", "output": "a"}, "instruction", (Q, A)),
            ({"instruction": "q", "input": "", "output": "a"}, "instruction", (Q, A)),
            ({"instruction": "q", "input": None, "output": "a"}, "instruction", (Q, A)),
            ({"instruction": "", "input": "q", "output": "a"}, "instruction", (Q, A)),
            ({"input": "q", "output": "a"}, "instruction", (Q, A)),
            (
                {"instruction": "Add.", "input": "1 2", "output": "3"},
                "instruction",
                (Message("user", "Add.\n\n1 2"), Message("assistant", "3")),
            ),
            (
                {"instruction": "q", "system": "s", "output": "a"},
                "instruction",
                (Message("system", "s"), Q, A),
            ),
            (
                {"instruction": "q", "output": "a", "history": [["q1", "a1"], ["q2", "a2"]]},
                "instruction",
                (
                    Message("user", "q1"),
                    Message("assistant", "a1"),
                    Message("user", "q2"),
                    Message("assistant", "a2"),
                    Q,
                    A,
                ),
            ),
            ({"instruction": "q", "output": "a", "history": []}, "instruction", (Q, A)),
            ({"instruction": "q", "output": "a", "history": None}, "instruction", (Q, A)),
        ],
    )
    def test_questions_and_answers(
        self, write: Write, row: Any, shape: str, messages: tuple[Message, ...]
    ) -> None:
        data = read_data(write(row))
        assert (data.format, only(data).messages, only(data).text) == (shape, messages, "")
        assert (data.num_rows, data.problems, data.objective) == (1, (), "supervised")
        assert only(data).prompt == messages[:-1]
        assert only(data).answer == messages[-1].content

    @pytest.mark.parametrize("key", ["messages", "conversations"])
    @pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
    @pytest.mark.parametrize("assistant", ["assistant", "gpt", "model"])
    @pytest.mark.parametrize("user", ["user", "human"])
    def test_conversations_by_openais_and_sharegpts_names(
        self, write: Write, key: str, role: str, content: str, assistant: str, user: str
    ) -> None:
        turns = [("system", "s"), (user, "q"), (assistant, "a"), (user, "q"), (assistant, "a")]
        data = read_data(write({key: [{role: r, content: c} for r, c in turns]}))
        assert data.format == "messages"
        assert only(data).messages == (Message("system", "s"), Q, A, Q, A)
        assert only(data).prompt == (Message("system", "s"), Q, A, Q)

    @pytest.mark.parametrize(
        "row",
        [
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"prompt": "q", "completion": "a"},
            {"question": "q", "answer": "a"},
            {"instruction": "q", "output": "a"},
        ],
        ids=lambda row: next(iter(row)),
    )
    def test_a_system_beside_them_opens_the_conversation(self, write: Write, row: Any) -> None:
        """ShareGPT's sets have it so."""
        data = read_data(write({**row, "system": "s"}, {**row, "system": " "}, row))
        assert data.rows[0].messages == (Message("system", "s"), Q, A)
        assert data.rows[1].messages == data.rows[2].messages == (Q, A)

    def test_a_conversation_s_own_system_message_comes_first(self, write: Write) -> None:
        turns = [("system", "own"), ("user", "q"), ("assistant", "a")]
        messages = [{"role": role, "content": text} for role, text in turns]
        row = only(read_data(write({"messages": messages, "system": "beside"})))
        assert row.messages == (Message("system", "own"), Q, A)

    def test_what_follows_the_last_answer_is_left_out(self, write: Write) -> None:
        turns = [("user", "q"), ("assistant", "a"), ("user", "and"), ("system", "now")]
        data = read_data(write({"messages": [{"role": r, "content": c} for r, c in turns]}))
        assert only(data).messages == (Q, A)

    def test_plain_text_is_kept_to_the_blank(self, write: Write) -> None:
        data = read_data(write({"text": "  Once upon a time\n\n"}))
        assert (data.format, data.objective) == ("text", "pretraining")
        assert (only(data).text, only(data).messages) == ("  Once upon a time\n\n", ())
        assert only(data).answer == "  Once upon a time\n\n"

    def test_shapes_may_be_mixed_and_the_most_frequent_names_the_format(self, write: Write) -> None:
        question = {"question": "q", "answer": "a"}
        data = read_data(write(GOOD, question, question))
        assert data.format == "question/answer"
        assert [row.line for row in data.rows] == [1, 2, 3]

    @given(rows())
    def test_any_row_is_either_used_or_counted_with_its_line(self, row: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
            data = read_data(path)
        assert data.num_rows == 2
        assert len(data.rows) + sum(problem.count for problem in data.problems) == 2
        for used in data.rows:
            assert used.answer.strip()
            assert not used.messages or used.messages[-1].role == "assistant"


class TestUnusableRows:
    @pytest.mark.parametrize(
        ("row", "kind"),
        [
            ({"a": "b"}, "no usable field"),
            ({}, "no usable field"),
            ({"instruction": "q"}, "no usable field"),
            ({"output": "a"}, "no usable field"),
            ({"prompt": "q", "chosen": "a", "rejected": "b"}, "no usable field"),
            ([1], "not a JSON object"),
            ("null", "not a JSON object"),
            ('"text"', "not a JSON object"),
            ("NaN", "not a JSON object"),
            ({"text": 7}, "`text` is not text"),
            ('{"text": NaN}', "`text` is not text"),
            ('{"text": 1e999}', "`text` is not text"),
            ({"text": " \n\t"}, "`text` is empty"),
            ({"text": None}, "`text` is not text"),
            ({"instruction": "q", "output": ""}, "`output` is empty"),
            ({"instruction": "q", "output": ["a"]}, "`output` is not text"),
            ({"instruction": " ", "output": "a"}, "`instruction` and `input` are empty"),
            ({"instruction": None, "output": "a"}, "`instruction` and `input` are empty"),
            ({"instruction": "q", "input": 5, "output": "a"}, "`input` is not text"),
            ({"instruction": "q", "system": {}, "output": "a"}, "`system` is not text"),
            ({"prompt": "", "completion": "a"}, "`prompt` is empty"),
            ({"prompt": "q", "completion": " "}, "`completion` is empty"),
            (
                {**GOOD, "history": ["q", "a"]},
                "`history` is not a list of [question, answer]",
            ),
            (
                {**GOOD, "history": [["q", None]]},
                "`history` is not a list of [question, answer]",
            ),
            ({**GOOD, "history": "q"}, "`history` is not a list of [question, answer]"),
            ({**GOOD, "history": {"q": "a"}}, "`history` is not a list of [question, answer]"),
            (
                {"messages": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a"}]}
                | {"system": 5},
                "`system` is not text",
            ),
            ({"messages": []}, "the conversation is not a list of messages"),
            ({"messages": None}, "the conversation is not a list of messages"),
            ({"messages": "hello"}, "the conversation is not a list of messages"),
            ({"messages": ["hello"]}, "a message is not an object"),
            (
                {"messages": [{"role": "tool", "content": "x"}]},
                "a message's role is not system, user or assistant",
            ),
            ({"messages": [{"content": "x"}]}, "a message's role is not system, user or assistant"),
            ({"messages": [{"role": "user", "content": None}]}, "a message has no text"),
            ({"messages": [{"role": "user", "content": ["x"]}]}, "a message has no text"),
            ({"messages": [{"role": "user"}]}, "a message has no text"),
        ],
    )
    def test_each_trouble_has_its_name(self, write: Write, row: Any, kind: str) -> None:
        data = read_data(write(GOOD, row))
        assert data.problems == (Problem(kind=kind, count=1, first_lines=(2,)),)
        assert (data.num_rows, len(data.rows)) == (2, 1)

    @pytest.mark.parametrize("history", [5, True, 0.5])
    def test_a_history_that_is_a_number_is_counted(self, write: Write, history: Any) -> None:
        data = read_data(write(GOOD, {**GOOD, "history": history}))
        assert [problem.first_lines for problem in data.problems] == [(2,)]

    @pytest.mark.parametrize("role", [["user"], {"name": "user"}])
    def test_a_role_that_is_a_list_or_an_object_is_counted(self, write: Write, role: Any) -> None:
        turns = [{"role": role, "content": "q"}, {"role": "assistant", "content": "a"}]
        data = read_data(write(GOOD, {"messages": turns}))
        assert [problem.first_lines for problem in data.problems] == [(2,)]

    @pytest.mark.parametrize("half", ["\\ud800", "\\udc00 x"])
    def test_text_with_half_a_character_is_counted(self, write: Write, half: str) -> None:
        """A lone surrogate: valid JSON, but no tokenizer takes it and no file can hold it."""
        data = read_data(write(GOOD, f'{{"instruction": "q", "output": "{half}"}}'))
        for row in data.rows:
            row.answer.encode("utf-8")
        assert [problem.first_lines for problem in data.problems] == [(2,)]

    def test_a_pair_of_surrogates_is_one_character(self, write: Write) -> None:
        assert only(read_data(write('{"text": "\\ud83e\\udd17"}'))).text == "🤗"

    @pytest.mark.parametrize(
        "roles",
        [
            "assistant",
            "user",
            "system",
            "system assistant",
            "user user assistant",
            "user assistant assistant",
            "assistant user assistant",
        ],
    )
    def test_speakers_must_take_turns(self, write: Write, roles: str) -> None:
        turns = [{"role": role, "content": "x"} for role in roles.split()]
        data = read_data(write(GOOD, {"messages": turns}))
        assert [p.kind for p in data.problems] == ["user and assistant do not take turns"]

    def test_problems_come_most_frequent_first_with_their_first_lines(self, write: Write) -> None:
        rows = [{"text": ""}, GOOD, {"a": 1}, {"b": 2}, "", {"c": 3}, "[]", "{}", {"d": 4}, {}]
        data = read_data(write(*rows))
        assert data.problems == (
            Problem(kind="no usable field", count=6, first_lines=(3, 4, 6, 8, 9)),
            Problem(kind="`text` is empty", count=1, first_lines=(1,)),
            Problem(kind="not a JSON object", count=1, first_lines=(7,)),
        )
        assert (data.num_rows, [row.line for row in data.rows]) == (9, [2])

    def test_without_any_usable_row_the_worst_trouble_is_told(self, write: Write) -> None:
        path = write({"text": ""}, *[{"a": 1}] * 6)
        error = refusal(path)
        assert error.message == (
            f"`{path}`: none of its 7 rows can be trained on: no usable field "
            "(line 2, 3, 4, 5, 6, ...)"
        )
        assert "`instruction` and `output`" in (error.hint or "")

    def test_all_lines_are_told_where_they_are_few(self, write: Write) -> None:
        assert refusal(write({}, {})).message.endswith("no usable field (line 1, 2)")


class TestDuplicates:
    def test_rows_that_say_the_same_are_counted_whatever_their_shape(self, write: Write) -> None:
        data = read_data(
            write(
                {"prompt": "q", "completion": "a"},
                {"question": "q", "answer": "a"},
                {"prompt": "q", "completion": "another"},
                {"text": "q"},
                {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                {"text": "q"},
            )
        )
        assert (data.duplicates, len(data.rows)) == (3, 6)

    def test_none_where_all_differ(self, write: Write) -> None:
        assert read_data(write({"text": "a"}, {"text": "a "})).duplicates == 0


class TestFiles:
    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n\n", b" \r\n\t\r\n"])
    def test_line_ends_and_blank_lines_do_not_matter_but_are_counted(
        self, tmp_path: Path, end: bytes
    ) -> None:
        path = tmp_path / "rows.jsonl"
        row = json.dumps(GOOD).encode()
        path.write_bytes(end.join([row, row, row]) + end)
        data = read_data(path)
        assert data.num_rows == len(data.rows) == 3
        assert [row.line for row in data.rows] == [1 + i * end.count(b"\n") for i in range(3)]

    def test_a_byte_order_mark_is_no_part_of_the_first_row(self, write: Write) -> None:
        path = write(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), GOOD)
        data = read_data(path)
        assert data.num_rows == len(data.rows) == 2
        assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    @pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\u000b", "\x1c", "\x1e"])
    def test_unicodes_line_separators_do_not_end_a_line(self, write: Write, sign: str) -> None:
        """`str.splitlines` would cut there; JSON allows the first three in strings as they are."""
        text = f"before{sign}after"
        row = json.dumps({"text": text}, ensure_ascii=ord(sign) < 0x20)
        data = read_data(write(row, "", GOOD))
        assert data.rows[0].text == text
        assert [row.line for row in data.rows] == [1, 3]

    @pytest.mark.parametrize("start", ["", "\n  ", "\ufeff", "\ufeff\n"])
    @pytest.mark.parametrize("indent", [None, 2])
    def test_a_json_file_may_hold_an_array(
        self, write: Write, start: str, indent: int | None
    ) -> None:
        array = json.dumps([GOOD, {}, {"text": "t"}], indent=indent)
        data = read_data(write(start + array, name="rows.json"))
        assert (data.num_rows, [row.line for row in data.rows]) == (3, [1, 3])
        assert data.problems == (Problem(kind="no usable field", count=1, first_lines=(2,)),)
        assert data.unit == "row"

    def test_an_array_s_rows_have_no_lines(self, write: Write) -> None:
        path = write("[\n\n\n{},\n{}]", name="rows.json")
        assert refusal(path).message.endswith("no usable field (row 1, 2)")

    def test_a_json_file_may_hold_json_lines(self, write: Write) -> None:
        data = read_data(write(GOOD, "", GOOD, name="rows.json"))
        assert ([row.line for row in data.rows], data.unit) == ([1, 3], "line")

    def test_line_numbers_and_positions_count_from_the_file_s_start(self, write: Write) -> None:
        path = write(GOOD, "", '{"text": "a" "b"}')
        error = refusal(path)
        assert error.message == (
            f"`{path}`, line 3, column 14: broken JSON: expecting ',' delimiter"
        )
        assert "one whole JSON object" in (error.hint or "")

    def test_the_line_within_an_array_is_found(self, write: Write) -> None:
        path = write("[", _line(GOOD) + ",", '{"text": }', "]", name="rows.json")
        assert refusal(path).message == (
            f"`{path}`, line 3, column 10: broken JSON: expecting value"
        )

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("rows.jsonl", b'{"text": "a'),
            ("rows.jsonl", b'{"text": "a\tb"}'),
            ("rows.jsonl", b'{"text": "a"}{"text": "b"}'),
            ("rows.jsonl", b'{"text": "a"}\r{"text": "b"}'),
            ("rows.jsonl", b"{'text': 'a'}"),
            ("rows.jsonl", b"\x00\x00\x00"),
            ("rows.jsonl", b"[" * 100_000),
            ("rows.json", b"[" * 100_000),
            ("rows.json", b'{\n  "text": "a"\n}'),
            ("rows.json", b'[{"text": "a"},]'),
            ("rows.json", b'[{"text": "a"}] and more'),
            ("rows.json", b'{"data": [{"text": "a"}]}'),
        ],
    )
    def test_broken_json_names_its_line(self, write: Write, name: str, content: bytes) -> None:
        path = write(content, name=name)
        assert "line 1" in refusal(path).message

    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
    @pytest.mark.parametrize("row", ['{"text": DIGITS}', '{"text": "a", "id": DIGITS}'])
    def test_a_number_of_thousands_of_digits_is_told(
        self, write: Write, name: str, row: str
    ) -> None:
        """Python refuses to read it: ValueError, but no JSONDecodeError."""
        long = row.replace("DIGITS", "7" * 5000)
        path = write(*([_line(GOOD), long] if name == "rows.jsonl" else [f"[{long}]"]), name=name)
        line = 2 if name == "rows.jsonl" else 1
        assert refusal(path).message == (
            f"`{path}`: a number with thousands of digits, in what begins at line {line}"
        )

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
    def test_other_encodings_are_told_with_line_and_byte(self, write: Write, encoding: str) -> None:
        start = (_line(GOOD) + "\n").encode(encoding)
        path = write(start + '{"text": "déjà vu"}'.encode(encoding))
        error = refusal(path)
        line, byte = (2, len(start) + 11) if encoding == "latin-1" else (1, 0)
        assert error.message == f"`{path}`, line {line}: not UTF-8 text (byte {byte})"
        assert "iconv" in (error.hint or "")

    @pytest.mark.parametrize("content", [b"", b"\n", b" \t\r\n\n"])
    def test_an_empty_file_is_told(self, write: Write, content: bytes) -> None:
        path = write(content)
        assert refusal(path).message == f"`{path}` is empty"

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("rows.json", b"[]"),
            ("rows.json", b" [\n]\n"),
            ("rows.jsonl", b"\xef\xbb\xbf"),
            ("rows.jsonl", b"\xef\xbb\xbf\r\n"),
            ("rows.jsonl", "\u2028\n\u00a0".encode()),
            ("rows.jsonl", b"\x1c"),
        ],
    )
    def test_a_file_without_any_row_is_told(self, write: Write, name: str, content: bytes) -> None:
        path = write(content, name=name)
        assert refusal(path).message == f"`{path}` holds no row"

    def test_a_missing_file_is_told(self, tmp_path: Path) -> None:
        for name in ("none.jsonl", "none.json", "none.txt", "none"):
            assert refusal(tmp_path / name).message == f"no such file: `{tmp_path / name}`"

    def test_another_suffix_is_told_even_if_the_content_would_do(self, write: Write) -> None:
        for name in ("rows.csv", "rows.parquet", "rows"):
            path = write(GOOD, name=name)
            assert refusal(path).message == f"`{path}` is not a .json or .jsonl file"

    @pytest.mark.parametrize("name", ["folder", "folder.jsonl", "folder.json"])
    def test_a_folder_is_told(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        assert str(tmp_path / name) in refusal(tmp_path / name).message

    def test_a_file_as_a_folder_is_told(self, write: Write) -> None:
        path = write(GOOD) / "rows.jsonl"
        assert refusal(path).message == f"cannot read `{path}`: Not a directory"

    def test_the_example_data_is_read_without_trouble(self) -> None:
        examples = Path(__file__).parents[1] / "examples"
        for path in sorted(examples.glob("*.jsonl")):
            data = read_data(path)
            assert data.problems == ()
            assert len(data.rows) == data.num_rows > 50

    @given(st.binary(max_size=80), st.sampled_from(["rows.jsonl", "rows.json"]))
    def test_any_bytes_are_read_or_refused(self, content: bytes, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            try:
                data = read_data(path)
            except InputError as error:
                assert str(path) in error.message
            else:
                assert data.rows
