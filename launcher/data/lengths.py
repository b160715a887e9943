"""Exact token counts of many texts, several times faster than tokenizing them.

Natural text repeats its words. Where a tokenizer's own description proves that no token crosses a
place before a blank (`cuts.py`), a text is cut there, and what each part counts is remembered.
A part that is new is cut once more, at the tokenizer's own word borders where it is ASCII, and
only words never met are tokenized. Nothing is estimated: where a part, a text or a tokenizer is not
covered by the proof, the tokenizer counts the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from ftplan.launcher.data.cuts import Unproven, find_cuts

_BEGINS = "\x00"  # opens a part that no blank stands before: the first of its text
_BLANK = "\x01"  # a blank that is not cut before
_WHOLE = 1 << 50  # counted by a part that makes its text be tokenized whole

_REMEMBERED_PARTS = 400_000
_REMEMBERED_WORDS = 200_000
_LONGEST_REMEMBERED = 48  # characters; longer parts hardly come again

_TEXTS_AT_ONCE = 512
_WHOLE_CHARACTERS_AT_ONCE = 1 << 20

_PRINTABLE_ASCII = re.compile(r"[\t\n\r -~]*")


class TokenCounter:
    """Counts tokens as `len(tokenizer(text, add_special_tokens=False)["input_ids"])` does.

    `tokenizer` is one of transformers'. The counter can be pickled; what it remembers stays behind.
    """

    reason: str
    """Why parts of texts may be counted alone, or why not: for a debug note."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._parts: _PartCounter | None = None
        if self._backend is None:
            self.reason = "the tokenizer is not a plain one of the `tokenizers` library"
            return
        try:
            self._parts = _PartCounter(self._backend)
            self.reason = self._parts.cuts.reason
        except Unproven as why:
            self.reason = str(why)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCounter, (self._tokenizer,)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is, without those that the tokenizer adds to a text."""
        if self._parts is None:
            return self._whole(texts)
        counted: list[int] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[start : start + _TEXTS_AT_ONCE]
            few = self._parts.counts(some)
            rest = [number for number, count in enumerate(few) if count >= _WHOLE]
            whole = self._whole([some[number] for number in rest])
            for number, count in zip(rest, whole, strict=True):
                few[number] = count
            counted += few
        return counted

    def _whole(self, texts: Sequence[str]) -> list[int]:
        """Counts by the tokenizer itself, a few at once: their encodings take memory."""
        counted: list[int] = []
        batch: list[str] = []
        characters = 0
        for text in texts:
            batch.append(text)
            characters += len(text)
            if characters >= _WHOLE_CHARACTERS_AT_ONCE:
                counted += self._tokenized(batch)
                batch, characters = [], 0
        return counted + self._tokenized(batch)

    def _tokenized(self, texts: list[str]) -> list[int]:
        if self._backend is not None or not texts:
            return _lengths(self._backend, texts)
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]


class _PartCounter:
    """Counts texts by their parts; raises Unproven where that may not be done.

    A part is named by what stands between two blanks that are cut before, without the first.
    """

    def __init__(self, backend: Any) -> None:
        description = json.loads(backend.to_str())
        self.cuts = find_cuts(description)
        if self.cuts.prefix_after_added and backend.encode_special_tokens:
            raise Unproven("it puts a blank before texts and reads special tokens as text")
        self._backend = backend
        self._bare = _private(self.cuts.bare, backend) if self.cuts.prefixed else backend
        added = sorted((token["content"] for token in description["added_tokens"]), key=len)
        self._added = re.compile("|".join(map(re.escape, reversed(added))) or r"(?!)")
        self._parts, self._earlier_parts = _Counts(), _Counts()
        self._words: dict[str, int] = {}
        self._earlier_words: dict[str, int] = {}

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Counts of a few texts; `_WHOLE` and more where a text is not to be counted in parts.

        Parts known already are summed up first, then those that were missing are counted at once.
        """
        missing = self._parts.missing
        counted, ends = [], []
        for text in texts:
            counted.append(self._known(text))
            ends.append(len(missing))
        found = self._learn(missing)
        start = 0
        for number, end in enumerate(ends):
            if end > start:
                counted[number] += sum(map(found.__getitem__, islice(missing, start, end)))
                start = end
        missing.clear()
        if len(self._parts) > _REMEMBERED_PARTS:
            self._earlier_parts, self._parts = self._parts, _Counts()
        return counted

    def _known(self, text: str) -> int:
        """What the known parts of a text count; the others are noted as missing."""
        cuts = self.cuts
        if _BEGINS in text or _BLANK in text or any(token in text for token in cuts.barred):
            return _WHOLE
        if not cuts.prefix_after_added:
            return self._known_segment(text)
        segments = self._added.split(text)
        return len(segments) - 1 + sum(map(self._known_segment, filter(None, segments)))

    def _known_segment(self, text: str) -> int:
        """The same of a text, or of what stands between two of its added tokens."""
        if not self.cuts.every_blank:
            text = _join_blanks(text)
        if text[:1] == " ":
            text = _BLANK + text[1:]
        first, *others = text.split(" ")
        count = self._parts.__getitem__
        return sum(map(count, others), count(_BEGINS + first))

    def _learn(self, missing: list[str]) -> dict[str, int]:
        """Counts of parts that were missing; remembers them."""
        found: dict[str, int] = {}
        fresh = []
        for part in dict.fromkeys(missing):
            if part in self._earlier_parts:
                found[part] = self._earlier_parts[part]
            else:
                fresh.append(part)
        self._count_parts(fresh, found)
        self._parts.update(
            (part, count) for part, count in found.items() if len(part) <= _LONGEST_REMEMBERED
        )
        return found

    def _count_parts(self, parts: list[str], found: dict[str, int]) -> None:
        """Adds counts of parts to `found`."""
        first: list[str] = []
        cut: list[tuple[str, list[str]]] = []
        for part in parts:
            if not self._ends_well(part):
                found[part] = _WHOLE
            elif part[:1] == _BEGINS and self.cuts.prefixed:
                first.append(part)
            else:
                cut.append((part, self._cut_into_words(_text(part))))
        found.update(zip(first, _lengths(self._backend, map(_text, first)), strict=True))
        known = self._count_words([word for _, words in cut for word in words])
        found.update((part, sum(map(known.__getitem__, words))) for part, words in cut)

    def _count_words(self, words: list[str]) -> dict[str, int]:
        """Counts of these words among others; remembers them."""
        if len(self._words) > _REMEMBERED_WORDS:
            self._earlier_words, self._words = self._words, {}
        known, earlier = self._words, self._earlier_words
        fresh = []
        for word in dict.fromkeys(words):
            if word in known:
                continue
            if word in earlier:
                known[word] = earlier[word]
            else:
                fresh.append(word)
        counted = dict(zip(fresh, _lengths(self._bare, fresh), strict=True))
        if all(len(word) <= _LONGEST_REMEMBERED for word in fresh):
            known.update(counted)
            return known
        known.update((word, n) for word, n in counted.items() if len(word) <= _LONGEST_REMEMBERED)
        return known | counted

    def _cut_into_words(self, text: str) -> list[str]:
        """A part's words where it is ASCII without added tokens; else the part itself."""
        if (
            not self.cuts.ascii_stages
            or not _PRINTABLE_ASCII.fullmatch(text)
            or self._added.search(text)
        ):
            return [text]
        words = [text]
        for stage in self.cuts.ascii_stages:
            words = [word for longer in words for word in stage.findall(longer)]
        return words if sum(map(len, words)) == len(text) else [text]

    def _ends_well(self, part: str) -> bool:
        """Whether a blank may be cut off behind a part. Behind some no blank can follow: it would
        have been joined to them."""
        if self.cuts.every_blank or part == "" or part[-1] in "\n" + _BEGINS + _BLANK:
            return True
        text = part.removeprefix(_BEGINS)
        if self._bare.normalizer is not None and not text.isascii():
            text = self._bare.normalizer.normalize_str(text)
        return text != "" and not text[-1].isspace() and text[-1] not in self.cuts.blanks


def _join_blanks(text: str) -> str:
    """The text with blanks marked that stand behind a blank or line feed: no cut is before them."""
    if "\n " in text:
        text = text.replace("\n ", "\n" + _BLANK)
    if "  " in text:
        text = text.replace("  ", " " + _BLANK)
    if _BLANK in text:
        text = text.replace(_BLANK + " ", _BLANK + _BLANK)
    return text


def _text(part: str) -> str:
    """What a part stands for."""
    text = part[1:] if part[:1] == _BEGINS else " " + part
    return text.replace(_BLANK, " ")


class _Counts(dict[str, int]):
    """Counts of parts. One that is not there counts nothing and is noted as missing."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []

    def __missing__(self, part: str) -> int:
        self.missing.append(part)
        return 0


def _lengths(backend: Any, texts: Iterable[str]) -> list[int]:
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
