"""One machine's part of a run that an engine carries out:
`python -m ftplan.launcher.backends.machine RUN [--inputs DIR] -- ARGUMENTS OF PYTHON`.

It brings what the run needs to this machine, starts training, and sees that it ends well. Engines
end a job by SIGTERM to its first process. accelerate's launcher would end by that and leave
training alone in a container that is taken down, and torch's would give its workers half a minute.
So the signal goes on to the training processes and to no other, and this one stays until they have
written their checkpoint.

The exit status is that of training; 143 after SIGTERM; 0 for a run that has finished already.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from ftplan.launcher.backends.ended import settle
from ftplan.launcher.backends.job import MACHINE_RANK
from ftplan.launcher.backends.needs import MACHINE_MODULE, hub_snapshot, model_folders
from ftplan.launcher.processes import children
from ftplan.launcher.run_dir import RunDir, open_run
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import FtplanError, InputError

_OWN_VARIABLE = re.compile(r"\$(FTPLAN_[A-Z_]+)")

# Copies of the weights in other formats, pickles among them, which training refuses.
_NOT_FETCHED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")

# 128 + SIGINT and SIGTERM.
_ASKED = (130, 143)

# Other machines look this often, and this long, for what the first one brings.
_LOOK_SECONDS = 0.5
_BRINGING_SECONDS = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    own, arguments = _split(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser(prog=MACHINE_MODULE, description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--inputs", type=Path, help="copied to RUN_DIR where that lacks them")
    parsed = parser.parse_args(own)
    ui = Ui()
    try:
        return carry_out_here(ui, parsed.run_dir, arguments, os.environ, inputs=parsed.inputs)
    except FtplanError as error:
        ui.fail(error)
        return error.exit_status


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def carry_out_here(
    ui: Ui,
    root: Path,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    *,
    inputs: Path | None = None,
) -> int:
    """Training on this machine, to its end. `arguments`: of Python, with the names of ftplan's own
    variables in them. Raises InputError where something is missing."""
    is_first = environ.get(MACHINE_RANK, "0") == "0"
    if inputs is not None:
        take_inputs(root, inputs, is_first=is_first)
    run = open_run(root)
    if run.finished:
        ui.say(f"`{root}` has finished")
        return 0
    fetch_models(ui, run)
    command = [sys.executable, *(filled(word, environ) for word in arguments)]
    log_start = run.stderr.stat().st_size if run.stderr.exists() else 0
    status = _to_its_end(run, command, environ, is_first=is_first)
    if is_first:
        settle(ui, run, status, log_start, asked=status in _ASKED)
    return status


def filled(word: str, environ: Mapping[str, str]) -> str:
    """The word with the values of ftplan's own variables; no other is looked at. Raises InputError
    for one that the engine has not set."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in environ:
            raise InputError(
                f"the engine has not set {found[1]}, which the machines find each other by",
                "start the run with `ftplan launch RUN --backend ENGINE`",
            )
        return environ[found[1]]

    return _OWN_VARIABLE.sub(value, word)


def take_inputs(root: Path, inputs: Path, *, is_first: bool) -> None:
    """Copy to the run directory what it lacks of the folder; the first machine does, the others
    wait for it. A run that goes on after it was lost has all of it. `plan.yaml` comes last, as
    where runs are written. Raises InputError where nothing comes."""
    run = RunDir(root)
    if is_first:
        make_folder(root)
        names = sorted(inputs.iterdir(), key=lambda path: path.name == run.plan.name)
        for source in names:
            _copy_missing(source, root / source.name)
        return
    deadline = time.monotonic() + _BRINGING_SECONDS
    while not run.plan.is_file():
        if time.monotonic() > deadline:
            raise InputError(
                f"the first machine's `{root}` is not seen by this one",
                "several machines need a run directory on a volume that all of them mount",
            )
        time.sleep(_LOOK_SECONDS)


def _copy_missing(source: Path, target: Path) -> None:
    if target.exists():
        return
    beside = target.with_name(f".{target.name}.coming")
    if source.is_dir():
        shutil.copytree(source, beside, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, beside)
    beside.rename(target)


def fetch_models(ui: Ui, run: RunDir) -> None:
    """Bring the base model, and a reward model, from the Hub where they are not here and came from
    there. Raises InputError for a model of another origin that is missing."""
    for folder in model_folders(run):
        if folder.is_dir():
            continue
        found = hub_snapshot(folder)
        if found is None:
            raise InputError(
                f"the model `{folder}` is not on this machine",
                "put it into the image or on the volume, at the same path",
            )
        from huggingface_hub import snapshot_download

        hub_id, revision = found
        cache = folder.parents[2]
        make_folder(cache)
        ui.say(f"fetching {hub_id} ...")
        snapshot_download(
            hub_id, revision=revision, cache_dir=cache, ignore_patterns=list(_NOT_FETCHED)
        )


def make_folder(path: Path) -> None:
    """A folder that this user can write, by sudo where that needs no password: a machine of a cloud
    has no home folder of the person's name. Raises InputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return
    except OSError as error:
        reason = error.strerror
    command = ["sudo", "-n", "install", "-d", "-o", str(os.getuid()), "-g", str(os.getgid())]
    with contextlib.suppress(OSError):
        if subprocess.run([*command, str(path)], capture_output=True).returncode == 0:
            return
    raise InputError(f"cannot make `{path}`: {reason}", "give this user the right to make it")


def _to_its_end(
    run: RunDir, command: list[str], environ: Mapping[str, str], *, is_first: bool
) -> int:
    """Training until it ends, started again where it asks for that after memory ran out."""
    while True:
        if is_first:
            run.status.unlink(missing_ok=True)
        training = _Training(run, command, environ, keeps_output=is_first)
        with _signals_to(training.ask_to_stop):
            status = training.wait()
        if training.stopped_by is not None or status == 0:
            return 0 if run.finished else status
        if not run.read_status().get("again"):
            return status


class _Training:
    """accelerate's launcher and the training processes below it."""

    def __init__(
        self, run: RunDir, command: list[str], environ: Mapping[str, str], *, keeps_output: bool
    ) -> None:
        self.stopped_by: int | None = None
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environ),
            start_new_session=True,
        )
        kept = (run.stdout, run.stderr) if keeps_output else (None, None)
        sources = (self._child.stdout, self._child.stderr)
        self._copying = [
            threading.Thread(target=_copy, args=(source, number, file))
            for number, (source, file) in enumerate(zip(sources, kept, strict=True), start=1)
        ]
        for thread in self._copying:
            thread.start()

    def ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM to the training processes; to the launcher where it has not started any."""
        self.stopped_by = self.stopped_by or number
        for pid in children(self._child.pid) or [self._child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def wait(self) -> int:
        """The exit status, once all that writes to these streams has ended: an engine that signals
        every process ends the launcher before training."""
        for thread in self._copying:
            while thread.is_alive():  # Ray interrupts this thread without a signal to wake it
                thread.join(_LOOK_SECONDS)
        status = self._child.wait()
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        return 128 - status if status < 0 else status


@contextlib.contextmanager
def _signals_to(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # a task of Ray, which ends by an exception instead
        return
    before = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _copy(source: BinaryIO, shown: int, kept: Path | None) -> None:
    """Every line to the engine's log, by the number of its stream, and to the run's own file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(kept.open("ab", buffering=0)) if kept else None
        for line in source:
            with contextlib.suppress(OSError):  # nobody reads any more
                os.write(shown, line)
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk must not end the run
                    file.write(line)


if __name__ == "__main__":
    sys.exit(main())
