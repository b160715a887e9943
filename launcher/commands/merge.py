"""`ftplan merge RUN`: a run's adapter in the weights of its base model."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftplan.launcher.live import with_progress
from ftplan.launcher.lock import held
from ftplan.launcher.packages import require_training
from ftplan.launcher.remote_code import add_trust_argument
from ftplan.launcher.run_dir import open_run
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from ftplan.launcher.merging.check import Check
    from ftplan.launcher.merging.gguf import GgufTools
    from ftplan.launcher.merging.merge import Merger, Unit
    from ftplan.launcher.merging.request import MergeRequest

DTYPES = ("bfloat16", "float16", "float32")
_DEFAULT_GGUF = "f16"

# Room for the weights, a GGUF file of 16 bits, and one made from it.
WITH_GGUF = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="a finished run's directory")
    parser.add_argument("--out", metavar="DIR", type=Path, help="a new folder (RUN/merged)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights (the base's, or bfloat16 for one in 32 bits)",
    )
    add_trust_argument(parser)
    parser.add_argument(
        "--gguf",
        metavar="TYPE",
        nargs="?",
        const=_DEFAULT_GGUF,
        help=f"a GGUF file too, with a Modelfile for Ollama ({_DEFAULT_GGUF}, q8_0, q4_k_m, ...)",
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    with held(open_run(arguments.run).root, "being merged"):
        return _run(arguments, ui)


def _run(arguments: argparse.Namespace, ui: Ui) -> int:
    from ftplan.launcher.merging.gguf import find_tools
    from ftplan.launcher.merging.request import merge_request

    request = merge_request(arguments.run, arguments.out)
    tools = find_tools(arguments.gguf) if arguments.gguf else None
    require_training()
    _quiet_libraries()
    began = time.monotonic()
    merged = _merge(ui, request, arguments.dtype, tools)
    merged["seconds"] = time.monotonic() - began
    ui.json({"schema": 1, "run_dir": str(request.run.root), **merged})
    _show(ui, request, merged)
    return 0


def _quiet_libraries() -> None:
    """No bars and notes of libraries between ours."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _merge(
    ui: Ui, request: MergeRequest, dtype: str | None, tools: GgufTools | None
) -> dict[str, Any]:
    """The merged folder, whole or not at all: written beside its place and renamed."""
    import torch

    from ftplan.launcher.merging.merge import Merger
    from ftplan.launcher.merging.request import check_room

    ui.say("reading the adapter and the base model's files ...")
    merger = Merger(request, getattr(torch, dtype) if dtype else None)
    num_bytes = merger.num_bytes()
    check_room(request.out, num_bytes * (1 if tools is None else WITH_GGUF))
    beside = request.out.with_name(f".{request.out.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        merger.write(beside, lambda units: _progress(ui, units))
        check = _checked(ui, request, merger, beside)
        merged = {
            "folder": str(request.out),
            "dtype": str(merger.dtype).removeprefix("torch."),
            "num_merged_modules": sum(len(unit.modules) for unit in merger.units),
            "weight_bytes": num_bytes,
            "check": check,
            "gguf": None,
        }
        if tools is not None:
            merged["gguf"] = _write_gguf(ui, request, beside, tools)
        _write_card(request, merged, beside)
        if os.path.lexists(request.out):
            raise InputError(f"`{request.out}` has appeared meanwhile", "name another with `--out`")
        beside.rename(request.out)
    except OSError as error:
        raise InputError(
            f"cannot write `{request.out}`: {error.strerror or error}",
            "name another folder with `--out`",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return merged


def _progress(ui: Ui, units: Sequence[Unit]) -> Iterator[Unit]:
    return with_progress(ui, iter(units), len(units), "modules merged")


def _checked(ui: Ui, request: MergeRequest, merger: Merger, folder: Path) -> dict[str, Any] | None:
    """Compared with base and adapter, where the model fits into the RAM."""
    from msgspec import to_builtins

    from ftplan.launcher.merging.check import can_check, check_merged

    if not can_check(merger.num_parameters()):
        ui.warn(
            "the model does not fit into the free RAM: its logits are not compared with those of "
            "base and adapter"
        )
        return None
    ui.say("comparing the logits of a few tokens with those of base and adapter ...")
    check: Check = check_merged(request, folder, merger.dtype)
    if check.drowned:
        ui.warn(
            f"rounding to {str(merger.dtype).removeprefix('torch.')} changes the logits more than "
            "the adapter does: `--dtype float32` keeps what it learned, or train longer"
        )
    found: dict[str, Any] = to_builtins(check)
    return found


def _write_gguf(ui: Ui, request: MergeRequest, folder: Path, tools: GgufTools) -> dict[str, Any]:
    from ftplan.launcher.data.tokens import load_tokenizer
    from ftplan.launcher.merging.gguf import write_gguf
    from ftplan.launcher.merging.modelfile import modelfile

    ui.say(f"writing {tools.kind} as GGUF ...")
    file = write_gguf(tools, folder)
    text = modelfile(file.name, load_tokenizer(request.adapter))
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return {"file": file.name, "type": tools.kind, "bytes": file.stat().st_size}


def _write_card(request: MergeRequest, merged: dict[str, Any], folder: Path) -> None:
    from ftplan.launcher.model_card import write_card

    write_card(request.run, request.record, folder, merged=merged)


def _show(ui: Ui, request: MergeRequest, merged: dict[str, Any]) -> None:
    """Where it is, how it was checked, and how to use it."""
    check, gguf = merged["check"], merged["gguf"]
    lines = [
        f"merged      {merged['folder']} ({format_bytes(merged['weight_bytes'])}, "
        f"{merged['dtype']}, {merged['num_merged_modules']} modules, "
        f"{format_seconds(merged['seconds'])})"
    ]
    if check:
        share = check["adapter_share"]
        beside = f"; the adapter changes them by {share:.1%}" if share is not None else ""
        lines.append(
            f"checked     logits of {check['num_tokens']} tokens differ by "
            f"{check['difference']:.2%}{beside}; the most probable token is the same for "
            f"{check['same_top1']:.0%}"
        )
    if gguf:
        lines.append(
            f"gguf        {merged['folder']}/{gguf['file']} ({format_bytes(gguf['bytes'])})"
        )
        lines.append(f"            ollama create NAME -f {merged['folder']}/Modelfile")
    loader = "AutoModelForSequenceClassification"
    loader = loader if request.objective == "reward" else "AutoModelForCausalLM"
    lines += [
        "use it",
        f"    from transformers import {loader}",
        f'    model = {loader}.from_pretrained("{merged["folder"]}")',
    ]
    ui.show_lines(lines)
