"""`ftplan doctor`: what keeps this machine from training, and how to mend it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

from ftplan.launcher.checkup.facts import Finding, gather
from ftplan.launcher.doctor import findings
from ftplan.launcher.ui import Ui

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="whose disk is looked at (runs)"
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    started = time.monotonic()
    ui.say("importing torch and the others, each in a process of its own ...")
    facts = gather(
        runs_dir=arguments.runs_dir,
        answered=lambda name: ui.say(f"  {name}: {time.monotonic() - started:.0f} s"),
    )
    found = findings(facts)
    ui.json(findings_to_dict(found))
    show(found, ui)
    return int(any(finding.status == "problem" for finding in found))


def findings_to_dict(found: Sequence[Finding]) -> dict[str, Any]:
    """The object of `doctor --json`."""
    statuses = [finding.status for finding in found]
    return {
        "schema": 1,
        "checks": to_builtins(found),
        "num_problems": statuses.count("problem"),
        "num_warnings": statuses.count("warning"),
    }


def show(found: Sequence[Finding], ui: Ui) -> None:
    """The findings for a person, each with what to do below it."""
    if ui.as_json:
        return
    from rich.text import Text

    from ftplan.launcher.ui import table

    rows: list[list[RenderableType]] = []
    for finding in found:
        text = Text(finding.found)
        if finding.mend:
            text.append(f"\n-> {finding.mend}", style="bold")
        rows.append([Text(finding.status, style=_STYLES[finding.status]), finding.name, text])
    ui.show(table("Check-up", ("", "what", "found"), rows), "", verdict(found))


def verdict(found: Sequence[Finding]) -> str:
    """`2 problems, 1 warning`."""
    counts = [(kind, sum(f.status == kind for f in found)) for kind in ("problem", "warning")]
    named = [f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts if count]
    return ", ".join(named) or "nothing to mend"
