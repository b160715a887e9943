"""Rows to tokens: one template for profiling, training, evaluation and samples.

Which template that is, `templates.py` chooses and the plan states; it stands in the tokenizer, as
it is saved. Only answers carry loss; plain text carries loss throughout. Where the tokenizer puts a
first token before every text (Llama's, Gemma's), so do we; a template writes its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ftplan.launcher import remote_code
from ftplan.launcher.data.patterns import Patterns, Segment
from ftplan.launcher.data.rows import Message, Messages, Row
from ftplan.launcher.data.special_tokens import (
    add_tokens_to,
    answer_end_ids,
    known_marks,
    pad_token_of,
    token_ids,
    written_tokens,
)
from ftplan.launcher.data.templates import Template, choose_template, first_token, marks_of
from ftplan.planner.errors import InputError
from ftplan.planner.vocabulary import OF_TEMPLATE, named_tokens

_ROWS_AT_ONCE = 256

_OTHER_TEMPLATE = "`--chat-template plain` puts the rows under plain headings instead"

# Stands for an answer where a template is looked at; no template looks for it.
_PROBE = "zq"


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
    """Tokenizes rows with a model's own tokenizer and a template, which it puts into it.

    `add_tokens` are put into it as well, and those that the template writes and the vocabulary has
    not: `added` are all of them. `trained`: these, and `train_tokens`, in which `template` stands
    for those that the template writes. Raises InputError for a token that the vocabulary has not.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template | None = None,
        *,
        add_tokens: Sequence[str] = (),
        train_tokens: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.chosen = template or choose_template(tokenizer)
        if self.chosen.text is not None:
            tokenizer.chat_template = self.chosen.text
        marks = marks_of(self.template_text)
        lacking = marks if self.chosen.text is not None else ()
        self.added = add_tokens_to(tokenizer, named_tokens(add_tokens, lacking), marks)
        asked = [
            written_tokens(tokenizer, marks) if token == OF_TEMPLATE else (token,)
            for token in train_tokens
        ]
        self.trained = named_tokens(*asked, add_tokens, self.added)
        self.trained_ids = token_ids(tokenizer, self.trained)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = pad_token_of(tokenizer)
        written = tokenizer.chat_template
        self._template = written if isinstance(written, str) else None
        self._patterns = Patterns(self._template)
        self._pair_patterns: dict[int, Patterns] = {}  # by how many messages are the prompt

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations are more than plain headings."""
        return not self.chosen.is_plain

    @property
    def template(self) -> str:
        """What the template is, for a person."""
        return self.chosen.shown

    @property
    def template_text(self) -> str:
        """The template in force, whole."""
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else json.dumps(template, sort_keys=True)

    @property
    def template_tokens(self) -> tuple[str, ...]:
        """Tokens of the vocabulary that the template writes, but for those that begin and end every
        text, which a model has always seen."""
        of_texts = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        marks = marks_of(self.template_text)
        return tuple(mark for mark in known_marks(self.tokenizer, marks) if mark not in of_texts)

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens that end what the model is taught: an answer's, then a text's."""
        ends = answer_end_ids(self.tokenizer, self._tail) or []
        eos = self.tokenizer.eos_token_id
        return list(dict.fromkeys([*ends, *([eos] if eos is not None else [])]))

    @cached_property
    def _tail(self) -> str:
        """What the template writes behind an answer; empty where it refuses a plain question."""
        turns = [Message("user", _PROBE), Message("assistant", _PROBE)]
        try:
            return self.render(turns).rpartition(_PROBE)[2]
        except InputError:
            return ""

    @cached_property
    def _added_end(self) -> str:
        """The end token, where the template ends an answer with none: without one a model is never
        taught to stop."""
        return "" if answer_end_ids(self.tokenizer, self._tail) else self._end

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

        patterns = self._pair_patterns.setdefault(asked, Patterns(self._template))
        return patterns.segments(whole, render)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The tokens of a prompt up to where its answer begins, as in training."""
        text = self.render(messages, ask=True, tools=tools)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._opening(messages, ids) + ids

    def _opening(self, messages: Sequence[Message], ids: list[int]) -> list[int]:
        """What belongs before the tokens: nothing where template or text has brought its own."""
        return [] if messages or ids[:1] == self.first_token else self.first_token

    def opening_tokens(self, row: Row, segments: Sequence[Segment]) -> int:
        """How many tokens `_opening` puts before the row."""
        if row.messages:
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
        return first_token(self.tokenizer)

    def segments(self, row: Row) -> list[Segment]:
        """The row's text cut where loss begins and ends; its end token is trained.

        A pair's text is that of its question and chosen answer. Raises InputError where the chat
        template refuses the row, or where a question is not rendered as the beginning of its
        answered conversation.
        """
        if row.text:
            return [Segment(row.text + self._end, True)]
        row = row.with_chosen_alone()
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
        return self._ended(segments)

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
        return self._ended([Segment(asked, False), Segment(whole[len(asked) :], True)])

    def _ended(self, segments: list[Segment]) -> list[Segment]:
        """The last answer with its end token, where the template writes none."""
        *before, last = segments
        return [*before, Segment(last.text + self._added_end, last.trained)]

    def render(
        self, messages: Sequence[Message], *, ask: bool = False, tools: Sequence[Any] = ()
    ) -> str:
        """The conversation as text, with the opening of the next answer if `ask`.

        A system message that the chat template refuses, as Gemma's does, stands before the first
        question instead. Raises InputError if the template refuses that too.
        """
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


def load_tokenizer(
    model: str | Path,
    template: Template | str = "auto",
    *,
    is_base: bool = False,
    add_tokens: Sequence[str] = (),
    train_tokens: Sequence[str] = (),
) -> RowTokenizer:
    """The tokenizer of a model folder or Hub id, with a template or the one that is asked for;
    imports transformers. Raises InputError where template or tokens are not to be had."""
    from transformers import AutoTokenizer

    trust = remote_code.trusted(model, remote_code.TOKENIZER)
    with remote_code.refused(model):
        tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=trust)
    if isinstance(template, str):
        template = choose_template(tokenizer, template, is_base=is_base)
    return RowTokenizer(tokenizer, template, add_tokens=add_tokens, train_tokens=train_tokens)
