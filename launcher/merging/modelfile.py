"""A Modelfile for Ollama: where the weights are, the chat template, and what ends an answer.

Ollama's templates are Go's. A chat template is taken apart by what it writes around a system
message and a question, so that those that write the same around every turn come through.
"""

from __future__ import annotations

from ftplan.launcher.data.rows import Message
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.planner.errors import InputError

_SYSTEM, _ASKED, _ANSWER = "SYSTEMMESSAGE", "QUESTIONASKED", "ANSWERGIVEN"


def modelfile(gguf_name: str, tokenizer: RowTokenizer) -> str:
    """The text of a Modelfile beside the weights."""
    lines = [f"FROM ./{gguf_name}"]
    template = go_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    added = tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.end_ids)
    lines += [f'PARAMETER stop "{token}"' for token in added]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: RowTokenizer) -> str | None:
    """The template in Go's language; None for one that cannot be taken apart: Ollama then looks
    for one that it knows."""
    asked = [Message("user", _ASKED)]
    try:
        alone = _cut(tokenizer.render(asked, ask=True), _ASKED)
        answered = _cut(tokenizer.render([*asked, Message("assistant", _ANSWER)]), _ANSWER)
        opening = [Message("system", _SYSTEM), *asked]
        with_system = _cut(tokenizer.render(opening, ask=True), _SYSTEM, _ASKED)
    except InputError:
        return None
    if alone is None or answered is None:
        return None
    before, after = alone
    user = "{{ .Prompt }}" + after + "{{ .Response }}" + answered[1]
    if with_system is None or with_system[2] != after:
        return _without_bos(before, tokenizer) + user
    system, between, _ = with_system
    opened = _without_bos(system, tokenizer) + "{{ .System }}" + between
    return (
        "{{ if .System }}" + opened + "{{ else }}" + _without_bos(before, tokenizer) + "{{ end }}"
    ) + user


def _cut(text: str, *marks: str) -> list[str] | None:
    """The text around the marks; None where one is not there once, in this order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        parts.append(before)
    whole = [*parts, text]
    return None if any("{{" in part or '"""' in part for part in whole) else whole


def _without_bos(text: str, tokenizer: RowTokenizer) -> str:
    """llama.cpp puts the first token there itself."""
    return text.removeprefix(tokenizer.tokenizer.bos_token or "")
