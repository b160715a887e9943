"""What shape a row has, by its fields, and the row that training gets of it.

Shapes are looked for in the order of SHAPES; the first whose fields are there is read. What a file
is for (its objective) follows from the shape of most of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from msgspec import Struct

from ftplan.launcher.data.records import decoded
from ftplan.launcher.data.rows import Message, Messages, Role, Row

Value = Mapping[str, Any]


class Unusable(Exception):
    """Why a row cannot be trained on, in few words that many rows may share."""


class Shape(Struct, frozen=True, kw_only=True):
    """A shape of rows.

    `objective`: what a file of such rows is for. `fits`: whether a row has its fields. `read`:
    the row's parts as arguments of `Row`; raises Unusable. `fields`: for people, as documentation
    spells them.
    """

    name: str
    objective: str
    fields: str
    fits: Callable[[Value], bool]
    read: Callable[[Value], dict[str, Any]]


# What a file is for, and the plan's objective that trains it.
OBJECTIVES = {
    "supervised": "sft",
    "multi-task": "sft",
    "pretraining": "sft",
    "preference": "dpo",
    "kto": "kto",
    "online": "grpo",
}

# What questions train: the model answers them itself.
_ONLINE = ("grpo", "rloo")

# What rows of a shape can train, the first by default: pairs are a reward model's too, and their
# chosen answers are answers.
TRAINS: Mapping[str, tuple[str, ...]] = {
    "supervised": ("sft", *_ONLINE),
    "multi-task": ("sft", *_ONLINE),
    "pretraining": ("sft",),
    "preference": ("dpo", "orpo", "simpo", "reward", "sft", *_ONLINE),
    "kto": ("kto", *_ONLINE),
    "online": _ONLINE,
}

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_ANSWERS = ("completion", "response", "output", "answer")
_QUESTIONS = ("prompt", "question", "query")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_LABELS = ("label", "kto_tag")

# Every field that some shape's `fits` asks for.
_OTHERS = ("instruction", "input", "chosen", "rejected", "task", "text")
_TELLING = frozenset((*_ANSWERS, *_QUESTIONS, *_CONVERSATIONS, *_LABELS, *_OTHERS))


def shape_of(value: object) -> Shape:
    """The first shape that the row has; raises Unusable where there is none."""
    return shapes_of(value)[0]


def other_shapes(value: Value, taken: Shape) -> list[Shape]:
    """Shapes that the row could have been read as, too, and that mean something else. That a row
    with an answer could be a prompt alone goes without saying."""
    return [
        shape
        for shape in SHAPES
        if shape.objective not in (taken.objective, "online") and shape.fits(value)
    ]


def shapes_of(value: object) -> tuple[Shape, ...]:
    """`shape_of`, then `other_shapes`; worked out once for the fields that many rows share."""
    if not isinstance(value, dict):
        raise Unusable("not a JSON object")
    names: list[object] = [
        name for name, item in value.items() if name in _TELLING and item is not None
    ]
    if (label := _first(value, _LABELS)) is not None:
        names.append(_is_label(value[label]))  # of a field's content, all that a shape asks
    key = tuple(names)
    known = _SHAPES_OF.get(key)
    if known is None:
        taken = next((shape for shape in SHAPES if shape.fits(value)), None)
        known = (taken, *other_shapes(value, taken)) if taken else ()
        if len(_SHAPES_OF) < _MOST_KNOWN:
            _SHAPES_OF[key] = known
    if not known:
        raise Unusable("no usable field")
    return known


# By the fields of a row in their order, of which there are many.
_SHAPES_OF: dict[tuple[object, ...], tuple[Shape, ...]] = {}
_MOST_KNOWN = 1024


def row_of(number: int, value: Value, shape: Shape, file: int = 0) -> Row:
    """The row; raises Unusable."""
    row = Row(number=number, file=file, **shape.read(value))
    for text in row.texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # valid JSON; no tokenizer takes it, no file can hold it
                raise Unusable("half a character (a lone surrogate)") from None
    return row


def renamed(value: Value, columns: Mapping[str, str]) -> Value:
    """The row with a person's own column names (`columns[ours] = theirs`) as ours, and without
    those of ours that have none (`columns[ours] = ""`)."""
    if not columns or not isinstance(value, Mapping):
        return value
    left_out = {ours for ours, own in columns.items() if not own} | set(columns.values())
    kept = {key: item for key, item in value.items() if key not in left_out}
    return kept | {ours: value[own] for ours, own in columns.items() if own and own in value}


def _has(*names: str) -> Callable[[Value], bool]:
    return lambda value: all(value.get(name) is not None for name in names)


def _first(value: Value, names: Sequence[str]) -> str | None:
    """The first of the fields that the row has."""
    for name in names:
        if value.get(name) is not None:
            return name
    return None


def _asked_and_answered(value: Value) -> bool:
    return _first(value, _QUESTIONS) is not None and _first(value, _ANSWERS) is not None


def _text(value: Value, key: str) -> str:
    content = value[key]
    if not isinstance(content, str):
        raise Unusable(f"`{key}` is not text")
    if _is_blank(content):
        raise Unusable(f"`{key}` is empty")
    return content


def _is_blank(text: str) -> bool:
    """Empty, or nothing but white space."""
    return not text or text.isspace()


def _optional_text(value: Value, key: str) -> str:
    content = value.get(key)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Unusable(f"`{key}` is not text")
    return content


# Names of fields that rows may have, which `--columns` maps a person's own ones to.
FIELDS = (
    *("instruction", "input", "output", "system", "history", "prompt", "completion", "question"),
    *("answer", "response", "messages", "conversations", "tools", "text", "label", "task"),
    *("chosen", "rejected", "score", "margin", "query", "conversation", "kto_tag"),
)


# --- conversations -------------------------------------------------------------------------------


def _message(turn: object) -> Message:
    if not isinstance(turn, dict):
        raise Unusable("a message is not an object")
    named = turn.get("role", turn.get("from"))
    role = _ROLES.get(named) if isinstance(named, str) else None
    role = role or _ROLES.get(str(named).casefold())
    if role is None:
        raise Unusable("a message's role is not system, user, assistant or tool")
    calls = _tool_calls(turn.get("tool_calls")) if role == "assistant" else ()
    content = _content(turn.get("content", turn.get("value")))
    if _is_blank(content) and not calls:
        raise Unusable("a message has no text")
    name = turn.get("name") if role == "tool" else None
    return Message(role, content, calls, name if isinstance(name, str) else "")


def _content(content: object) -> str:
    """A message's text; a list of parts joined, if all are text."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, Mapping) else p for p in content]
        if not all(isinstance(part, str) for part in parts):
            raise Unusable("a message has parts that are not text")
        return "".join(map(str, parts))
    if not isinstance(content, str):
        raise Unusable("a message has no text")
    return content


def _tool_calls(calls: object) -> tuple[Any, ...]:
    """OpenAI's, with arguments as objects: templates write them out themselves."""
    if not calls:
        return ()
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise Unusable("`tool_calls` is not a list of objects")
    return tuple(_with_object_arguments(call) for call in calls)


def _with_object_arguments(call: Value) -> Value:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = decoded(function["arguments"])
    except ValueError:
        raise Unusable("a tool call's arguments are not JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _turns(turns: object) -> list[Message]:
    """Messages in an order that a conversation can have."""
    if not isinstance(turns, list) or not turns:
        raise Unusable("the conversation is not a list of messages")
    messages = [_message(turn) for turn in turns]
    _check_order(messages)
    return messages


_MAY_FOLLOW: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _check_order(messages: Sequence[Message]) -> None:
    before = ""
    for message in messages:
        if message.role not in _MAY_FOLLOW[before]:
            raise Unusable(
                "a system message in the middle"
                if message.role == "system"
                else "user and assistant do not take turns"
            )
        before = message.role


def _answered(turns: object) -> Messages:
    """A conversation up to its last answer."""
    messages = _turns(turns)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise Unusable("a conversation without an answer")
    return tuple(messages)


def _conversation(value: Value) -> dict[str, Any]:
    turns = value[_first(value, _CONVERSATIONS) or ""]
    return {"messages": _opened(value, _answered(turns)), **_tools(value)}


def _tools(value: Value) -> dict[str, Any]:
    tools = value.get("tools") or value.get("functions")
    if isinstance(tools, str):
        try:
            tools = decoded(tools)
        except ValueError:
            raise Unusable("`tools` is not JSON") from None
    if not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise Unusable("`tools` is not a list of objects")
    return {"tools": tuple(tools)}


def _opened(value: Value, messages: Messages) -> Messages:
    """The conversation with the row's own `system`, if it has none."""
    system = _optional_text(value, "system")
    if _is_blank(system) or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", system), *messages)


# --- questions and answers -----------------------------------------------------------------------


def _question(value: Value) -> Messages:
    """What a row asks, by whichever fields it asks, with what was said before."""
    key = _first(value, _QUESTIONS)
    if key is not None and isinstance(value[key], list):
        asked = _turns(value[key])
        if asked[-1].role not in ("user", "tool"):
            raise Unusable(f"`{key}` does not end with a question")
        return _opened(value, tuple(asked))
    if (turns := _first(value, _CONVERSATIONS)) is not None and key is None:
        asked = _turns(value[turns])
        if asked[-1].role not in ("user", "tool"):
            raise Unusable(f"`{turns}` does not end with a question")
        return _opened(value, tuple(asked))
    text = _text(value, key) if key is not None else _instructed(value)
    return _opened(value, (*_history(value), Message("user", text)))


def _instructed(value: Value) -> str:
    parts = (_optional_text(value, "instruction"), _optional_text(value, "input"))
    request = "\n\n".join([part for part in parts if not _is_blank(part)])
    if not request:
        raise Unusable("`instruction` and `input` are empty")
    return request


def _history(value: Value) -> Messages:
    turns = value.get("history")
    if not turns:  # exported tables have "" for none
        return ()
    pairs = isinstance(turns, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    )
    if not pairs:
        raise Unusable("`history` is not a list of [question, answer]")
    messages: list[Message] = []
    for asked, answered in turns:
        messages += [Message("user", asked), Message("assistant", answered)]
    return tuple(messages)


def _answer(value: Value, key: str) -> Messages:
    """An answer as text, as one message, or as messages of which it is the last."""
    given = value[key]
    if isinstance(given, str):
        return (Message("assistant", _text(value, key)),)
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list):
        raise Unusable(f"`{key}` is not text")
    messages = tuple(_message(turn) for turn in given)
    if not messages or messages[-1].role != "assistant":
        raise Unusable(f"`{key}` does not end with an answer")
    return messages


def _one_answer(value: Value) -> dict[str, Any]:
    answer = _answer(value, _first(value, _ANSWERS) or "")
    messages = (*_question(value), *answer)
    _check_order(messages)
    return {"messages": messages, **_tools(value)}


def _instruction(value: Value) -> dict[str, Any]:
    messages = (*_history(value), Message("user", _instructed(value)), *_answer(value, "output"))
    return {"messages": _opened(value, messages)}


def _task(value: Value) -> dict[str, Any]:
    task = _text(value, "task")
    request = "\n\n".join(
        part
        for part in (task, _optional_text(value, "instruction"), _optional_text(value, "input"))
        if not _is_blank(part)
    )
    messages = (Message("user", request), *_answer(value, _first(value, _ANSWERS) or ""))
    return {"messages": _opened(value, messages), "task": task}


def _classified(value: Value) -> dict[str, Any]:
    """The class is the answer, in words where it has any."""
    named = (name for name in ("label_text", "label_name") if isinstance(value.get(name), str))
    label = value[next(named, "label")]
    if not isinstance(label, str | int):
        raise Unusable("`label` is neither text nor a number")
    if _is_blank(str(label)):
        raise Unusable("`label` is empty")
    return {"messages": (Message("user", _text(value, "text")), Message("assistant", str(label)))}


# --- preferences ---------------------------------------------------------------------------------


def _preferred(value: Value) -> dict[str, Any]:
    chosen, rejected = _answer(value, "chosen"), _answer(value, "rejected")
    if _first(value, (*_QUESTIONS, *_CONVERSATIONS, "instruction", "input")) is not None:
        asked = _question(value)
        chosen, rejected = _without(asked, chosen), _without(asked, rejected)
    else:  # whole conversations that begin alike
        alike = 0
        for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
            if one != other:
                break
            alike += 1
        asked = _opened(value, chosen[:alike])
        chosen, rejected = chosen[alike:], rejected[alike:]
    if not asked or asked[-1].role not in ("user", "tool"):
        raise Unusable("a pair without a question")
    if chosen == rejected:
        raise Unusable("the chosen answer is the rejected one")
    for answers in (chosen, rejected):
        _check_order((*asked, *answers))
    margin = _margin(value)
    if margin is not None and margin < 0:
        raise Unusable("the rejected answer has the higher score")
    return {"messages": asked, "chosen": chosen, "rejected": rejected, "margin": margin}


def _without(asked: Messages, answers: Messages) -> Messages:
    """The answers alone, where they repeat what was asked."""
    for begins in (asked, asked[1:] if asked and asked[0].role == "system" else asked):
        if begins and answers[: len(begins)] == begins:
            return answers[len(begins) :]
    return answers


_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


def _margin(value: Value) -> float | None:
    """By how much the chosen answer was scored better; None where nobody scored."""
    score = value.get("score")
    if isinstance(score, Mapping):
        found = (score.get("chosen"), score.get("rejected"))
    else:
        names = next((pair for pair in _SCORES if pair[0] in value), None)
        if names is None:
            margin = value.get("margin")
            return float(margin) if _is_number(margin) else None
        found = (value.get(names[0]), value.get(names[1]))
    if found == (None, None):
        return None
    chosen, rejected = found
    if not (_is_number(chosen) and _is_number(rejected)):
        raise Unusable("a score is not a number")
    return float(chosen) - float(rejected)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_label(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))


def _labelled(value: Value) -> dict[str, Any]:
    name = _first(value, _LABELS) or ""
    asked = _conversation(value) if _first(value, _CONVERSATIONS) else _one_answer(value)
    return {**asked, "label": bool(value[name])}


def _has_label(value: Value) -> bool:
    name = _first(value, _LABELS)
    answered = _first(value, _CONVERSATIONS) is not None or _asked_and_answered(value)
    return name is not None and _is_label(value[name]) and answered


# --- the rest ------------------------------------------------------------------------------------


def _plain(value: Value) -> dict[str, Any]:
    return {"text": _text(value, "text")}


def _prompt_alone(value: Value) -> dict[str, Any]:
    return {"messages": _question(value), **_tools(value)}


def _asks(value: Value) -> bool:
    return _first(value, (*_QUESTIONS, "instruction", "input")) is not None


SHAPES: tuple[Shape, ...] = (
    Shape(
        name="preference",
        objective="preference",
        fields="`chosen`, `rejected`, `prompt`",
        fits=_has("chosen", "rejected"),
        read=_preferred,
    ),
    Shape(
        name="labelled",
        objective="kto",
        fields="`prompt`, `completion`, `label` (true or false)",
        fits=_has_label,
        read=_labelled,
    ),
    Shape(
        name="messages",
        objective="supervised",
        fields="`messages` or `conversations`",
        fits=lambda value: _first(value, _CONVERSATIONS) is not None,
        read=_conversation,
    ),
    Shape(
        name="multi-task",
        objective="multi-task",
        fields="`task`, `input`, `output`",
        fits=lambda value: _has("task")(value) and _first(value, _ANSWERS) is not None,
        read=_task,
    ),
    Shape(
        name="instruction",
        objective="supervised",
        fields="`instruction` or `input`, `output`",
        fits=lambda value: (
            _has("output")(value) and _first(value, ("instruction", "input")) is not None
        ),
        read=_instruction,
    ),
    Shape(
        name="prompt/completion",
        objective="supervised",
        fields="`prompt` or `question`, `completion`, `response`, `output` or `answer`",
        fits=_asked_and_answered,
        read=_one_answer,
    ),
    Shape(
        name="classification",
        objective="supervised",
        fields="`text`, `label`",
        fits=_has("text", "label"),
        read=_classified,
    ),
    Shape(
        name="text",
        objective="pretraining",
        fields="`text`",
        fits=_has("text"),
        read=_plain,
    ),
    Shape(
        name="prompt",
        objective="online",
        fields="`prompt`",
        fits=_asks,
        read=_prompt_alone,
    ),
)
