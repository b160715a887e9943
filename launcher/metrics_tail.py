"""Rows of a growing metrics.jsonl, of which each is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftplan.launcher.run_dir import parsed_row


class MetricsTail:
    """`rows()` whenever something may have come. A file that has been replaced, as a resume does,
    is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._inode, self._offset = -1, 0

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; what is still being written, and damaged ones, are left out."""
        try:
            told = self.path.stat()
            if told.st_ino != self._inode or told.st_size < self._offset:
                self._rows, self._inode, self._offset = [], told.st_ino, 0
            if told.st_size > self._offset:
                self._read_on()
        except OSError:
            self._rows, self._inode, self._offset = [], -1, 0
        return self._rows

    def _read_on(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            come = file.read()
        whole = come[: come.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            row = parsed_row(line)
            if row is not None:
                self._rows.append(row)
