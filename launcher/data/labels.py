"""The labels that rows are answered with, where all answers are labels."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ftplan.launcher.data.rows import Row
from ftplan.planner.labels import MAX_LABELS, LabelRows

# Longer answers are no labels.
_MOST_CHARACTERS = 64


class LabelCodes:
    """Each row's answer as a number, as long as the answers may be labels.

    `codes`: a row's place among the labels from 1, 0 for a row without an answer of its own.
    `names`: None once an answer is too long, or there are too many different ones.
    """

    def __init__(self) -> None:
        self.codes = array("B")
        self.names: dict[str, int] | None = {}

    def take(self, row: Row) -> None:
        """The next row."""
        if self.names is None:
            return
        answered = row.messages and not row.is_prompt and not row.is_compared
        self._add(row.answer.strip() if answered else "")

    def merge(self, later: LabelCodes) -> None:
        """What the next part of the source has."""
        if later.names is None:
            self._give_up()
        names = {code: name for name, code in (later.names or {}).items()}
        for code in later.codes:
            if self.names is None:
                return
            self._add(names.get(code, ""))

    def _add(self, answer: str) -> None:
        assert self.names is not None
        if not answer:
            self.codes.append(0)
            return
        if len(answer) > _MOST_CHARACTERS or (
            answer not in self.names and len(self.names) == MAX_LABELS
        ):
            self._give_up()
            return
        self.codes.append(self.names.setdefault(answer, len(self.names) + 1))

    def _give_up(self) -> None:
        self.codes, self.names = array("B"), None

    def of_rows(self, used: Iterable[bool]) -> list[str] | None:
        """The labels of the used rows; None where one of them has none."""
        if self.names is None:
            return None
        names = {code: name for name, code in self.names.items()}
        found = [code for code, wanted in zip(self.codes, used, strict=True) if wanted]
        return None if 0 in found else [names[code] for code in found]


def count_labels(train: Sequence[str], held_out: Sequence[str]) -> dict[str, LabelRows]:
    """The most frequent label of the training rows first."""
    trained, evaluated = Counter(train), Counter(held_out)
    names = sorted({*trained, *evaluated}, key=lambda name: (-trained[name], name))
    return {
        name: LabelRows(num_train_rows=trained[name], num_eval_rows=evaluated[name])
        for name in names
    }


def label_warnings(labels: Mapping[str, LabelRows]) -> Iterator[str]:
    """A line for each label that is evaluated and never trained on."""
    for name, rows in labels.items():
        if not rows.num_train_rows:
            yield (
                f"label `{name}`: {rows.num_eval_rows:,} held-out rows and none to train on; "
                "add rows, or look whether it is spelled as the others are"
            )
