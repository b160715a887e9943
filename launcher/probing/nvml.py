"""NVIDIA's management library: what a probe calls of it, and how it is asked.

A query that fails costs its own answer: `Session.ask` gives None and notes what is missing. A GPU
that the driver has lost costs the GPU: `Session.unless_lost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar, cast

from msgspec import Struct

P = ParamSpec("P")
T = TypeVar("T")

_NVIDIA_PCI_VENDOR = "0x10de"
_PCI_DISPLAY_CLASS = "0x03"

# Names of NVML's errors at start, and what a person can do.
_START_ADVICE = {
    "NVMLError_DriverNotLoaded": "NVIDIA's driver is installed but not loaded; run "
    "`sudo modprobe nvidia`, or restart the machine after a driver update",
    "NVMLError_NoPermission": "this user may not open NVIDIA's driver; check the rights of "
    "/dev/nvidiactl and /dev/nvidia*",
    "NVMLError_LibRmVersionMismatch": "NVIDIA's driver and its library are of different versions; "
    "restart the machine after a driver update",
}
NO_DRIVER = "no NVIDIA driver found"
NO_LIBRARY = (
    "NVIDIA's GPUs cannot be seen without the package `nvidia-ml-py`; "
    "install it with `pip install nvidia-ml-py`"
)
_NO_ANSWER = "NVIDIA's driver does not answer"
_NO_LIBRARY_OF_DRIVER = (
    "there is an NVIDIA GPU but no driver library (libnvidia-ml); install NVIDIA's driver, "
    "or start the container with GPU access (`docker run --gpus all`)"
)
_LOST = "the driver has lost it"


def is_fault(note: str) -> bool:
    """Whether a note tells of a GPU that is there and does not work, rather than of a setting, a
    sensor or a card that the catalog lacks."""
    faults = (*_START_ADVICE.values(), _NO_LIBRARY_OF_DRIVER, NO_LIBRARY)
    return note in faults or note.startswith(_NO_ANSWER) or _LOST in note


class NvmlMemory(Protocol):
    """Sizes in bytes."""

    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...


class NvmlProcess(Protocol):
    """A process on a GPU; `usedGpuMemory` in bytes, None where the driver does not tell."""

    @property
    def pid(self) -> int: ...
    @property
    def usedGpuMemory(self) -> int | None: ...


class NvmlUtilization(Protocol):
    """Percent of the last sampling interval in which a kernel ran."""

    @property
    def gpu(self) -> int: ...


class NvmlPciInfo(Protocol):
    """A place on the PCI bus, such as `00000000:3B:00.0`."""

    @property
    def busId(self) -> str | bytes: ...


class NvmlModule(Protocol):
    """The part of `pynvml` that a probe calls. Handles are opaque; power is in milliwatts."""

    @property
    def NVMLError(self) -> type[Exception]: ...
    @property
    def NVMLError_GpuIsLost(self) -> type[Exception]: ...

    def nvmlInit(self) -> object: ...
    def nvmlShutdown(self) -> object: ...
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...
    def nvmlSystemGetCudaDriverVersion(self) -> int: ...
    def nvmlSystemGetProcessName(self, pid: int, /) -> str | bytes: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, /) -> object: ...
    def nvmlDeviceGetName(self, handle: object, /) -> str | bytes: ...
    def nvmlDeviceGetUUID(self, handle: object, /) -> str | bytes: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> NvmlMemory: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: object, /) -> tuple[int, int]: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: object, /) -> Sequence[NvmlProcess]: ...
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object, /) -> Sequence[NvmlProcess]: ...
    def nvmlDeviceGetMigMode(self, handle: object, /) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object, /) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int, /) -> object: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> NvmlUtilization: ...
    def nvmlDeviceGetTemperature(self, handle: object, sensor: int, /) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int: ...
    def nvmlDeviceGetEnforcedPowerLimit(self, handle: object, /) -> int: ...
    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: object, /) -> int: ...
    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: object, /) -> int: ...
    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: object, /) -> int: ...
    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: object, /) -> int: ...
    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: object, /) -> int: ...
    def nvmlDeviceGetPciInfo(self, handle: object, /) -> NvmlPciInfo: ...
    def nvmlDeviceGetNvLinkState(self, handle: object, link: int, /) -> int: ...
    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: object, link: int, /) -> int: ...
    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: object, link: int, /) -> NvmlPciInfo: ...
    def nvmlDeviceGetTopologyCommonAncestor(self, one: object, other: object, /) -> int: ...
    def nvmlDeviceGetP2PStatus(self, one: object, other: object, index: int, /) -> int: ...


def import_nvml(notes: list[str]) -> NvmlModule | None:
    """`pynvml`; None, with a note, where it is not installed."""
    try:
        import pynvml
    except ImportError:
        notes.append(NO_LIBRARY)
        return None
    return cast(NvmlModule, pynvml)


@contextmanager
def session(nvml: NvmlModule, root: Path, notes: list[str]) -> Iterator[Session | None]:
    """NVML, started and shut down again; None, with a note, where it does not start."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        notes.append(_start_note(error, root))
        yield None
        return
    try:
        yield Session(nvml=nvml, root=root, notes=notes)
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _start_note(error: Exception, root: Path) -> str:
    kind = type(error).__name__
    if kind != "NVMLError_LibraryNotFound":
        return _START_ADVICE.get(kind, f"{_NO_ANSWER}: {error}")
    if not _has_nvidia_display_card(root):
        return NO_DRIVER
    return _NO_LIBRARY_OF_DRIVER


def _has_nvidia_display_card(root: Path) -> bool:
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        with suppress(OSError):
            device_class = (vendor.parent / "class").read_text(encoding="ascii")
            if vendor.read_text(encoding="ascii").strip() == _NVIDIA_PCI_VENDOR:
                return device_class.startswith(_PCI_DISPLAY_CLASS)
    return False


class Session(Struct, frozen=True, kw_only=True):
    """A started NVML, and the notes on what it would not tell."""

    nvml: NvmlModule
    root: Path
    notes: list[str]

    def driver_version(self) -> str | None:
        return self.text("the driver's version is unknown", self.nvml.nvmlSystemGetDriverVersion)

    def cuda_version(self) -> tuple[int, int] | None:
        """The newest CUDA that the driver runs; NVML says 12040 for 12.4."""
        number = self.ask(None, self.nvml.nvmlSystemGetCudaDriverVersion)
        return (number // 1000, number % 1000 // 10) if number else None

    def text(
        self,
        without: str | None,
        query: Callable[P, str | bytes],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> str | None:
        answer = self.ask(without, query, *args, **kwargs)
        return None if answer is None else decoded(answer)

    def ask(
        self, without: str | None, query: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """The answer; None, with the note `without` it, where NVML refuses. A lost GPU raises."""
        try:
            return query(*args, **kwargs)
        except self.nvml.NVMLError_GpuIsLost:
            raise
        except self.nvml.NVMLError as error:
            if without is not None:
                self.notes.append(f"{without} ({error})")
            return None

    @contextmanager
    def unless_lost(self, label: str) -> Iterator[None]:
        try:
            yield
        except self.nvml.NVMLError_GpuIsLost:
            self.notes.append(
                f"{label} is left out: {_LOST}; restart the machine, "
                "and check its power and seating if it happens again"
            )


def decoded(text: str | bytes) -> str:
    """NVML's text: bytes in older versions of pynvml."""
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
