"""`python -m ftplan.launcher.training.convert_gguf GGUF FOLDER`: GGUF to safetensors.

Two traps in transformers 5: a model loaded from GGUF stays packed, and counts as quantized, so
that `save_pretrained` refuses it, unless it is dequantized by its GgufConfig; and the tokenizer
needs the same `gguf_file`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, target: Path) -> None:
    """Write `target/` with bf16 safetensors, config and tokenizer."""
    folder, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, **_dequantized(name)
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _forget_quantization(target / "config.json")


def _dequantized(name: str) -> dict[str, object]:
    """Arguments that ask for plain weights, where this transformers keeps them packed."""
    try:
        from transformers import GgufConfig
    except ImportError:  # earlier releases always dequantize
        return {}
    return {"quantization_config": GgufConfig(gguf_file=name, dequantize=True)}


def _forget_quantization(path: Path) -> None:
    """Take the GGUF's traces out of config.json, or the folder would load as quantized."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
