"""Tries inputs in a process of its own, which may crash, hang or grow; keeps what it found.

A try that says something new (a reason, a note, an error, a finding; under Python 3.12 and later a
new line of code too) is kept, and others are made from it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from msgspec import Struct

from tests.fuzz import corpus, target
from tests.fuzz.inputs import Input, load, with_file
from tests.fuzz.mutators import MOST_BYTES, changed_row, mutated

Look = Callable[[Path, Any], frozenset[str]]

_MOST_KEPT = 4000
_TRIES_TO_MINIMIZE = 1500
_SECONDS_TO_MINIMIZE = 60.0
_FORK = multiprocessing.get_context("fork")


class Limits(Struct, frozen=True):
    """Of one try: processor time, and memory beyond what the process has at its start."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30


class Finding(Struct, frozen=True):
    """`kind` tells findings apart: the error and where it was raised, `hang`, `crash: SIGSEGV`."""

    kind: str
    number: int
    found: Input
    details: str = ""


class Fuzzer:
    """Tries inputs that follow from a seed."""

    def __init__(
        self, seed: int, *, limits: Limits | None = None, look: Look | None = None
    ) -> None:
        self.seed = seed
        self.limits = limits or Limits()
        self.look = look or target.look
        self.num_tries = 0
        self.seen: set[str] = set()
        self.kept = [Input(((name, content),)) for name, content in corpus.seeds()]
        self.findings: dict[str, Finding] = {}

    def run(self, *, seconds: float = float("inf"), tries: int = sys.maxsize) -> None:
        """Go on until the time is over, or so many tries are done."""
        end, last = time.monotonic() + seconds, self.num_tries + tries
        with tempfile.TemporaryDirectory() as folder:
            while self.num_tries < last and time.monotonic() < end:
                self._watch(Path(folder), end, last)

    def _watch(self, folder: Path, end: float, last: int) -> None:
        """One process, until it has done its work or died."""
        ours, theirs = _FORK.Pipe(duplex=False)
        worker = _FORK.Process(target=self._work, args=(theirs, folder, end, last))
        worker.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while True:
                self._take(ours.recv())
        worker.join()
        if worker.exitcode:
            self._add(Finding(_death(worker.exitcode), self.num_tries, load(folder)))
            self.num_tries += 1

    def _take(self, message: tuple[Any, ...]) -> None:
        what, number, *more = message
        self.num_tries = number
        if what == "new":
            tried, said = more
            self.seen |= said
            self.kept = [*self.kept, tried][-_MOST_KEPT:]
        elif what == "found":
            self._add(more[0])

    def _add(self, finding: Finding) -> None:
        self.findings.setdefault(finding.kind, finding)

    def _work(self, pipe: Connection, folder: Path, end: float, last: int) -> None:
        _limit(self.limits)
        target.prepare()
        lines = _Lines()
        for number in range(self.num_tries, last):
            if time.monotonic() > end:
                break
            tried = self.made(number)
            tried.save(folder)
            pipe.send(("begun", number))
            with _clock(self.limits.seconds):
                try:
                    said = self.look(folder / "data", tried.options)
                except Exception as error:
                    text = traceback.format_exc()
                    pipe.send(("found", number, Finding(_place(error), number, tried, text)))
                    continue
            said |= lines.new()
            if not said <= self.seen:
                self.seen |= said
                if tried.size <= MOST_BYTES:
                    self.kept.append(tried)
                    pipe.send(("new", number, tried, said))
            pipe.send(("done", number + 1))

    def made(self, number: int) -> Input:
        """The input of a try; it follows from the seed and from what was kept before."""
        rng = Random(f"{self.seed}/{number}")
        files = [self._file(rng) for _ in range(rng.choices((1, 2, 3), (0.93, 0.05, 0.02))[0])]
        names = {name: content for name, content in files}
        return Input(tuple(names.items()), target.options_of(rng))

    def _file(self, rng: Random) -> tuple[str, bytes]:
        other = self._one_kept(rng)[1]
        if rng.random() < 0.45:
            rows = [row for rows in rng.sample(list(corpus.ROWS.values()), 2) for row in rows]
            rows = rng.sample(rows, rng.randint(1, len(rows)))
            share = rng.choice((0.1, 0.5, 1.0))
            changed = [changed_row(rng, row) if rng.random() < share else row for row in rows]
            if rng.random() < 0.1:
                changed *= rng.choice((3, 30))
            name, content = corpus.written(rng, changed)
            content = mutated(rng, content, other, rng.choice((0, 0, 0, 1, 2)))
        else:
            name, content = self._one_kept(rng)
            content = mutated(rng, content, other, rng.choice((1, 1, 2, 3, 6)))
        if rng.random() < 0.06:
            content = corpus.encoded(content, rng.choice(corpus.ENCODINGS))
        if rng.random() < 0.08:
            content = rng.choice(corpus.PACKED)(content)
            content = mutated(rng, content, other, rng.choice((0, 0, 1)))
        return rng.choice(corpus.NAMES) if rng.random() < 0.15 else name, content

    def _one_kept(self, rng: Random) -> tuple[str, bytes]:
        recent = self.kept[-200:] if rng.random() < 0.3 else self.kept
        return rng.choice(rng.choice(recent).files)


def _limit(limits: Limits) -> None:
    """Beyond them memory is refused, and a signal ends the process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":  # elsewhere the limit is not kept
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def _clock(seconds: float) -> Iterator[None]:
    """Processor time of this process, and ten times that where it waits for others."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _death(exitcode: int) -> str:
    if -exitcode in (signal.SIGPROF, signal.SIGALRM):
        return "hang"
    name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit status {exitcode}"
    return f"crash: {name}"


def _place(error: BaseException) -> str:
    """The error's class, and the innermost line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/launcher/" in f.filename or f.filename == target.__file__]
    last = ours[-1] if ours else frames[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} in {last.name}"


class _Lines:
    """Lines of the readers that ran for the first time, by `sys.monitoring`, which costs next to
    nothing: each line is told once. Nothing before Python 3.12, whose tracing takes longer than
    what it traces."""

    _TOOL = 4

    def __init__(self) -> None:
        self._new: set[str] = set()
        self._monitoring = getattr(sys, "monitoring", None)
        if self._monitoring is None:
            return
        event = self._monitoring.events.LINE
        self._monitoring.use_tool_id(self._TOOL, "fuzz")
        self._monitoring.register_callback(self._TOOL, event, self._ran)
        self._monitoring.set_events(self._TOOL, event)

    def _ran(self, code: Any, line: int) -> Any:
        if "launcher/data" in code.co_filename:
            self._new.add(f"{Path(code.co_filename).name}:{line}")
        return self._monitoring.DISABLE  # type: ignore[union-attr]

    def new(self) -> frozenset[str]:
        new, self._new = frozenset(self._new), set()
        return new


def outcome(tried: Input, limits: Limits, look: Look) -> str:
    """The finding's kind that an input shows, in a process of its own; empty for none."""
    ours, theirs = _FORK.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        tried.save(Path(folder))
        child = _FORK.Process(target=_try, args=(theirs, Path(folder), tried, limits, look))
        child.start()
        theirs.close()
        said = ""
        with contextlib.suppress(EOFError):
            said = ours.recv()
        child.join()
    return said or (_death(child.exitcode) if child.exitcode else "")


def _try(pipe: Connection, folder: Path, tried: Input, limits: Limits, look: Look) -> None:
    _limit(limits)
    with _clock(limits.seconds):
        try:
            look(folder / "data", tried.options)
        except Exception as error:
            pipe.send(_place(error))


def minimized(finding: Finding, limits: Limits, look: Look) -> Input:
    """A smaller input with the same finding: options, files, then stretches of bytes left out."""
    smallest, left = finding.found, _TRIES_TO_MINIMIZE
    end = time.monotonic() + _SECONDS_TO_MINIMIZE

    def still(tried: Input) -> bool:
        nonlocal smallest, left
        left -= 1
        if outcome(tried, limits, look) != finding.kind:
            return False
        smallest = tried
        return True

    for options in finding.found.options.simpler():
        still(Input(smallest.files, options))
    for file in finding.found.files:
        if len(smallest.files) > 1:
            still(Input(tuple(f for f in smallest.files if f != file), smallest.options))
    for number in range(len(smallest.files)):
        size = max(1, len(smallest.files[number][1]) // 2)
        while size and left > 0 and time.monotonic() < end:
            at = 0
            while at < len(content := smallest.files[number][1]) and time.monotonic() < end:
                if not still(with_file(smallest, number, content[:at] + content[at + size :])):
                    at += size
            size //= 2
    return smallest


def keep(finding: Finding, seed: int, limits: Limits, look: Look, folder: Path) -> Path:
    """Write a finding: the input as it was and minimized, and what is known of it."""
    place = folder / f"seed{seed}-{finding.number}"
    shutil.rmtree(place, ignore_errors=True)
    finding.found.save(place / "as_found")
    minimized(finding, limits, look).save(place / "minimized")
    again = f"python -m tests.fuzz --again {place / 'minimized'}"
    text = f"{finding.kind}\nseed {seed}, try {finding.number}\n{again}\n\n{finding.details}"
    (place / "finding.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    return place
