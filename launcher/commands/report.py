"""`ftplan report RUN`: the report of a run, made again, also of one that has not finished."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.launcher.stages_dir import StagesDir, is_stages_dir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's directory")
    parser.add_argument("--out", metavar="FILE", type=Path, help="where to (RUN/report.html)")
    parser.add_argument("--open", action="store_true", help="show it in the browser")


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    from ftplan.launcher.report.write import write_report

    if is_stages_dir(arguments.run):
        return _run_stages(arguments, ui)
    run_dir = open_run(arguments.run)
    out: Path = arguments.out or run_dir.report
    with _written(out):
        facts = write_report(run_dir, out)
        pictures = _pictures(ui, run_dir) if arguments.out is None else []
        size = out.stat().st_size
    told = [str(path) for path in pictures]
    ui.json(
        {
            "schema": 1,
            "run_dir": str(run_dir.root),
            "report": str(out),
            "bytes": size,
            "state": facts.outcome.state,
            "steps": len(facts.steps),
            "pictures": told,
        }
    )
    ui.show_lines([f"report      {out}", *(f"picture     {path}" for path in told)])
    if arguments.open:
        _show(ui, out)
    return 0


def _run_stages(arguments: argparse.Namespace, ui: Ui) -> int:
    """The reports of all stages, and one of how they hang together."""
    from ftplan.launcher.report.write import write_report, write_stages_report

    stages = StagesDir(arguments.run)
    out: Path = arguments.out or stages.report
    with _written(out):
        reports = [stage.run.report for stage in stages.runs() if write_report(stage.run)]
        write_stages_report(stages, out)
    told = [str(path) for path in reports]
    ui.json({"schema": 1, "run_dir": str(stages.root), "report": str(out), "stages": told})
    ui.show_lines([f"report      {out}", *(f"of a stage  {path}" for path in told)])
    if arguments.open:
        _show(ui, out)
    return 0


@contextlib.contextmanager
def _written(out: Path) -> Iterator[None]:
    """Turns what keeps a file from being written into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write `{error.filename or out}`: {error.strerror or error}",
            "name another file with `--out`",
        ) from error


def _pictures(ui: Ui, run_dir: RunDir) -> list[Path]:
    """Drawn anew where matplotlib is there: the page needs none of them."""
    from ftplan.launcher.report.pictures import draw_pictures

    try:
        return draw_pictures(run_dir)
    except ImportError:
        ui.say("no pictures: they need matplotlib, `pip install matplotlib`")
        return []


def _show(ui: Ui, page: Path) -> None:
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        ui.warn(f"no browser could be started; open {page} in one")
