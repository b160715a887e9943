"""What `ftplan data` prints. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from ftplan.launcher.ui import bar, table
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.overlong import said_counts
from ftplan.planner.units import format_count

if TYPE_CHECKING:
    from ftplan.launcher.data.sample import Sample

_BINS = 10
_MOST_TASKS = 12


def report(
    profile: DataProfile, described: Mapping[str, Any], template: str
) -> list[RenderableType]:
    """All tables, those that would be empty left out."""
    parts: list[RenderableType] = [data_table(profile, template), ""]
    if profile.problems:
        parts += [problems_table(profile), ""]
    if profile.labels:
        parts += [labels_table(profile), ""]
    if "task_weighting" in described:
        parts += [tasks_table(described["task_weighting"]), ""]
    parts += [histogram(profile), "", cuts_table(described["by_max_length"]), ""]
    return [*parts, advice_table(described["advice"])]


def data_table(profile: DataProfile, template: str) -> Table:
    """Rows and token lengths."""
    lengths = profile.summary()
    measured = "with the model's tokenizer" if profile.exact else "estimated from characters"
    test = f", {profile.num_test_rows:,} for a test" if profile.num_test_rows else ""
    loss = profile.trained_tokens / max(1, profile.total_tokens)
    rows = [
        ["file", profile.path],
        ["format", f"{profile.format}, for {profile.objective} training"],
        [
            "rows",
            f"{profile.num_rows:,} read, {profile.num_train_rows:,} to train on, "
            f"{profile.num_eval_rows:,} held out{test}",
        ],
        [
            "tokens a row",
            f"{lengths['min']} to {lengths['max']:,}, median {lengths['median']}, "
            f"mean {lengths['mean']:.0f}, 95 % up to {lengths['p95']:,}, "
            f"99 % up to {lengths['p99']:,}; {measured}",
        ],
        ["tokens", _said_tokens(profile, loss)],
    ]
    for counts, side in ((profile.train_counts, ""), (profile.eval_counts, "held out: ")):
        if said := said_counts(counts, profile.limit):
            rows.append(["too long", side + said])
    if template:
        rows.append(["template", template])
    return table("Data", ("", "what was found"), rows)


def _said_tokens(profile: DataProfile, loss: float) -> str:
    share = f", {100 * loss:.0f} % of them answers"
    total = format_count(profile.total_tokens)
    if not profile.train_counts.changes:
        return f"{total} to train on{share}"
    left = format_count(round(profile.rows_each * profile.train_counts.num_tokens))
    return f"{left} to train on; before, {total}{share}"


def problems_table(profile: DataProfile) -> Table:
    """What is left out, and what is odd, with where and what to do."""
    rows = []
    for problem in profile.problems:
        what = problem.advice or ("left out" if problem.left_out else "")
        rows.append(
            [
                "left out" if problem.left_out else "look",
                f"{problem.count:,}",
                f"{problem.kind}: {problem.where}" + (f"\n-> {what}" if problem.advice else ""),
            ]
        )
    return table("Rows with problems", ("", ">rows", "what"), rows)


def labels_table(profile: DataProfile) -> Table:
    """How often each label is trained on and evaluated."""
    total = max(1, sum(rows.num_train_rows for rows in profile.labels.values()))
    rows = [
        [
            name,
            f"{counts.num_train_rows:,}",
            f"{100 * counts.num_train_rows / total:.1f} %",
            f"{counts.num_eval_rows:,}",
        ]
        for name, counts in profile.labels.items()
    ]
    title = "Answers are labels"
    return table(title, ("label", ">to train on", ">share", ">held out"), rows)


def tasks_table(described: Mapping[str, Any]) -> Table:
    """What an epoch has of each task: the most frequent ones, and the others together."""
    tasks = sorted(described["tasks"].items(), key=lambda item: -item[1]["share"])
    rows = [
        [
            name,
            f"{told['num_rows']:,}",
            f"{100 * told['share']:.1f} %",
            "" if told["times_each_row"] is None else f"{told['times_each_row']:.2g}",
        ]
        for name, told in tasks[:_MOST_TASKS]
    ]
    others = [told for _, told in tasks[_MOST_TASKS:]]
    if others:
        count, share = (sum(told[name] for told in others) for name in ("num_rows", "share"))
        rows.append([f"{len(others):,} others", f"{count:,}", f"{100 * share:.1f} %", ""])
    title = f"Tasks, {said_weighting(described)}"
    return table(title, ("task", ">rows", ">of an epoch", ">times each row comes"), rows)


def said_weighting(described: Mapping[str, Any]) -> str:
    """`weighted by temperature 2`."""
    weighting, temperature = described["weighting"], described["temperature"]
    return {
        "proportional": "each row once",
        "equal": "equally often",
        "temperature": f"weighted by temperature {temperature:g}",
        "fixed": "by fixed weights",
        "dynamic": "at the start; their losses change it",
    }[weighting]


def histogram(profile: DataProfile) -> Table:
    """Rows by length, in steps of round numbers; the longest hundredth together."""
    step = _round_step(profile.summary()["p99"] / _BINS)
    counts = [0] * (_BINS + 1)
    for length in profile.lengths:
        counts[min(_BINS, max(0, length - 1) // step)] += 1
    last = max(number for number, count in enumerate(counts) if count)
    most = max(counts)
    rows: list[list[RenderableType]] = [
        [
            f"{number * step + 1:,} to {(number + 1) * step:,}"
            if number < _BINS
            else f"more, up to {profile.lengths[0]:,}",
            f"{count:,}",
            bar(count / most) if count else "",
        ]
        for number, count in enumerate(counts[: last + 1])
    ]
    title = "Rows by tokens" if profile.rows_each == 1 else "Rows of the sample by tokens"
    return table(title, (">tokens", ">rows", ""), rows)


def _round_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is no less."""
    power = 10 ** math.floor(math.log10(max(1.0, least)))
    return int(next(step * power for step in (1, 2, 5, 10) if step * power >= least))


def cuts_table(cuts: Sequence[Mapping[str, Any]]) -> Table:
    """What each `max_length` would cut."""
    rows = [
        [
            f"{cut['max_length']:,}",
            f"{cut['cut_rows']:,}",
            f"{cut['cut_tokens']:,}",
            f"{100 * cut['padded_share']:.0f} %",
        ]
        for cut in cuts
    ]
    columns = (">max_length", ">rows cut", ">tokens cut", ">padding in batches of 8")
    return table("What a length cuts", columns, rows)


def advice_table(advice: Sequence[Mapping[str, Any]]) -> Table:
    """What the data alone decides."""
    rows = [[item["setting"], _said(item["value"]), item["why"]] for item in advice]
    return table("What follows for training", ("setting", ">value", "why"), rows)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {share:g}" for key, share in value.items())
    return value if isinstance(value, str) else f"{value:g}"


def sample_table(sample: Sample) -> Table:
    """What was estimated, and how far off it may be."""
    rows = [
        [name, f"{one.value:,.{digits}f}", f"{one.standard_error:,.{digits}f}"]
        for name, one, digits in (
            ("rows", sample.rows, 0),
            ("tokens a row", sample.mean_tokens, 1),
            ("tokens", sample.total_tokens, 0),
        )
    ]
    title = f"Estimated from {sample.num_sampled:,} rows"
    return table(title, ("", ">estimate", ">standard error"), rows)
