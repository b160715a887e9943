"""What ftplan does when training has ended, for engines that start training by themselves: `python
-m ftplan.launcher.backends.ended RUN --status N --log-start BYTE [--asked]`.

Keys are taken out of the logs, status.json says how it ended, and the report is written.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from ftplan.launcher.masking import mask_files, secrets_of
from ftplan.launcher.process import failed, tell
from ftplan.launcher.report.write import report_end
from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.launcher.ui import Ui
from ftplan.launcher.user_data import remember
from ftplan.planner.errors import FtplanError

# Such as `slurmstepd: error: Detected 1 oom_kill event in StepId=7.0`.
_SLURM_SAID = re.compile(r"^(?:srun|slurmstepd[\w.-]*): (?:fatal|error): (.+)$", re.MULTILINE)


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
            error = failed(run, status, log_start).message
            tell(run, stage="failed", error=said_by_slurm(run, log_start) or error)
    report_end(ui, run)
    if run.finished:
        remember(ui, run)


def said_by_slurm(run: RunDir, log_start: int) -> str | None:
    """Why Slurm itself ended training, or could not begin it; None where it did neither."""
    log = run.stderr.read_bytes()[log_start:].decode(errors="replace")
    said = [found for found in _SLURM_SAID.findall(log) if "Exited with exit code" not in found]
    return f"training failed: {said[-1]}" if said else None


if __name__ == "__main__":
    sys.exit(main())
