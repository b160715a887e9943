# ruff: noqa: RUF001
"""Writes a JSON-lines file of varied rows, as long as asked for and always the same.

    python -m benchmarks.data_file rows.jsonl 2GB

Words are drawn by rank from a Zipf-Mandelbrot law without an end: the share of words of a rank
above r falls as (1 + r / HEAD)^-GROWTH, so that n words hold about n^GROWTH different ones (Heaps'
law), new ones at any length. The first ranks are words of this repository's example data, the
others are made of syllables. `python -m benchmarks.lengths` compares the growth with local text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from msgspec import Struct

ROOT = Path(__file__).resolve().parent.parent

HEAD = 14.0
GROWTH = 0.62

_MEDIAN_WORDS, _SPREAD = 110.0, 0.9  # of the log-normal lengths of answers
_LONGEST_WORDS = 6000
_BATCH_WORDS = 1 << 17
_HIGHEST_RANK = 1 << 48

_SYLLABLES = {
    "english": "an be con der en for gra hi in ju ker lo men na or pla qui re sta ti un ver wi ya",
    "german": "ab be chen dü ein für ge hö ich jä kei lung mä nis ö pf ring schü tig über vor wä ß",
    "spanish": "a bri ción da é fi gue há í jo lle más ña ó pre que ría sión té ú vi xi yo z",
    "russian": "а бы во год де ет жи за и ком ла мо ни об по ра ст ти у фи хо це чи ше ы ю я",
    "chinese": "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自",
}
_SHARES = {"english": 0.8, "german": 0.05, "spanish": 0.06, "russian": 0.05, "chinese": 0.04}
_CODE_SHARE, _DEFECT_SHARE = 0.1, 0.002


class Language(Struct, frozen=True):
    """How words of a rank are spelt."""

    known: list[str]
    syllables: list[str]
    between: str

    def spell(self, rank: int) -> str:
        if rank < len(self.known):
            return self.known[rank]
        rank, word = rank - len(self.known) + 1, ""
        while rank:
            rank, digit = divmod(rank, len(self.syllables))
            word += self.syllables[digit]
        return word


def _languages() -> dict[str, Language]:
    text = (ROOT / "examples" / "python_docs.jsonl").read_text()
    counts: dict[str, int] = {}
    for word in re.findall("[a-z]{1,16}", text):
        counts[word] = counts.get(word, 0) + 1
    english = sorted(counts, key=lambda word: (-counts[word], word))
    return {
        name: Language(
            english if name == "english" else [],
            list(syllables) if name == "chinese" else syllables.split(),
            "" if name == "chinese" else " ",
        )
        for name, syllables in _SYLLABLES.items()
    }


class _Draws:
    """Ranks and uniform numbers, drawn many at once."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._ranks = self._endless_ranks()
        self._uniform = self._endless_uniform()

    def _endless_ranks(self) -> Iterator[int]:
        while True:
            share = 1.0 - self._random.random(_BATCH_WORDS)
            ranks = HEAD * (share ** (-1 / GROWTH) - 1)
            yield from np.minimum(ranks, _HIGHEST_RANK).astype(np.int64).tolist()

    def _endless_uniform(self) -> Iterator[float]:
        while True:
            yield from self._random.random(_BATCH_WORDS).tolist()

    def ranks(self, number: int) -> list[int]:
        return list(islice(self._ranks, number))

    def uniform(self) -> float:
        return next(self._uniform)

    def below(self, number: int) -> int:
        return int(self.uniform() * number)

    def words(self) -> int:
        """The length of an answer."""
        drawn = float(self._random.lognormal(np.log(_MEDIAN_WORDS), _SPREAD))
        return max(3, min(_LONGEST_WORDS, int(drawn)))


class Rows:
    """Lines of a data file, without an end; `seed` decides all of them."""

    def __init__(self, seed: int = 0) -> None:
        self._draws = _Draws(seed)
        self._languages = _languages()
        self._names = list(self._languages)
        self._shares = np.cumsum([_SHARES[name] for name in self._names]).tolist()

    def __iter__(self) -> Iterator[str]:
        last = "{}"
        while True:
            draw = self._draws.uniform()
            if draw < _DEFECT_SHARE:
                line = self._defect(last)
            else:
                line = json.dumps(self._row(), ensure_ascii=draw < 0.1)
            yield line
            last = line

    def _language(self) -> Language:
        draw = self._draws.uniform()
        at = sum(draw > share for share in self._shares[:-1])
        return self._languages[self._names[at]]

    def prose(self, language: Language, number: int) -> str:
        """Sentences and paragraphs of so many words, numbers among them."""
        draws = self._draws
        words = list(map(language.spell, draws.ranks(number)))
        for at in range(draws.below(40), number, 29 + draws.below(30)):
            words[at] = str(int(10 ** (draws.uniform() * 6)))
        at = 0
        while at < number:
            words[at] = words[at].capitalize()
            length = 4 + draws.below(20)
            if length > 9 and at + 6 < number:
                words[at + 2 + draws.below(4)] += ","
            if draws.uniform() < 0.06:
                inside = min(at + 3, number - 1)
                words[inside] = (
                    f'"{words[inside]}"' if draws.uniform() < 0.5 else f"({words[inside]})"
                )
            at += length
            end = min(at, number) - 1
            words[end] += (".", ".", ".", "?", ":")[draws.below(5)]
            if end + 1 < number and draws.uniform() < 0.2:
                lead = ("\n\n", "\n", "\n- ", "\n\n## ")[draws.below(4)]
                words[end] += lead + words[end + 1]
                words[end + 1] = language.spell(draws.below(20))
        return language.between.join(words)

    def code(self, number: int) -> str:
        """A function in Python, about so many words long."""
        english, draws = self._languages["english"], self._draws
        names = iter(list(map(english.spell, draws.ranks(number + 8))))
        lines = [f"def {next(names)}_{next(names)}({next(names)}, {next(names)}=None):"]
        indent = 4
        for first in names:
            second, third = next(names, "x"), next(names, "y")
            if draws.uniform() < 0.2 and indent < 16:
                lines.append(f"{' ' * indent}if {first}.{second} is not {third}:")
                indent += 4
                continue
            lines.append(f"{' ' * indent}{first}_{second} = self.{third}[{draws.below(300)}]")
            indent = max(4, indent - 4 * draws.below(2))
        return "\n".join([*lines, "    return None"])

    def _answer(self, language: Language) -> str:
        number = self._draws.words()
        if self._draws.uniform() < _CODE_SHARE:
            return f"```python\n{self.code(number)}\n```"
        return self.prose(language, number)

    def _row(self) -> dict[str, object]:
        language = self._language()
        return _SHAPES[self._draws.below(len(_SHAPES))](self, language)

    def _question(self, language: Language) -> str:
        return self.prose(language, 4 + self._draws.below(30))

    def _alpaca(self, language: Language) -> dict[str, object]:
        row = {"instruction": self._question(language), "output": self._answer(language)}
        if self._draws.uniform() < 0.4:
            row["input"] = self.prose(language, 10 + self._draws.below(60))
        return dict(row)

    def _messages(self, language: Language) -> dict[str, object]:
        turns = [{"role": "system", "content": "You are a helpful assistant."}]
        for _ in range(1 + self._draws.below(3)):
            turns.append({"role": "user", "content": self._question(language)})
            turns.append({"role": "assistant", "content": self._answer(language)})
        return {"messages": turns[self._draws.below(2) :]}

    def _sharegpt(self, language: Language) -> dict[str, object]:
        asked = {"from": "human", "value": self._question(language)}
        return {"conversations": [asked, {"from": "gpt", "value": self._answer(language)}]}

    def _completion(self, language: Language) -> dict[str, object]:
        return {"prompt": self._question(language), "completion": self._answer(language)}

    def _text(self, language: Language) -> dict[str, object]:
        return {"text": self._answer(language)}

    def _defect(self, last: str) -> str:
        row = self._alpaca(self._languages["english"])
        output = str(row["output"])
        kind = self._draws.below(8)
        if kind == 0:
            return json.dumps(row)[: -5 - self._draws.below(20)]
        if kind == 1:
            return last
        changed = [
            {"output": ""},
            {"output": None},
            {"output": [1, 2]},
            {"output": f"{output}\x07\x00"},
            {"output": f"{output} write to {self._draws.below(10**6)}@example.com"},
            {"output": f"{output}<|im_end|>"},
        ]
        return json.dumps({**row, **changed[kind - 2]})


_SHAPES: list[Callable[[Rows, Language], dict[str, object]]] = [
    Rows._alpaca,
    Rows._messages,
    Rows._sharegpt,
    Rows._completion,
    Rows._text,
]


def write(path: Path, size_bytes: int, seed: int = 0) -> int:
    """Writes lines until the file has this size or a little more; the number of lines."""
    written = lines = 0
    with path.open("wb") as file:
        for line in Rows(seed):
            if written >= size_bytes:
                break
            written += file.write(line.encode() + b"\n")
            lines += 1
    return lines


def parse_size(text: str) -> int:
    """Bytes of a size such as 300MB or 2GB (powers of ten)."""
    match = re.fullmatch(r"(\d+)\s*(|k|M|G)B?", text)
    if match is None:
        raise SystemExit(f"`{text}` is no size: write 300MB or 2GB")
    return int(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[match[2]]


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m benchmarks.data_file FILE SIZE")
    lines = write(Path(sys.argv[1]), parse_size(sys.argv[2]))
    print(f"{lines:,} lines in {sys.argv[1]}")


if __name__ == "__main__":
    main()
