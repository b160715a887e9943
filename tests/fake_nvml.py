"""A whole fake of NVIDIA's management library, as far as ftplan asks it.

`FakeNvml(gpus=[FakeGpu(name=...)])` is handed to the probe where `pynvml` would stand. Any call
can be made to fail: `FakeGpu(fails={"nvmlDeviceGetUUID": NVMLError_NotSupported})`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

GIB = 1024**3


class NVMLError(Exception):
    text = "Unknown Error"

    def __str__(self) -> str:
        return self.text


class NVMLError_NotSupported(NVMLError):
    text = "Not Supported"


class NVMLError_NoPermission(NVMLError):
    text = "Insufficient Permissions"


class NVMLError_NotFound(NVMLError):
    text = "Not Found"


class NVMLError_InvalidArgument(NVMLError):
    text = "Invalid Argument"


class NVMLError_GpuIsLost(NVMLError):
    text = "GPU is lost"


class NVMLError_LibraryNotFound(NVMLError):
    text = "NVML Shared Library Not Found"


class NVMLError_DriverNotLoaded(NVMLError):
    text = "Driver Not Loaded"


class NVMLError_LibRmVersionMismatch(NVMLError):
    text = "RM has detected an NVML/RM version mismatch."


Failures = Mapping[str, type[NVMLError]]


@dataclass(frozen=True)
class FakeMemory:
    total: int
    free: int


@dataclass(frozen=True)
class FakeProcess:
    pid: int
    usedGpuMemory: int | None


@dataclass(frozen=True)
class FakeUtilization:
    gpu: int
    """In percent."""


@dataclass(frozen=True)
class FakePciInfo:
    busId: str | bytes


SWITCH = "NVSwitch"
"""The other end of an NVLink, beside a GPU's bus id."""


@dataclass(eq=False)
class FakeGpu:
    """A GPU or MIG device; it is its own handle."""

    name: str | bytes = "NVIDIA GeForce RTX 4090"
    uuid: str | bytes = "GPU-00000000-0000-0000-0000-000000000000"
    total: int = 24 * GIB
    free: int = 23 * GIB
    compute_capability: tuple[int, int] = (8, 9)
    compute: Sequence[FakeProcess] = ()
    graphics: Sequence[FakeProcess] = ()
    mig: Sequence[FakeGpu | None] | None = None
    """MIG devices by place, None where a place is empty; None where MIG is not supported."""
    mig_mode: int = 1
    power_limit: int = 450_000
    default_power_limit: int = 450_000
    power: int = 300_000
    """In milliwatts."""
    temperature: int = 60
    utilization: int = 97
    pcie: tuple[int, int, int, int] = (1, 16, 4, 16)
    """Generation and width now (idle: 1), and at most."""
    bus_id: str | bytes = "00000000:01:00.0"
    nvlinks: Sequence[str | bytes | None] | None = None
    """The other end of each link, None of one that is down; None where there is no NVLink."""
    fails: Failures = field(default_factory=dict)


@dataclass
class FakeNvml:
    gpus: Sequence[FakeGpu] = ()
    driver_version: str | bytes = "550.54.15"
    cuda_version: int = 12040
    process_names: Mapping[int, str | bytes] = field(default_factory=dict)
    topology_level: int = 20
    p2p_status: int = 0
    fails: Failures = field(default_factory=dict)
    open_sessions: int = 0

    NVMLError = NVMLError
    NVMLError_GpuIsLost = NVMLError_GpuIsLost

    def nvmlInit(self) -> None:
        self._may_fail("nvmlInit", self.fails)
        self.open_sessions += 1

    def nvmlShutdown(self) -> None:
        self.open_sessions -= 1
        self._may_fail("nvmlShutdown", self.fails)

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        self._system("nvmlSystemGetDriverVersion")
        return self.driver_version

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        self._system("nvmlSystemGetCudaDriverVersion")
        return self.cuda_version

    def nvmlSystemGetProcessName(self, pid: int) -> str | bytes:
        self._system("nvmlSystemGetProcessName")
        if pid not in self.process_names:
            raise NVMLError_NotFound
        return self.process_names[pid]

    def nvmlDeviceGetCount(self) -> int:
        self._system("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self._device("nvmlDeviceGetHandleByIndex", self.gpus[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> FakeGpu:
        for gpu in self.gpus:
            if gpu.uuid in (uuid, uuid.decode()):
                return self._device("nvmlDeviceGetHandleByUUID", gpu)
        raise NVMLError_NotFound

    def nvmlDeviceGetUtilizationRates(self, handle: FakeGpu) -> FakeUtilization:
        return FakeUtilization(self._device("nvmlDeviceGetUtilizationRates", handle).utilization)

    def nvmlDeviceGetTemperature(self, handle: FakeGpu, sensor: int) -> int:
        assert sensor == 0, "NVML_TEMPERATURE_GPU"
        return self._device("nvmlDeviceGetTemperature", handle).temperature

    def nvmlDeviceGetPowerUsage(self, handle: FakeGpu) -> int:
        return self._device("nvmlDeviceGetPowerUsage", handle).power

    def nvmlDeviceGetName(self, handle: FakeGpu) -> str | bytes:
        return self._device("nvmlDeviceGetName", handle).name

    def nvmlDeviceGetUUID(self, handle: FakeGpu) -> str | bytes:
        return self._device("nvmlDeviceGetUUID", handle).uuid

    def nvmlDeviceGetMemoryInfo(self, handle: FakeGpu) -> FakeMemory:
        gpu = self._device("nvmlDeviceGetMemoryInfo", handle)
        return FakeMemory(total=gpu.total, free=gpu.free)

    def nvmlDeviceGetCudaComputeCapability(self, handle: FakeGpu) -> tuple[int, int]:
        return self._device("nvmlDeviceGetCudaComputeCapability", handle).compute_capability

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeGpu) -> Sequence[FakeProcess]:
        return self._device("nvmlDeviceGetComputeRunningProcesses", handle).compute

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: FakeGpu) -> Sequence[FakeProcess]:
        return self._device("nvmlDeviceGetGraphicsRunningProcesses", handle).graphics

    def nvmlDeviceGetMigMode(self, handle: FakeGpu) -> list[int]:
        gpu = self._device("nvmlDeviceGetMigMode", handle)
        if gpu.mig is None:
            raise NVMLError_NotSupported
        return [gpu.mig_mode, gpu.mig_mode]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: FakeGpu) -> int:
        return len(self._device("nvmlDeviceGetMaxMigDeviceCount", handle).mig or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: FakeGpu, index: int) -> FakeGpu:
        gpu = self._device("nvmlDeviceGetMigDeviceHandleByIndex", handle)
        mig = (gpu.mig or ())[index]
        if mig is None:
            raise NVMLError_NotFound
        return mig

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: FakeGpu) -> int:
        return self._device("nvmlDeviceGetEnforcedPowerLimit", handle).power_limit

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: FakeGpu) -> int:
        gpu = self._device("nvmlDeviceGetPowerManagementDefaultLimit", handle)
        return gpu.default_power_limit

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: FakeGpu) -> int:
        return self._device("nvmlDeviceGetCurrPcieLinkGeneration", handle).pcie[0]

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: FakeGpu) -> int:
        return self._device("nvmlDeviceGetCurrPcieLinkWidth", handle).pcie[1]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: FakeGpu) -> int:
        return self._device("nvmlDeviceGetMaxPcieLinkGeneration", handle).pcie[2]

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: FakeGpu) -> int:
        return self._device("nvmlDeviceGetMaxPcieLinkWidth", handle).pcie[3]

    def nvmlDeviceGetPciInfo(self, handle: FakeGpu) -> FakePciInfo:
        return FakePciInfo(self._device("nvmlDeviceGetPciInfo", handle).bus_id)

    def nvmlDeviceGetNvLinkState(self, handle: FakeGpu, link: int) -> int:
        gpu = self._device("nvmlDeviceGetNvLinkState", handle)
        if gpu.nvlinks is None:
            raise NVMLError_NotSupported
        if link >= len(gpu.nvlinks):
            raise NVMLError_InvalidArgument
        return int(gpu.nvlinks[link] is not None)

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: FakeGpu, link: int) -> int:
        gpu = self._device("nvmlDeviceGetNvLinkRemoteDeviceType", handle)
        return 2 if (gpu.nvlinks or ())[link] == SWITCH else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: FakeGpu, link: int) -> FakePciInfo:
        gpu = self._device("nvmlDeviceGetNvLinkRemotePciInfo", handle)
        remote = (gpu.nvlinks or ())[link]
        assert remote is not None, "a link that is down was asked for its other end"
        return FakePciInfo("00000000:FF:00.0" if remote == SWITCH else remote)

    def nvmlDeviceGetTopologyCommonAncestor(self, one: FakeGpu, other: FakeGpu) -> int:
        self._device("nvmlDeviceGetTopologyCommonAncestor", one)
        return self.topology_level

    def nvmlDeviceGetP2PStatus(self, one: FakeGpu, other: FakeGpu, index: int) -> int:
        self._device("nvmlDeviceGetP2PStatus", one)
        assert index == 0, "NVML_P2P_CAPS_INDEX_READ"
        return self.p2p_status

    def _system(self, call: str) -> None:
        assert self.open_sessions == 1, f"{call} outside nvmlInit ... nvmlShutdown"
        self._may_fail(call, self.fails)

    def _device(self, call: str, gpu: FakeGpu) -> FakeGpu:
        self._system(call)
        self._may_fail(call, gpu.fails)
        return gpu

    @staticmethod
    def _may_fail(call: str, fails: Failures) -> None:
        if error := fails.get(call):
            raise error
