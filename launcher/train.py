"""The training process: `accelerate launch ... -m ftplan.launcher.train RUN_DIR [--resume]`.

Reads everything from the run directory and writes everything to it. Exit status: 0 finished,
130 or 143 stopped by SIGINT or SIGTERM with a checkpoint, 2 for input that cannot be used, 75 to be
started again after memory ran out on one of several GPUs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from ftplan.launcher import remote_code
from ftplan.launcher.hangs import write_stack_when_asked
from ftplan.launcher.masking import MaskedStream, secrets_of
from ftplan.launcher.run_dir import open_run
from ftplan.planner.errors import FtplanError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ftplan.launcher.train", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from the last whole checkpoint, or from the one of this name",
    )
    remote_code.add_trust_argument(parser)
    arguments = parser.parse_args(argv)
    try:
        run = open_run(arguments.run_dir)
        write_stack_when_asked(run)
        from ftplan.launcher.training.loop import train

        trusts = arguments.trust_remote_code
        with remote_code.allowed(_say) if trusts else nullcontext():
            return train(run, resume=arguments.resume)
    except FtplanError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201
        return error.exit_status


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


def mask_output() -> None:
    """From now on, to the traceback at the end, nothing printed holds a token or key."""
    secrets = secrets_of()
    sys.stdout = MaskedStream(sys.stdout, secrets)
    sys.stderr = MaskedStream(sys.stderr, secrets)


if __name__ == "__main__":
    # A batch script may shield what starts this process from SIGTERM; training heeds it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mask_output()
    sys.exit(main())
