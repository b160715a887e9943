"""Rows as training knows them, whatever the file called their fields."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, structs

Role = Literal["system", "user", "assistant", "tool"]


class Message(Struct, frozen=True):
    """A turn. `tool_calls`: what an assistant asks tools for, as chat templates take it."""

    role: Role
    content: str
    tool_calls: tuple[Any, ...] = ()
    name: str = ""
    """The tool that answers."""

    def to_dict(self) -> dict[str, Any]:
        """As a chat template takes it."""
        more: dict[str, Any] = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
        return {"role": self.role, "content": self.content, **more} | (
            {"name": self.name} if self.name else {}
        )


Messages = tuple[Message, ...]


class Row(Struct, frozen=True, kw_only=True):
    """A usable row.

    `text` alone: plain text. Else `messages` is a conversation: it ends with an answer that is
    learned; or, beside `chosen` and `rejected`, which go on from it, and for prompts alone, with a
    question. `label` says whether its answer is wanted (KTO). `margin`: by how much the chosen
    answer scored better. `tools`: JSON schemas. `number`: the line, or the row, of its file.
    """

    number: int
    file: int = 0
    messages: Messages = ()
    text: str = ""
    chosen: Messages = ()
    rejected: Messages = ()
    margin: float | None = None
    label: bool | None = None
    task: str = ""
    tools: tuple[Any, ...] = ()

    @property
    def prompt(self) -> Messages:
        """What is asked: all messages before the answers."""
        if self.chosen or not self.messages or self.messages[-1].role != "assistant":
            return self.messages
        return self.messages[:-1]

    @property
    def is_compared(self) -> bool:
        """Whether answers are weighed: one against another (DPO, reward), or alone (KTO)."""
        return bool(self.chosen) or self.label is not None

    @property
    def is_prompt(self) -> bool:
        """Whether it is a question alone, for a model that answers while it is trained."""
        return bool(self.messages and not self.chosen and self.messages[-1].role != "assistant")

    def with_chosen_alone(self) -> Row:
        """A pair's question and chosen answer as a conversation; other rows as they are."""
        if not self.chosen:
            return self
        messages = (*self.messages, *self.chosen)
        return structs.replace(self, messages=messages, chosen=(), rejected=())

    def as_prompt(self) -> Row:
        """What is asked, alone."""
        return structs.replace(self, messages=self.prompt, chosen=(), rejected=(), label=None)

    @property
    def answer(self) -> str:
        """The wanted answer's text; the whole text of a row without one."""
        if self.chosen:
            return self.chosen[-1].content
        if self.messages and self.messages[-1].role == "assistant":
            return self.messages[-1].content
        return self.text

    @property
    def texts(self) -> tuple[str, ...]:
        """All its text, a message each."""
        several = (*self.messages, *self.chosen, *self.rejected)
        return tuple([message.content for message in several]) or (self.text,)
