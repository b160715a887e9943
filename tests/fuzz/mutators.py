"""How inputs are changed: rows field by field, bytes wherever."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.fuzz.corpus import CALLS, CONVERSATION, FIELDS, ROLES, SHAREGPT

# The largest input but for rare ones: what is looked for shows in small files.
MOST_BYTES = 2**16


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 1.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", "\n", "\0", "a\0b", "\ud83d", "\udc00\ud800", "\ufeff"),
    *("x" * 300, "é" * 9000, "true", "NaN", "[]", "{}", '{"a": ', "[1", "null", "\u2028", "\x85"),
    *("=1+1", "'", '"', "a,b\tc;d|e", "<|im_end|>", "<|bos|>", "```", "// no", "/* no */"),
    *([], {}, [[]], [{}], [None], [1, 2], ["a"], ["a", "b"], [["a", "b"]], [["a", 1]], {"a": {}}),
    *({"chosen": 1, "rejected": None}, {"chosen": 10**400, "rejected": 0}, {"role": "user"}),
    *(nested(30), nested(300), CONVERSATION, SHAREGPT, CALLS, CONVERSATION[:1], CALLS[1:]),
    *(
        [{"role": None, "content": None}],
        [{"role": [], "content": {}}],
        {"type": "text", "text": 1},
    ),
    *([{"role": "assistant", "tool_calls": "x"}], [{"role": "user", "content": [{"text": None}]}]),
    *([{"function": {"arguments": "[" * 2000}}], "[" * 2000, '{"a":' * 2000, "9" * 5000),
)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key or index) within a row."""
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        found.append((value, key))
        if len(found) < 200:
            _places(inner, found)
    return found


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def changed_row(rng: Random, row: Any) -> Any:
    """A row with a few fields of other types, other names, missing or doubled."""
    if rng.random() < 0.05:
        return rng.choice(VALUES)
    row = copied(row)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = _places(row, [])
        if not places:
            break
        within, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.5:
            within[key] = copied(rng.choice(VALUES))
        elif kind < 0.6:
            within[key] = rng.choice(ROLES)
        elif isinstance(within, list):
            within.insert(key, copied(rng.choice(within))) if kind < 0.8 else within.pop(key)
        elif kind < 0.7:
            del within[key]
        elif kind < 0.85:
            within[rng.choice(FIELDS)] = within.pop(key)
        else:
            within[rng.choice(FIELDS)] = copied(rng.choice(VALUES))
    return row


_WORDS = (
    *(f'"{name}"' for name in (*FIELDS, *ROLES)),
    *(f'"{name}": ' for name in FIELDS),
    *("{", "}", "[", "]", ",", ":", '"', "\\", "\n", "\r", "\r\n", "\n\n", "\t", " ", ";", "|"),
    *("//", "/*", "*/", "// c\n", "/* c\n */", "#", "'", '""', "null", "true", "NaN", "-Infinity"),
    *("1e999", "-", "0", "\\u0000", "\\ud83d", "\\udc00", "\\u", "\\ud83d\\u0041", '{"a": 1}\n'),
    *('[{"text": "a"}]', '{"data": [', "\ufeff", "\u2028", "\x85", "\0", "\ud83d", "<|im_start|>"),
    *("PAR1", "ARROW1", "---", "%YAML", "<html>", "[INST]", "-----BEGIN"),
)
_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\xff\xff\xff\xff", b"\x1f\x8b", b"BZh9", b"\x28\xb5\x2f\xfd")
TOKENS = (*(word.encode("utf-8", "surrogatepass") for word in _WORDS), *_MARKS, b"\xc3")


def _at(rng: Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1)


def _range(rng: Random, data: bytes) -> tuple[int, int]:
    begin = _at(rng, data)
    return begin, min(len(data), begin + int(2 ** rng.uniform(0, 12)))


def _put(rng: Random, data: bytes, new: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + new + data[at:]


def flipped(rng: Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _turn in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: Random, data: bytes, _: bytes) -> bytes:
    begin, end = _range(rng, data)
    return data[:begin] + rng.randbytes(min(end - begin, 16)) + data[min(end, begin + 16) :]


def truncated(rng: Random, data: bytes, _: bytes) -> bytes:
    return data[: _at(rng, data)]


def beheaded(rng: Random, data: bytes, _: bytes) -> bytes:
    return data[rng.randrange(min(len(data), 64) + 1) :]


def cut(rng: Random, data: bytes, _: bytes) -> bytes:
    begin, end = _range(rng, data)
    return data[:begin] + data[end:]


def doubled(rng: Random, data: bytes, _: bytes) -> bytes:
    begin, end = _range(rng, data)
    return _put(rng, data, data[begin:end] * rng.choice((1, 2, 50)))


def spliced(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[: _at(rng, data)] + other[_at(rng, other) :]


def grafted(rng: Random, data: bytes, other: bytes) -> bytes:
    begin, end = _range(rng, other)
    return _put(rng, data, other[begin:end])


def joined(rng: Random, data: bytes, other: bytes) -> bytes:
    return data + other


def told(rng: Random, data: bytes, _: bytes) -> bytes:
    for _turn in range(rng.choice((1, 1, 3))):
        data = _put(rng, data, rng.choice(TOKENS))
    return data


def deepened(rng: Random, data: bytes, _: bytes) -> bytes:
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'{"messages":[', b"]}")))
    depth = rng.choice((3, 40, 500, 990, 1010, 3000))
    return _put(rng, data, opening * depth + b"1" + closing * rng.choice((0, depth - 1, depth)))


_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
_NUMBERS = (
    b"9" * 30,
    b"9" * 400,
    b"9" * 5000,
    b"1e400",
    b"-1e-400",
    b"0" * 20,
    b"1E5",
    b"-",
    b"01",
)


def overflown(rng: Random, data: bytes, _: bytes) -> bytes:
    found = list(_NUMBER.finditer(data))[:200]
    if not found:
        return _put(rng, data, rng.choice(_NUMBERS))
    place = rng.choice(found)
    return data[: place.start()] + rng.choice(_NUMBERS) + data[place.end() :]


def zeroed(rng: Random, data: bytes, _: bytes) -> bytes:
    return _put(rng, data, bytes(rng.choice((1, 1, 2, 7, 4096))))


def miscoded(rng: Random, data: bytes, _: bytes) -> bytes:
    """A stretch in another encoding than the rest."""
    begin, end = _range(rng, data)
    encoding = rng.choice(("utf-16-le", "utf-16-be", "utf-32-le", "cp1252", "utf-8-sig"))
    part = data[begin:end].decode("utf-8", "replace") + rng.choice(("", "é", "😀", "€"))
    return data[:begin] + part.encode(encoding, "replace") + data[end:]


def returned(rng: Random, data: bytes, _: bytes) -> bytes:
    return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\r", b"\n\n", b"", b"\xe2\x80\xa8")))


def lengthened(rng: Random, data: bytes, _: bytes) -> bytes:
    """One very long line, or very many short ones."""
    begin, end = _range(rng, data)
    part = data[begin:end] or b"x"
    return _put(rng, data, part * (rng.choice((2**12, 2**15, 2**18)) // len(part)))


MUTATORS: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (
    *(flipped, flipped, overwritten, truncated, beheaded, cut, cut, doubled, spliced, grafted),
    *(joined, told, told, told, deepened, overflown, zeroed, miscoded, returned, lengthened),
)


def mutated(rng: Random, data: bytes, other: bytes, times: int) -> bytes:
    """Changed so many times, and not much longer than MOST_BYTES."""
    for _ in range(times):
        data = rng.choice(MUTATORS)(rng, data, other)
        if len(data) > MOST_BYTES and rng.random() < 0.95:
            data = data[:MOST_BYTES]
    return data
