"""Secrets and personal data in a text: what kinds there are, never what they say.

A false alarm costs more than a miss: forms that only keys have, checksums where there are any, and
no examples of documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from ftplan.profiles.text_facts import Cards, personal_data, secret_patterns

# In what is assigned to a name such as `password`: capitals, small letters and digits mixed, and
# more surprise than words have (English words: below 3.3 bits a character at this length).
_LEAST_BITS_PER_CHARACTER = 3.3
_NAMES = ("passw", "secret", "token", "key")
_ASSIGNED = re.compile(
    r"(?:ord|d)?[\"']?[ \t]*[:=]>?[ \t]*(?P<quote>[\"']?)"
    r"(?P<value>[A-Za-z0-9+/=_\-!@#$%^&*~]{12,200})(?P=quote)(?=[\s,;)}\]]|\Z)",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"://[^\s:/@'\"]{2,40}:(?P<value>[^\s:/@'\"<>{}$*%]{8,80})@(?P<host>[\w.-]+)")
_PLACEHOLDER = re.compile(
    r"(.)\1\1\1|1234|abcd|qwer|your|my_|pass|secret|token|key|example|sample|change|dummy|fake"
    r"|test|demo|redacted|placeholder|insert|here",
    re.IGNORECASE,
)
_NO_KEY = re.compile(r"(.)\1{4}|123456|abcdef|ABCDEF|\.\.\.")
_FEWEST_DIFFERENT_CHARACTERS = 10


def keys_in(text: str) -> Iterator[str]:
    """`AWS access key`, `GitHub token`, ...: forms that only keys have; each kind once."""
    examples = secret_patterns().examples.contains
    for name, contains, pattern in _patterns():
        for part in contains:
            if part in text:
                if any(_is_key(name, found[0], examples) for found in pattern.finditer(text)):
                    yield name
                break


def keys_masked(text: str, mask: str) -> str:
    """The text with what `keys_in` finds replaced."""
    examples = secret_patterns().examples.contains
    for name, contains, pattern in _patterns():
        if any(part in text for part in contains):
            for key in {found[0] for found in pattern.finditer(text)}:
                if _is_key(name, key, examples):
                    text = text.replace(key, mask)
    return text


def assigned_in(text: str) -> Iterator[str]:
    """What looks random and is assigned to a name such as `password` or `api_key`."""
    lowered = text.lower()
    for name in _NAMES:
        start = lowered.find(name)
        while start >= 0:
            end = start + len(name)
            found = _ASSIGNED.match(text, end)
            if found and _looks_random(found["value"]) and _names_a_secret(lowered, start, name):
                yield "password or key in an assignment"
                return
            start = lowered.find(name, end)


def _names_a_secret(lowered: str, start: int, name: str) -> bool:
    """Whether a name that ends in `key` is that of a key that opens something."""
    before = lowered[max(0, start - 8) : start].rstrip("_-")
    return name != "key" or before.endswith(("api", "access", "secret", "private", "auth"))


def passwords_in_urls(text: str) -> Iterator[str]:
    if "://" in text and any(map(_opens_a_server, _IN_URL.finditer(text))):
        yield "password in a URL"


@cache
def openings_of_keys() -> re.Pattern[bytes]:
    """What stands in every key, of one kind or another."""
    parts = (part for _, contains, _ in _patterns() for part in contains)
    return re.compile("|".join(map(re.escape, parts)).encode())


@cache
def _patterns() -> tuple[tuple[str, tuple[str, ...], re.Pattern[str]], ...]:
    return tuple(
        (entry.name, entry.contains, re.compile(entry.pattern))
        for entry in secret_patterns().patterns
    )


def _is_key(name: str, key: str, examples: tuple[str, ...]) -> bool:
    key = key.rpartition("KEY-----")[2]  # a private key without its heading
    if any(example in key for example in examples) or _NO_KEY.search(key):
        return False
    if len(set(key)) < _FEWEST_DIFFERENT_CHARACTERS:
        return False
    return name != "JSON web token" or _is_json_web_token(key)


def _is_json_web_token(token: str) -> bool:
    """Whether its header is an object that names an algorithm (RFC 7515, section 4.1.1)."""
    import base64
    import json

    header = token.partition(".")[0]
    try:
        fields = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except ValueError:
        return False
    return isinstance(fields, dict) and "alg" in fields


def _looks_random(value: str) -> bool:
    mixed = all(re.search(kind, value) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    return mixed and not _PLACEHOLDER.search(value) and _bits(value) >= _LEAST_BITS_PER_CHARACTER


def _bits(value: str) -> float:
    """Shannon's entropy of the characters, in bits a character."""
    from collections import Counter
    from math import log2

    counts = Counter(value).values()
    return -sum(count / len(value) * log2(count / len(value)) for count in counts)


def _opens_a_server(found: re.Match[str]) -> bool:
    value, host = found["value"], found["host"]
    mixed = re.search("[A-Za-z]", value) and re.search("[0-9]", value)
    local = host.startswith(("localhost", "127.", "0.0.0.0")) or "example" in host
    return bool(mixed) and not local and not _PLACEHOLDER.search(value)


_LOCAL_PART = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.){1,5}(?P<top>[a-z]{2,6}|[A-Z]{2,6})(?![\w@(=[])")
_EXAMPLE_TOPS = (".example", ".test", ".invalid", ".localhost")  # RFC 2606
_MESSAGE_ID = re.compile(r"(?:\d.*){8}")  # `<142480216486.20800@host>`: a letter, no address
_URL_BEFORE = re.compile(r"://\S*\Z")


def emails_in(text: str) -> Iterator[str]:
    """Persons' addresses: not an example's, not a role's (`info@`), no `user@host` of a URL."""
    at = text.find("@")
    while at >= 0:
        local = _LOCAL_PART.search(text, max(0, at - 64), at)
        domain = _DOMAIN.match(text, at + 1)
        if local and domain and _is_a_person(text, local, domain):
            yield "e-mail address"
            return
        at = text.find("@", at + 1)


def _is_a_person(text: str, local: re.Match[str], domain: re.Match[str]) -> bool:
    facts, name = _email_facts(), domain[0].lower()
    top = domain["top"].lower()
    if len(top) > 2 and top not in facts["top_levels"]:
        return False
    parts = name.split(".")
    examples = {".".join(parts[start:]) for start in range(len(parts))} & facts["examples"]
    if examples or name.endswith(_EXAMPLE_TOPS) or "example" in name:
        return False
    if local[0].lower() in facts["roles"] or len(local[0]) < 2 or _MESSAGE_ID.search(local[0]):
        return False
    if _is_a_list(local[0].lower(), parts, facts):
        return False
    return not _URL_BEFORE.search(text, max(0, local.start() - 80), local.start())


def _is_a_list(local: str, domain: list[str], facts: dict[str, frozenset[str]]) -> bool:
    """Whether an address is a mailing list's: `python-dev@`, `bug-bash@`, `@lists.debian.org`."""
    _, hyphen, ending = local.rpartition("-")
    named = bool(hyphen) and (ending in facts["list_endings"] or local.startswith("bug-"))
    return named or not facts["list_hosts"].isdisjoint(domain)


@cache
def _email_facts() -> dict[str, frozenset[str]]:
    facts = personal_data()
    return {
        "top_levels": frozenset(facts.email_domains.top_levels.split()),
        "examples": frozenset(facts.email_domains.examples.split()),
        "roles": frozenset(facts.email_roles.names.split()),
        "list_endings": frozenset(facts.email_roles.list_endings.split()),
        "list_hosts": frozenset(facts.email_roles.list_hosts.split()),
    }


_PHONE = re.compile(
    r"(?:(?<=[\s(\[:\"'>,;])|\A)\+(?P<number>[1-9][\d ().\-/]{7,20}\d)(?![\d\w]|[.,:]\d)"
)


def phones_in(text: str) -> Iterator[str]:
    """Numbers in international form, `+49 ...`; not those kept for fiction."""
    if any(_is_a_phone(found["number"]) for found in _PHONE.finditer(text)):
        yield "phone number"


_DECIMAL = re.compile(r"\d{4,}\.\d+")


def _is_a_phone(number: str) -> bool:
    if _DECIMAL.fullmatch(number):
        return False
    groups = re.findall(r"\d+", number)
    digits = "".join(groups)
    if not 9 <= len(digits) <= 15 or (len(groups) == 1 and len(digits) < 11):
        return False
    if len(set(digits)) < 4 or digits.endswith("000") or re.search("12345|23456|34567", digits):
        return False
    thousands = all(len(group) == 3 for group in groups[1:])
    if len(groups) > 2 and thousands and ("." in number or len(groups[0]) == 3):
        return False  # a sum of money or a score
    codes, fiction = _phone_facts()
    return any(digits[:length] in codes for length in (1, 2, 3)) and not fiction.fullmatch(digits)


@cache
def _phone_facts() -> tuple[frozenset[str], re.Pattern[str]]:
    facts = personal_data().phones
    return frozenset(facts.country_codes.split()), re.compile(facts.fiction)


_CARD = re.compile(
    r"\d(?<![\w.,+/-]\d)(?<!\d[ -]\d)\d{3}"
    r"(?:(?P<gap>[ -])(?:\d{4}(?P=gap)\d{4}(?P=gap)\d{4}|\d{6}(?P=gap)\d{4,5})|\d{10,15})"
    r"(?!\w|[ .,-]\d)"
)
_ABOUT_CARDS = re.compile(r"\b(?:card|visa|mastercard|amex|cvv|cvc|kreditkarte|carte|tarjeta)")
_NEAR = 60  # characters around a bare number in which a word must say that it is a card's


def cards_in(text: str) -> Iterator[str]:
    """Numbers with an issuer's first digits and a right check digit.

    Written in groups, or beside a word that speaks of cards: one bare number of sixteen digits in
    fifty passes both checks by chance.
    """
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        around = text[max(0, found.start() - _NEAR) : found.end() + _NEAR].lower()
        if is_card_number(digits) and (found["gap"] or _ABOUT_CARDS.search(around)):
            yield "card number"
            return


def is_card_number(digits: str) -> bool:
    facts = personal_data().cards
    if digits in facts.examples or len(set(digits)) < 4:
        return False
    return any(_is_of(network, digits, facts) for network in facts.prefixes) and _luhn(digits)


def _is_of(network: str, digits: str, facts: Cards) -> bool:
    return len(digits) in facts.lengths[network] and bool(re.match(facts.prefixes[network], digits))


def _luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1, annex B."""
    numbers = [int(digit) for digit in reversed(digits)]
    doubled = sum(sum(divmod(2 * number, 10)) for number in numbers[1::2])
    return (sum(numbers[::2]) + doubled) % 10 == 0


_IBAN = re.compile(
    r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)"
    r"(?![A-Za-z0-9])"
)


def ibans_in(text: str) -> Iterator[str]:
    """Account numbers of a country's form with right check digits; not the registry's examples."""
    if any(_begins_with_an_iban(found[0]) for found in _IBAN.finditer(text)):
        yield "IBAN"


def _begins_with_an_iban(found: str) -> bool:
    """Groups of capitals may follow the number: `... 0130 00 BIC`."""
    groups = found.split(" ")
    return any(is_iban("".join(groups[:number])) for number in range(len(groups), 0, -1))


def is_iban(compact: str) -> bool:
    """Whether the form is its country's and the remainder by 97 is 1 (ISO 13616-1)."""
    form = _iban_forms().get(compact[:2])
    if not form or not form.fullmatch(compact) or compact in personal_data().ibans.examples:
        return False
    moved = compact[4:] + compact[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


@cache
def _iban_forms() -> dict[str, re.Pattern[str]]:
    kinds = {"n": r"\d", "a": "[A-Z]", "c": "[A-Z0-9]"}
    forms = {}
    for country, structure in personal_data().ibans.structures.items():
        parts = re.findall(r"(\d+)([nac])", structure)
        rest = "".join(f"{kinds[kind]}{{{length}}}" for length, kind in parts)
        forms[country] = re.compile(rf"{country}\d\d{rest}", re.ASCII)
    return forms
