"""What ftplan does when training has ended, for engines that start training by themselves: `python
-m ftplan.launcher.backends.ended RUN --status N --log-start BYTE [--asked]`.

Keys are taken out of the logs, status.json says how it ended, and the report is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ftplan.launcher.masking import mask_files, secrets_of
from ftplan.launcher.process import failed, tell
from ftplan.launcher.report.write import report_end
from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.launcher.ui import Ui
from ftplan.launcher.user_data import remember
from ftplan.planner.errors import FtplanError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ftplan.launcher.backends.ended", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--status", type=int, required=True, help="exit status of training")
    parser.add_argument("--log-start", type=int, default=0, help="where its stderr.log begins")
    parser.add_argument("--asked", action="store_true", help="training was asked to end")
    arguments = parser.parse_args(argv)
    ui = Ui()
    try:
        run = open_run(arguments.run_dir)
        settle(ui, run, arguments.status, arguments.log_start, asked=arguments.asked)
    except FtplanError as error:
        ui.fail(error)
        return error.exit_status
    return 0


def settle(ui: Ui, run: RunDir, status: int, log_start: int, *, asked: bool) -> None:
    """Say in the run directory how training ended. `status`: its exit status."""
    mask_files(run, secrets_of(os.environ))
    if not run.finished and run.read_status().get("stage") not in ("interrupted", "failed"):
        if asked:
            tell(run, stage="interrupted")
        else:
            tell(run, stage="failed", error=failed(run, status, log_start).message)
    report_end(ui, run)
    if run.finished:
        remember(ui, run)


if __name__ == "__main__":
    sys.exit(main())
