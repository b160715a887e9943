"""`ftplan runs`: the runs of a folder and their states; one of them, also while it goes on."""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.text import Text

from ftplan.launcher import runs_views
from ftplan.launcher.backends.jobs import with_job
from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.launcher.run_states import RunSummary, find_run, runs_in, summary_of
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "show", nargs="?", metavar="show", help="one run: plan, figures, what to do next"
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="its name or folder (the newest)")
    parser.add_argument(
        "--follow", action="store_true", help="watch a run that goes on, until it ends"
    )
    parser.add_argument(
        "--runs-dir", metavar="DIR", type=Path, default=Path("runs"), help="where runs are (runs)"
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    if arguments.show not in (None, "show"):
        raise InputError(
            f"`ftplan runs {arguments.show}`: nothing is known by that name",
            f"`ftplan runs show {arguments.show}` shows one run",
        )
    if arguments.show is None and not arguments.follow:
        return _list(arguments.runs_dir, ui)
    path = _chosen(arguments)
    if arguments.follow:
        from ftplan.launcher.watching import follow

        return follow(ui, path)
    return _show(path, ui)


def _list(runs_dir: Path, ui: Ui) -> int:
    runs = [with_job(one) for one in runs_in(runs_dir)]
    ui.json({"schema": 1, "runs_dir": str(runs_dir), "runs": [_to_dict(one) for one in runs]})
    if runs:
        ui.show(runs_views.runs_table(runs, time.time()))
    else:
        ui.say(f"no runs in `{runs_dir}`: `ftplan auto DATA` makes one, `--runs-dir` names another")
    return 0


def _chosen(arguments: argparse.Namespace) -> Path:
    """The run that was named, else the newest one; to follow, the newest that goes on."""
    if arguments.run is not None:
        return find_run(arguments.run, arguments.runs_dir)
    runs = runs_in(arguments.runs_dir)
    going = [one for one in runs if one.state == "running"]
    if arguments.follow and not going:
        raise InputError(f"no run in `{arguments.runs_dir}` goes on", "`ftplan runs` lists them")
    if not runs:
        raise InputError(f"no runs in `{arguments.runs_dir}`", "`--runs-dir DIR` names another")
    return (going if arguments.follow else runs)[0].path


def _show(path: Path, ui: Ui) -> int:
    shown = with_job(summary_of(path))
    if shown.state == "damaged":
        raise InputError(f"`{path}` is damaged: {shown.why}", "plan again with `ftplan auto`")
    if shown.stages:
        return _show_stages(shown, ui)
    folder = open_run(path)
    plan = folder.read_plan()
    record = folder.read_record() if folder.finished else {}
    compared = record or {
        "predicted": plan["predicted"],
        "measured": runs_views.measured_so_far(folder),
    }
    commands = runs_views.commands(shown, merges=_merges(record))
    ui.json(
        {
            "schema": 1,
            **_to_dict(shown),
            "predicted": compared["predicted"],
            "measured": compared["measured"],
            "sampled": record.get("sampled"),
            "evaluation": record.get("evaluation"),
            "commands": [command for _, command in commands],
        }
    )
    if not ui.as_json:
        _show_parts(shown, folder, plan, record, compared, ui)
        _show_commands(commands, ui)
    return 0


def _show_parts(
    shown: RunSummary,
    folder: RunDir,
    plan: dict[str, Any],
    record: dict[str, Any],
    compared: dict[str, Any],
    ui: Ui,
) -> None:
    from ftplan.launcher import views

    ui.show(runs_views.run_facts(shown, plan, record, time.time()))
    if curve := runs_views.last_losses(folder, min(ui.out.width, 100)):
        ui.show(Text(""), Text("Training loss", style="bold"), *curve)
    comparison = views.comparison_table(compared)
    if comparison.row_count:
        ui.show(Text(""), comparison)
    if record:
        ui.show(Text(""), views.evaluation_table(record))
    if sampled := runs_views.sampled_line(record):
        ui.show(Text(""), sampled)
    ui.show(Text(""), Text("Files", style="bold"))
    ui.show_lines(runs_views.file_lines(folder))


def _show_stages(shown: RunSummary, ui: Ui) -> int:
    commands = runs_views.commands(shown, merges=False)
    ui.json({"schema": 1, **_to_dict(shown), "commands": [command for _, command in commands]})
    ui.show(runs_views.runs_table([shown], time.time()))
    if shown.why:
        ui.show(Text(f"\n{shown.stage}: {shown.why}"))
    _show_commands(commands, ui)
    ui.show_lines([f"a stage        ftplan runs show {part.path}" for part in shown.stages[:1]])
    return 0


def _show_commands(commands: list[tuple[str, str]], ui: Ui) -> None:
    ui.show(Text(""))
    ui.show_lines([f"{what:<14} {command}" for what, command in commands])


def _merges(record: dict[str, Any]) -> bool:
    from ftplan.launcher.launching import is_merged_by_ftplan

    return bool(record) and is_merged_by_ftplan(record)


def _to_dict(one: RunSummary) -> dict[str, Any]:
    return {
        "name": one.name,
        "path": str(one.path),
        "state": one.state,
        "stage": one.stage,
        "why": one.why,
        "model": one.model,
        "method": one.method,
        "step": one.step,
        "steps": one.steps,
        "loss": one.loss,
        "checkpoint": one.checkpoint,
        "changed_at": datetime.fromtimestamp(one.changed_at, UTC).isoformat(timespec="seconds"),
        "size_bytes": one.size_bytes,
        "job": one.job,
        "stages": [_to_dict(part) for part in one.stages],
    }
