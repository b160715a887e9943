# ruff: noqa: RUF001
"""Token counts by parts are the tokenizer's own, for every kind of tokenizer that is proven."""

import json
import pickle
import random
import re
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ftplan.launcher.data.borders as borders
import ftplan.launcher.data.lengths as lengths_module
from benchmarks.data_file import Rows
from benchmarks.lengths import row_texts
from ftplan.launcher.data.count_table import LONGEST_KEY, CountTable, keys
from ftplan.launcher.data.cuts import _ALTERNATIVES, Unproven, byte_names, find_cuts
from ftplan.launcher.data.lengths import TokenCounter

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tokenizers import (  # noqa: E402
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

ROOT = Path(__file__).resolve().parents[1]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

SCRIPTS = (
    "Größe, naïve café — “quoted” … ½ ²³\n\n"
    "Быстрая коричневая лиса прыгает. Ελληνικά ΣΊΣΥΦΟΣ, שלום עולם مرحبا بالعالم हिन्दी में लिखा\n"
    "日本語のテキスト。中文，没有空格的句子！한국어 문장 하나 ไทยไม่มีช่องว่าง\n"
    "👩‍👩‍👧 🇩🇪 e\u0301 A\u030a \ufdfa ﬁ Å\u00a0nbsp \u3000ideographic\u2028line\u200bzero\n"
)
SPACES = (
    "a  b   c    d\n    indented\n\tif x:\n\t\treturn 1\n\n\n\n  \n \n"
    " end \r\nnext\r\n\r\n x \t y\n\n"
)
# Often enough that tokens are learned from it which a wrong cut would take apart.
RUNS = (
    "x:\n/usr a\n  \n b\n \t\n c \n  \n\n d\n\n\n e\r\n\r\n f\n\t\t\n g  \n\n h"
    "\n\n1\n\n中\t\n i\n\t j"
)
ADDED = (
    "<|im_start|>user\nHi <|im_end|>\n\n<|im_start|>  <|im_end|> <s> a<s>b</s>\n\n"
    "He's I'LL 12345 1 22\n"
)


@cache
def corpus() -> tuple[str, ...]:
    """Text and code at hand."""
    rows = (ROOT / "examples/python_docs.jsonl").read_text().splitlines()
    texts = [text for row in rows for text in json.loads(row).values() if isinstance(text, str)]
    files = [
        ROOT / "README.md",
        ROOT / "docs/data.md",
        *sorted((ROOT / "launcher").glob("*.py"))[:4],
    ]
    return (
        *texts,
        *(file.read_text() for file in files),
        SCRIPTS * 20,
        SPACES * 5,
        RUNS * 300,
        ADDED * 5,
    )


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def then_bytes(*stages):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*stages, last])


def byte_level(pre_tokenizer, normalizer=None):
    made = Tokenizer(models.BPE())
    made.normalizer = normalizer or made.normalizer
    made.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    return made


def sentencepiece_like(first_space, split_while_training=True):
    """A BPE as SentencePiece's, with bytes for characters it does not know."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if split_while_training:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split(r"\n"), pre_tokenizers.Metaspace(prepend_scheme="never")]
        )
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        show_progress=False,
        limit_alphabet=150,
        special_tokens=["<unk>", "<s>", "</s>", *BYTES],
    )
    made.train_from_iterator(corpus(), trainer)
    description = json.loads(made.to_str())
    added = description["added_tokens"]
    description["added_tokens"] = [token for token in added if token["content"] not in BYTES]
    description["normalizer"] = description["pre_tokenizer"] = None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if first_space == "prepend":
        prepend = {"type": "Prepend", "prepend": "▁"}
        description["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    elif first_space == "gemma":
        description["normalizer"] = replace
        pattern = {"pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        description["pre_tokenizer"] = {"type": "Split", **pattern}
    else:
        scheme = {"replacement": "▁", "prepend_scheme": first_space, "split": False}
        description["pre_tokenizer"] = {"type": "Metaspace", **scheme}
    return Tokenizer.from_str(json.dumps(description))


def unigram(scheme):
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=2000, show_progress=False, special_tokens=special, unk_token="<unk>"
    )
    made.train_from_iterator(corpus(), trainer)
    return made


def word_piece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=3000, show_progress=False, special_tokens=special
    )
    made.train_from_iterator(corpus(), trainer)
    return made


def with_runs_of_blanks():
    """As GPT-NeoX's: runs of blanks are tokens added to it."""
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())
    made.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 25)])
    return made


def with_greedy_tokens():
    """As RoBERTa's `<mask>`, which takes the blanks before it, and one of two words."""
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.add_special_tokens([AddedToken("<s>", lstrip=True), AddedToken("x:\n", rstrip=True)])
    made.add_tokens(["the file", AddedToken("He", single_word=True)])
    return made


PROVEN = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "opt": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    ),
    "falcon": lambda: byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(individual_digits=False),
                split("[0-9][0-9][0-9]"),
            ]
        )
    ),
    "llama3": lambda: byte_level(then_bytes(split(LLAMA3))),
    "qwen2": lambda: byte_level(then_bytes(split(QWEN2)), normalizers.NFC()),
    "o200k": lambda: byte_level(then_bytes(split(O200K))),
    "deepseek": lambda: byte_level(
        then_bytes(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK))
    ),
    "nfkc": lambda: byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC()
    ),
    "neox": with_runs_of_blanks,
    "greedy tokens": with_greedy_tokens,
    "llama2": lambda: sentencepiece_like("prepend"),
    "mistral": lambda: sentencepiece_like("first"),
    "always": lambda: sentencepiece_like("always"),
    "gemma": lambda: sentencepiece_like("gemma"),
    "unigram": lambda: unigram("always"),
    "unigram first": lambda: unigram("first"),
    "bert": word_piece,
}

LINES = {
    "gpt2": "single",
    "llama3": "runs",
    "o200k": "runs",
    "deepseek": "runs",
    "llama2": "merges",
    "gemma": "merges",
    "bert": "none",
    "neox": "single",
}


@cache
def fast(name):
    made = PROVEN[name]()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@cache
def counter(name):
    return TokenCounter(fast(name))


def expected(tokenizer, texts):
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("name", PROVEN)
def test_texts_at_hand_count_as_the_tokenizer_counts_them(name):
    texts = [*corpus(), RUNS, SPACES, ADDED, "", " ", "\n", "  a", "a ", "a\n\n", "\x00\x01 a"]
    assert "blank" in counter(name).reason, counter(name).reason
    assert counter(name).counts(texts) == expected(fast(name), texts)


PIECES = [
    *" \t\n\r\u00a0\u3000\u2028\x0b\x85\x1c",
    *["  ", "    ", "\n\n", "\n\n\n", "\r\n", "\n  ", " \n", "\n\t"],
    *"aZé'’s/.,:-_<>|#1٣½中ひ한ß▁ΣﬁĠÅ¨\u0301\u200b\u200d\ufeff\ufdfa👩🏽\x00\x01\x07",
    *["the", "The", " the", "don't", "I'LL", "123456", "中文字", "word", "x:", "...", "//", ":\n"],
    *["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[CLS]", "<unk>", "He", "the file", "<0x0A>"],
]


@pytest.mark.parametrize("name", PROVEN)
@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), max_size=8))
def test_any_mixture_of_blanks_signs_and_scripts_counts_alike(name, texts):
    assert counter(name).counts(texts) == (expected(fast(name), texts) if texts else [])


def mixtures(seed, number):
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(number)]


@pytest.mark.parametrize("name", PROVEN)
def test_a_long_random_mixture_counts_alike(name):
    texts = mixtures(name, 4000)
    assert counter(name).counts(texts) == expected(fast(name), texts)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_counts_alike_by_merges_alone(text):
    for name in ("llama2", "llama3", "gpt2"):
        assert counter(name).counts([text]) == expected(fast(name), [text])


@pytest.mark.parametrize("name", LINES)
def test_lines_are_cut_in_the_way_of_the_pattern(name):
    assert find_cuts(json.loads(fast(name).backend_tokenizer.to_str())).lines == LINES[name]


WORDS_ARE_BYTES = {
    "gpt2": True,
    "smollm": True,
    "deepseek": True,
    "falcon": False,
    "bert": False,
    "llama2": False,
}


@pytest.mark.parametrize("name", WORDS_ARE_BYTES)
def test_words_go_to_the_model_alone_only_where_nothing_else_changes_them(name):
    cuts = find_cuts(json.loads(fast(name).backend_tokenizer.to_str()))
    assert cuts.words_are_bytes == WORDS_ARE_BYTES[name]


def test_bytes_have_the_names_that_byte_level_gives_them():
    text = "".join(map(chr, range(0x250))) + "中👩"
    named = text.encode().decode("latin-1").translate(byte_names())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert named == pieces.pre_tokenize_str(text)[0][0]
    assert set(byte_names().values()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_vocabulary_that_joins_words_is_not_proven_and_a_cut_would_be_wrong(monkeypatch):
    crossing = sentencepiece_like("gemma", split_while_training=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=crossing)
    whole = TokenCounter(tokenizer)
    assert "it merges" in whole.reason
    texts = list(corpus())
    assert whole.counts(texts) == expected(tokenizer, texts)

    monkeypatch.setattr("ftplan.launcher.data.cuts._look_at_merges", lambda model, blank: None)
    cut = TokenCounter(tokenizer)
    assert cut.reason != whole.reason
    assert cut.counts(texts) != expected(tokenizer, texts)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\w+ \w+|\s+|[^\s\w]+|\w+", "two words are one piece of text here and there"),
        (r"\S+ ?|\s+", "blanks stand behind words of this text"),
        (r"\s+(?!\S)|\s+|[^\s]+(?= the)|[^\s]", "looking at the words behind the blank"),
    ],
)
def test_an_unknown_pattern_is_not_proven_and_a_cut_would_be_wrong(pattern, text, monkeypatch):
    made = byte_level(then_bytes(split(pattern)))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    texts = [text, *corpus()]
    whole = TokenCounter(tokenizer)
    assert "not known" in whole.reason
    assert whole.counts(texts) == expected(tokenizer, texts)

    monkeypatch.setattr("ftplan.launcher.data.cuts._cuts", lambda stage, replaces: True)
    monkeypatch.setattr("ftplan.launcher.data.cuts._ascii_stages", lambda stages: ())
    assert TokenCounter(tokenizer).counts(texts) != expected(tokenizer, texts)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "o200k"])
@pytest.mark.parametrize("left", ["feed", "sign", "other", "blank"])
def test_the_rules_of_borders_are_needed(name, left, monkeypatch):
    rules = borders._is_border
    monkeypatch.setattr(
        borders, "_is_border", lambda cuts, *kinds: kinds[1] == left or rules(cuts, *kinds)
    )
    texts = mixtures(name, 2000)
    loose = TokenCounter(fast(name))
    assert loose.counts(texts) != expected(fast(name), texts)


def described(name, **changes):
    return {**json.loads(fast(name).backend_tokenizer.to_str()), **changes}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}),
        ("gpt2", {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"}}),
        ("gpt2", {"pre_tokenizer": {"type": "UnicodeScripts"}}),
        ("gpt2", {"pre_tokenizer": None}),
        ("unigram", {"pre_tokenizer": None}),
    ],
)
def test_stages_that_may_see_across_a_blank_are_not_proven(name, changes):
    find_cuts(described(name))
    with pytest.raises(Unproven):
        find_cuts(described(name, **changes))


def test_random_merges_are_not_proven():
    model = {**described("llama3")["model"], "dropout": 0.1}
    with pytest.raises(Unproven, match="random"):
        find_cuts(described("llama3", model=model))


def test_every_pattern_compiles_in_its_form_for_ascii():
    for pattern in _ALTERNATIVES.values():
        re.compile(pattern)


def test_special_tokens_read_as_text_count_as_text():
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=PROVEN["llama3"](), split_special_tokens=True
    )
    assert TokenCounter(tokenizer).counts([ADDED]) == expected(tokenizer, [ADDED])
    assert expected(tokenizer, [ADDED]) != expected(fast("llama3"), [ADDED])


def test_truncation_and_padding_of_the_tokenizer_change_nothing():
    made = PROVEN["llama3"]()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    assert TokenCounter(tokenizer).counts([SPACES]) == expected(fast("llama3"), [SPACES])


def test_a_tokenizer_of_another_kind_counts_whole_texts():
    class Reversed(transformers.PreTrainedTokenizerFast):
        def __call__(self, texts, **settings):
            return {"input_ids": [[0] * len(text) for text in texts]}

    counter = TokenCounter(Reversed(tokenizer_object=PROVEN["gpt2"]()))
    assert counter.counts(["abc", "a b"]) == [3, 3]
    assert "not a plain one" in counter.reason


def test_the_benchmark_writes_the_same_varied_rows_each_time_and_they_count_alike():
    rows = list(islice(Rows(), 300))
    assert rows == list(islice(Rows(), 300)) != list(islice(Rows(1), 300))
    texts = [text for row in rows for text in row_texts(row)]
    assert counter("llama3").counts(texts) == expected(fast("llama3"), texts)


def test_a_pickled_counter_counts_alike():
    texts = [SCRIPTS, SPACES, ADDED]
    assert pickle.loads(pickle.dumps(counter("gpt2"))).counts(texts) == counter("gpt2").counts(
        texts
    )


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(lengths_module, "_SLOTS_LOG2", 8)
    monkeypatch.setattr(lengths_module, "_REMEMBERED", 50)
    monkeypatch.setattr(lengths_module, "_TEXTS_AT_ONCE", 20)
    small = TokenCounter(fast("opt"))
    texts = [f"word{n}s {n} stays {'x' * 100}{n} {'y' * 20}{n}" for n in range(2000)] * 2
    assert small.counts(texts) == expected(fast("opt"), texts)
    chunks = small._chunks
    assert len(chunks._table) <= 128
    for remembered in (chunks._long.known, chunks._first.known):
        assert 0 < len(remembered) < 100
        assert not any(len(chunk) > 64 for chunk in remembered)


def test_a_long_text_is_looked_at_in_pieces(monkeypatch):
    monkeypatch.setattr(lengths_module, "_CHARACTERS_AT_ONCE", 200)
    monkeypatch.setattr(lengths_module, "_LONG", 400)
    texts = ["\n".join(corpus()), "x" * 1000, "a " * 500, RUNS * 3]
    for name in ("gpt2", "llama3", "llama2"):
        assert TokenCounter(fast(name)).counts(texts) == expected(fast(name), texts)


@settings(deadline=None)
@given(
    batches=st.lists(
        st.lists(st.binary(min_size=1, max_size=20).filter(lambda key: 0 not in key), max_size=30)
    )
)
def test_the_table_finds_what_was_added_and_nothing_else(batches):
    table, known = CountTable(7), {}
    for batch in batches:
        data = b"\0".join(batch) + b"\0"
        ends = np.cumsum([[len(key), 1] for key in batch] or [[0, 1]])
        low, high, _ = keys(data, np.concatenate([[0], ends]))
        counts, absent = table.get(low, high)
        places = [place for place, key in enumerate(batch) if len(key) <= LONGEST_KEY]
        assert {2 * n for n in places if batch[n] not in known} == set(absent.tolist())
        assert all(counts[2 * n] == known.get(batch[n], 0) for n in places)
        new = {batch[place // 2]: place for place in absent.tolist()}
        if len(known) + len(new) > 64:
            known = {}
        known |= {key: len(known) + number + 1 for number, key in enumerate(list(new)[:64])}
        at = list(new.values())
        table.add(low[at], high[at], np.array([known.get(key, 0) for key in new], np.int64))
