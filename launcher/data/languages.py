"""Which language or script a text is in, where that is plain; else nothing is said.

Latin letters: by function words (articles, pronouns, conjunctions), which make up a third of any
text of a language and are rare in others. Other scripts: by the bytes that open their letters in
UTF-8. Short text and code are not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from ftplan.profiles.text_facts import function_words

# Bytes of a text that are looked at: some forty words, of which fifteen are function words.
SAMPLE_BYTES = 240

_FEWEST_WORDS = 12
_FEWEST_DIFFERENT = 4  # function words; related languages share some, so the lead counts too
_LEAD = 1.4
_LEAST_SHARE = 0.15
_FEWEST_LETTERS = 15
_LETTERS_SHARE = 0.3
_CODE_SHARE = 0.04

# What opens a letter in UTF-8, by Unicode block. E0 opens twelve scripts, told apart by the
# second byte; E2 opens punctuation, F0 pictures, C2 signs: no letters.
_LATIN, _HAN = "Latin", "Chinese"
_LEADS: Mapping[str, str] = {
    _LATIN: "c3-c9 e1",
    "Greek": "cd-cf",
    "Cyrillic script": "d0-d4",
    "Hebrew": "d6-d7",
    "Arabic script": "d8-db",
    "script of E0": "e0",
    _HAN: "e4-e9",
    "Korean": "ea-ed",
}
_SCRIPTS_OF_E0 = (
    ("Devanagari", b"\xa4\xa5"),
    ("Bengali", b"\xa6\xa7"),
    ("Gurmukhi", b"\xa8\xa9"),
    ("Gujarati", b"\xaa\xab"),
    ("Tamil", b"\xae\xaf"),
    ("Telugu", b"\xb0\xb1"),
    ("Kannada", b"\xb2\xb3"),
    ("Malayalam", b"\xb4\xb5"),
    ("Sinhala", b"\xb6\xb7"),
    ("Thai", b"\xb8\xb9"),
    ("Lao", b"\xba\xbb"),
)
_KANA = (b"\xe3\x81", b"\xe3\x82", b"\xe3\x83")
_KANA_SHARE = 0.1

_CODE = b"{}()[]<>=;_\\/#$|"
_ASCII_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _is_plainly_english(sample: bytes) -> bool:
    """What most rows of most files are: told at once."""
    if b" the " not in sample:
        return False
    others = (b" of " in sample) + (b" and " in sample) + (b" to " in sample) + (b" is " in sample)
    return others >= 2 and not (b" de " in sample or b" der " in sample or b" la " in sample)


def language(sample: bytes) -> str:
    """`German`, `Cyrillic script`, ...; empty where it cannot be told.

    `sample`: the beginning of a text in UTF-8, ASCII letters lower-cased.
    """
    if not sample.isascii():
        script = _script(sample)
        if script != _LATIN:
            return script
    if _is_plainly_english(sample):
        return "English"
    words = sample.split()
    if len(words) < _FEWEST_WORDS:
        return ""
    known = _words()
    found = known.all.intersection(words)
    if len(found) < _FEWEST_DIFFERENT:
        return ""
    scores = known.scores(found)
    score = max(scores)
    best = scores.index(score)
    second = max(scores[:best] + scores[best + 1 :])
    if score < _FEWEST_DIFFERENT or score < _LEAD * second or score < 2 + second:
        return ""
    hits = sum(map(known.words[best].__contains__, words))
    return "" if hits < _LEAST_SHARE * len(words) or _is_code(sample) else known.names[best]


class _Words:
    """Function words in UTF-8, and the languages of each.

    `names`, `words`: of each language. A language has fewer than 256 words.
    """

    def __init__(self) -> None:
        texts = function_words().words
        self.names = tuple(texts)
        self.words = [frozenset(text.encode().split()) for text in texts.values()]
        self.all = frozenset[bytes]().union(*self.words)
        self._ones = {
            word: sum(1 << 8 * index for index, words in enumerate(self.words) if word in words)
            for word in self.all
        }

    def scores(self, found: Iterable[bytes]) -> bytes:
        """How many of the words each language has: a byte each, added up as one number."""
        return sum(map(self._ones.__getitem__, found)).to_bytes(len(self.names), "little")


@cache
def _words() -> _Words:
    return _Words()


def _is_code(sample: bytes) -> bool:
    return len(sample) - len(sample.translate(None, _CODE)) > _CODE_SHARE * len(sample)


def _script(sample: bytes) -> str:
    """The script of most letters that are not ASCII, or _LATIN where those are few."""
    script_of_lead, no_leads = _leads()
    letters = sample.translate(script_of_lead, no_leads)
    kana = sum(map(sample.count, _KANA)) if b"\xe3" in sample else 0
    if len(letters) + kana < _FEWEST_LETTERS:
        return _LATIN
    counts = {name: letters.count(index) for index, name in enumerate(_LEADS)}
    latin = counts.pop(_LATIN) + len(sample) - len(sample.translate(None, _ASCII_LETTERS))
    counts[_HAN] += kana
    name = max(counts, key=lambda name: counts[name])
    if counts[name] < _LETTERS_SHARE * (latin + counts[name]):
        return _LATIN
    if name == _HAN:
        return "Japanese" if kana > _KANA_SHARE * counts[name] else _HAN
    return _script_of_e0(sample) if name == "script of E0" else name


def _script_of_e0(sample: bytes) -> str:
    counts = {
        name: sum(sample.count(bytes((0xE0, byte))) for byte in seconds)
        for name, seconds in _SCRIPTS_OF_E0
    }
    return max(counts, key=lambda name: counts[name])


@cache
def _leads() -> tuple[bytes, bytes]:
    """For bytes.translate: of each byte that opens a letter the number of its script, and the bytes
    that open none."""
    scripts, known = bytearray(256), set()
    for index, ranges in enumerate(_LEADS.values()):
        for part in ranges.split():
            for byte in range(int(part[:2], 16), int(part[-2:], 16) + 1):
                scripts[byte] = index
                known.add(byte)
    return bytes(scripts), bytes(byte for byte in range(256) if byte not in known)
