"""Processes that measure: a run each, so that one that dies costs its own row only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.task import Task
from ftplan.launcher.emit import launch_environment
from ftplan.planner.hardware_spec import Device
from ftplan.planner.plan import TrainingPlan

_ROOT = Path(__file__).parents[2]

# Loading libraries may take long on a cold disk.
_PATIENCE_SECONDS = 240.0

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "trl", "datasets", "bitsandbytes"),
    *("liger_kernel", "flash_attn", "triton"),
)


def carry_out(
    task: Task, device: Device, num_cores: int, expected_seconds: float
) -> dict[str, Any]:
    """A process's answer; {"failed": reason} where it has none."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.measure"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(device, task.case.plan, num_cores),
        )
        limit = _PATIENCE_SECONDS + 4 * expected_seconds
        try:
            answer, _ = process.communicate(json.dumps(task.to_dict()), timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit:.0f} s"}
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        written = log.read()
    if process.returncode == 0 and answer.strip():
        found: dict[str, Any] = json.loads(answer)
        return {**found, "log": _end(written)} if "failed" in found else found
    return {"failed": f"ended with status {process.returncode}", "log": _end(written)}


def _end(log: str) -> str:
    return "\n".join(log.strip().splitlines()[-12:])


def ceilings(device: Device, num_cores: int, *, small: bool) -> Iterator[dict[str, Any]]:
    """What the device can do at most, line by line."""
    command = [sys.executable, "-m", "benchmarks.gpu.ceilings", device.kind]
    with subprocess.Popen(
        [*command, "--small"] if small else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(device, TrainingPlan(), num_cores),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            process.kill()


def environment(device: Device, plan: TrainingPlan, num_cores: int) -> dict[str, str]:
    """That of a launched run; the allocator is torch's default for stacks that ftplan does not
    launch. Models are made, not fetched."""
    merged = launch_environment(os.environ, [device], plan, num_cores)
    if plan.trainer != "trl":
        merged.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**merged, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def software(driver: str | None) -> str:
    """The releases that a run used, as a case's `software` names them."""
    said = [f"Python {sys.version.split()[0]}"]
    for package in PACKAGES:
        try:
            said.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join([*said, *([f"driver {driver}"] if driver else [])])
