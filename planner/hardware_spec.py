"""The devices a run may use, and the machine around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from ftplan.planner.calibration import UNCALIBRATED, Calibration
from ftplan.planner.units import KIB, MIB

DeviceKind = Literal["cuda", "cpu"]
Vendor = Literal["nvidia", "amd", "apple"]
LinkKind = Literal["nvlink", "nvswitch", "xgmi", "pcie"]

# Memory that a CUDA process holds before its first tensor: context, cuBLAS workspaces and the
# kernels of loaded libraries. Assumed: 0.14 GiB was seen on a T4 process, "several hundred MiB"
# on data-centre cards (fitcheck's measurements); 0.5 GiB stands in until a card's own is known.
ASSUMED_CUDA_CONTEXT_BYTES = 512 * MIB

# Resident memory of a training process less its tensors and the heap's holes: Python, torch,
# transformers, peft, trl, datasets. Measured at 636 MiB (Linux x86-64, CPU build of torch 2.13).
CPU_PROCESS_BYTES = 640 * MIB

# What starting CUDA adds to a process's resident memory: 322,040 KiB before, 2,056,600 after its
# devices were counted and one was used (pytorch/pytorch issue 113326: torch 2.2, CUDA 11.8, RTX
# 3090). One machine's figure; libraries loaded later add to it.
CUDA_HOST_BYTES = (2_056_600 - 322_040) * KIB

# What the C library's heap keeps of freed tensors, as a share of the peak's: micro-batches differ
# in length, and blocks under 32 MiB that are freed between others cannot be given back. Measured
# on nine configurations of SmolLM2-135M (docs/memory-model.md): 0.03 to 0.90 with a median of
# 0.41, and one of them 0 when it was run again. So this is a middle and a worst case, not a law.
CPU_HEAP_HOLES = 0.45
CPU_WORST_HEAP_HOLES = 0.9

# The least compute capability for training beside a quantized base (bitsandbytes' installation
# guide, "CUDA"): its 4-bit kernels, and LLM.int8, which needs the integer tensor cores of Turing.
# GPTQ's and AWQ's dequantization is Triton, which needs Volta (Triton's README).
QUANTIZATION_CAPABILITY: dict[str, tuple[int, int]] = {
    "nf4": (6, 0),
    "fp4": (6, 0),
    "int8": (7, 5),
    "gptq": (7, 0),
    "awq": (7, 0),
}


class MemoryHolder(Struct, frozen=True, kw_only=True):
    """A process that holds GPU memory."""

    pid: int
    name: str
    used_bytes: int | None
    """None where the driver does not tell."""


class PcieLink(Struct, frozen=True, kw_only=True):
    """A GPU's PCI Express link: now, and the most that card, slot and chipset allow together.

    `generation` falls while the GPU idles, to save power; `width`, in lanes, does not.
    """

    generation: int | None = None
    width: int | None = None
    max_generation: int | None = None
    max_width: int | None = None


class GpuLink(Struct, frozen=True, kw_only=True):
    """The way between two of the visible GPUs, named by their `index`.

    `num_links` and `bytes_per_second`, in one direction: direct links, NVLink or AMD's XGMI, none
    over PCIe. `path`: how far apart they are on PCIe, as `nvidia-smi topo -m` calls it. Through a
    switch each reaches every other with all its links, though not all at once.
    """

    first: int
    second: int
    kind: LinkKind
    num_links: int = 0
    bytes_per_second: float = 0.0
    path: str | None = None
    peer_access: bool | None = None
    """Whether one reads the other's memory without the detour through RAM; None if unknown."""


class Network(Struct, frozen=True, kw_only=True):
    """What joins machines. `bytes_per_second`: what collective operations reach, in one direction,
    for each GPU of a machine while all of them send; `latency_seconds`: of one hop."""

    name: str
    bytes_per_second: float
    latency_seconds: float


class Device(Struct, frozen=True, kw_only=True):
    """One GPU, or the processor as a device that can train.

    FLOP/s are dense; `peak_flops_per_second` is keyed by dtype name. `rates_source` says
    whether they are from a data sheet or measured on this machine. `matmul_flops_per_second`: what
    large matrix products reach, of the dtypes that someone measured on such a card.
    `link_bytes_per_second`: what collective operations reach to other GPUs beside it, in one
    direction, by NVLink or the like where it has that, else by PCIe; None where unknown.
    `network`: the way to other machines, None where there are none.
    `host_link_bytes_per_second`: what copies reach from or to the host's memory.
    `calibration`: what finished runs say of the device's constants; none of a catalogued card.
    `power_watts`: the limit in force, `default_power_watts` the board's own; on a catalogued card
    both are the data sheet's. What another vendor's card does is modelled as on NVIDIA's: kind
    `cuda`, no compute capability.
    """

    name: str
    kind: DeviceKind
    index: int = 0
    total_bytes: int
    free_bytes: int
    memory_bandwidth_bytes_per_second: float
    peak_flops_per_second: Mapping[str, float]
    vendor: Vendor = "nvidia"
    compute_capability: tuple[int, int] | None = None
    link_bytes_per_second: float | None = None
    network: Network | None = None
    host_link_bytes_per_second: float | None = None
    power_watts: float | None = None
    default_power_watts: float | None = None
    pcie: PcieLink | None = None
    matmul_flops_per_second: Mapping[str, float] = {}
    context_bytes: int = ASSUMED_CUDA_CONTEXT_BYTES
    rates_source: str = ""
    holders: tuple[MemoryHolder, ...] = ()
    uuid: str | None = None
    calibration: Calibration = UNCALIBRATED

    @property
    def power_capped(self) -> bool:
        """Held below the board's own power limit, by more than what is lost in rounding."""
        if self.power_watts is None or self.default_power_watts is None:
            return False
        return self.power_watts < self.default_power_watts - 1

    @property
    def supports_bfloat16(self) -> bool:
        """bf16 arithmetic: compute capability 8.0 up; any processor (emulated if need be); other
        vendors' cards whose rate in it is known."""
        if self.vendor != "nvidia":
            return "bfloat16" in self.peak_flops_per_second
        return self.kind == "cpu" or (self.compute_capability or (0, 0)) >= (8, 0)

    def supports_quantization(self, quantization: str) -> bool:
        """Whether a base held as `nf4`, `fp4` or `int8` can be trained beside. bitsandbytes has
        kernels for ROCm, and none for Apple's GPUs."""
        if self.vendor != "nvidia":
            return self.vendor == "amd"
        least = QUANTIZATION_CAPABILITY[quantization]
        return self.kind == "cuda" and (self.compute_capability or (0, 0)) >= least


class Host(Struct, frozen=True, kw_only=True):
    """The machine: what is left of it for a run. `ram_*` respect the container's limit."""

    cpu_name: str
    num_cores: int
    ram_total_bytes: int
    ram_available_bytes: int
    disk_free_bytes: int
    disk_path: str


class Machine(Struct, frozen=True, kw_only=True):
    """What a probe found: GPUs (none is possible), the processor as a device, the host."""

    gpus: tuple[Device, ...]
    cpu: Device
    host: Host
    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    """The newest CUDA that the driver runs."""
    links: tuple[GpuLink, ...] = ()
    """Between each two of the visible GPUs."""
    notes: tuple[str, ...] = ()
    """What is missing, hidden or slow: what was found, then after a semicolon what to do."""

    @property
    def best_device(self) -> Device:
        """The GPU with the most free memory, else the processor."""
        return max(self.gpus, key=lambda gpu: gpu.free_bytes, default=self.cpu)
