"""Merges the adapter of a run into its base, in a process of its own, so that its memory is free
when training starts: `python -m ftplan.launcher.merge_adapter RUN_DIR FOLDER`.

Torch runs on the processor here. The base is loaded in the dtype of its own files, whatever the run
held it in: an adapter that was trained on a quantized base goes into the base of 16 bits.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ftplan.launcher.run_dir import RunDir
from ftplan.planner.errors import RunFailedError

_MODULE = "ftplan.launcher.merge_adapter"


def merge_adapter(run: RunDir, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """The run's base with its adapter merged, as a model's folder, whole or not at all.

    Raises RunFailedError with the process's last words.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    quiet = {"CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-m", _MODULE, str(run.root), str(beside)],
        env={**environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(beside, ignore_errors=True)
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RunFailedError(
            f"the adapter of `{run.root}` could not be merged: {said[0]}",
            "there may be too little RAM: the whole base is held while an adapter is merged",
        )
    beside.rename(folder)


def main(run_dir: str, folder: str) -> None:
    """In the process: load, merge, save."""
    from peft import PeftModel

    from ftplan.launcher.data.tokens import load_tokenizer
    from ftplan.launcher.training.config import read_train_config
    from ftplan.launcher.training.model_classes import MODEL_CLASSES

    run = RunDir(Path(run_dir))
    config = read_train_config(run)
    model_class = MODEL_CLASSES[config.objective]
    base = model_class.auto.from_pretrained(
        config.model, dtype="auto", use_safetensors=True, **model_class.settings
    )
    merged = PeftModel.from_pretrained(base, run.adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    load_tokenizer(config.model).tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
