"""Merges the adapter of a run into its base by `ftplan merge`, in a process of its own, so that its
memory is free when training starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ftplan.launcher.run_dir import RunDir, read_mapping
from ftplan.planner.errors import RunFailedError


def merge_adapter(run: RunDir, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """The run's base with its adapter merged, as a model's folder, whole or not at all.

    In the dtype of the base's own files, whatever the run held it in: an adapter that was trained
    on a quantized base goes into the base of 16 bits. Raises RunFailedError with what was wrong.
    """
    words = ["merge", str(run.root), "--out", str(folder), "--json"]
    dtype = _base_dtype(run)
    done = subprocess.run(
        [sys.executable, "-m", "ftplan", *words, *(["--dtype", dtype] if dtype else [])],
        env={**environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.strip().splitlines() if line.startswith("error: ")]
        why = said[-1].removeprefix("error: ") if said else f"exit status {done.returncode}"
        raise RunFailedError(
            f"the adapter of `{run.root}` could not be merged: {why}",
            f"`ftplan merge {run.quoted}` says more",
        )


def _base_dtype(run: RunDir) -> str | None:
    base = run.root / read_mapping(run.train)["model"]
    config = read_mapping(base / "config.json")
    return config.get("dtype") or config.get("torch_dtype")
