"""Feeds the readers of data files with changed files: `python -m tests.fuzz --minutes 15`.

Each goes through all that `ftplan data` and a run do with it. What is neither a result that adds
up nor an error for people (another exception, a crash, a hang, too much memory) is kept in a folder
with its seed and as small as it gets; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz import target
from tests.fuzz.inputs import load
from tests.fuzz.runner import Fuzzer, Limits, keep


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (1)")
    parser.add_argument("--tries", type=int, default=sys.maxsize, help="or how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="which inputs (0)")
    parser.add_argument("--seconds", type=float, default=10.0, help="that one may take (10)")
    parser.add_argument("--memory-mib", type=int, default=1024, help="that one may take (1024)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="where they go")
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="only what was kept there")
    arguments = parser.parse_args(words)
    if arguments.again:
        target.prepare()
        tried = load(arguments.again)
        print("\n".join(sorted(target.look(arguments.again / "data", tried.options))))
        return 0
    limits = Limits(arguments.seconds, arguments.memory_mib << 20)
    target.prepare()
    fuzzer = Fuzzer(arguments.seed, limits=limits)
    began = time.monotonic()
    fuzzer.run(seconds=60 * arguments.minutes, tries=arguments.tries)
    took = time.monotonic() - began
    print(
        f"{fuzzer.num_tries:,} inputs in {took:.0f} s, {len(fuzzer.seen):,} different outcomes, "
        f"{len(fuzzer.kept):,} inputs kept, {len(fuzzer.findings)} findings"
    )
    for finding in fuzzer.findings.values():
        place = keep(finding, arguments.seed, limits, fuzzer.look, arguments.out)
        print(f"{finding.kind}: {place}")
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    sys.exit(main())
