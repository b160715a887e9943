"""How well short answers agree with what the data says: exact match and F1, and of labels macro F1.

Answers are compared as SQuAD's evaluation does (Rajpurkar et al. 2016, arXiv 1606.05250): in lower
case, without punctuation and the English articles, blanks as one.
"""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import Struct

from ftplan.planner.labels import are_labels

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class AnswerScores(Struct, frozen=True, kw_only=True):
    """Shares from 0 to 1. `macro_f1`: of labels, the mean of each label's F1; `majority_share`: of
    the most frequent one, which is the exact match of always answering it. None for others."""

    exact_match: float
    f1: float
    macro_f1: float | None = None
    majority_share: float | None = None


def normalized(text: str) -> str:
    """SQuAD's normalization."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score(answers: Sequence[str], references: Sequence[str]) -> AnswerScores:
    """Answers against references, one for one; at least one of each."""
    pairs = [
        (normalized(answer), normalized(reference))
        for answer, reference in zip(answers, references, strict=True)
    ]
    labels = Counter(reference for _, reference in pairs)
    classifies = are_labels(len(labels), len(pairs))
    return AnswerScores(
        exact_match=statistics.fmean(answer == reference for answer, reference in pairs),
        f1=statistics.fmean(token_f1(answer, reference) for answer, reference in pairs),
        macro_f1=_macro_f1(pairs, labels) if classifies else None,
        majority_share=max(labels.values()) / len(pairs) if classifies else None,
    )


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, both texts normalized."""
    said, wanted = answer.split(), reference.split()
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def _macro_f1(pairs: Sequence[tuple[str, str]], labels: Iterable[str]) -> float:
    """What is no label counts as a miss of the right one."""
    return statistics.fmean(_label_f1(pairs, label) for label in labels)


def _label_f1(pairs: Sequence[tuple[str, str]], label: str) -> float:
    right = sum(answer == reference == label for answer, reference in pairs)
    named = sum((answer == label) + (reference == label) for answer, reference in pairs)
    return 2 * right / named if named else 0.0
