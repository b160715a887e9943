"""How long a dry run takes, and how much memory: `python benchmarks/dry_run.py [NAME ...]`.

Each case is a fresh `ftplan estimate --exact`, imports included. Prints one line a case and
exits with 1 when one exceeds its limit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from msgspec import Struct

from ftplan.planner.units import GIB

MEMORY_LIMIT_BYTES = 3 * GIB

# DeepSeek-V3's config.json, as far as the shape goes (671 B parameters).
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}


class Case(Struct, frozen=True):
    """What is estimated, and the seconds it may take on two cores."""

    name: str
    model: str
    method: str
    limit_seconds: float


CASES = (
    Case("8B LoRA", "llama-3.1-8b", "lora", 12),
    Case("8B QLoRA", "llama-3.1-8b", "qlora", 12),
    Case("8B full", "llama-3.1-8b", "full", 12),
    Case("70B QLoRA", "llama-3.1-70b", "qlora", 20),
    Case("70B full", "llama-3.1-70b", "full", 20),
    Case("671B mixture LoRA", "deepseek_v3", "lora", 60),
)


def main(names: list[str]) -> int:
    exceeded = False
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "deepseek_v3"
        config.mkdir()
        (config / "config.json").write_text(json.dumps(DEEPSEEK_V3))
        for case in CASES:
            if names and case.name not in names:
                continue
            seconds, peak_bytes = run(case, str(config))
            within = seconds <= case.limit_seconds and peak_bytes <= MEMORY_LIMIT_BYTES
            exceeded |= not within
            print(
                f"{case.name:20} {seconds:6.1f} s of {case.limit_seconds:3.0f}   "
                f"{peak_bytes / GIB:5.2f} GiB of {MEMORY_LIMIT_BYTES / GIB:.0f}   "
                f"{'within' if within else 'EXCEEDED'}",
                flush=True,
            )
    return int(exceeded)


def run(case: Case, deepseek_folder: str) -> tuple[float, int]:
    """(seconds, highest resident bytes of any process) of one estimate."""
    model = deepseek_folder if case.model == "deepseek_v3" else case.model
    words = ["estimate", model, "--method", case.method, "--exact", "--json"]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "ftplan", *words], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max([peak, *(resident_bytes(pid) for pid in family(process.pid))])
        time.sleep(0.05)
    assert process.returncode == 0, f"{case.name}: exit status {process.returncode}"
    return time.perf_counter() - began, peak


def family(pid: int) -> list[int]:
    """A process and its children (Linux)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *map(int, children)]


def resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
