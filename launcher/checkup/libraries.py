"""What the libraries that train say of themselves, each asked in a process of its own.

`python -m ftplan.launcher.checkup.libraries torch` imports one and prints one JSON object:
importing takes seconds, and a broken library can end the process that imports it.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from msgspec import Struct

TIMEOUT_SECONDS = 120

# What is asked, and the package whose absence spares the question.
ASKED = {
    "torch": "torch",
    "bitsandbytes": "bitsandbytes",
    "flash_attn": "flash_attn",
    "trainer": "trl",
}


class Answer(Struct, frozen=True, kw_only=True):
    """A library's facts, or why there are none."""

    facts: Mapping[str, Any] = {}
    error: str | None = None


def ask_libraries(
    environ: Mapping[str, str], answered: Callable[[str], None] = lambda name: None
) -> dict[str, Answer]:
    """The answers of those that are installed, by name. They are asked at once; `answered` hears of
    each as it comes."""
    installed = [name for name, package in ASKED.items() if importlib.util.find_spec(package)]
    answers: dict[str, Answer] = {}
    with ThreadPoolExecutor(len(ASKED)) as pool:
        asked = {pool.submit(ask, name, environ): name for name in installed}
        for done in as_completed(asked):
            answers[asked[done]] = done.result()
            answered(asked[done])
    return answers


def ask(name: str, environ: Mapping[str, str], timeout_seconds: float = TIMEOUT_SECONDS) -> Answer:
    """One library's answer. PYTHONSAFEPATH as in training: no `torch.py` of the user's folder; and
    no word to the Hub."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "ftplan.launcher.checkup.libraries", name],
            env={**environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer after {timeout_seconds:.0f} s")
    except OSError as error:
        return Answer(error=str(error))
    if child.returncode < 0:
        return Answer(error=f"its process died by {_signal_name(-child.returncode)}")
    if child.returncode > 0:
        return Answer(error=(child.stderr.strip().splitlines() or ["it failed without a word"])[-1])
    try:
        facts = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        facts = None
    if not isinstance(facts, dict):
        return Answer(error="its answer could not be read")
    return Answer(facts=facts)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- in the child


def torch_facts() -> dict[str, Any]:
    """The build, and what it says of the GPUs. Counting them makes no context."""
    import torch

    available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "mps": torch.backends.mps.is_available(),
        "available": available,
        "num_gpus": torch.cuda.device_count() if available else 0,
        "architectures": torch.cuda.get_arch_list() if available else _built_for(),
        "why_not": None if available else _why_not(),
    }


def _built_for() -> list[str]:
    """What `torch.cuda.get_arch_list` would say if it saw a GPU."""
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
    return flags.split() if flags else []


def _why_not() -> str | None:
    """The first line of torch's own complaint; None of a build that knows no GPU."""
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return None
    try:
        torch.cuda.init()
    except Exception as error:  # whatever keeps it from its GPUs is what is asked for
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


def bitsandbytes_facts() -> dict[str, Any]:
    """Which native library it has loaded; with a stand-in, calling a kernel fails."""
    import bitsandbytes
    from bitsandbytes.cextension import lib

    return {
        "version": bitsandbytes.__version__,
        "library": type(lib).__name__,
        "error": vars(lib).get("error_msg"),
    }


def flash_attn_facts() -> dict[str, Any]:
    """Its version, once the compiled part has been loaded."""
    import flash_attn
    from flash_attn import flash_attn_func  # noqa: F401

    return {"version": flash_attn.__version__}


def trainer_facts() -> dict[str, Any]:
    """Nothing but that what a run imports can be imported together."""
    from accelerate import Accelerator  # noqa: F401
    from datasets import Dataset  # noqa: F401
    from peft import LoraConfig  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    return {}


FACTS = {
    "torch": torch_facts,
    "bitsandbytes": bitsandbytes_facts,
    "flash_attn": flash_attn_facts,
    "trainer": trainer_facts,
}


def main(argv: list[str]) -> int:
    """The child."""
    sys.stdout.write(json.dumps(FACTS[argv[1]]()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
