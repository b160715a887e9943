"""Rows of every shape people have, and why a row cannot be used."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftplan.launcher.data import shapes
from ftplan.launcher.data.rows import Message, Row
from ftplan.launcher.data.shapes import (
    FIELDS,
    OBJECTIVES,
    SHAPES,
    Unusable,
    other_shapes,
    renamed,
    row_of,
    shape_of,
    shapes_of,
)

ASKED, TOLD = Message("user", "2 + 2?"), Message("assistant", "4")
WRONG = Message("assistant", "5")
BRIEF = Message("system", "Be brief.")
OPENAI = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]


def read(value: Any, **columns: str) -> Row:
    value = renamed(value, columns)
    return row_of(7, value, shape_of(value))


def refused(value: Any) -> str:
    with pytest.raises(Unusable) as raised:
        read(value)
    return str(raised.value)


SUPERVISED = {
    "instruction": {"instruction": "2 + 2?", "output": "4"},
    "instruction, input empty": {"instruction": "2 + 2?", "input": "", "output": "4"},
    "instruction, input null": {"instruction": "2 + 2?", "input": None, "output": "4"},
    "input alone": {"input": "2 + 2?", "output": "4"},
    "instruction empty": {"instruction": "", "input": "2 + 2?", "output": "4"},
    "prompt, completion": {"prompt": "2 + 2?", "completion": "4"},
    "prompt, response": {"prompt": "2 + 2?", "response": "4"},
    "prompt as messages": {"prompt": OPENAI[:1], "completion": OPENAI[1:]},
    "question, answer": {"question": "2 + 2?", "answer": "4"},
    "query, response": {"query": "2 + 2?", "response": "4"},
    "messages": {"messages": OPENAI},
    "sharegpt": {"conversations": SHAREGPT},
    "messages in parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}, OPENAI[1]]
    },
    "other fields beside": {"prompt": "2 + 2?", "completion": "4", "id": 3, "source": None},
    "messages after the answer": {"messages": [*OPENAI, {"role": "user", "content": "Thanks"}]},
}


@pytest.mark.parametrize("value", SUPERVISED.values(), ids=SUPERVISED)
def test_a_question_and_its_answer(value: dict[str, Any]) -> None:
    assert shape_of(value).objective == "supervised"
    assert read(value) == Row(number=7, messages=(ASKED, TOLD))


def test_instruction_and_input_are_joined_and_history_goes_before() -> None:
    row = read(
        {
            **{"instruction": "Add.", "input": "2 + 2", "output": "4", "system": "Be brief."},
            "history": [["Hi", "Hello"]],
        }
    )
    assert row.messages == (
        BRIEF,
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Add.\n\n2 + 2"),
        TOLD,
    )
    assert row.prompt == row.messages[:-1] and row.answer == "4"


def test_a_system_message_of_its_own_is_kept() -> None:
    turns = [{"role": "system", "content": "Own."}, *OPENAI]
    assert read({"messages": turns, "system": "Be brief."}).messages[0].content == "Own."
    assert read({"messages": OPENAI, "system": "Be brief."}).messages[0] == BRIEF
    developer = [{"role": "developer", "content": "Be brief."}, *OPENAI]
    assert read({"messages": developer}).messages[0] == BRIEF


def test_tools_and_their_calls() -> None:
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'},
    }
    schema = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = read(
        {
            "tools": [schema],
            "messages": [
                OPENAI[0],
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "name": "add", "content": "4", "tool_call_id": "1"},
                OPENAI[1],
            ],
        }
    )
    assert row.tools == (schema,) and row.messages[-1] == TOLD
    asks, answers = row.messages[1:3]
    assert asks.tool_calls[0]["function"]["arguments"] == {"a": 2, "b": 2}
    assert answers.to_dict() == {"role": "tool", "content": "4", "name": "add"}
    assert asks.to_dict()["tool_calls"] == list(asks.tool_calls)


PAIRS = {
    "texts": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "question": {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
    "instruction": {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
    "messages, prompt apart": {
        "prompt": OPENAI[:1],
        "chosen": OPENAI[1:],
        "rejected": [{"role": "assistant", "content": "5"}],
    },
    "whole conversations": {
        "chosen": OPENAI,
        "rejected": [OPENAI[0], {"role": "assistant", "content": "5"}],
    },
    "whole conversations beside the prompt": {
        "prompt": "2 + 2?",
        "chosen": OPENAI,
        "rejected": [OPENAI[0], {"role": "assistant", "content": "5"}],
    },
    "sharegpt, one message each": {
        "conversations": SHAREGPT[:1],
        "chosen": SHAREGPT[1],
        "rejected": {"from": "gpt", "value": "5"},
    },
}


@pytest.mark.parametrize("value", PAIRS.values(), ids=PAIRS)
def test_a_chosen_and_a_rejected_answer(value: dict[str, Any]) -> None:
    assert OBJECTIVES[shape_of(value).objective] == "dpo"
    row = read(value)
    assert row == Row(number=7, messages=(ASKED,), chosen=(TOLD,), rejected=(WRONG,))
    assert row.prompt == (ASKED,) and row.answer == "4"
    assert row.texts == ("2 + 2?", "4", "5")


def test_scores_give_a_margin() -> None:
    pair = PAIRS["texts"]
    scored = {**pair, "score": {"chosen": 5, "rejected": 1}, "reject_reason": "wrong"}
    assert read(scored).margin == 4.0
    assert read({**pair, "score_chosen": 0.5, "score_rejected": 0.25}).margin == 0.25
    assert read({**pair, "margin": 2}).margin == 2.0
    assert read({**pair, "score": None}).margin is None
    assert refused({**pair, "score": {"chosen": 1, "rejected": 5}}) == (
        "the rejected answer has the higher score"
    )
    assert refused({**pair, "score": {"chosen": "a", "rejected": 5}}) == "a score is not a number"


def test_labelled_answers_are_kto() -> None:
    value = {"prompt": "2 + 2?", "completion": "5", "label": False}
    assert shape_of(value).objective == "kto"
    assert read(value) == Row(number=7, messages=(ASKED, WRONG), label=False)
    assert read({"messages": OPENAI, "label": True}).label is True
    assert read({"messages": OPENAI, "kto_tag": 1}).label is True
    texts = {"prompt": "2 + 2?", "completion": "4", "label": "arithmetic"}
    assert shape_of(texts).objective == "supervised"  # a label of something else


def test_tasks_texts_classes_and_prompts_alone() -> None:
    task = {"task": "sentiment", "input": "I hate it", "output": "negative"}
    assert shape_of(task).objective == "multi-task"
    row = read(task)
    assert row.task == "sentiment" and row.answer == "negative"
    assert row.prompt == (Message("user", "sentiment\n\nI hate it"),)

    text = {"text": "Two and two are four."}
    assert shape_of(text).objective == "pretraining"
    assert read(text) == Row(number=7, text="Two and two are four.")

    assert read({"text": "I hate it", "label": "negative"}).answer == "negative"
    assert read({"text": "I hate it", "label": 0}).answer == "0"
    assert read({"text": "I hate it", "label": 0, "label_text": "negative"}).answer == "negative"

    prompt = {"prompt": "2 + 2?"}
    assert shape_of(prompt).objective == "online"
    assert read(prompt) == Row(number=7, messages=(ASKED,))
    assert read({"prompt": [{"role": "system", "content": "Be brief."}, OPENAI[0]]}).prompt == (
        BRIEF,
        ASKED,
    )


def test_columns_of_ones_own() -> None:
    assert read({"q": "2 + 2?", "a": "4"}, instruction="q", output="a").messages == (ASKED, TOLD)
    # Ours wins over a field that happens to have the name.
    assert read({"q": "2 + 2?", "a": "4", "output": "5"}, prompt="q", output="a").answer == "4"
    assert renamed({"q": 1}, {}) == {"q": 1}


def test_a_row_that_fits_two_readings_says_so() -> None:
    value = {"instruction": "2 + 2?", "output": "4", "text": "### Instruction: 2 + 2?"}
    taken = shape_of(value)
    assert taken.name == "instruction"
    assert "text" in [shape.name for shape in other_shapes(value, taken)]


some_fields = st.dictionaries(
    st.sampled_from([*FIELDS, "query", "conversation", "kto_tag", "id"]),
    st.sampled_from([None, "", "2 + 2?", 0, 1, 2, 1.0, True, OPENAI, []]),
)


@given(some_fields)
def test_shapes_known_by_their_fields_are_those_that_fit(value: dict[str, Any]) -> None:
    fitting = [shape for shape in SHAPES if shape.fits(value)]
    for _ in range(2):  # worked out, and known
        if not fitting:
            with pytest.raises(Unusable, match="no usable field"):
                shapes_of(value)
        else:
            taken, *others = shapes_of(value)
            assert taken == fitting[0] == shape_of(value)
            assert others == other_shapes(value, taken)


def test_no_more_orders_of_fields_are_known_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(shapes, "_SHAPES_OF", known)
    monkeypatch.setattr(shapes, "_MOST_KNOWN", 3)
    for names in permutations(("instruction", "input", "output")):
        assert shapes_of(dict.fromkeys(names, "x"))[0].name == "instruction"
    assert len(known) == 3


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "not a JSON object"),
        ({"id": 3}, "no usable field"),
        ({"messages": "2 + 2?"}, "the conversation is not a list of messages"),
        ({"messages": []}, "the conversation is not a list of messages"),
        ({"messages": ["2 + 2?"]}, "a message is not an object"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "a message's role is not system, user, assistant or tool",
        ),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": " "}]}, "a message has no text"),
        ({"messages": [OPENAI[0], OPENAI[0]]}, "user and assistant do not take turns"),
        ({"messages": OPENAI[1:]}, "user and assistant do not take turns"),
        ({"messages": OPENAI[:1]}, "a conversation without an answer"),
        (
            {"messages": [*OPENAI, {"role": "system", "content": "x"}]},
            "a system message in the middle",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, OPENAI[1]]},
            "a message has parts that are not text",
        ),
        ({"messages": OPENAI, "tools": "["}, "`tools` is not JSON"),
        ({"messages": OPENAI, "tools": {"a": 1}}, "`tools` is not a list of objects"),
        ({"instruction": "2 + 2?", "output": ""}, "`output` is empty"),
        ({"instruction": "2 + 2?", "output": 4}, "`output` is not text"),
        ({"instruction": " ", "input": "", "output": "4"}, "`instruction` and `input` are empty"),
        (
            {"instruction": "a", "output": "b", "history": "c"},
            "`history` is not a list of [question, answer]",
        ),
        ({"text": ""}, "`text` is empty"),
        ({"text": "half \ud83d"}, "half a character (a lone surrogate)"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the chosen answer is the rejected one"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "`rejected` is empty"),
        ({"chosen": "b", "rejected": "c"}, "a pair without a question"),
        ({"text": "a", "label": None, "prompt": 3}, None),
        ({"text": "a", "label": [1]}, "`label` is neither text nor a number"),
        ({"prompt": 3}, "`prompt` is not text"),
        ({"prompt": OPENAI}, "`prompt` does not end with a question"),
    ],
)
def test_why_a_row_cannot_be_used(value: Any, reason: str | None) -> None:
    if reason is None:
        assert read(value).text == "a"
    else:
        assert refused(value) == reason


def test_every_shape_has_an_objective_that_a_plan_knows() -> None:
    assert {shape.objective for shape in SHAPES} <= set(OBJECTIVES)
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
