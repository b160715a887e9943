"""`python -m ftplan` is the `ftplan` command."""

import sys

from ftplan.launcher.cli import main

sys.exit(main())
