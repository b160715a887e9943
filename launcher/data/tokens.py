"""Rows to tokens: one template for profiling, training, evaluation and samples.

A tokenizer's own chat template where it has one; else a plain template, stated in the plan.
Only answers carry loss; plain text carries loss throughout. Where the tokenizer puts a first token
before every text (Llama's, Gemma's), so do we; a chat template writes its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from msgspec import Struct, structs

from ftplan.launcher.data.patterns import Patterns, Segment
from ftplan.launcher.data.rows import Message, Messages, Role, Row
from ftplan.planner.errors import InputError

PLAIN_HEADINGS = {
    "system": "System",
    "user": "Instruction",
    "assistant": "Response",
    "tool": "Tool",
}

PLAIN_ROLES: tuple[Role, ...] = get_args(Role)

_ROWS_AT_ONCE = 256

_OTHER_TEMPLATE = (
    "give a model with another template, or take `chat_template` out of its tokenizer's files: "
    "plain headings are used then"
)


# Any conversation: only what the template puts around it is looked at.
_SHORT_TALK = (Message("user", "Hello"), Message("assistant", "Farewell"))


class TokenRow(Struct, frozen=True):
    """A row as training sees it: `completion_mask` is 1 where a token carries loss."""

    input_ids: list[int]
    completion_mask: list[int]


class TokenPair(Struct, frozen=True):
    """A question and its answers as preference training sees them; `rejected_ids` is empty where
    there is one answer only."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class RowTokenizer:
    """Tokenizes rows with a model's own tokenizer and template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        template = getattr(tokenizer, "chat_template", None)
        self._template = template if isinstance(template, str) else None
        self._patterns = Patterns(self._template)
        self._pair_patterns: dict[int, Patterns] = {}  # by how many messages are the prompt

    @property
    def template(self) -> str:
        """What the template is, for a person."""
        return "the tokenizer's chat template" if self.has_chat_template else "plain headings"

    @property
    def template_text(self) -> str:
        """The template in force, whole: the tokenizer's, or a conversation under plain headings."""
        if not self.has_chat_template:
            return self.render([Message(role, role) for role in PLAIN_ROLES], ask=True)
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)

    def tokenize(
        self, rows: Sequence[Row], progress: Callable[[int], None] = lambda done: None
    ) -> Iterator[TokenRow]:
        """Token rows in order; `progress` is told how many rows are done."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows[start : start + _ROWS_AT_ONCE]
            yield from self._tokenize_chunk(chunk)
            progress(min(start + _ROWS_AT_ONCE, len(rows)))

    def _tokenize_chunk(self, rows: Sequence[Row]) -> Iterator[TokenRow]:
        cut = [self.segments(row) for row in rows]
        texts = [segment.text for segments in cut for segment in segments]
        ids = iter(self.ids(texts))
        for row, segments in zip(rows, cut, strict=True):
            input_ids: list[int] = []
            mask: list[int] = []
            for segment in segments:
                tokens = next(ids)
                input_ids += tokens
                mask += [int(segment.trained)] * len(tokens)
            opening = self._opening(row.messages, input_ids)
            yield TokenRow(opening + input_ids, [0] * len(opening) + mask)

    def pair(self, row: Row) -> TokenPair:
        """The row's prompt, its wanted answer and the other one, if any.

        Raises InputError as `segments` does.
        """
        (pair,) = self.pairs([row])
        return pair

    def pairs(self, rows: Sequence[Row]) -> list[TokenPair]:
        """Of each row as `pair`."""
        cut = [self.compared(row) for row in rows]
        texts = [segment.text for answers in cut for segments in answers for segment in segments]
        ids = iter(self.ids(texts))
        made = []
        for row, answers in zip(rows, cut, strict=True):
            (prompt, wanted), *others = [[next(ids) for _ in segments] for segments in answers]
            rejected = others[0][1] if others else []
            made.append(TokenPair(self._opening(row.prompt, prompt) + prompt, wanted, rejected))
        return made

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's tokens, without those that the tokenizer adds to a text."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return found

    def compared(self, row: Row) -> list[list[Segment]]:
        """What preference training compares: the prompt with the wanted answer, and with the other
        one, if any; two segments each. The prompt of the first is everybody's.

        Raises InputError as `segments` does.
        """
        wanted = row.chosen or row.messages[len(row.prompt) :]
        pairs = [wanted, row.rejected] if row.rejected else [wanted]
        try:
            return [self._asked_and_answer(row, answers) for answers in pairs]
        except InputError as error:
            raise _of_row(row, error) from error

    def _asked_and_answer(self, row: Row, answers: Messages) -> list[Segment]:
        asked = len(row.prompt)
        whole = structs.replace(row, messages=(*row.prompt, *answers), chosen=(), rejected=())

        def render(row: Row) -> list[Segment]:
            return self._last_answers(row.messages[:asked], row.messages[asked:], row.tools)

        if not self.has_chat_template:
            return render(whole)
        patterns = self._pair_patterns.setdefault(asked, Patterns(self._template))
        return patterns.segments(whole, render)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The tokens of a prompt up to where its answer begins, as in training."""
        text = self.render(messages, ask=True, tools=tools)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._opening(messages, ids) + ids

    def _opening(self, messages: Sequence[Message], ids: list[int]) -> list[int]:
        """What belongs before the tokens: nothing where template or text has brought its own."""
        templated = messages and self.has_chat_template
        return [] if templated or ids[:1] == self.first_token else self.first_token

    def opening_tokens(self, row: Row, segments: Sequence[Segment]) -> int:
        """How many tokens `_opening` puts before the row."""
        if row.messages and self.has_chat_template:
            return 0
        first = next((segment.text for segment in segments if segment.text), "")
        bos = self._bos
        return 0 if bos and first.startswith(bos) else len(self.first_token)

    @cached_property
    def _end(self) -> str:
        """What ends a text; looked up once, as transformers takes a microsecond for it."""
        return self.tokenizer.eos_token or ""

    @cached_property
    def _bos(self) -> str:
        return self.tokenizer.bos_token or ""

    @cached_property
    def first_token(self) -> list[int]:
        """The token that the tokenizer puts before every text; empty where it puts none."""
        first, bos = self.tokenizer("a")["input_ids"][:1], self.tokenizer.bos_token_id
        return first if first == [bos] else []

    @cached_property
    def end_tokens(self) -> list[int]:
        """What training teaches to say at an answer's end: the tokenizer's end token, and the
        special token with which the chat template goes on after an answer."""
        ends = [self.tokenizer.eos_token_id]
        if self.has_chat_template:
            *_, answer = self.segments(Row(number=1, messages=_SHORT_TALK))
            after = answer.text.partition(_SHORT_TALK[-1].content)[2].strip()
            (ids,) = self.ids([after])
            added = self.tokenizer.added_tokens_decoder
            ends += [token for token in ids[:1] if token in added and added[token].special]
        return list(dict.fromkeys(token for token in ends if token is not None))

    def segments(self, row: Row) -> list[Segment]:
        """The row's text cut where loss begins and ends; its end token is trained.

        A pair's text is that of its question and chosen answer. Raises InputError where the chat
        template refuses the row, or where a question is not rendered as the beginning of its
        answered conversation.
        """
        end = self._end
        if row.text:
            return [Segment(row.text + end, True)]
        row = row.with_chosen_alone()
        if not self.has_chat_template:
            return self._plain_segments(row.messages, end)
        try:
            return self._patterns.segments(row, self._template_segments)
        except InputError as error:
            raise _of_row(row, error) from error

    def _template_segments(self, row: Row) -> list[Segment]:
        """Every answer of the conversation trained, where the template renders prefixes alike;
        some templates change earlier turns later on, then the last answer only. A prompt alone
        carries no loss."""
        messages, tools = row.messages, row.tools
        if messages[-1].role != "assistant":
            return [Segment(self.render(messages, ask=True, tools=tools), False)]
        segments: list[Segment] = []
        done = ""
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            asked = self.render(messages[:number], ask=True, tools=tools)
            answered = self.render(messages[: number + 1], tools=tools)
            if not (asked.startswith(done) and answered.startswith(asked)):
                return self._last_answers(messages[:-1], messages[-1:], tools)
            segments += [
                Segment(asked[len(done) :], False),
                Segment(answered[len(asked) :], True),
            ]
            done = answered
        return segments

    def _last_answers(
        self, prompt: Messages, answers: Messages, tools: Sequence[Any]
    ) -> list[Segment]:
        """What was asked, and all that follows it."""
        whole = self.render((*prompt, *answers), tools=tools)
        asked = self.render(prompt, ask=True, tools=tools)
        if not whole.startswith(asked):
            asked = self.render(prompt, tools=tools)
        if not whole.startswith(asked):
            raise InputError(
                "the tokenizer's chat template renders a question in another way once it is "
                "answered, so that loss cannot be put on the answer alone",
                _OTHER_TEMPLATE,
            )
        return [Segment(asked, False), Segment(whole[len(asked) :], True)]

    def _plain_segments(self, messages: tuple[Message, ...], end: str) -> list[Segment]:
        """Questions and headings between two answers are one segment: a tokenizer may have other
        tokens for two line feeds at the end of a text than before `###`."""
        segments = []
        asked = ""
        for message in messages:
            asked += f"### {PLAIN_HEADINGS[message.role]}:\n"
            if message.role == "assistant":
                segments += [Segment(asked, False), Segment(message.content + end, True)]
                asked = ""
            else:
                asked += f"{message.content}\n\n"
        return [*segments, Segment(asked, False)] if asked else segments

    def render(
        self, messages: Sequence[Message], *, ask: bool = False, tools: Sequence[Any] = ()
    ) -> str:
        """The conversation as text, with the opening of the next answer if `ask`.

        A system message that the chat template refuses, as Gemma's does, stands before the first
        question instead. Raises InputError if the template refuses that too.
        """
        if not self.has_chat_template:
            parts = self._plain_segments(tuple(messages), self._end)
            opening = f"### {PLAIN_HEADINGS['assistant']}:\n" if ask else ""
            return "".join(part.text for part in parts) + opening
        try:
            return self._apply_template(messages, ask, tools)
        except InputError:
            if [message.role for message in messages[:2]] != ["system", "user"]:
                raise
        system, question, *rest = messages
        folded = Message("user", f"{system.content}\n\n{question.content}")
        return self._apply_template([folded, *rest], ask, tools)

    def _apply_template(self, messages: Sequence[Message], ask: bool, tools: Sequence[Any]) -> str:
        from jinja2.exceptions import TemplateError  # comes with what renders templates

        turns = [message.to_dict() for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    tokenize=False,
                    add_generation_prompt=ask,
                    **({"tools": list(tools)} if tools else {}),
                )
            )
        except TemplateError as error:
            raise InputError(
                f"the tokenizer's chat template refuses the conversation: {error}", _OTHER_TEMPLATE
            ) from error


def _of_row(row: Row, error: InputError) -> InputError:
    return InputError(f"row {row.number}: {error.message}", error.hint)


def load_tokenizer(model: str | Path) -> RowTokenizer:
    """The tokenizer of a model folder or Hub id; imports transformers."""
    from transformers import AutoTokenizer

    return RowTokenizer(AutoTokenizer.from_pretrained(str(model)))
