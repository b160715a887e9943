"""Finished run directories as far as the history reads them, written without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import structs

from ftplan.launcher.run_dir import RunDir, write_json, write_yaml
from ftplan.launcher.version import version
from ftplan.planner.calibration_fit import PastRun

SECRET = "hf_aSecretOfThisUsersThatNobodyElseShouldSee"


def write_finished(root: Path, run: PastRun, number: int = 0, **changes: Any) -> RunDir:
    """A run on an L4; `changes`: of plan.yaml's `ftplan` and `device`, and of environment.json."""
    made = RunDir(root)
    assert run.parts is not None and run.step_seconds
    tokens = 4096.0
    predicted = {
        "allocated_bytes": run.allocated_bytes,
        "reserved_bytes": run.reserved_bytes,
        "device_bytes": run.reserved_bytes + run.context_bytes,
        "closed_form_device_bytes": None,
        "formula": {
            "reserved_bytes": run.reserved_bytes,
            "closed_form_reserved_bytes": None,
            "context_bytes": run.context_bytes,
            "tokens_per_step": tokens,
            "step_parts": structs.asdict(run.parts),
        },
        "calibration": None,
    }
    settings = {
        "method": "lora",
        "lora_rank": 8,
        "max_length": 512,
        "reward_model": f"/home/somebody/{SECRET}",
        "add_tokens": [SECRET],
    }
    write_yaml(
        made.plan,
        {
            "ftplan": changes.get("ftplan", version()),
            "planned_at": f"2026-11-23T{number:02}:00:00Z",
            "model": {"name": SECRET, "hub_id": SECRET},
            "device": changes.get("device", {"name": "L4", "kind": "cuda"}),
            "plan": {name: {"value": value} for name, value in settings.items()},
            "estimate": {
                "model": {
                    "name": SECRET,
                    "architecture": "LlamaForCausalLM",
                    "num_parameters": 10**9 + int(run.configuration),
                }
            },
        },
    )
    write_json(
        made.environment,
        {
            "python": "3.11.7",
            "platform": "Linux",
            "packages": {"torch": "2.13.0+cu130", "bitsandbytes": None},
            "gpu": "NVIDIA L4",
            "gpu_memory_bytes": 24 * 10**9,
            "driver": "580.65.06",
            "processor": "AMD EPYC",
            "argv": [f"/home/somebody/{SECRET}"],
            **changes.get("environment", {}),
        },
    )
    write_json(
        made.record,
        {
            "name": SECRET,
            "method": "lora",
            "num_trainable_parameters": 10**7,
            "predicted": predicted,
            "measured": {
                "allocated_bytes": run.measured_allocated_bytes,
                "reserved_bytes": run.measured_reserved_bytes,
                "device_bytes": run.measured_device_bytes,
                "settled_tokens_per_second_per_gpu": tokens / run.step_seconds,
                "seconds": {"load": 1.0},
            },
            "samples": [SECRET],
        },
    )
    return made
