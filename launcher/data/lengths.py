"""Exact token counts of many texts, many times faster than tokenizing them.

Natural text repeats its words. Where a tokenizer's own description proves that no token crosses a
place (`cuts.py`), texts are cut there (`borders.py`), and what each chunk counts is remembered
(`count_table.py`). Only chunks never met are tokenized. Nothing is estimated: where a text or a
tokenizer is not covered by the proof, the tokenizer counts the whole text.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from itertools import compress, islice
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ftplan.launcher.data.borders import EDGE, Borders, is_letter
from ftplan.launcher.data.count_table import LONGEST_KEY, CountTable, keys
from ftplan.launcher.data.cuts import Cuts, Unproven, byte_names, find_cuts

# Of the table of chunks; half of them are filled. 24 bytes each.
_SLOTS_LOG2 = 21
# Chunks that the table does not take; longer ones hardly come again.
_REMEMBERED = 100_000
_LONGEST_REMEMBERED = 64  # bytes

# Signs that may belong to the letters behind them; an apostrophe may begin a contraction.
_JOINING = frozenset(string.punctuation.encode()) - {ord("'")}
_BLANK = ord(" ")

_TEXTS_AT_ONCE = 2048
_CHARACTERS_AT_ONCE = 1 << 20
_LONG = 2 * _CHARACTERS_AT_ONCE
_ALWAYS_CUT = re.compile("[A-Za-z] ")


class TokenCounter:
    """Counts tokens as `len(tokenizer(text, add_special_tokens=False)["input_ids"])` does.

    `tokenizer` is one of transformers'. The counter can be pickled; what it remembers stays behind.
    """

    reason: str
    """Why chunks of texts may be counted alone, or why not: for a debug note."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._chunks: _ChunkCounter | None = None
        if self._backend is None:
            self.reason = "the tokenizer is not a plain one of the `tokenizers` library"
            return
        try:
            self._chunks = _ChunkCounter(self._backend)
            self.reason = self._chunks.cuts.reason
        except Unproven as why:
            self.reason = str(why)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCounter, (self._tokenizer,)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is, without those that the tokenizer adds to a text."""
        if self._chunks is None:
            return _in_groups(texts, self._tokenized)
        whole = [self._chunks.is_barred(text) for text in texts]
        if True not in whole:
            return self._chunks.counts(texts)
        tokenized = iter(_in_groups(list(compress(texts, whole)), self._tokenized))
        others = [text for text, barred in zip(texts, whole, strict=True) if not barred]
        counted = iter(self._chunks.counts(others))
        return [next(tokenized) if barred else next(counted) for barred in whole]

    def _tokenized(self, texts: Sequence[str]) -> list[int]:
        if self._backend is not None:
            return _lengths(self._backend, texts)
        ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [len(one) for one in ids]


def _in_groups(texts: Sequence[str], count: Callable[[Sequence[str]], list[int]]) -> list[int]:
    """Counts of texts, some at a time: what is kept of them meanwhile takes memory."""
    counted: list[int] = []
    start = characters = 0
    for end, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE or end - start >= _TEXTS_AT_ONCE:
            counted += count(texts[start:end])
            start, characters = end, 0
    return counted + count(texts[start:]) if start < len(texts) else counted


def _pieces(text: str) -> list[str]:
    """A long text, cut where every proof allows it."""
    pieces = []
    while len(text) > _LONG:
        place = _ALWAYS_CUT.search(text, _CHARACTERS_AT_ONCE)
        if place is None:
            break
        pieces.append(text[: place.start() + 1])
        text = text[place.start() + 1 :]
    return [*pieces, text]


class _ChunkCounter:
    """Counts texts by their chunks; raises Unproven where that may not be done."""

    def __init__(self, backend: Any) -> None:
        description = json.loads(backend.to_str())
        self.cuts = find_cuts(description)
        if self.cuts.prefix_after_added and backend.encode_special_tokens:
            raise Unproven("it puts a blank before texts and reads special tokens as text")
        added = [token["content"] for token in description["added_tokens"]]
        self._added = re.compile(
            "|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)"
        )
        self._borders = Borders(self.cuts, added)
        self._new = _NewChunks(backend, self.cuts, self._added)
        self._table = CountTable(_SLOTS_LOG2)
        self._long = _Remembered(self._new.counts)
        self._first = _Remembered(self._new.first)

    def is_barred(self, text: str) -> bool:
        """Whether a text is to be tokenized whole."""
        return EDGE in text or any(token in text for token in self.cuts.barred)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Counts of texts that are not barred."""
        if not self.cuts.prefix_after_added and max(map(len, texts), default=0) <= _LONG:
            return self._of_parts(texts)
        parts = list(map(self._parts, texts))
        sums = iter(self._of_parts([part for some in parts for part in some]))
        counted = [sum(islice(sums, len(some))) for some in parts]
        if self.cuts.prefix_after_added:
            added = (len(self._added.findall(text)) for text in texts)
            return [count + more for count, more in zip(counted, added, strict=True)]
        return counted

    def _of_parts(self, parts: Sequence[str]) -> list[int]:
        """Counts of parts, those of ASCII apart: their characters are bytes."""
        is_ascii = [part.isascii() for part in parts]
        narrow = iter(_in_groups(list(compress(parts, is_ascii)), self._sums))
        wide_parts = [part for part, narrow in zip(parts, is_ascii, strict=True) if not narrow]
        wide = iter(_in_groups(wide_parts, self._sums))
        return [next(narrow) if is_narrow else next(wide) for is_narrow in is_ascii]

    def _parts(self, text: str) -> list[str]:
        """Parts of a text that count alone."""
        if self.cuts.prefix_after_added:
            return [part for part in self._added.split(text) if part]
        return [text] if self.cuts.prefixed else _pieces(text)

    def _sums(self, texts: Sequence[str]) -> list[int]:
        """Counts of texts, or of parts of them."""
        data, starts = self._borders.chunks(EDGE + EDGE.join(texts) + EDGE)
        low, high, lengths = keys(data, starts)
        counts, absent = self._table.get(low, high)
        edges = np.flatnonzero((low == 0) & (lengths == 1))
        chunks = _Chunks(data, starts, counts)

        new = chunks.at(absent)
        place_of = dict(zip(reversed(new), reversed(absent.tolist()), strict=True))
        known = dict(zip(place_of, self._new.counts(list(place_of)), strict=True))
        chunks.fill(absent, new, known)
        places = list(place_of.values())
        self._table.add(low[places], high[places], counts[places])

        long = np.flatnonzero(lengths > LONGEST_KEY)
        self._long.fill(chunks, long)
        if self.cuts.prefixed:
            first = edges[:-1] + 1
            self._first.fill(chunks, first[~np.isin(first, edges)])
        sums: list[int] = np.add.reduceat(counts, edges)[:-1].tolist()
        return sums


class _Chunks(Struct, frozen=True):
    """Chunks of `data` from each of `starts` to the next, and what each counts."""

    data: bytes
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    def at(self, places: NDArray[np.int64]) -> list[bytes]:
        data = self.data
        ends = self.starts[places + 1].tolist()
        return [data[s:e] for s, e in zip(self.starts[places].tolist(), ends, strict=True)]

    def fill(
        self, places: NDArray[np.int64], chunks: list[bytes], known: Mapping[bytes, int]
    ) -> None:
        self.counts[places] = list(map(known.__getitem__, chunks))


class _Remembered:
    """Counts of chunks that are no keys of the table."""

    def __init__(self, count: Callable[[list[bytes]], list[int]]) -> None:
        self._count = count
        self.known: dict[bytes, int] = {}

    def fill(self, chunks: _Chunks, places: NDArray[np.int64]) -> None:
        """Puts in what the chunks at these places count."""
        if len(self.known) > _REMEMBERED:
            self.known.clear()
        some, known = chunks.at(places), self.known
        new = [chunk for chunk in dict.fromkeys(some) if chunk not in known]
        found = dict(zip(new, self._count(new), strict=True))
        chunks.fill(places, some, ChainMap(found, known))
        known.update(
            (chunk, count) for chunk, count in found.items() if len(chunk) <= _LONGEST_REMEMBERED
        )


class _NewChunks:
    """Counts chunks by the tokenizer."""

    def __init__(self, backend: Any, cuts: Cuts, added: re.Pattern[str]) -> None:
        self._whole = backend
        self._bare = _private(cuts.bare, backend) if cuts.prefixed else backend
        self._stages = cuts.ascii_stages if cuts.words_are_bytes else ()
        self._tokenize = self._bare.model.tokenize
        self._added = added
        self._letters_are_words = cuts.letters_are_words
        self._signs_join = cuts.signs_join
        self._normalized = self._bare.normalizer is not None
        self._byte_names = byte_names()

    def first(self, chunks: list[bytes]) -> list[int]:
        """Counts of chunks that begin a text."""
        return _lengths(self._whole, [chunk.decode() for chunk in chunks])

    def counts(self, chunks: list[bytes]) -> list[int]:
        """Counts of chunks that stand elsewhere: by the model alone where its words are known, as
        that takes a third of the time."""
        tokenize, names, is_word = self._tokenize, self._byte_names, self._is_word
        by_letters = self._letters_are_words
        counted: list[int] = []
        others: list[int] = []
        for chunk in chunks:
            if by_letters and is_word(chunk):
                words = [chunk]
            else:
                words = self._words(chunk)
                if not words:
                    others.append(len(counted))
            named = [word.decode("latin-1").translate(names) for word in words]
            counted.append(sum(map(len, map(tokenize, named))))
        lengths = _lengths(self._bare, [chunks[number].decode() for number in others])
        for number, length in zip(others, lengths, strict=True):
            counted[number] = length
        return counted

    def _is_word(self, chunk: bytes) -> bool:
        """Whether a chunk is letters, and perhaps a blank or sign that belongs to them."""
        joins = chunk[0] == _BLANK or (self._signs_join and chunk[0] in _JOINING)
        letters = chunk[1:] if joins else chunk
        if letters.isalpha():
            return True
        if letters.isascii():
            return False
        text = letters.decode()
        normal = not self._normalized or unicodedata.is_normalized("NFKC", text)
        return normal and all(map(is_letter, text))

    def _words(self, chunk: bytes) -> list[bytes]:
        """The words of a chunk; none where they are not known without the tokenizer."""
        if not (self._stages and chunk.isascii()):
            return []
        text = chunk.decode()
        if self._added.search(text):
            return []
        words = [text]
        for stage in self._stages:
            words = [word for longer in words for word in stage.findall(longer)]
        return [word.encode() for word in words] if sum(map(len, words)) == len(text) else []


def _lengths(backend: Any, texts: Sequence[str]) -> list[int]:
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [len(encoding) for encoding in encodings]


def _backend(tokenizer: Any) -> Any | None:
    """A copy of the tokenizer of the `tokenizers` library inside; None where texts take another
    way through the tokenizer than that."""
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast
    if not isinstance(tokenizer, plain) or any(
        getattr(type(tokenizer), name, None) is not getattr(plain, name, None)
        for name in ("__call__", "_encode_plus", "_batch_encode_plus", "batch_encode_plus")
    ):
        return None
    original = tokenizer.backend_tokenizer
    copied = _private(json.loads(original.to_str()), original)
    copied.encode_special_tokens = bool(tokenizer.split_special_tokens)
    return copied


def _private(description: dict[str, Any], original: Any) -> Any:
    """A tokenizer of its own by a description, that neither cuts texts short nor pads them."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(json.dumps(description))
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = original.encode_special_tokens
    return made
