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
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from ftplan.launcher.data.cuts import Lines, Unproven, ascii_bytes, find_cuts

# What marks a part's text, which then holds none of these itself:
_BEGINS = "\x00"  # no blank stands before it: it is behind a line feed
_BLANK = "\x01"  # a blank that is not cut before
_FEED = "\x02"  # a line feed that is not cut behind
_PAIR = "\x03"  # two line feeds
_BEHIND_PAIR = "\x04"  # as _BEGINS, behind two line feeds
_FIRST = "\x05"  # nothing stands before it
_MARKS = (_BEGINS, _BLANK, _FEED, _PAIR, _BEHIND_PAIR, _FIRST)
_OPENINGS = _BEGINS + _BEHIND_PAIR + _FIRST

_WHOLE = 1 << 50  # counted by a part that makes its text be tokenized whole

_REMEMBERED_PARTS = 400_000
_REMEMBERED_WORDS = 200_000
_LONGEST_REMEMBERED = 48  # characters; longer parts hardly come again

_TEXTS_AT_ONCE = 512
_WHOLE_CHARACTERS_AT_ONCE = 1 << 20


class TokenCounter:
    """Counts tokens as `len(tokenizer(text, add_special_tokens=False)["input_ids"])` does.

    `tokenizer` is one of transformers'. The counter can be pickled; what it remembers stays behind.
    """

    reason: str
    """Why parts of texts may be counted alone, or why not: for a debug note."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._ways: list[Callable[[Sequence[str]], list[int]]] = [self._whole]
        if self._backend is None:
            self.reason = "the tokenizer is not a plain one of the `tokenizers` library"
            return
        try:
            words = _Words(self._backend)
            blanks, lines = _PartCounter(words, "none"), _PartCounter(words, words.cuts.lines)
            self._ways = [lines.counts, blanks.counts, self._whole]
            self.reason = words.cuts.reason
        except Unproven as why:
            self.reason = str(why)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCounter, (self._tokenizer,)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is, without those that the tokenizer adds to a text."""
        counted: list[int] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[start : start + _TEXTS_AT_ONCE]
            few = [_WHOLE] * len(some)
            for count in self._ways:
                rest = [number for number, known in enumerate(few) if known >= _WHOLE]
                for number, known in zip(rest, count([some[n] for n in rest]), strict=True):
                    few[number] = known
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


class _Words:
    """Counts words, which are what parts are made of; raises Unproven where that may not be done.

    Words of ASCII parts are the tokenizer's own; other parts are one word each.
    """

    def __init__(self, backend: Any) -> None:
        description = json.loads(backend.to_str())
        self.cuts = find_cuts(description)
        if self.cuts.prefix_after_added and backend.encode_special_tokens:
            raise Unproven("it puts a blank before texts and reads special tokens as text")
        self._whole = backend
        self._bare = _private(self.cuts.bare, backend) if self.cuts.prefixed else backend
        added = sorted((token["content"] for token in description["added_tokens"]), key=len)
        self.added = re.compile("|".join(map(re.escape, reversed(added))) or r"(?!)")
        self._model = self._bare.model if self.cuts.words_are_bytes else None
        self._byte_names = ascii_bytes()
        self._uncut: set[str] = set()
        self._known: dict[str, int] = {}
        self._earlier: dict[str, int] = {}

    def first(self, texts: list[str]) -> list[int]:
        """Counts of parts that begin a text, where the tokenizer puts something before it."""
        return _lengths(self._whole, texts)

    @property
    def known(self) -> dict[str, int]:
        """Words counted before. Another dictionary after `counts`."""
        return self._known

    def counts(self, words: Iterable[str]) -> dict[str, int]:
        """Counts of those of the words that are not among the known; remembers them."""
        if len(self._known) > _REMEMBERED_WORDS:
            self._earlier, self._known = self._known, {}
        known, earlier = self._known, self._earlier
        unknown = [word for word in dict.fromkeys(words) if word not in known]
        known.update((word, earlier[word]) for word in unknown if word in earlier)
        fresh = [word for word in unknown if word not in known]
        counted = self._tokenized(fresh)
        _remember(known, counted)
        return {word: known[word] if word in known else counted[word] for word in unknown}

    def _tokenized(self, words: list[str]) -> dict[str, int]:
        """Counts words: by the model alone where they are ones of the tokenizer, as that takes a
        third of the time."""
        if self._model is None:
            self._uncut.clear()
            return dict(zip(words, _lengths(self._bare, words), strict=True))
        tokenize, names, uncut = self._model.tokenize, self._byte_names, self._uncut
        counted: dict[str, int] = {}
        others = []
        for word in words:
            if word.isascii() and word not in uncut:
                counted[word] = len(tokenize(word.translate(names)))
            else:
                others.append(word)
        uncut.clear()
        counted.update(zip(others, _lengths(self._bare, others), strict=True))
        return counted

    def cut(self, text: str) -> list[str]:
        """A part's words where it is ASCII without added tokens; else the part itself."""
        if not (self.cuts.ascii_stages and text.isascii()) or self.added.search(text):
            return self._leave(text)
        words = [text]
        for stage in self.cuts.ascii_stages:
            words = [word for longer in words for word in stage.findall(longer)]
        return words if sum(map(len, words)) == len(text) else self._leave(text)

    def _leave(self, text: str) -> list[str]:
        self._uncut.add(text)
        return [text]

    def begins(self, text: str) -> bool:
        """Whether whitespace before this may be treated like that at the end of a text."""
        letter = text[:1].isascii() and text[:1].isalpha()
        return (self.cuts.begins_apart and not letter) or self.added.match(text) is not None

    def normalized(self, text: str) -> str:
        """What patterns see of a text; the proof lets ASCII pass as it is."""
        normalizer = self._bare.normalizer
        if normalizer is None or text.isascii():
            return text
        return str(normalizer.normalize_str(text))


class _PartCounter:
    """Counts texts by their parts, cut before blanks and behind line feeds as `lines` says.

    A part is named by what stands between two places to cut, without the blank that opens it.
    """

    def __init__(self, words: _Words, lines: Lines) -> None:
        self._words = words
        self._lines = lines
        self._known, self._earlier = _Counts(), _Counts()

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Counts of a few texts; `_WHOLE` and more where a text is not to be counted in parts.

        Parts known already are summed up first, then those that were missing are counted at once.
        """
        missing = self._known.missing
        counted, ends = [], []
        for text in texts:
            counted.append(self._sum_known(text))
            ends.append(len(missing))
        found = self._learn(missing)
        start = 0
        for number, end in enumerate(ends):
            if end > start:
                counted[number] += sum(map(found.__getitem__, islice(missing, start, end)))
                start = end
        missing.clear()
        if len(self._known) > _REMEMBERED_PARTS:
            self._earlier, self._known = self._known, _Counts()
        return counted

    def _sum_known(self, text: str) -> int:
        """What the known parts of a text count; the others are noted as missing."""
        cuts = self._words.cuts
        if any(mark in text for mark in _MARKS) or any(token in text for token in cuts.barred):
            return _WHOLE
        if not cuts.prefix_after_added:
            return self._sum_segment(text)
        segments = self._words.added.split(text)
        return len(segments) - 1 + sum(map(self._sum_segment, filter(None, segments)))

    def _sum_segment(self, text: str) -> int:
        """The same of a text, or of what stands between two of its added tokens."""
        if "\n" in text:
            text = _MARK_LINES[self._lines](text)
        if not self._words.cuts.every_blank:
            text = _join_blanks(text)
        if text[:1] == " ":
            text = _BLANK + text[1:]
        first, *others = text.split(" ")
        count = self._known.__getitem__
        return sum(map(count, others), count(_FIRST + first))

    def _learn(self, missing: list[str]) -> dict[str, int]:
        """Counts of parts that were missing; remembers them."""
        earlier = self._earlier
        parts = dict.fromkeys(missing)
        fresh = [part for part in parts if part not in earlier]
        found = {part: earlier[part] for part in parts if part in earlier} if earlier else {}
        self._count_parts(fresh, found)
        _remember(self._known, found)
        return found

    def _count_parts(self, parts: list[str], found: dict[str, int]) -> None:
        """Adds counts of parts to `found`."""
        cut, count = self._words.cut, self._words.known.__getitem__
        prefixed = self._words.cuts.prefixed
        first: list[str] = []
        left: list[tuple[str, list[str]]] = []
        for part in parts:
            if part.isascii() and part.isprintable() and part != "":
                words = cut(" " + part)
            elif not self._is_sound(part):
                found[part] = _WHOLE
                continue
            elif prefixed and part[:1] == _FIRST:
                first.append(part)
                continue
            else:
                words = cut(_text(part))
            try:
                found[part] = sum(map(count, words))
            except KeyError:
                left.append((part, words))
        found.update(zip(first, self._words.first([_text(part) for part in first]), strict=True))
        new = self._words.counts([word for _, words in left for word in words])
        for part, words in left:
            found[part] = sum(new[word] if word in new else count(word) for word in words)

    def _is_sound(self, part: str) -> bool:
        """Whether the places around a part are ones to cut at, whatever stands beyond them."""
        cuts = self._words.cuts
        if cuts.every_blank:
            return True
        begins = part != "" and part[0] in _OPENINGS
        raw = _text(part)[0 if begins else 1 :]
        text = self._words.normalized(raw)  # without the blank before it
        if bool(text) != bool(raw):
            return False
        # Behind blanks and line feeds no blank can follow: it would have been joined to them.
        if raw and raw[-1] not in " \n" and (text[-1].isspace() or text[-1] in cuts.blanks):
            return False
        if self._lines == "single":
            return self._is_single_line(part, text)
        return self._lines != "runs" or self._is_behind_run(part, text)

    def _is_single_line(self, part: str, text: str) -> bool:
        if part[-1:] == "\n" and text[-2:-1].isspace():
            return False
        if part[:1] == _BEHIND_PAIR and self._words.begins(text):
            return False
        behind = part[:1] in (_BEGINS, _BEHIND_PAIR)
        return not (behind and text[:1].isspace() and part != _BEGINS + "\n")

    def _is_behind_run(self, part: str, text: str) -> bool:
        if part[:1] == _FIRST:
            return True
        if part[:1] == _BEGINS and self._words.cuts.slash_continues and text[:1] == "/":
            return False
        space = text[: len(text) - len(text.lstrip())]
        return "\n" not in space and "\r" not in space


def _mark_no_lines(text: str) -> str:
    return text.replace("\n ", "\n" + _BLANK)


def _mark_single_lines(text: str) -> str:
    """Cuts behind line feeds between two characters that are no whitespace, and around the second
    of two such line feeds; the rest of whitespace is joined."""
    text = text.replace("\r\n", "\r" + _FEED).replace(" \n", " " + _FEED)
    text = text.replace("\n\n\n", _FEED * 3)
    text = text.replace(_FEED + "\n", _FEED * 2).replace(_FEED + "\n", _FEED * 2)
    text = text.replace("\n ", _FEED + _BLANK).replace("\n\t", _FEED + "\t")
    text = text.replace("\n" + _FEED, _FEED * 2).replace(_FEED + " ", _FEED + _BLANK)
    if text[-2:] == "\n\n":
        text = text[:-2] + _FEED * 2
    if "\n\n" not in text:
        return text.replace("\n", "\n " + _BEGINS)
    text = text.replace("\n\n", _PAIR).replace("\n", "\n " + _BEGINS)
    return text.replace(_PAIR, f"\n {_BEGINS}\n {_BEHIND_PAIR}")


def _mark_runs_of_lines(text: str) -> str:
    """Cuts behind the last of line feeds that follow one another."""
    if "\n\n" in text:
        text = text.replace("\n\n", _FEED + "\n").replace("\n" + _FEED, _FEED * 2)
        text = text.replace("\n\n", _FEED + "\n")
    return text.replace("\n", "\n " + _BEGINS)


_MARK_LINES: dict[Lines, Callable[[str], str]] = {
    "none": _mark_no_lines,
    "single": _mark_single_lines,
    "runs": _mark_runs_of_lines,
    "merges": _mark_runs_of_lines,
}


def _join_blanks(text: str) -> str:
    """The text with each blank marked that stands behind another one: no cut is before it."""
    if "  " in text:
        text = text.replace("  ", " " + _BLANK)
    if _BLANK in text:
        text = text.replace(_BLANK + " ", _BLANK + _BLANK)
    return text


def _text(part: str) -> str:
    """What a part stands for."""
    text = part[1:] if part != "" and part[0] in _OPENINGS else " " + part
    return text.replace(_BLANK, " ").replace(_FEED, "\n")


class _Counts(dict[str, int]):
    """Counts of parts. One that is not there counts nothing and is noted as missing."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []

    def __missing__(self, part: str) -> int:
        self.missing.append(part)
        return 0


def _remember(known: dict[str, int], counted: dict[str, int]) -> None:
    """Adds counts to what is known, without those of long texts."""
    if max(map(len, counted), default=0) <= _LONGEST_REMEMBERED:
        known.update(counted)
    else:
        known.update((text, n) for text, n in counted.items() if len(text) <= _LONGEST_REMEMBERED)


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
