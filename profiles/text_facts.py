"""Facts about text: words of languages, keys' forms, chat tokens, numbers of banks and phones,
general passages.

JSON files beside this one, each with its sources; read once, when data are looked at.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TypeVar

from msgspec import Struct, json

_Facts = TypeVar("_Facts")


class FunctionWords(Struct, frozen=True, forbid_unknown_fields=True):
    """The commonest words without a meaning of their own, by language, separated by blanks."""

    source: str
    words: dict[str, str]


class SecretPattern(Struct, frozen=True, forbid_unknown_fields=True):
    """What a kind of key looks like; one of `contains` stands in every key."""

    name: str
    contains: tuple[str, ...]
    pattern: str
    source: str


class Examples(Struct, frozen=True, forbid_unknown_fields=True):
    """Parts of keys that documentation prints and that open nothing."""

    source: str
    contains: tuple[str, ...]


class SecretPatterns(Struct, frozen=True, forbid_unknown_fields=True):
    patterns: tuple[SecretPattern, ...]
    examples: Examples


class ChatMarker(Struct, frozen=True, forbid_unknown_fields=True):
    """How a family of models marks turns: by any of `tokens`, or by all of `headings`."""

    name: str
    tokens: tuple[str, ...]
    headings: tuple[str, ...]
    source: str


class ChatMarkers(Struct, frozen=True, forbid_unknown_fields=True):
    markers: tuple[ChatMarker, ...]


class Ibans(Struct, frozen=True, forbid_unknown_fields=True):
    """`structures`: by country, what follows the check digits: `4a14n` is 4 capitals, 14 digits.

    `examples` are nobody's account.
    """

    source: str
    structures: dict[str, str]
    examples: tuple[str, ...]


class Cards(Struct, frozen=True, forbid_unknown_fields=True):
    """By network: a regular expression of the first digits, and lengths in digits."""

    source: str
    prefixes: dict[str, str]
    lengths: dict[str, tuple[int, ...]]
    examples: tuple[str, ...]


class Phones(Struct, frozen=True, forbid_unknown_fields=True):
    """`fiction`: a regular expression of numbers that no one has, country code first."""

    source: str
    country_codes: str
    fiction: str


class EmailDomains(Struct, frozen=True, forbid_unknown_fields=True):
    """`top_levels`: those of more than two letters that count; two letters are a country's."""

    source: str
    examples: str
    top_levels: str


class EmailRoles(Struct, frozen=True, forbid_unknown_fields=True):
    """`list_endings`: what mailing lists' names end in, behind a hyphen; `list_hosts`: labels of
    domains that hold nothing but lists."""

    source: str
    list_endings: str
    list_hosts: str
    names: str


class PersonalData(Struct, frozen=True, forbid_unknown_fields=True):
    ibans: Ibans
    cards: Cards
    phones: Phones
    email_domains: EmailDomains
    email_roles: EmailRoles


class GeneralPassage(Struct, frozen=True, forbid_unknown_fields=True):
    kind: str
    text: str


class GeneralText(Struct, frozen=True, forbid_unknown_fields=True):
    """Passages of several kinds in turn, that no data for tuning are about: on them is measured
    what tuning has made a model forget."""

    source: str
    texts: tuple[GeneralPassage, ...]


@cache
def general_text() -> GeneralText:
    return _read("general_text.json", GeneralText)


@cache
def function_words() -> FunctionWords:
    return _read("function_words.json", FunctionWords)


@cache
def secret_patterns() -> SecretPatterns:
    return _read("secret_patterns.json", SecretPatterns)


@cache
def chat_markers() -> ChatMarkers:
    return _read("chat_markers.json", ChatMarkers)


@cache
def personal_data() -> PersonalData:
    return _read("personal_data.json", PersonalData)


def _read(name: str, facts: type[_Facts]) -> _Facts:
    return json.decode((Path(__file__).parent / name).read_bytes(), type=facts)
