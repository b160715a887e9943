"""What a run really takes: memory on GPU or processor, seconds a step.

On CUDA the caching allocator's own counters. On the processor tensors are counted by torch's
profiler during the first two steps (they hold the longest batches, the second one optimizer
states too), and the process by the kernel's high-water mark.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ftplan.launcher.training.allocations import highest_rise, levels


class CpuAllocationRecorder:
    """Peak of tensor bytes on the processor while it is on."""

    def __init__(self) -> None:
        self._profiler: Any = None
        self._base_bytes = 0
        self._marks: list[tuple[int, str]] = []
        self.peak_bytes: int | None = None
        self.peaks: dict[str, int] = {}  # by phase

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        beside: Sequence[nn.Module] = (),
        remembered: Iterable[torch.Tensor] = (),
    ) -> None:
        """`beside`: models that are held and not trained; `remembered`: tensors that a method keeps
        outside of its modules."""
        self._base_bytes = live_bytes(model, optimizer)
        self._base_bytes += sum(storage_sizes(remembered).values())
        self._base_bytes += sum(live_bytes(other, None) for other in beside)
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._marks = []
        self._profiler.__enter__()

    def mark(self, phase: str) -> None:
        """A phase ends here. Its peak is known once the recorder has stopped."""
        if self._profiler is not None:
            self._marks.append((time.time_ns(), phase))

    def stop(self) -> None:
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        peak = self._base_bytes + highest_rise(self._profiler)
        self.peak_bytes = max(self.peak_bytes or 0, peak)
        for phase, rise in rises_by_phase(levels(self._profiler), self._marks).items():
            self.peaks[phase] = max(self.peaks.get(phase, 0), self._base_bytes + rise)
        self._profiler = None


def rises_by_phase(
    levels: Sequence[tuple[int, int]], marks: Sequence[tuple[int, str]]
) -> dict[str, int]:
    """The highest level of each phase. `marks`: when phases end, in order, and their names; what
    a phase begins with is its own too."""
    found: dict[str, int] = {}
    level, at = 0, 0
    for end, phase in marks:
        highest = level
        while at < len(levels) and levels[at][0] <= end:
            level = levels[at][1]
            highest = max(highest, level)
            at += 1
        found[phase] = max(found.get(phase, 0), highest)
    return found


def live_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of parameters, buffers and what else modules hold, gradients and optimizer states,
    shared storage once."""
    tensors = list(_held(model))
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    if optimizer is not None:
        tensors += [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
    return sum(storage_sizes(tensors).values())


def _held(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, scales of quantized ones, and tensors that are neither, such as the
    places of SHiRA's weights."""
    for module in model.modules():
        for value in vars(module).values():
            for one in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(one, torch.Tensor):
                    yield one
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (one for one in vars(state).values() if isinstance(one, torch.Tensor))
            state = getattr(state, "state2", None)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be spread over several."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def storage_sizes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage in this process, by address."""
    sizes = {}
    for tensor in tensors:
        storage = local_tensor(tensor).untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def process_peak_bytes() -> int | None:
    """The process's highest resident memory so far (Linux); None elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def on_cuda() -> bool:
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())


def allocated_peak(recorder: CpuAllocationRecorder, earlier: Mapping[str, int]) -> int | None:
    """The highest bytes of tensors so far, as `measured_memory` has them; None until known."""
    if on_cuda():
        return max(int(torch.cuda.max_memory_allocated()), earlier.get("allocated_bytes", 0))
    return recorder.peak_bytes


def measured_memory(
    recorder: CpuAllocationRecorder, earlier: Mapping[str, int] | None = None
) -> dict[str, int | None]:
    """Peak bytes: allocated, reserved, device, in the sense of the estimate. `earlier`: the highest
    of each before the counters were last reset."""
    earlier = earlier or {}
    allocated = allocated_peak(recorder, earlier)
    if on_cuda():
        reserved = max(torch.cuda.max_memory_reserved(), earlier.get("reserved_bytes", 0))
        return {
            "allocated_bytes": allocated,
            "reserved_bytes": reserved,
            "device_bytes": bytes_beside_cache() + reserved,
        }
    resident = process_peak_bytes()
    return {
        "allocated_bytes": allocated,
        "reserved_bytes": recorder.peak_bytes,
        "device_bytes": resident and max(resident, earlier.get("device_bytes", 0)),
    }


def bytes_beside_cache() -> int:
    """What the driver shows of this process beside the allocator's cache: context, libraries. It
    does not shrink with the cache."""
    free, total = torch.cuda.mem_get_info()
    return process_device_bytes(total - free) - int(torch.cuda.memory_reserved())


def process_device_bytes(fallback: int) -> int:
    """GPU memory of this process by NVML; `fallback` (all that is used) where it will not say."""
    try:
        import os

        import pynvml

        pynvml.nvmlInit()
        try:
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return int(process.usedGpuMemory)
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # containers hide processes, drivers lack the query
        return fallback
    return fallback
