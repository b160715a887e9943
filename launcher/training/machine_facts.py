"""The machine of a run, as environment.json tells of it."""

from __future__ import annotations

from typing import Any

import torch

from ftplan.launcher.host import cpu_name, usable_cores


def machine_facts() -> dict[str, Any]:
    """Names and sizes of processor and GPU, and the driver's version where there is one."""
    has_gpu = torch.cuda.is_available()
    return {
        "processor": cpu_name(),
        "num_cores": usable_cores(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties().total_memory if has_gpu else None,
        "driver": _driver_version() if has_gpu else None,
    }


def _driver_version() -> str | None:
    """NVIDIA's, None where NVML is not there or will not say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # other vendors' cards, containers
        return None
    return version.decode() if isinstance(version, bytes) else str(version)
