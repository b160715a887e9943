"""Rows to tokens: one template for profiling, training, evaluation and samples.

A tokenizer's own chat template where it has one; else a plain template, stated in the plan.
Only answers carry loss; plain text carries loss throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftplan.launcher.data_reader import Message, Row

PLAIN_HEADINGS = {"system": "System", "user": "Instruction", "assistant": "Response"}

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text, and whether its tokens carry loss."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row as training sees it: `completion_mask` is 1 where a token carries loss."""

    input_ids: list[int]
    completion_mask: list[int]


class RowTokenizer:
    """Tokenizes rows with a model's own tokenizer and template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))

    @property
    def template(self) -> str:
        """What the template is, for a person."""
        return "the tokenizer's chat template" if self.has_chat_template else "plain headings"

    def tokenize(
        self, rows: Sequence[Row], progress: Callable[[int], None] = lambda done: None
    ) -> Iterator[TokenRow]:
        """Token rows in order; `progress` is told how many rows are done."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows[start : start + _ROWS_AT_ONCE]
            yield from self._tokenize_chunk([self.segments(row) for row in chunk])
            progress(min(start + _ROWS_AT_ONCE, len(rows)))

    def _tokenize_chunk(self, rows: list[list[Segment]]) -> Iterator[TokenRow]:
        texts = [segment.text for segments in rows for segment in segments]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        for segments in rows:
            input_ids: list[int] = []
            mask: list[int] = []
            for segment in segments:
                tokens = next(ids)
                input_ids += tokens
                mask += [int(segment.trained)] * len(tokens)
            yield TokenRow(input_ids, mask)

    def segments(self, row: Row) -> list[Segment]:
        """The row's text cut where loss begins and ends; its end token is trained."""
        end = self.tokenizer.eos_token or ""
        if row.text:
            return [Segment(row.text + end, True)]
        if not self.has_chat_template:
            return self._plain_segments(row.messages, end)
        return self._template_segments(row.messages)

    def _template_segments(self, messages: tuple[Message, ...]) -> list[Segment]:
        """Every answer of the conversation trained, where the template renders prefixes alike;
        some templates change earlier turns later on, then the last answer only."""
        segments: list[Segment] = []
        done = ""
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            asked = self.render(messages[:number], ask=True)
            answered = self.render(messages[: number + 1])
            if not (asked.startswith(done) and answered.startswith(asked)):
                return self._last_answer(messages)
            segments += [
                Segment(asked[len(done) :], False),
                Segment(answered[len(asked) :], True),
            ]
            done = answered
        if self.render(messages) != done:
            return self._last_answer(messages)
        return segments

    def _last_answer(self, messages: tuple[Message, ...]) -> list[Segment]:
        asked, answered = self.render(messages[:-1], ask=True), self.render(messages)
        if not answered.startswith(asked):
            asked = self.render(messages[:-1])
        return [Segment(asked, False), Segment(answered[len(asked) :], True)]

    def _plain_segments(self, messages: tuple[Message, ...], end: str) -> list[Segment]:
        segments = []
        for message in messages:
            heading = f"### {PLAIN_HEADINGS[message.role]}:\n"
            if message.role == "assistant":
                segments += [Segment(heading, False), Segment(message.content + end, True)]
            else:
                segments.append(Segment(f"{heading}{message.content}\n\n", False))
        return segments

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """The conversation as text, with the opening of the next answer if `ask`."""
        if not self.has_chat_template:
            parts = self._plain_segments(tuple(messages), self.tokenizer.eos_token or "")
            opening = f"### {PLAIN_HEADINGS['assistant']}:\n" if ask else ""
            return "".join(part.text for part in parts) + opening
        turns = [{"role": m.role, "content": m.content} for m in messages]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=ask
        )
        return text


def load_tokenizer(model: str | Path) -> RowTokenizer:
    """The tokenizer of a model folder or Hub id; imports transformers."""
    from transformers import AutoTokenizer

    return RowTokenizer(AutoTokenizer.from_pretrained(str(model)))
