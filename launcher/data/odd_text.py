"""What does not belong into training text: templates' marks, lost characters, HTML.

Each function yields the kinds found in a text, each once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from ftplan.profiles.text_facts import chat_markers

_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_QUOTES = "\"'`\u201c\u201d\u2018\u2019"

# Llama 2's end of a turn; in HTML the same letters end a struck-out stretch.
_END_OF_SEQUENCE = re.compile(r"</s>\s*(?:\Z|<s>)")
_STRUCK_OUT = re.compile(r"<s>[^<]*</s>(?!\s*\Z)|\w<s>")


def chat_tokens_in(text: str) -> Iterator[str]:
    """`ChatML`, `Llama 3`, ...: whose marks of turns stand in the text.

    Not those between quotation marks or in a block of code: such text speaks about them.
    """
    if "```" in text:
        text = _CODE_BLOCK.sub("", text)
    for name, tokens, headings in _markers():
        if any(_stands_bare(token, text) for token in tokens if token in text) or (
            headings and all(heading.search(text) for heading in headings)
        ):
            yield name
    if "</s>" in text and _END_OF_SEQUENCE.search(text) and not _STRUCK_OUT.search(text):
        yield "end of sequence"


def thoughts_in(text: str) -> bool:
    """Whether a thought in `<think>` tags stands in the text."""
    start = text.find("<think>")
    return start >= 0 and _stands_bare("<think>", text) and text.find("</think>", start) >= 0


@cache
def _markers() -> tuple[tuple[str, tuple[str, ...], tuple[re.Pattern[str], ...]], ...]:
    return tuple(
        (
            marker.name,
            marker.tokens,
            tuple(re.compile(rf"^{re.escape(text)}", re.MULTILINE) for text in marker.headings),
        )
        for marker in chat_markers().markers
    )


def _stands_bare(token: str, text: str) -> bool:
    start = text.find(token)
    while start >= 0:
        end = start + len(token)
        if text[start - 1 : start] not in _quotes() and text[end : end + 1] not in _quotes():
            return True
        start = text.find(token, end)
    return False


@cache
def _quotes() -> frozenset[str]:
    return frozenset(_QUOTES)


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Overrides of the writing direction, which show a text in another order than it has; and runs of
# characters without width. A single joiner is right in Persian, Hindi and in pictures.
_INVISIBLE = re.compile("[\u202d\u202e]|[\u200b\u200c\u200d\u2060\ufeff]{2}")


def odd_characters_in(text: str) -> Iterator[str]:
    if _CONTROL.search(text):
        yield "control characters"
    if _INVISIBLE.search(text):
        yield "invisible characters"
    if "\ufffd" in text:
        yield "lost characters (U+FFFD)"
    if _was_decoded_wrongly(text):
        yield "wrongly decoded characters"


# UTF-8's two bytes of a Latin letter or sign read as Windows-1252: Ã or Â and what its bytes 80 to
# BF are there; or the three of a quotation mark or dash. Words in capitals (SÃO, «CAFÂ») are words.
_HIGH = bytes(range(0x80, 0xC0)).decode("cp1252", "ignore") + "\x81\x8d\x8f\x90\x9d"
_MOJIBAKE = re.compile(f"(?<![A-ZÀ-Þ{_QUOTES}])(?:[ÃÂ][{re.escape(_HIGH)}]|â€[{re.escape(_HIGH)}])")


def _was_decoded_wrongly(text: str) -> bool:
    return _MOJIBAKE.search(text) is not None


_TAG = re.compile(
    r"</?(?:p|br|div|span|b|i|em|strong|ul|ol|li|a|h[1-6]|table|tr|td|th|font|img|blockquote)"
    r"(?:\s[^<>]{0,200})?/?>",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:nbsp|amp|quot|lt|gt|apos|#\d{2,5}|#x[0-9a-fA-F]{2,4});")
_ABOUT_MARKUP = re.compile(
    r"html|xml|css|svg|markup|markdown|javascript|\bjsx?\b|react|vue|angular|php|django|jinja|\btags?\b"
    r"|url|http request|<!doctype|<script|<style|<\?|=>|```|`<|`&|def |function|import |class ",
    re.IGNORECASE,
)


def html_in(text: str) -> bool:
    """Whether tags or entities stand in a text that is not about them and holds no code."""
    found = _TAG.search(text) or _ENTITY.search(text)
    return found is not None and not _ABOUT_MARKUP.search(text)


_REFUSAL = re.compile(
    r"\bas an? (?:large )?ai(?: language)?(?: model| assistant)?\b"
    r"|\bas a (?:large )?language model\b|\bi(?:['\u2019]m| am) (?:just |only )?an? (?:large )?"
    r"(?:ai|language model)\b",
    re.IGNORECASE,
)
_REFUSAL_WITHIN = 300  # characters; later on, the text may speak about such models


def refusal_in(answer: str) -> bool:
    """Whether an answer opens by saying that a language model speaks."""
    return _REFUSAL.search(answer, 0, _REFUSAL_WITHIN) is not None


_LONG_PROMPT = 40  # characters; short ones ("Hello") are rightly said back


def repeats_prompt(prompt: str, answer: str) -> bool:
    return len(prompt) >= _LONG_PROMPT and answer.startswith(prompt.strip())
