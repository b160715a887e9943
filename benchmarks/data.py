"""How fast data files are looked through, and in how much memory: `python -m benchmarks.data`.

Generates a file of varied rows (`--size 2GB`), measures it with a tokenizer's exact lengths as
`ftplan data` does, and then a sample of it. Exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from benchmarks.data_file import parse_size, write
from ftplan.launcher.data.data_file import DataFile, read_data
from ftplan.launcher.data.tokens import RowTokenizer, load_tokenizer
from ftplan.launcher.default_model import find_default_model
from ftplan.launcher.host import usable_cores
from ftplan.launcher.ui import Ui, table
from ftplan.planner.units import GIB, format_bytes, format_seconds

# For 2 GB on two cores; a sample, whatever the size.
BAR_SECONDS_PER_BYTE = 90 / 2e9
BAR_BYTES = GIB
BAR_SAMPLE_SECONDS = 5.0
SAMPLE_ROWS = 2000


class Measured(Struct, frozen=True, kw_only=True):
    """`peak_bytes`: resident memory of the process, and what each of its children has beyond what
    it shares with it."""

    size_bytes: int
    rows: int
    seconds: float
    peak_bytes: int
    sample_seconds: float

    @property
    def within(self) -> bool:
        """Whether all bars are reached."""
        return (
            self.seconds <= BAR_SECONDS_PER_BYTE * self.size_bytes
            and self.peak_bytes <= BAR_BYTES
            and self.sample_seconds <= BAR_SAMPLE_SECONDS
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return {"schema": 1, **fields, "within": self.within}


def measure(path: Path, tokenizer: RowTokenizer) -> Measured:
    """Looks through a file whole, in as many processes as there are cores, and through a sample."""
    sample_seconds, _ = _timed(lambda: read_data([path], tokenizer=tokenizer, sample=SAMPLE_ROWS))
    processes = usable_cores()
    shared = _peak_bytes(resource.RUSAGE_SELF)
    seconds, data = _timed(lambda: read_data([path], tokenizer=tokenizer, processes=processes))
    return Measured(
        size_bytes=path.stat().st_size,
        rows=data.num_rows,
        seconds=seconds,
        peak_bytes=_peak_bytes(resource.RUSAGE_SELF)
        + processes * max(0, _peak_bytes(resource.RUSAGE_CHILDREN) - shared),
        sample_seconds=sample_seconds,
    )


def _timed(look: Callable[[], DataFile]) -> tuple[float, DataFile]:
    began = time.perf_counter()
    data = look()
    return time.perf_counter() - began, data


def _peak_bytes(whose: int) -> int:
    kib = resource.getrusage(whose).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--size", default="2GB", help="of the generated file (2GB)")
    parser.add_argument("--file", type=Path, help="look through this file instead")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    arguments = parser.parse_args()
    ui = Ui(as_json=arguments.json)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(find_default_model(ui.say))
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.file
        if path is None:
            path = Path(folder) / "rows.jsonl"
            ui.say(f"writing {arguments.size} of rows ...")
            write(path, parse_size(arguments.size))
        measured = measure(path, tokenizer)
    ui.json(measured.to_dict())
    ui.show(_shown(measured))
    return 0 if measured.within else 1


def _shown(measured: Measured) -> object:
    speed = measured.size_bytes / measured.seconds / 1e6
    bar = BAR_SECONDS_PER_BYTE * measured.size_bytes
    rows = [
        [
            f"{measured.rows:,} rows, {measured.size_bytes / 1e6:,.0f} MB",
            f"{format_seconds(measured.seconds)}, {speed:.1f} MB/s",
            format_seconds(bar),
        ],
        ["memory", format_bytes(measured.peak_bytes), format_bytes(BAR_BYTES)],
        [
            f"a sample of {SAMPLE_ROWS:,} rows",
            format_seconds(measured.sample_seconds),
            format_seconds(BAR_SAMPLE_SECONDS),
        ],
    ]
    title = "Reached" if measured.within else "MISSED"
    return table(title, ("", ">measured", ">bar"), rows)


if __name__ == "__main__":
    sys.exit(main())
