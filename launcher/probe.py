"""What this machine has: its GPUs, through NVIDIA's management library, and the processor.

No torch and no CUDA context: a probe costs no GPU memory. Memory is what the driver reports now;
rates come from the catalog, by the exact name that the driver reports. A query that fails costs
its own field; what is missing, and why, stands in `Machine.notes`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar, cast

from msgspec import Struct, structs

from ftplan.launcher.cpu_rates import MeasurementFailed, assumed_rates, measured_rates
from ftplan.launcher.host import read_host
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device, Host, Machine, MemoryHolder
from ftplan.profiles import GpuEntry, find_gpu_by_nvml_name

P = ParamSpec("P")
T = TypeVar("T")

# A100, H100, H200 and B200 divide their memory into eight slices. (The A30 has four: two eighths.)
MIG_MEMORY_SLICES = 8

_NVIDIA_PCI_VENDOR = "0x10de"
_PCI_DISPLAY_CLASS = "0x03"

# Names of NVML's errors at start, and what a person can do.
_START_ADVICE = {
    "NVMLError_DriverNotLoaded": "NVIDIA's driver is installed but not loaded: run "
    "`sudo modprobe nvidia`, or restart the machine after a driver update",
    "NVMLError_NoPermission": "this user may not open NVIDIA's driver: check the rights of "
    "/dev/nvidiactl and /dev/nvidia*",
    "NVMLError_LibRmVersionMismatch": "NVIDIA's driver and its library are of different versions: "
    "restart the machine after a driver update",
}


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


class NvmlModule(Protocol):
    """The part of `pynvml` that a probe calls. Handles are opaque."""

    @property
    def NVMLError(self) -> type[Exception]: ...
    @property
    def NVMLError_GpuIsLost(self) -> type[Exception]: ...

    def nvmlInit(self) -> object: ...
    def nvmlShutdown(self) -> object: ...
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...
    def nvmlSystemGetProcessName(self, pid: int, /) -> str | bytes: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...
    def nvmlDeviceGetName(self, handle: object, /) -> str | bytes: ...
    def nvmlDeviceGetUUID(self, handle: object, /) -> str | bytes: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> NvmlMemory: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: object, /) -> tuple[int, int]: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: object, /) -> Sequence[NvmlProcess]: ...
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: object, /) -> Sequence[NvmlProcess]: ...
    def nvmlDeviceGetMigMode(self, handle: object, /) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: object, /) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: object, index: int, /) -> object: ...


def probe_machine(
    *,
    run_dir: Path = Path("."),
    nvml: NvmlModule | None = None,
    environ: Mapping[str, str] = os.environ,
    measure_cpu: bool = False,
    root: Path = Path("/"),
) -> Machine:
    """Everything a plan needs to know of this machine.

    `run_dir`: where the run would be written, for the free disk. `environ` decides which GPUs are
    visible, as CUDA would. `measure_cpu` spends some seconds on the processor's real rates.
    GPUs stand in CUDA's order; `index` is the number that nvidia-smi gives the card.

    Raises InputError where the driver reports visible GPUs and the catalog knows none of them.
    """
    notes: list[str] = []
    host = read_host(run_dir, root)
    gpus: tuple[Device, ...] = ()
    driver_version = None
    nvml = nvml or _import_nvml(notes)
    if nvml is not None:
        with _session(nvml, root, notes) as session:
            if session is not None:
                driver_version = session.driver_version()
                gpus = session.gpus(environ)
    return Machine(
        gpus=gpus,
        cpu=_processor(host, measure_cpu, environ, notes),
        host=host,
        driver_version=driver_version,
        notes=tuple(dict.fromkeys(notes)),
    )


def _processor(host: Host, measure: bool, environ: Mapping[str, str], notes: list[str]) -> Device:
    rates = assumed_rates(host.num_cores)
    if measure:
        try:
            rates = measured_rates(host.num_cores, environ)
        except MeasurementFailed as reason:
            notes.append(
                f"the processor's rates are assumed, since measuring them failed: {reason}"
            )
    return Device(
        name=host.cpu_name,
        kind="cpu",
        total_bytes=host.ram_total_bytes,
        free_bytes=host.ram_available_bytes,
        memory_bandwidth_bytes_per_second=rates.memory_bandwidth_bytes_per_second,
        peak_flops_per_second=rates.flops_per_second,
        context_bytes=0,
        rates_source=rates.source,
    )


def _import_nvml(notes: list[str]) -> NvmlModule | None:
    try:
        import pynvml
    except ImportError:
        notes.append(
            "GPUs cannot be seen without the package `nvidia-ml-py`: "
            "install it with `pip install nvidia-ml-py`"
        )
        return None
    return cast(NvmlModule, pynvml)


@contextmanager
def _session(nvml: NvmlModule, root: Path, notes: list[str]) -> Iterator[_Session | None]:
    """NVML, started and shut down again; None, with a note, where it does not start."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        notes.append(_start_note(error, root))
        yield None
        return
    try:
        yield _Session(nvml=nvml, root=root, notes=notes)
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _start_note(error: Exception, root: Path) -> str:
    kind = type(error).__name__
    if kind != "NVMLError_LibraryNotFound":
        return _START_ADVICE.get(kind, f"NVIDIA's driver does not answer: {error}")
    if not _has_nvidia_display_card(root):
        return "no NVIDIA driver found"
    return (
        "there is an NVIDIA GPU but no driver library (libnvidia-ml): install NVIDIA's driver, "
        "or start the container with GPU access (`docker run --gpus all`)"
    )


def _has_nvidia_display_card(root: Path) -> bool:
    for vendor in (root / "sys/bus/pci/devices").glob("*/vendor"):
        with suppress(OSError):
            device_class = (vendor.parent / "class").read_text(encoding="ascii")
            if vendor.read_text(encoding="ascii").strip() == _NVIDIA_PCI_VENDOR:
                return device_class.startswith(_PCI_DISPLAY_CLASS)
    return False


class _Slot(Struct, frozen=True, kw_only=True):
    """A device that CUDA could use: a GPU, or a MIG device (`handle`) in a GPU (`gpu_handle`)."""

    index: int
    gpu_handle: object
    gpu_name: str
    gpu_uuid: str | None
    handle: object
    name: str
    uuid: str | None

    @property
    def is_mig(self) -> bool:
        return self.handle is not self.gpu_handle

    @property
    def label(self) -> str:
        return f"GPU {self.index}" + (f" ({self.name})" if self.is_mig else "")


class _Session(Struct, frozen=True, kw_only=True):
    """A started NVML, and the notes on what it would not tell."""

    nvml: NvmlModule
    root: Path
    notes: list[str]
    uncatalogued: list[_Slot] = []

    def driver_version(self) -> str | None:
        return self._text("the driver's version is unknown", self.nvml.nvmlSystemGetDriverVersion)

    def gpus(self, environ: Mapping[str, str]) -> tuple[Device, ...]:
        """The visible devices, in CUDA's order."""
        count = self._ask("the GPUs cannot be listed", self.nvml.nvmlDeviceGetCount) or 0
        slots = [self._slots(index) for index in range(count)]
        chosen = _visible(slots, environ, self.notes)
        devices = [device for slot in chosen if (device := self._device(slot)) is not None]
        if self.uncatalogued and not devices:
            raise _uncatalogued_error(self.uncatalogued[0].gpu_name)
        for slot in self.uncatalogued:
            self.notes.append(
                f"{slot.label} is left out: the catalog has no GPU that the driver calls "
                f"`{slot.gpu_name}`; an entry in profiles/gpus would add it"
            )
        return tuple(devices)

    def _slots(self, index: int) -> list[_Slot]:
        """The devices of one GPU: itself, or its MIG devices; none if it is lost."""
        label, nvml = f"GPU {index}", self.nvml
        with self._unless_lost(label):
            without = f"{label} is left out: the driver does not name it"
            gpu = self._ask(without, nvml.nvmlDeviceGetHandleByIndex, index)
            name = None if gpu is None else self._ask(without, nvml.nvmlDeviceGetName, gpu)
            if name is None:
                return []
            uuid = self._uuid(gpu, label)
            slot = _Slot(
                index=index,
                gpu_handle=gpu,
                gpu_name=_decoded(name),
                gpu_uuid=uuid,
                handle=gpu,
                name=_decoded(name),
                uuid=uuid,
            )
            mode = self._ask(None, nvml.nvmlDeviceGetMigMode, gpu)
            return self._mig_slots(slot) if mode is not None and mode[0] == 1 else [slot]
        return []

    def _mig_slots(self, gpu: _Slot) -> list[_Slot]:
        nvml, slots = self.nvml, []
        places = self._ask(None, nvml.nvmlDeviceGetMaxMigDeviceCount, gpu.handle) or 0
        for place in range(places):
            mig = self._ask(None, nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu.handle, place)
            if mig is None:  # an empty place
                continue
            name = self._text(None, nvml.nvmlDeviceGetName, mig) or f"{gpu.name} MIG"
            uuid = self._uuid(mig, f"{gpu.label}, MIG device {place}")
            slots.append(structs.replace(gpu, handle=mig, name=name, uuid=uuid))
        if not slots:
            self.notes.append(
                f"{gpu.label} is left out: MIG is on, but it has no MIG device; "
                "make one (`nvidia-smi mig -cgi ... -C`) or turn MIG off (`nvidia-smi -mig 0`)"
            )
        return slots

    def _device(self, slot: _Slot) -> Device | None:
        nvml = self.nvml
        with self._unless_lost(slot.label):
            without = f"{slot.label} is left out: its memory is unknown"
            memory = self._ask(without, nvml.nvmlDeviceGetMemoryInfo, slot.handle)
            if memory is None:
                return None
            entry = find_gpu_by_nvml_name(slot.gpu_name)
            if entry is None:
                self.uncatalogued.append(slot)
                return None
            share, rates_source = _rates_share(slot, entry, memory.total)
            return Device(
                name=slot.name,
                kind="cuda",
                index=slot.index,
                total_bytes=memory.total,
                free_bytes=memory.free,
                memory_bandwidth_bytes_per_second=share * entry.memory_bandwidth_bytes_per_second,
                peak_flops_per_second={
                    dtype: share * peak for dtype, peak in entry.peak_flops_per_second.items()
                },
                matmul_flops_per_second={
                    dtype: share * rate for dtype, rate in entry.matmul_flops_per_second.items()
                },
                link_bytes_per_second=entry.link_bytes_per_second,
                power_watts=share * entry.power_watts if entry.power_watts else None,
                context_bytes=entry.context_bytes,
                compute_capability=self._compute_capability(slot, entry),
                rates_source=rates_source,
                holders=self._holders(slot),
                uuid=slot.uuid,
            )
        return None

    def _compute_capability(self, slot: _Slot, entry: GpuEntry) -> tuple[int, int] | None:
        without = f"{slot.label}: compute capability taken from the catalog"
        query = self.nvml.nvmlDeviceGetCudaComputeCapability
        return self._ask(without, query, slot.gpu_handle) or entry.compute_capability

    def _holders(self, slot: _Slot) -> tuple[MemoryHolder, ...]:
        """Processes on the device, the largest first; one that computes and draws comes once."""
        without = f"{slot.label}: not all processes that hold its memory are known"
        used_bytes: dict[int, int | None] = {}
        for query in (
            self.nvml.nvmlDeviceGetComputeRunningProcesses,
            self.nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            for process in self._ask(without, query, slot.handle) or ():
                known = [n for n in (used_bytes.get(process.pid), process.usedGpuMemory) if n]
                used_bytes[process.pid] = max(known, default=None)
        holders = (
            MemoryHolder(pid=pid, name=self._process_name(pid), used_bytes=used)
            for pid, used in used_bytes.items()
        )
        return tuple(sorted(holders, key=lambda h: (-(h.used_bytes or 0), h.pid)))

    def _process_name(self, pid: int) -> str:
        """The program's name, without its folder and options."""
        command = self._text(None, self.nvml.nvmlSystemGetProcessName, pid)
        if command:
            program = command.split("\0")[0].split(" -")[0]
            return re.split(r"[/\\]", program)[-1].strip()
        with suppress(OSError):
            return (self.root / f"proc/{pid}/comm").read_text(encoding="utf-8").strip()
        return f"pid {pid}"

    def _uuid(self, handle: object, label: str) -> str | None:
        return self._text(f"{label}: UUID unknown", self.nvml.nvmlDeviceGetUUID, handle)

    def _text(
        self,
        without: str | None,
        query: Callable[P, str | bytes],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> str | None:
        answer = self._ask(without, query, *args, **kwargs)
        return None if answer is None else _decoded(answer)

    def _ask(
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
    def _unless_lost(self, label: str) -> Iterator[None]:
        try:
            yield
        except self.nvml.NVMLError_GpuIsLost:
            self.notes.append(
                f"{label} is left out: the driver has lost it; restart the machine, "
                "and check its power and seating if it happens again"
            )


def _visible(
    slots: Sequence[Sequence[_Slot]], environ: Mapping[str, str], notes: list[str]
) -> list[_Slot]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order. `slots` holds each GPU's devices."""
    everything = [slot for devices in slots for slot in devices]
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    chosen = everything if setting is None else _selected(slots, setting, notes)
    if everything and not chosen:
        notes.append(f"`CUDA_VISIBLE_DEVICES={setting}` hides every GPU")
    if len(chosen) > 1 and any(slot.is_mig for slot in chosen):
        notes.append(
            "a process can use only one MIG device: "
            "name it in CUDA_VISIBLE_DEVICES by its UUID (`nvidia-smi -L`)"
        )
    unlike = len({slot.gpu_name for slot in everything}) > 1
    if unlike and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and _has_index(setting):
        notes.append(
            "the GPUs differ, and CUDA numbers the fastest first while ftplan and nvidia-smi "
            "number by bus: set CUDA_DEVICE_ORDER=PCI_BUS_ID so that indices mean the same"
        )
    return chosen


def _selected(slots: Sequence[Sequence[_Slot]], setting: str, notes: list[str]) -> list[_Slot]:
    """The devices that `setting` names, as CUDA reads it.

    Indices or beginnings of UUIDs; the first that matches no device ends the list, so that -1 or
    nothing hides all; a device named twice hides all. An index or UUID of a GPU with MIG stands
    for its first MIG device.
    """
    chosen: list[_Slot] = []
    for token in map(str.strip, setting.split(",")):
        matching = _matching(slots, token)
        if matching is None:
            if token not in ("", "-1"):
                notes.append(
                    f"CUDA_VISIBLE_DEVICES names `{token}`, which is no single GPU here: "
                    "CUDA ignores it and all that follows"
                )
            break
        chosen += matching
    if len({id(slot) for slot in chosen}) < len(chosen):
        notes.append("CUDA_VISIBLE_DEVICES names a GPU twice: CUDA then shows none")
        return []
    return chosen


def _has_index(setting: str | None) -> bool:
    return any(token.strip().isdigit() for token in (setting or "").split(","))


def _matching(slots: Sequence[Sequence[_Slot]], token: str) -> list[_Slot] | None:
    """The device of an index or beginning of a UUID; empty if its GPU is lost, None if not one."""
    if re.fullmatch(r"[0-9]+", token):
        return list(slots[int(token)][:1]) if int(token) < len(slots) else None
    if token.startswith("GPU-"):
        found = [gpu[0] for gpu in slots if gpu and (gpu[0].gpu_uuid or "").startswith(token)]
    elif token.startswith("MIG-"):
        devices = (slot for gpu in slots for slot in gpu if slot.is_mig)
        found = [slot for slot in devices if (slot.uuid or "").startswith(token)]
    else:
        return None
    return found if len(found) == 1 else None


def _rates_share(slot: _Slot, entry: GpuEntry, memory_bytes: int) -> tuple[float, str]:
    """The share of the GPU's rates that the device gets, and what to say of their source.

    A MIG device's share is that of its memory slices, to the nearest eighth. That holds for
    bandwidth; compute slices differ a little (an A100's 3g.20gb: 4 of 8 and 3 of 7).
    """
    if not slot.is_mig:
        return 1.0, "data sheet"
    held = max(1, round(MIG_MEMORY_SLICES * memory_bytes / entry.memory_bytes))
    share = f"{held}/{MIG_MEMORY_SLICES}"
    return (
        held / MIG_MEMORY_SLICES,
        f"data sheet of the whole GPU, times the assumed share {share} by memory slices",
    )


def _uncatalogued_error(name: str) -> InputError:
    return InputError(
        f"the driver reports a GPU named `{name}`, which the catalog does not have",
        f"add an entry `{_catalog_key(name)}` to a file of profiles/gpus with its data-sheet "
        "numbers and this name under `nvml_names`, or set CUDA_VISIBLE_DEVICES to nothing to use "
        "the processor",
    )


def _catalog_key(name: str) -> str:
    """What a GPU of that name would be called in the catalog: `rtx-4090`."""
    words = re.findall(r"[a-z0-9]+", name.casefold())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


def _decoded(text: str | bytes) -> str:
    """NVML's text: bytes in older versions of pynvml."""
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
