"""What a run has learned: losses, measures before and after, answers, tasks, earlier stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ftplan.launcher import views
from ftplan.launcher.report.charts import Series, line_chart, smoothed
from ftplan.launcher.report.elements import Html, join, prose, table, tag
from ftplan.launcher.report.facts import RunFacts, mapping, number, said, shown
from ftplan.planner.units import format_bytes, format_percent, format_seconds


def outcome_line(facts: RunFacts) -> str:
    """`lora of smollm2-135m-instruct on L4; 100 of 100 steps`."""
    model = mapping(facts.plan.get("model")).get("name", "an unknown model")
    method = facts.setting("method") or facts.train.get("method") or "an unknown method"
    device = mapping(facts.plan.get("device")).get("name", "an unknown device")
    gpus = number(facts.setting("num_gpus")) or 1
    several = f"{gpus:.0f} x " if gpus > 1 else ""
    done = int(number(facts.steps[-1].get("step")) or 0) if facts.steps else 0
    of = f" of {facts.num_steps:,}" if facts.num_steps else ""
    return f"{method} of {model} on {several}{device}; {done:,}{of} steps"


def summary(facts: RunFacts) -> Html:
    """The figures that are asked for first."""
    measured, predicted = facts.measured, facts.predicted
    cards = []
    before, after = (number(facts.evaluation(w).get("eval_loss")) for w in ("before", "after"))
    if before is not None:
        now = f" → {after:.3f}" if after is not None else ""
        change = "before training"
        if after is not None:
            change = f"{format_percent(after / before - 1)} by training" if before > 0 else ""
        cards.append(("Held-out loss", f"{before:.3f}{now}", change))
    losses = [loss for row in facts.steps if (loss := number(row.get("loss"))) is not None]
    if losses and after is None:
        cards.append(("Training loss", f"{smoothed(losses)[-1]:.3f}", "smoothed, latest step"))
    for label, name, form in (
        ("Peak memory", "device_bytes", format_bytes),
        ("A step", "step_seconds", format_seconds),
        ("Training", "train_seconds", format_seconds),
    ):
        if name == "train_seconds" and not facts.record and facts.steps:
            so_far = form(float(measured[name])), f"predicted {said(predicted.get(name), form)}"
            cards.append(("Training so far", *so_far))
            continue
        cards += _compared(label, number(measured.get(name)), number(predicted.get(name)), form)
    return tag("div", [_card(*card) for card in cards], class_="cards")


def _compared(
    label: str, measured: float | None, predicted: float | None, form: Callable[[float], str]
) -> list[tuple[str, str, str]]:
    if measured is not None and predicted:
        beside = f"predicted {form(predicted)}"
        off = f", {format_percent(predicted / measured - 1)}" if measured else ""
        return [(label, form(measured), beside + off)]
    return [(label, form(predicted), "predicted")] if predicted else []


def _card(label: str, value: str, beside: str) -> Html:
    return tag(
        "div",
        tag("span", label, class_="label"),
        tag("span", value, class_="figure"),
        tag("span", beside, class_="beside"),
        class_="card",
    )


def loss_section(facts: RunFacts) -> Html | None:
    if not facts.steps and not facts.evaluations:
        return None
    chart = _loss_chart(facts)
    others = [line_chart(title, lines, small=True) for title, lines in _step_series(facts)]
    small = tag("div", others, class_="row") if others else None
    return join(chart, evaluation(facts), small)


def _loss_chart(facts: RunFacts) -> Html | None:
    points = step_points(facts, "loss")
    held_out = evaluation_points(facts)
    series = []
    if points:
        smooth = smoothed([loss for _, loss in points])
        steps = [step for step, _ in points]
        series += [
            Series(name="training, each step", points=points, look="faint"),
            Series(name="training, smoothed", points=list(zip(steps, smooth, strict=True))),
        ]
    if len(held_out) > 1:
        series.append(Series(name="held-out", points=held_out, look="dashed", colour=1))
    if held_out:
        series.append(Series(name="evaluated", points=held_out, look="dots", colour=1))
    return line_chart(f"Loss{loss_unit(facts)}", series) if series else None


def loss_unit(facts: RunFacts) -> str:
    """What follows `Loss`: other objectives than plain fine-tuning have one without a unit."""
    return " (nats a token)" if facts.setting("objective") == "sft" else ""


def step_points(facts: RunFacts, name: str) -> list[tuple[float, float]]:
    """A number of each step; what is none is `nan`."""
    return [
        (float(row["step"]), math.nan if (value := number(row.get(name))) is None else value)
        for row in facts.steps
    ]


def evaluation_points(facts: RunFacts) -> list[tuple[float, float]]:
    """Held-out losses, at the steps at which they were measured."""
    return [
        (number(row.get("step")) or 0.0, loss)
        for row in facts.evaluations
        if (loss := number(row.get("eval_loss"))) is not None
    ]


# Shown in the order of their importance; what else trainers tell of a step follows.
_TITLES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradients",
    "tokens_per_second": "Tokens a second",
    "reward": "Reward",
    "rewards/accuracies": "Share of pairs: chosen over rejected",
    "rewards/margins": "Reward of chosen less rejected",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "kl": "Distance from the reference (KL)",
    "completions/mean_length": "Tokens a completion",
}
_OF_OTHERS = frozenset({"step", "loss", "epoch", "seconds", "tokens", "allocated_bytes"})
_MOST_SERIES = 9


def _step_series(facts: RunFacts) -> list[tuple[str, list[Series]]]:
    """Titles and lines of what is told of each step beside the loss."""
    present = {
        name for row in facts.steps for name, value in row.items() if number(value) is not None
    }
    names = [name for name in _TITLES if name in present]
    names += sorted(present - {*_TITLES, *_OF_OTHERS})
    found = []
    for name in names[:_MOST_SERIES]:
        title = _TITLES.get(name, name)
        found.append((title, [Series(name=title, points=step_points(facts, name))]))
    if tasks := _task_lines(facts):
        found.insert(0, ("Loss of each task (nats a token)", tasks))
    return found


def _task_lines(facts: RunFacts) -> list[Series]:
    losses = [(float(row["step"]), mapping(row.get("task_losses"))) for row in facts.steps]
    names = dict.fromkeys(name for _, of_tasks in losses for name in of_tasks)
    looks = ("line", "dashed")
    return [
        Series(
            name=str(name),
            colour=at,
            look="dashed" if at % len(looks) else "line",
            points=[(s, v) for s, t in losses if (v := number(t.get(name))) is not None],
        )
        for at, name in enumerate(names)
    ]


def evaluation(facts: RunFacts) -> Html | None:
    """Measures before and after; of a run without a record those before."""
    if "evaluation" in facts.record:
        rows = views.evaluation_rows(facts.record)
        said_lost = views.said_forgetting(facts.record)
        warning = tag("p", prose(said_lost), class_="warning") if said_lost else None
        found = table("On held-out rows and general text", views.EVALUATION_COLUMNS, rows)
        return join(found if rows else None, warning)
    before = facts.evaluation("before")
    general = mapping(before.get("general"))
    rows = [
        ["loss on held-out rows", said(before.get("eval_loss"), "{:.3f}".format)],
        ["perplexity of general text", said(general.get("perplexity"), "{:.2f}".format)],
    ]
    known = [row for row in rows if row[1] != "-"]
    return table("Before training", ("", ">before"), known) if known else None


def answers_section(facts: RunFacts) -> Html | None:
    """Held-out questions with the model's answers before and after."""
    samples = facts.record.get("samples")
    if not isinstance(samples, list):
        shown_before = facts.evaluation("before").get("shown")
        rows = shown_before if isinstance(shown_before, list) else []
        samples = [{**mapping(row), "before": mapping(row).get("answer")} for row in rows]
    cards = [_sample(number, mapping(sample)) for number, sample in enumerate(samples, start=1)]
    return join(cards) if cards else None


_PARTS = (
    ("Question", "prompt"),
    ("Before training", "before"),
    ("After training", "after"),
    ("In the data", "reference"),
)


def _sample(number: int, sample: Mapping[str, Any]) -> Html:
    parts = [
        tag("div", tag("dt", label), tag("dd", shown(sample[key])))
        for label, key in _PARTS
        if sample.get(key)
    ]
    return tag("article", tag("h3", f"Question {number}"), tag("dl", parts), class_="sample")


def stages_section(facts: RunFacts) -> Html | None:
    """What has become of earlier stages."""
    told = facts.record.get("earlier")
    earlier = [mapping(row) for row in told] if isinstance(told, list) else facts.earlier
    rows = [
        (
            str(row.get("stage")),
            str(row.get("objective")),
            *(said(row.get(key), "{:.3f}".format) for key in ("before", "at_its_end", "after")),
        )
        for row in earlier
    ]
    columns = ("stage", "objective", ">before it", ">at its end", ">now")
    return table("Loss on held-out rows of earlier stages", columns, rows) if rows else None
