"""`python -m ftplan` is the `ftplan` command."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder: a `torch.py` there is not the library

from ftplan.launcher.cli import main

sys.exit(main())
