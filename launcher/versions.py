"""Versions that a run was made with, and what others may change when it goes on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from typing import Any

# What decides how a run goes, and what another version of it may change.
PACKAGES: dict[str, str] = {
    "ftplan": "the order of rows and what is measured may differ",
    "torch": "losses may differ in their last digits, and random numbers altogether",
    "transformers": "the model's code, its loss and the schedule may differ",
    "peft": "what an adapter computes and how it is stored may differ",
    "trl": "the loss and how rows are put into batches may differ",
    "accelerate": "how rows are dealt out may differ",
    "datasets": "nothing but the speed of reading should differ",
    "deepspeed": "ZeRO's checkpoints may not be readable",
    "bitsandbytes": "quantized weights and 8-bit optimizer states may differ",
}
_PYTHON = "random numbers and the order of sets may differ"


def installed() -> dict[str, str | None]:
    """Versions by package; None of one that is not installed."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    if package == "ftplan":
        from ftplan.launcher.version import version

        return version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def unlike(environment: Mapping[str, Any]) -> Iterator[str]:
    """What is another version than environment.json names, each with what that may mean."""
    python, here = environment.get("python"), platform.python_version()
    if python and str(python).split(".")[:2] != here.split(".")[:2]:
        yield f"the run began with Python {python}, this is {here}: {_PYTHON}"
    before = environment.get("packages")
    if not isinstance(before, Mapping):
        return
    now = installed()
    for package, means in PACKAGES.items():
        if package in before and before[package] != now[package]:
            was, is_now = before[package], now[package]
            yield (
                f"the run began {f'with {package} {was}' if was else f'without {package}'}, "
                f"{f'{is_now} is here' if is_now else 'it is not installed here'}: {means}"
            )
