"""Jobs for the tests of engines, and stand-ins of the engines' clients."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftplan.launcher.backends.job import Backend, Job, check_options
from ftplan.launcher.run_dir import RunDir, write_text
from ftplan.planner.units import GIB

# As `machine_command` of several machines has it.
COMMAND = (
    "/home/me/.venv/bin/python",
    *("-m", "accelerate.commands.launch", "--config_file", "runs/accelerate.yaml"),
    *("--num_machines", "2", "--num_processes", "16"),
    *("--machine_rank", "$FTPLAN_MACHINE_RANK"),
    *("--main_process_ip", "$FTPLAN_MAIN_ADDRESS", "--main_process_port", "$FTPLAN_MAIN_PORT"),
    *("-m", "ftplan.launcher.train", "runs/it's", "--resume"),
)


def job(root: Path, backend: Backend, options: dict[str, str], **changes: Any) -> Job:
    """Two machines of eight H100; options as the command line checks them."""
    check_options(backend, options)
    values: dict[str, Any] = {
        "name": "llama-3.1-8b-lora-Tickets_v2",
        "run": RunDir(root),
        "num_machines": 2,
        "gpus_per_machine": 8,
        "gpu": "NVIDIA H100 80GB HBM3",
        "cpus_per_machine": 32,
        "host_ram_bytes": 200 * GIB + 1,
        "disk_bytes": 150 * 10**9 + 1,
        "seconds": 3600.0,
        "environment": {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "4"},
        "command": COMMAND,
        "grace_seconds": 300,
        "options": options,
    }
    return Job(**{**values, **changes})


def run_directory(root: Path, model: str, files: list[str] | None = None) -> RunDir:
    """What backends and machines look at in one."""
    run = RunDir(root)
    train = {"model": model, "data": {"files": files or ["data/rows.jsonl"]}, "eval_data": None}
    write_text(run.train, yaml.safe_dump(train))
    write_text(run.accelerate, "num_processes: 1\n")
    write_text(run.plan, "schema: 1\n")
    return run


# Notes what each machine was told of the others.
NOTING = (
    "import os, pathlib, sys; pathlib.Path(sys.argv[1]).with_suffix('.' + sys.argv[2])"
    ".write_text(' '.join([*sys.argv[2:], os.environ['OMP_NUM_THREADS']]))"
)


def noting(target: Path) -> tuple[str, ...]:
    """A command in the place of accelerate's launcher: it writes to `target`.RANK."""
    names = ("MACHINE_RANK", "NUM_MACHINES", "MAIN_ADDRESS", "MAIN_PORT")
    return ("python", "-c", NOTING, str(target), *(f"$FTPLAN_{name}" for name in names))


def wrapper(path: Path) -> None:
    """This Python under another name."""
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)


class StandIn:
    """A client on PATH that notes its arguments and answers as it is told."""

    def __init__(self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._noted = folder / f"{name}.arguments"
        self._answer = folder / f"{name}.answer"
        self._status = folder / f"{name}.status"
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f"#!{sys.executable} -S\n"
            "import sys\n"
            f"open({str(self._noted)!r}, 'a').write('\\0'.join(sys.argv[1:]) + '\\n')\n"
            f"said, status = open({str(self._answer)!r}).read(), {str(self._status)!r}\n"
            "failed = int(open(status).read())\n"
            "(sys.stderr if failed else sys.stdout).write(said)\n"
            "sys.exit(failed)\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        self.answers("")

    def answers(self, text: str, status: int = 0) -> None:
        self._answer.write_text(text)
        self._status.write_text(str(status))

    @property
    def calls(self) -> list[list[str]]:
        noted = self._noted.read_text().splitlines() if self._noted.exists() else []
        return [line.split("\0") for line in noted]
