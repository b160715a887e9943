"""`python -m benchmarks.gpu --minutes N --out DIR`: measure this machine's GPU.

Runs models of real shapes with random weights (nothing is fetched) through the code that trains:
about 60 configurations that fit the card, most telling first, each in a process of its own. What it
writes is read by `ftplan validate DIR/rows.jsonl`. It can be interrupted at any time and goes on
where it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gpu import self_test, views
from benchmarks.gpu.configurations import Run, choose, left_out
from benchmarks.gpu.suite import CEILINGS_SECONDS, Suite, packages_at_hand
from ftplan.launcher import validate_views
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import FtplanError, InputError
from ftplan.planner.units import format_bytes


def main(words: list[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    ui = Ui(as_json=arguments.json)
    try:
        return _self_test(arguments, ui) if arguments.self_test else _measure(arguments, ui)
    except FtplanError as error:
        ui.fail(error)
        return error.exit_status
    except KeyboardInterrupt:
        ui.say("interrupted; the same command goes on where it was")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=45, help="no longer (default: 45)")
    parser.add_argument("--out", type=Path, help="the folder to write to")
    parser.add_argument("--list", action="store_true", help="show what would run, and stop")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON lines")
    parser.add_argument(
        "--self-test", action="store_true", help="tiny models on the processor, in seconds"
    )
    return parser


def _measure(arguments: argparse.Namespace, ui: Ui) -> int:
    machine = probe_machine()
    if not machine.gpus:
        raise InputError(
            f"no GPU to measure: {'; '.join(machine.notes) or 'none was found'}",
            "`--self-test` tries the suite out on the processor",
        )
    device = machine.best_device
    packages = packages_at_hand()
    missing = left_out(packages)
    if missing:
        ui.say(f"left out, since they are not installed: what needs {', '.join(missing)}")
    ui.say(f"choosing runs for {device.name}, {format_bytes(device.free_bytes)} free")
    runs = choose(device, packages)
    if arguments.list:
        ui.json([_said(run) for run in runs])
        ui.show(views.runs_table(runs, CEILINGS_SECONDS))
        return 0
    if arguments.out is None:
        raise InputError("no folder to write to", "name one with `--out DIR`")
    suite = Suite(machine, device, arguments.out, ui, small=False)
    suite.run(runs, arguments.minutes)
    ui.show(*validate_views.report(self_test.comparisons(suite.rows.path)), "")
    ui.show(views.ceilings_table(suite.ceilings, device))
    return 0


def _self_test(arguments: argparse.Namespace, ui: Ui) -> int:
    """Exit status 1 where the suite does not do what it should."""
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        out = arguments.out or Path(temporary)
        machine = probe_machine(environ={"CUDA_VISIBLE_DEVICES": ""})
        axes = self_test.axes((out / "models").resolve())
        runs = choose(
            machine.cpu,
            packages_at_hand(),
            axes=axes,
            count=self_test.COUNT,
            hands=self_test.HANDS,
        )
        suite = Suite(machine, machine.cpu, out, ui, small=True)
        suite.run(runs, arguments.minutes)
        compared = self_test.comparisons(suite.rows.path)
        ui.show(*validate_views.report(compared), "")
        ui.show(views.ceilings_table(suite.ceilings, machine.cpu))
        wrong = self_test.complaints(compared, sum(1 for _ in suite.failures))
    for complaint in wrong:
        ui.warn(complaint)
    return 1 if wrong else 0


def _said(run: Run) -> dict[str, object]:
    candidate = run.candidate
    return {
        "id": run.key,
        "required_bytes": candidate.required_bytes,
        "step_seconds": candidate.step_seconds,
        "seconds": candidate.seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
