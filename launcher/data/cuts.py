"""Where a text may be cut so that its parts, tokenized alone, give the tokens of the whole.

`find_cuts` proves places from a tokenizer's own description (its `tokenizer.json`), stage by stage
as `tokenizers` applies them. First of all before a blank (U+0020) that follows something else than
whitespace:

1. Added tokens are taken out of the text first. None may hold the place inside itself.
2. The normalizer works on what is left. It must work on each character alone, or on sequences
   that a blank ends (Unicode's normal forms: a blank never joins the character before it).
3. A pre-tokenizer that cuts there makes the parts independent of each other whatever the model
   is. Stages before it must not see across the place.
4. Without one, the merges of a BPE model decide: where no merge joins something to a blank on its
   right, no token holds both, and neither side's merges depend on the other's.

Around line feeds there are more such places, in three kinds (`Lines`). Where the pre-tokenizer is a
pattern known here, its alternatives say more: in all of them letters and digits come last, so that
a word ends before a sign or whitespace whatever follows (`words_end`), and in some nothing but a
blank stands before letters (`words_begin`). What is not proven is not cut.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, Literal

from msgspec import Struct

Description = dict[str, Any]

Lines = Literal["none", "single", "runs", "merges"]
"""Where a text may be cut behind line feeds too.

single: a pattern like GPT-2's ends before whitespace, and takes the last one of a run apart if
    text follows: before a line feed behind something else than whitespace, and behind one that
    stands between two of those.
runs: a pattern like Llama 3's takes whitespace up to its last line feed: behind that.
merges: no merge joins a line feed to anything else on its right: behind the last of a run.
"""

_MOST_BARRED = 8  # each is looked for in every text

_ASCII_SIGNS = r"!-/:-@\[-`{-~"

_S = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX, _ASCII_PREFIX = r"[^\r\n\p{L}\p{N}]?", r"[^\r\nA-Za-z0-9]?"

# The alternatives of which the patterns of byte-level tokenizers are made, each with what it is on
# ASCII. In none of them can anything but the first character be a blank, save in a run
# of whitespace; none looks at what follows, save after whitespace. So a match that starts left of
# a blank behind a non-blank ends there, as it would at the end of the text.
# From tokenizer.json of GPT-2, Llama 3, Qwen 2 and 3, gpt-oss (o200k), Mistral NeMo, DeepSeek-V3.
_ALTERNATIVES = {
    "'s": "'s",
    "'t": "'t",
    "'re": "'re",
    "'ve": "'ve",
    "'m": "'m",
    "'ll": "'ll",
    "'d": "'d",
    "'(?:[sdmt]|ll|ve|re)": "'(?:[sdmt]|ll|ve|re)",
    "'(?i:[sdmt]|ll|ve|re)": "'(?i:[sdmt]|ll|ve|re)",
    _S: _S,
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": _S,
    r" ?\p{L}+": " ?[A-Za-z]+",
    r" ?\p{N}+": " ?[0-9]+",
    r" ?[^\s\p{L}\p{N}]+": r" ?[^\sA-Za-z0-9]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*": r" ?[^\sA-Za-z0-9]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*": r" ?[^\sA-Za-z0-9]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*": r" ?[^\sA-Za-z0-9]+[\r\n]*",
    r" ?[\p{P}\p{S}]+[\r\n]*": rf" ?[{_ASCII_SIGNS}]+[\r\n]*",
    rf"{_PREFIX}\p{{L}}+": rf"{_ASCII_PREFIX}[A-Za-z]+",
    rf"{_PREFIX}[\p{{L}}\p{{M}}]+": rf"{_ASCII_PREFIX}[A-Za-z]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+": rf"[^\r\nA-Za-z{_ASCII_SIGNS}]?[A-Za-z]+",
    rf"{_PREFIX}{_UPPER}*{_LOWER}+": rf"{_ASCII_PREFIX}[A-Z]*[a-z]+",
    rf"{_PREFIX}{_UPPER}+{_LOWER}*": rf"{_ASCII_PREFIX}[A-Z]+[a-z]*",
    rf"{_PREFIX}{_UPPER}*{_LOWER}+{_S}?": rf"{_ASCII_PREFIX}[A-Z]*[a-z]+{_S}?",
    rf"{_PREFIX}{_UPPER}+{_LOWER}*{_S}?": rf"{_ASCII_PREFIX}[A-Z]+[a-z]*{_S}?",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+": rf"[{_ASCII_SIGNS}][A-Za-z]+",
    r"\p{N}": "[0-9]",
    r"\p{N}{1,3}": "[0-9]{1,3}",
    r"\s*[\r\n]+": r"\s*[\r\n]+",
    r"\s+(?!\S)": r"\s+(?!\S)",
    r"\s+": r"\s+",
}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_OF_CHINESE = "[一-龥\u3040-ゟ\u30a0-ヿ]+"

# Patterns that hold no blank and look at nothing around a match.
_NEUTRAL = {
    r"\p{N}{1,3}": "[0-9]{1,3}|[^0-9]+",
    r"\p{N}": "[0-9]|[^0-9]+",
    r"\p{N}+": "[0-9]+|[^0-9]+",
    r"\d": "[0-9]|[^0-9]+",
    r"[0-9]": "[0-9]|[^0-9]+",
    r"[0-9][0-9][0-9]": None,  # what is left of a number is not cut off from what stands beside it
    _OF_CHINESE: r"[\s\S]+",
    r"[\r\n]": r"[\r\n]|[^\r\n]+",
}

_CHARACTERWISE = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}


class Unproven(Exception):
    """Why texts of a tokenizer are counted whole."""


class Cuts(Struct, frozen=True, kw_only=True):
    """What is proven of a tokenizer."""

    reason: str
    bare: Description
    """The tokenizer without what it puts before a text: for parts that do not begin one."""
    prefixed: bool
    """Whether it puts something before each text."""
    prefix_after_added: bool
    """Whether it puts that behind each added token too."""
    every_blank: bool
    """Whether every blank is a place to cut, one after whitespace too."""
    blanks: str
    """Characters behind which a blank is not cut off, other than whitespace."""
    lines: Lines
    words_end: bool
    """Whether a letter or digit ends its word before an ASCII sign other than the apostrophe and
    before whitespace, and a letter before a digit."""
    words_begin: bool
    """Whether a letter begins a word behind a digit or such a sign."""
    letters_beyond_ascii: bool
    """Whether that holds for letters of any script that no normal form changes."""
    letters_are_words: bool
    """Whether the model sees such letters, and a blank before them, as one word by their bytes'
    names (`byte_names`), unless a normal form changes them together."""
    signs_join: bool
    """Whether one sign before letters belongs to their word as a blank does."""
    strips: bool
    """Whether the normalizer takes accents and control characters out."""
    slash_continues: bool
    """Whether a word may go on with a slash behind a line feed, as in o200k's pattern."""
    barred: tuple[str, ...]
    """Texts that hold one of these are counted whole."""
    ascii_stages: tuple[re.Pattern[str], ...]
    """Cut ASCII parts into words: each stage finds the words in those of the stage before."""
    words_are_bytes: bool
    """Whether the model sees each of these words as it is, by its bytes' names (`byte_names`)."""


def find_cuts(description: Description) -> Cuts:
    """The proof for a tokenizer, of which `description` is the parsed `tokenizer.json`.

    Raises Unproven where a stage is not known to leave the place alone.
    """
    changed = ("normalizer", "pre_tokenizer")
    bare = {**description, **{name: copy.deepcopy(description[name]) for name in changed}}
    bare["truncation"] = bare["padding"] = None
    replaces, prepends = _look_at_normalizer(bare)
    stages = _pre_tokenizers(bare)
    cutting, metaspace, every_blank = _look_at_stages(stages, replaces)
    scheme = "always" if prepends else _strip_prefix(stages)
    model = bare["model"]
    if model.get("dropout"):
        raise Unproven("its model drops merges at random")
    if not cutting:
        _look_at_merges(model, "▁" if replaces or metaspace else " ")
    words = _cutting_alternatives(stages) if cutting else []
    lines: Lines = _lines_of(words) if cutting else _lines_of_merges(model)
    added = bare["added_tokens"]
    remade = [token["content"] for token in added if token["normalized"] and bare["normalizer"]]
    # The normalizer may make such a token of other characters, which are not seen to be one.
    if any(re.search(r"\n[\s\S]", token["content"]) for token in added) or any(
        re.search(r"\S\n", content) for content in remade
    ):
        lines = "none"
    words_end = bool(words) and not (
        any(token["single_word"] for token in added)
        or any(re.search("[A-Za-z0-9]", content) for content in remade)
    )
    kinds = _normalizers(bare)
    letters_beyond_ascii = words_end and kinds <= {"NFC", "NFKC"}
    reason = (
        f"its pre-tokenizer ({cutting}) cuts before a blank"
        if cutting
        else "none of its merges joins anything to a blank behind it"
    )
    return Cuts(
        reason=reason,
        bare=bare,
        prefixed=scheme != "never",
        prefix_after_added=scheme == "always",
        every_blank=every_blank,
        blanks="▁" if replaces or metaspace else "",
        lines=lines,
        words_end=words_end,
        words_begin=words_end and not any(word.startswith("[") for word in words),
        letters_beyond_ascii=letters_beyond_ascii,
        letters_are_words=letters_beyond_ascii and _letters_are_words(bare, stages),
        signs_join=any(word.startswith(_PREFIX) for word in words),
        strips=not kinds.isdisjoint({"StripAccents", "BertNormalizer"}),
        slash_continues=any(r"[\r\n/]" in word for word in words),
        barred=_barred(bare, replaces, prepends, scheme == "always"),
        ascii_stages=_ascii_stages(stages) if cutting and not _recased(bare) else (),
        words_are_bytes=_words_are_bytes(bare, stages),
    )


def _look_at_normalizer(bare: Description) -> tuple[bool, bool]:
    """Whether the normalizer makes blanks `▁`, and whether it puts one first; that is taken out."""
    normalizer = bare["normalizer"]
    parts = _parts(normalizer, "normalizers")
    replaces = prepends = False
    kept = []
    for number, part in enumerate(parts):
        if part["type"] == "Prepend" and part["prepend"] == "▁" and number == 0:
            prepends = True
            continue
        if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
            if part["content"] != "▁":
                raise Unproven("its normalizer replaces blanks by something else than `▁`")
            replaces = True
        elif part["type"] not in _CHARACTERWISE:
            raise Unproven(f"its normalizer has a part that is not known here: {part['type']}")
        kept.append(part)
    bare["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return replaces, prepends


def _parts(stage: Description | None, field: str) -> list[Description]:
    if stage is None:
        return []
    if stage["type"] != "Sequence":
        return [stage]
    return [part for inner in stage[field] for part in _parts(inner, field)]


def _normalizers(bare: Description) -> set[str]:
    """The kinds of the normalizer's parts."""
    return {part["type"] for part in _parts(bare["normalizer"], "normalizers")}


def _pre_tokenizers(bare: Description) -> list[Description]:
    """The pre-tokenizer's stages, as they stand in `bare`."""
    return _parts(bare["pre_tokenizer"], "pretokenizers")


def _look_at_stages(stages: list[Description], replaces: bool) -> tuple[str, bool, bool]:
    """Which stage cuts before a blank (empty: none), whether one makes blanks `▁`, and whether
    every blank is cut before."""
    for stage in stages:
        kind = stage["type"]
        if kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer") and not replaces:
            return kind, False, True
        if kind == "Metaspace":
            if stage["replacement"] != "▁" or replaces or len(stages) > 1:
                raise Unproven("its Metaspace is not the only stage, or replaces twice")
            split = stage.get("split", True)
            return ("Metaspace" if split else ""), True, split
        if _cuts(stage, replaces):
            return kind, False, False
        if not _is_neutral(stage, replaces):
            raise Unproven(f"its pre-tokenizer has a stage that is not known here: {kind}")
    return "", False, False


def _cuts(stage: Description, replaces: bool) -> bool:
    """Whether a stage's pattern is one of those that cut before a blank."""
    if stage["type"] == "ByteLevel":
        return bool(stage.get("use_regex", True)) and not replaces
    if stage["type"] != "Split" or replaces or not _isolates(stage):
        return False
    alternatives = _alternatives(_pattern(stage))
    return r"\s+" in alternatives and all(known in _ALTERNATIVES for known in alternatives)


def _pattern(stage: Description) -> str:
    return _GPT2 if stage["type"] == "ByteLevel" else str(stage["pattern"].get("Regex", ""))


def _isolates(stage: Description) -> bool:
    return (stage["behavior"], stage["invert"]) in (("Isolated", False), ("Removed", True))


def _is_neutral(stage: Description, replaces: bool) -> bool:
    """Whether a stage treats what stands left and right of a blank apart."""
    if stage["type"] == "Split":
        if stage["pattern"] == {"String": " "}:
            return replaces  # no blank is left to match, as in Gemma's
        isolated = (stage["behavior"], stage["invert"]) == ("Isolated", False)
        return isolated and stage["pattern"].get("Regex") in _NEUTRAL
    if stage["type"] == "Punctuation":
        return stage.get("behavior") in ("Isolated", "Contiguous") and not replaces
    return stage["type"] == "Digits" or (
        stage["type"] == "ByteLevel" and not stage.get("use_regex", True) and not replaces
    )


def _alternatives(pattern: str) -> list[str]:
    """A pattern's alternatives: cut at each `|` outside brackets."""
    found, depth, in_class, start, escaped = [], 0, False, 0, False
    for at, character in enumerate(pattern):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            found.append(pattern[start:at])
            start = at + 1
    return [*found, pattern[start:]]


def _strip_prefix(stages: list[Description]) -> str:
    """When the pre-tokenizer puts a blank first: always, first or never; it is told not to."""
    scheme = "never"
    for number, stage in enumerate(stages):
        if stage["type"] == "ByteLevel" and stage.get("add_prefix_space"):
            scheme, stage["add_prefix_space"] = "always", False
        elif stage["type"] == "Metaspace":
            scheme, stage["prepend_scheme"] = stage["prepend_scheme"], "never"
        else:
            continue
        if scheme != "never" and number > 0:
            raise Unproven("its pre-tokenizer puts a blank before parts of a word")
    return scheme


def _look_at_merges(model: Description, blank: str) -> None:
    """Raises Unproven where a token of the model may hold a blank behind something else."""
    if model["type"] != "BPE":
        raise Unproven(f"nothing cuts its text before the model, a {model['type']}, sees it")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Unproven("its tokens know whether they begin or end a word")
    if model.get("ignore_merges"):
        raise Unproven("its model takes words from its vocabulary whatever its merges are")
    if blank not in model["vocab"]:
        raise Unproven("a blank is none of its tokens")
    for left, right in _merges(model):
        if right[0] == blank and left[-1] != blank:
            raise Unproven(f"it merges {left!r} with {right!r}")


def _cutting_alternatives(stages: list[Description]) -> list[str]:
    """The alternatives of the pattern that cuts; none where it is no pattern."""
    for stage in stages:
        if _cuts(stage, False):
            return _alternatives(_pattern(stage))
    return []


def _lines_of(alternatives: list[str]) -> Lines:
    if not alternatives:
        return "none"
    if r"\s*[\r\n]+" in alternatives:
        return "runs"
    return "none" if any(r"\r\n]" in word[6:] for word in alternatives) else "single"


def _lines_of_merges(model: Description) -> Lines:
    every_byte = model.get("byte_fallback") and all(
        f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)
    )
    if "\n" not in model["vocab"] and not every_byte:
        return "none"
    feeds = ("\n", "<0x0A>")
    crossing = any(
        left.endswith(feeds) and not right.startswith(feeds) for left, right in _merges(model)
    )
    return "none" if crossing else "merges"


def _merges(model: Description) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _barred(
    bare: Description, replaces: bool, prepends: bool, after_added: bool
) -> tuple[str, ...]:
    """Added tokens that act beyond their own characters, or hold a place to cut."""
    barred = []
    for token in bare["added_tokens"]:
        content, normalized = token["content"], token["normalized"]
        if normalized and bare["normalizer"] and not content.isascii():
            raise Unproven(
                f"its added token {content!r} stands for what the normalizer makes of it"
            )
        if (
            re.search(r"\S ", content)
            or token["lstrip"]
            or token["rstrip"]
            or (normalized and (replaces or prepends))
            or (after_added and (token["single_word"] or normalized))
        ):
            barred.append(content)
    if len(barred) > _MOST_BARRED:
        raise Unproven(f"{len(barred)} of its added tokens act on the text around them")
    return tuple(barred)


def _recased(bare: Description) -> bool:
    """Whether an added token may stand in a text in other letters than its own."""
    changes = not _normalizers(bare).isdisjoint({"Lowercase", "BertNormalizer"})
    return changes and any(token["normalized"] for token in bare["added_tokens"])


def _words_are_bytes(bare: Description, stages: list[Description]) -> bool:
    """Whether nothing but naming bytes comes behind the stage that cuts, and ASCII stays itself."""
    cutting = next((number for number, stage in enumerate(stages) if _cuts(stage, False)), None)
    if cutting is None or not _normalizers(bare) <= {"NFC", "NFD", "NFKC", "NFKD"}:
        return False
    naming = [stage for stage in stages if stage["type"] == "ByteLevel"]
    return len(naming) == 1 and naming in (stages[cutting:], stages[cutting + 1 :])


def byte_names() -> dict[int, str]:
    """The names that byte-level tokenizers give to bytes: those that are no printable sign of
    Latin-1 are called by what follows it (GPT-2's `bytes_to_unicode`)."""
    signs = {*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in signs]
    return {byte: chr(byte) for byte in signs} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


def _letters_are_words(bare: Description, stages: list[Description]) -> bool:
    """Whether nothing takes letters apart: no pattern that sees capitals, none for one script, and
    no added token made of letters."""
    for stage in stages:
        pattern = _pattern(stage) if stage["type"] in ("Split", "ByteLevel") else ""
        if _UPPER in pattern or pattern == _OF_CHINESE:
            return False
    lettered = (token["content"].strip().isalpha() for token in bare["added_tokens"])
    return _words_are_bytes(bare, stages) and not any(lettered)


def _ascii_stages(stages: list[Description]) -> tuple[re.Pattern[str], ...]:
    """The stages up to the cutting one as patterns for ASCII; none where one has no such form."""
    patterns: list[str] = []
    for stage in stages:
        pattern, last = _ascii_stage(stage)
        if pattern is None:
            return ()
        patterns.append(pattern)
        if last:
            return tuple(re.compile(pattern, re.ASCII) for pattern in patterns)
    return ()


def _ascii_stage(stage: Description) -> tuple[str | None, bool]:
    """A stage's pattern on ASCII, and whether it is the cutting one."""
    if _cuts(stage, False):
        return "|".join(_ALTERNATIVES[known] for known in _alternatives(_pattern(stage))), True
    if stage["type"] == "BertPreTokenizer":
        return rf"[^\s{_ASCII_SIGNS}]+|[{_ASCII_SIGNS}]|\s+", True
    if stage["type"] == "Digits":
        digits = "[0-9]" if stage["individual_digits"] else "[0-9]+"
        return f"{digits}|[^0-9]+", False
    if stage["type"] == "Split":
        return _NEUTRAL[stage["pattern"]["Regex"]], False
    return None, False
