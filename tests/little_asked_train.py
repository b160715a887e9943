"""The training process of a run, with short evaluations: `python -m` this on a run directory."""

from __future__ import annotations

import sys

from ftplan.launcher.train import main
from ftplan.launcher.training import loop  # what is made short has to be there
from tests.quick import little_asked

__all__ = ["loop", "main"]

if __name__ == "__main__":
    with little_asked():
        sys.exit(main())
