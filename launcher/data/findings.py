"""What checks of rows say: kinds of findings, how grave they are, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

FIRST_NUMBERS = 5


class Kind(Struct, frozen=True):
    """A kind of finding: how grave, and what to do."""

    severity: Literal["warning", "note"]
    advice: str


KINDS = {
    "repeats an earlier row": Kind("warning", "remove the copies: they count as extra epochs"),
    "repeats an earlier row but for case, punctuation, blanks or digits": Kind(
        "warning", "keep one of each"
    ),
    "shares most of its words with an earlier row": Kind("note", "look whether both are needed"),
    "the prompt of an earlier row with another answer": Kind(
        "note", "right for several good answers; else the answers contradict each other"
    ),
    "another language than most": Kind("note", "right for a mixture of languages; else remove"),
    "far longer than the others": Kind(
        "warning", "shorten or split: the longest row decides the memory of the whole run"
    ),
    "cut off at the same length": Kind(
        "warning", "export the answers again without a limit: the model learns to break off"
    ),
    "control characters": Kind("warning", "remove them, or convert the file again"),
    "invisible characters": Kind("warning", "remove them: the text is not what it looks like"),
    "lost characters (U+FFFD)": Kind("warning", "convert from the source with its own encoding"),
    "wrongly decoded characters": Kind("warning", "convert again: UTF-8 was read as Windows-1252"),
    "likely secret": Kind("warning", "remove it, and withdraw the key where it was issued"),
    "personal data": Kind("warning", "remove or replace it, unless you may train on it"),
    "chat tokens": Kind(
        "warning", "remove them and give the turns as `messages`: the template writes its own"
    ),
    "thoughts in <think> tags": Kind("note", "right for a reasoning model; else remove them"),
    "remains of HTML": Kind("note", "convert to plain text or Markdown"),
    "the answer repeats the prompt": Kind("warning", "leave the prompt out of the answer"),
    "an AI model speaks of itself": Kind("note", "remove, unless the model shall answer so"),
    "a held-out row that is trained on": Kind(
        "warning", "remove it from one side: the held-out loss would flatter"
    ),
    "a held-out prompt that is trained on": Kind(
        "warning", "keep all rows of a prompt on one side"
    ),
}


class Finding(Struct, frozen=True, kw_only=True):
    """Rows with one kind of defect. They are warned about, never left out.

    `kind`: for people, stable: a key of KINDS, often with more in brackets. `numbers`: the first
    rows. `detail`: what else is known; never a secret itself.
    """

    kind: str
    count: int
    numbers: tuple[int, ...]
    severity: Literal["warning", "note"]
    advice: str
    detail: str = ""


class Tally(Struct):
    """How many rows, and the first of their numbers."""

    count: int = 0
    numbers: list[int] = []  # msgspec copies it for each object

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.numbers) < FIRST_NUMBERS:
            self.numbers.append(number)

    def merge(self, other: Tally, offset: int) -> None:
        self.count += other.count
        moved = [number + offset for number in other.numbers]
        self.numbers = sorted(self.numbers + moved)[:FIRST_NUMBERS]


class Tallies(dict[str, Tally]):
    """Tallies by kind, or by another name."""

    def add(self, name: str, number: int) -> None:
        tally = self.get(name)
        if tally is None:
            tally = self[name] = Tally()
        tally.add(number)

    def merge(self, other: Tallies, offset: int) -> None:
        for name, tally in other.items():
            self.setdefault(name, Tally()).merge(tally, offset)


def tally_of(numbers: Sequence[int]) -> Tally:
    return Tally(len(numbers), list(numbers[:FIRST_NUMBERS]))


def finding(name: str, tally: Tally, detail: str = "") -> Finding:
    kind = KINDS.get(name) or KINDS[name.rpartition(" (")[0]]
    return Finding(
        kind=name,
        count=tally.count,
        numbers=tuple(tally.numbers),
        severity=kind.severity,
        advice=kind.advice,
        detail=detail,
    )
