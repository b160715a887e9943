"""Which template puts conversations into text: the model's own, a plain one, or one that is named.

Each is a Jinja template that stands in the tokenizer itself, so that what is saved with a run
renders prompts as they were trained, in plain transformers too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.planner.errors import InputError, UnknownNameError

PLAIN_HEADINGS = {
    "system": "System",
    "user": "Instruction",
    "assistant": "Response",
    "tool": "Tool",
}

# What may be asked for beside a file.
TEMPLATE_NAMES = ("auto", "model", "plain", "chatml")

# Marks that are one token each in the vocabularies that have them: ChatML's and Llama's, DeepSeek's
# and Gemma's.
_MARK = re.compile(r"<\|[^\s|<>{}'\"]+\|>|<\uff5c[^\s\uff5c<>{}'\"]+\uff5c>|<(?:start|end)_of_\w+>")

_CALLS = (
    "{% for call in message.tool_calls or [] %}"
    "{{ ('\\n' if message.content or not loop.first else '') + (call | tojson) }}"
    "{% endfor %}"
)

# https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
_CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\nTools:\\n' }}"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\\n' if not loop.last }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    + _CALLS
    + "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Template(Struct, frozen=True, kw_only=True):
    """`name`: `model`, `plain`, `chatml` or a file's path. `text`: Jinja; None for the tokenizer's
    own. `why`: of the choice; `asked`: whether a person made it."""

    name: str
    text: str | None = None
    why: str = ""
    asked: bool = False

    @property
    def is_plain(self) -> bool:
        return self.name == "plain"

    @property
    def shown(self) -> str:
        """For a person."""
        if self.is_plain:
            return "plain headings"
        if self.text is None:
            return "the tokenizer's chat template"
        return f"the chat template `{self.name}`"


def choose_template(tokenizer: Any, asked: str = "auto", *, is_base: bool = False) -> Template:
    """The one asked for; else the tokenizer's own, but plain headings for a base model.

    Raises InputError where it is not to be had.
    """
    has_own = bool(getattr(tokenizer, "chat_template", None))
    if asked == "auto":
        if has_own and not is_base:
            why = "a chat model is tuned on in the template that it was taught"
            return Template(name="model", why=why)
        why = (
            "a base model has hardly seen the tokens of the chat template that it comes with"
            if has_own
            else "the tokenizer has no chat template"
        )
        return Template(name="plain", text=plain_template(tokenizer), why=why)
    return _asked_template(tokenizer, asked, has_own=has_own)


def _asked_template(tokenizer: Any, asked: str, *, has_own: bool) -> Template:
    if asked == "model":
        if not has_own:
            raise InputError(
                "`--chat-template model`: the tokenizer has no chat template",
                "use `--chat-template plain` or `chatml`, or give a file with a Jinja template",
            )
        return Template(name=asked, why="asked for", asked=True)
    if asked == "plain":
        text = plain_template(tokenizer)
    elif asked == "chatml":
        text = _opening(tokenizer) + _CHATML
    else:
        text = _read(asked)
        asked = str(Path(asked).resolve())
    return Template(name=asked, text=text, why="asked for", asked=True)


def check_template_name(asked: str) -> None:
    """Raises InputError, before anything slow, for what is neither a name nor a file."""
    if asked not in TEMPLATE_NAMES:
        _read(asked)


def _read(path: str) -> str:
    """A template's file. Raises InputError where it cannot be read or is no Jinja."""
    if not Path(path).is_file():
        raise UnknownNameError(
            "chat template", path, TEMPLATE_NAMES, "Or give a file with a Jinja template."
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the chat template `{path}`: {error}") from error
    if "messages" not in text:
        raise InputError(
            f"`{path}` is no chat template: it does not speak of `messages`",
            "it is a Jinja template as transformers' tokenizers have it; "
            "`--chat-template chatml` is a common one",
        )
    return text


def plain_template(tokenizer: Any) -> str:
    """Headings before each message, and the tokenizer's end token after each answer.

    Messages and headings are as they are in a conversation; calls of tools are JSON lines.
    """
    headings = ", ".join(f"'{role}': '### {word}:\\n'" for role, word in PLAIN_HEADINGS.items())
    return (
        f"{_opening(tokenizer)}{{% set headings = {{{headings}}} %}}"
        "{% if tools %}{{ '### Tools:\\n' }}"
        "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '\\n' }}{% endif %}"
        "{% for message in messages %}"
        "{{ headings[message.role] + (message.content or '') }}"
        + _CALLS
        + "{{ (eos_token or '') if message.role == 'assistant' else '\\n\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ headings['assistant'] }}{% endif %}"
    )


def _opening(tokenizer: Any) -> str:
    """The first token, where the tokenizer puts one before every text."""
    return "{{ bos_token }}" if first_token(tokenizer) else ""


def first_token(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text; empty where it puts none."""
    first, bos = tokenizer("a")["input_ids"][:1], tokenizer.bos_token_id
    return first if first == [bos] else []


def marks_of(template: str) -> tuple[str, ...]:
    """The marks that a template writes and that vocabularies have as one token each."""
    return tuple(dict.fromkeys(_MARK.findall(template)))
