"""Writes the report of a run, and its pictures."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ftplan.launcher.report.facts import RunFacts, read_facts
from ftplan.launcher.report.page import page
from ftplan.launcher.run_dir import RunDir, write_text
from ftplan.launcher.ui import Ui

if TYPE_CHECKING:
    from ftplan.launcher.stages_dir import StagesDir


def write_report(run: RunDir, out: Path | None = None) -> RunFacts:
    """report.html from what is in the run directory; returns what was read.

    Raises OSError where it cannot be written.
    """
    facts = read_facts(run)
    write_text(out or run.report, page(facts))
    return facts


def write_stages_report(stages: StagesDir, out: Path | None = None) -> None:
    """report.html of several stages. Raises InputError where the folder is damaged, OSError where
    it cannot be written."""
    from ftplan.launcher.report.stages import stages_page

    write_text(out or stages.report, stages_page(stages))


def report_end(ui: Ui, run: RunDir) -> None:
    """The report and the pictures of a run that has ended, well or not."""
    from ftplan.launcher.report.pictures import draw_pictures

    _try(ui, run.root, run.report.name, lambda: write_report(run))
    _try(ui, run.root, run.loss_plot.name, lambda: draw_pictures(run))


def report_stages_end(ui: Ui, stages: StagesDir) -> None:
    """The report of stages, the last of which has ended, well or not."""
    _try(ui, stages.root, stages.report.name, lambda: write_stages_report(stages))


def _try(ui: Ui, root: Path, name: str, make: Callable[[], object]) -> None:
    """Whatever is wrong with a report is said: the run does not fail by it."""
    try:
        make()
    except Exception as error:
        ui.warn(f"no {name}: {error}; try `ftplan report {shlex.quote(str(root))}`")
