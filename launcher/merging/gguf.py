"""The merged model as one GGUF file, by llama.cpp's own tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from ftplan.planner.errors import InputError, RunFailedError

CONVERT = "convert_hf_to_gguf.py"
QUANTIZE = "llama-quantize"

# What the converter writes itself; everything else is quantized from 16 bits.
CONVERTED = ("f32", "f16", "bf16", "q8_0")
QUANTIZED = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_k_s", "q4_k_m", "q5_0", "q5_k_s"),
    *("q5_k_m", "q6_k"),
)
DEFAULT_TYPE = "f16"

_LAST_LINES = 3


class GgufTools(Struct, frozen=True):
    """The type that is wanted, and the paths of llama.cpp's programs."""

    kind: str
    convert: str
    quantize: str | None


def find_tools(kind: str, environ: Mapping[str, str] = os.environ) -> GgufTools:
    """Raises InputError for a type that there is not, and where a tool is missing."""
    if kind not in (*CONVERTED, *QUANTIZED):
        raise InputError(f"no GGUF type `{kind}`", f"one of {', '.join((*CONVERTED, *QUANTIZED))}")
    path = environ.get("PATH")
    convert = shutil.which(CONVERT, path=path)
    if convert is None:
        raise InputError(
            f"`--gguf` needs llama.cpp's `{CONVERT}`, which is not on PATH",
            "clone llama.cpp from https://github.com/ggml-org/llama.cpp, install its "
            "requirements.txt, and put its folder on PATH (the file must be executable)",
        )
    quantize = shutil.which(QUANTIZE, path=path)
    if quantize is None and kind in QUANTIZED:
        raise InputError(
            f"`--gguf {kind}` needs llama.cpp's `{QUANTIZE}`, which is not on PATH",
            f"build llama.cpp or install a release of it; or take `--gguf {CONVERTED[-1]}`, which "
            f"`{CONVERT}` writes alone",
        )
    return GgufTools(kind, convert, quantize)


def write_gguf(tools: GgufTools, folder: Path) -> Path:
    """`model-TYPE.gguf` in the model's folder. Raises RunFailedError with what the tool said."""
    kind = tools.kind
    target = folder / f"model-{kind}.gguf"
    if kind in CONVERTED:
        _converted(tools, folder, target, kind)
        return target
    assert tools.quantize is not None, "`find_tools` has looked"
    whole = folder / ".model-f16.gguf"
    try:
        _converted(tools, folder, whole, DEFAULT_TYPE)
        _run([tools.quantize, str(whole), str(target), kind.upper()])
    finally:
        whole.unlink(missing_ok=True)
    return target


def _converted(tools: GgufTools, folder: Path, target: Path, kind: str) -> None:
    command = [tools.convert, str(folder), "--outfile", str(target), "--outtype", kind]
    _run([sys.executable, *command])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-_LAST_LINES:]
        name = next(Path(word).name for word in command if not word.startswith(sys.executable))
        raise RunFailedError(
            f"`{name}` failed: {' '.join(lines) or 'it said nothing'}",
            "the merged model itself is whole; llama.cpp may not know this architecture yet",
        )
