"""The held-out rows that a model is asked, by the tokens that a pass over the data has counted."""

from __future__ import annotations

import statistics
from itertools import compress, islice

from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.split import MAX_EVAL_ROWS, Split
from ftplan.planner.evaluating import ASKED_ROWS, SHOWN_ROWS, Questions, are_short


def questions(data: DataFile, split: Split, eval_data: DataFile | None) -> Questions:
    """Plain text asks nothing. An answer's end is counted as one token of it."""
    asked = eval_data or data
    if asked.kind == "pretraining":
        return Questions()
    survey, used = asked.survey, asked.used()
    groups = survey.groups
    if eval_data is None:
        used = [fits and group in split.held_out for fits, group in zip(used, groups, strict=True)]
    counted = zip(survey.tokens, survey.first, survey.trained, strict=True)
    rows = [
        (min(first, tokens - trained), trained)  # of a prompt its completion alone comes after
        for tokens, first, trained in islice(compress(counted, used), MAX_EVAL_ROWS)
    ]
    if not rows:
        return Questions()
    answers = [max(0, trained - 1) for _, trained in rows]
    prompts = [first for first, _ in rows]
    shown = sorted(rows, key=sum)[:SHOWN_ROWS]
    return Questions(
        num_rows=min(len(rows), ASKED_ROWS),
        prompt_tokens=statistics.fmean(prompts),
        shown_prompt_tokens=statistics.fmean(first for first, _ in shown),
        longest_prompt_tokens=max(prompts),
        answer_tokens=max(answers),
        are_short=are_short(answers),
    )
