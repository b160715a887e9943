"""How far the closed form is from the dry run: `python -m benchmarks.accuracy VERB`.

- `compare` (the default): the closed form beside the reference file, at once. Exit status 1 when
  it misses the bars.
- `run`: dry runs of the drawn configurations that the reference file does not have yet, or has
  from before ftplan knew their family. Can be interrupted and goes on where it was.
- `show KEY`: one configuration, with its settings and what lives at the peak.
- `draw`: what is drawn and how often, and what was drawn again.
- `reserved`: what the allocator holds by the closed form, beside the dry run's replay.
- `speed`: estimates a second on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

from benchmarks import comparison, views
from benchmarks.draws import COUNT, SEED, draw
from benchmarks.references import REFERENCE, carry_out, read
from benchmarks.reserved import reserved_report
from benchmarks.speed import measure_speed
from ftplan.launcher.host import usable_cores
from ftplan.launcher.live import with_progress
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import FtplanError, UnknownNameError


def main(words: list[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    ui = Ui(as_json=arguments.json)
    try:
        return int(VERBS[arguments.verb](arguments, ui))
    except FtplanError as error:
        ui.fail(error)
        return error.exit_status
    except KeyboardInterrupt:
        ui.say("interrupted; `run` goes on where it was")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", nargs="?", choices=VERBS, default="compare")
    parser.add_argument("key", nargs="?", help="with `show`: which configuration")
    parser.add_argument("--file", type=Path, default=REFERENCE, help="the reference file")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--worst", type=int, default=10, help="configurations listed as farthest")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=COUNT, help="configurations drawn")
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="processes at once")
    return parser


def _compare(arguments: argparse.Namespace, ui: Ui) -> int:
    compared = [comparison.compare(reference) for reference in read(arguments.file)]
    report = comparison.Report.of(compared)
    ui.json(report.to_dict(arguments.worst))
    ui.show(*views.report(report, arguments.worst))
    return 0 if report.within else 1


def _run(arguments: argparse.Namespace, ui: Ui) -> int:
    drawn = draw(arguments.seed, arguments.count).configurations
    there = {reference.configuration.key: reference for reference in read(arguments.file)}
    missing = [c for c in drawn if c.key not in there or there[c.key].stale]
    Random(arguments.seed).shuffle(missing)  # so that what an interrupted run has done is a sample
    ui.say(f"{len(drawn)} drawn, {len(drawn) - len(missing)} of them there already")
    carried_out = carry_out(missing, arguments.file, max(1, min(arguments.jobs, len(missing))))
    for reference in with_progress(ui, carried_out, len(missing), "dry runs"):
        ui.json_line(reference.to_dict())
    return 0


def _show(arguments: argparse.Namespace, ui: Ui) -> int:
    references = {r.configuration.key: r for r in read(arguments.file)}
    if arguments.key not in references:
        raise UnknownNameError("configuration", str(arguments.key), references)
    reference = references[arguments.key]
    compared = comparison.compare(reference)
    ui.json({**reference.to_dict(), "comparison": compared.to_dict()})
    ui.show(*views.configuration(compared))
    return 0


def _draw(arguments: argparse.Namespace, ui: Ui) -> int:
    drawn = draw(arguments.seed, arguments.count)
    ui.json(
        {
            "configurations": [c.to_dict() for c in drawn.configurations],
            "redrawn": dict(drawn.redrawn),
        }
    )
    ui.show(*views.draw(drawn))
    return 0


def _reserved(arguments: argparse.Namespace, ui: Ui) -> int:
    report = reserved_report(read(arguments.file))
    ui.json({"schema": 1, **report})
    ui.show(views.reserved(report))
    return 0


def _speed(arguments: argparse.Namespace, ui: Ui) -> int:
    speed = measure_speed()
    ui.json(speed.to_dict())
    ui.show(views.speed(speed))
    return 0 if speed.within else 1


VERBS = {
    "compare": _compare,
    "run": _run,
    "show": _show,
    "draw": _draw,
    "reserved": _reserved,
    "speed": _speed,
}


if __name__ == "__main__":
    sys.exit(main())
