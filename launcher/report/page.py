"""report.html: one page that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Callable

from ftplan.launcher.report import planned, resources, results
from ftplan.launcher.report.elements import Html, join, prose, style, tag
from ftplan.launcher.report.facts import Outcome, RunFacts, last_lines
from ftplan.launcher.report.memory import memory_section
from ftplan.launcher.report.style import CSS
from ftplan.launcher.version import version

# Nothing is loaded and nothing runs, whatever the page may come to hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_SECTIONS: tuple[tuple[str, Callable[[RunFacts], Html | None]], ...] = (
    ("Loss and evaluation", results.loss_section),
    ("Memory", memory_section),
    ("Time and cost", resources.time_section),
    ("Events", planned.events_section),
    ("Answers", results.answers_section),
    ("Earlier stages", results.stages_section),
    ("Devices", resources.devices_section),
    ("Go on", planned.commands_section),
    ("Plan", planned.plan_section),
    ("Data", planned.data_section),
    ("Environment", planned.environment_section),
)


def page(facts: RunFacts) -> str:
    """The whole page. What of a run directory is damaged is named in its place."""
    sections = [(title, _built(build, facts)) for title, build in _SECTIONS]
    return document(
        facts.name,
        tag(
            "header",
            tag("h1", facts.name),
            tag("p", badge(facts.outcome), " ", _built(_line, facts), class_="outcome"),
            _trouble(facts),
            _built(results.summary, facts),
        ),
        tag("main", [_section(title, body) for title, body in sections if body]),
    )


def document(title: str, *body: Html) -> str:
    """A page around its header and its main part."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"{title} - ftplan"),
        style(CSS),
    )
    foot = tag("footer", f"Made by ftplan {version()} from the files of the run.")
    return (
        "<!doctype html>\n" + tag("html", head, tag("body", *body, foot), lang="en").markup + "\n"
    )


def _line(facts: RunFacts) -> Html:
    return join(results.outcome_line(facts))


def _built(build: Callable[[RunFacts], Html | None], facts: RunFacts) -> Html | None:
    """A part of the page; what a damaged file keeps from being made is said instead."""
    try:
        return build(facts)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = f"Cannot be shown: the run's files are not as expected ({type(error).__name__})."
        return tag("p", said, class_="warning")


def _section(title: str, body: Html) -> Html:
    name = title.lower().replace(" ", "-")
    return tag("section", tag("h2", title, id=name), body, aria_labelledby=name)


def badge(outcome: Outcome) -> Html:
    """A word and a sign; the colour only goes with them."""
    kind = {True: "good", False: "bad", None: "open"}[outcome.good]
    mark = tag("span", outcome.mark, aria_hidden="true")
    return tag("strong", mark, " ", outcome.state, class_=f"badge {kind}")


def _trouble(facts: RunFacts) -> Html:
    """Why a run ended badly, and what could not be read."""
    told = facts.outcome.told
    damaged = ", ".join(facts.unreadable)
    return join(
        tag("p", prose(told), class_="warning") if told else None,
        _last_lines(facts) if facts.outcome.good is False else None,
        tag("p", f"Damaged and left out: {damaged}", class_="warning") if damaged else None,
    )


def _last_lines(facts: RunFacts) -> Html | None:
    """The end of the process's log."""
    lines = last_lines(facts.run)
    if not lines:
        return None
    name = facts.run.stderr.name
    return tag("details", tag("summary", f"The end of {name}"), tag("pre", lines, tabindex=0))
