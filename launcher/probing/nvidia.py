"""NVIDIA's GPUs, through the management library of its driver.

No torch and no CUDA context: a probe costs no GPU memory. Memory, power limit and PCIe are what
the driver reports now; rates come from the catalog, by the exact name that the driver reports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress

from msgspec import Struct, structs

from ftplan.launcher.probing.cuda_visible import Slot, visible
from ftplan.launcher.probing.linked import Found, notes_on, with_links
from ftplan.launcher.probing.nvidia_links import gpu_links
from ftplan.launcher.probing.nvml import Session, decoded
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device, GpuLink, MemoryHolder, PcieLink
from ftplan.profiles import GpuEntry, find_gpu_by_driver_name

# A100, H100, H200 and B200 divide their memory into eight slices. (The A30 has four: two eighths.)
MIG_MEMORY_SLICES = 8


def nvidia_gpus(
    session: Session, environ: Mapping[str, str]
) -> tuple[tuple[Device, ...], tuple[GpuLink, ...]]:
    """The visible devices, in CUDA's order, and the links between them.

    Raises InputError where GPUs are visible and the catalog knows none of them.
    """
    return _Reader(session=session).gpus(environ)


class _Reader(Struct, frozen=True, kw_only=True):
    """Reads GPUs; keeps those that the catalog lacks."""

    session: Session
    uncatalogued: list[Slot] = []

    def gpus(self, environ: Mapping[str, str]) -> tuple[tuple[Device, ...], tuple[GpuLink, ...]]:
        ask, nvml, notes = self.session.ask, self.session.nvml, self.session.notes
        count = ask("the GPUs cannot be listed", nvml.nvmlDeviceGetCount) or 0
        slots = [self._slots(index) for index in range(count)]
        chosen = [(slot, self._found(slot)) for slot in visible(slots, environ, notes)]
        found = [(slot, gpu) for slot, gpu in chosen if gpu is not None]
        if self.uncatalogued and not found:
            raise _uncatalogued_error(self.uncatalogued[0].gpu_name)
        for slot in self.uncatalogued:
            notes.append(
                f"{slot.label} is left out: the catalog has no GPU that the driver calls "
                f"`{slot.gpu_name}`; an entry in profiles/gpus would add it"
            )
        links, own = gpu_links(
            self.session,
            [(slot, gpu.entry) for slot, gpu in found],
            [gpu[0].gpu_handle for gpu in slots if gpu],
        )
        notes += [
            note for slot, gpu in found for note in notes_on(slot.label, gpu.device, gpu.entry)
        ]
        return with_links([gpu for _, gpu in found], links, own), links

    def _slots(self, index: int) -> list[Slot]:
        """The devices of one GPU: itself, or its MIG devices; none if it is lost."""
        label, nvml, ask = f"GPU {index}", self.session.nvml, self.session.ask
        with self.session.unless_lost(label):
            without = f"{label} is left out: the driver does not name it"
            gpu = ask(without, nvml.nvmlDeviceGetHandleByIndex, index)
            name = None if gpu is None else ask(without, nvml.nvmlDeviceGetName, gpu)
            if name is None:
                return []
            uuid = self._uuid(gpu, label)
            slot = Slot(
                index=index,
                gpu_handle=gpu,
                gpu_name=decoded(name),
                gpu_uuid=uuid,
                handle=gpu,
                name=decoded(name),
                uuid=uuid,
            )
            mode = ask(None, nvml.nvmlDeviceGetMigMode, gpu)
            return self._mig_slots(slot) if mode is not None and mode[0] == 1 else [slot]
        return []

    def _mig_slots(self, gpu: Slot) -> list[Slot]:
        nvml, ask, slots = self.session.nvml, self.session.ask, []
        places = ask(None, nvml.nvmlDeviceGetMaxMigDeviceCount, gpu.handle) or 0
        for place in range(places):
            mig = ask(None, nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu.handle, place)
            if mig is None:  # an empty place
                continue
            name = self.session.text(None, nvml.nvmlDeviceGetName, mig) or f"{gpu.name} MIG"
            uuid = self._uuid(mig, f"{gpu.label}, MIG device {place}")
            slots.append(structs.replace(gpu, handle=mig, name=name, uuid=uuid))
        if not slots:
            self.session.notes.append(
                f"{gpu.label} is left out: MIG is on, but it has no MIG device; "
                "make one (`nvidia-smi mig -cgi ... -C`) or turn MIG off (`nvidia-smi -mig 0`)"
            )
        return slots

    def _found(self, slot: Slot) -> Found | None:
        nvml = self.session.nvml
        with self.session.unless_lost(slot.label):
            without = f"{slot.label} is left out: its memory is unknown"
            memory = self.session.ask(without, nvml.nvmlDeviceGetMemoryInfo, slot.handle)
            if memory is None:
                return None
            entry = find_gpu_by_driver_name(slot.gpu_name)
            if entry is None:
                self.uncatalogued.append(slot)
                return None
            share, rates_source = _rates_share(slot, entry, memory.total)
            whole, card = entry.device(), slot.gpu_handle
            default_power = self._watts(nvml.nvmlDeviceGetPowerManagementDefaultLimit, card)
            default_power = default_power or entry.power_watts
            power = self._watts(nvml.nvmlDeviceGetEnforcedPowerLimit, card) or default_power
            device = structs.replace(
                whole,
                name=slot.name,
                index=slot.index,
                total_bytes=memory.total,
                free_bytes=memory.free,
                memory_bandwidth_bytes_per_second=share * entry.memory_bandwidth_bytes_per_second,
                peak_flops_per_second=_times(share, entry.peak_flops_per_second),
                matmul_flops_per_second=_times(share, entry.matmul_flops_per_second),
                power_watts=power and share * power,
                default_power_watts=default_power and share * default_power,
                pcie=self._pcie(card),
                compute_capability=self._compute_capability(slot, entry),
                rates_source=rates_source,
                holders=self._holders(slot),
                uuid=slot.uuid,
            )
            return Found(device=device, entry=entry)
        return None

    def _compute_capability(self, slot: Slot, entry: GpuEntry) -> tuple[int, int] | None:
        without = f"{slot.label}: compute capability taken from the catalog"
        query = self.session.nvml.nvmlDeviceGetCudaComputeCapability
        return self.session.ask(without, query, slot.gpu_handle) or entry.compute_capability

    def _watts(self, query: Callable[[object], int], card: object) -> float | None:
        """None where the card has no such sensor, as laptops often do not."""
        milliwatts = self.session.ask(None, query, card)
        return milliwatts / 1000 if milliwatts else None

    def _pcie(self, card: object) -> PcieLink | None:
        nvml, ask = self.session.nvml, self.session.ask
        link = PcieLink(
            generation=ask(None, nvml.nvmlDeviceGetCurrPcieLinkGeneration, card) or None,
            width=ask(None, nvml.nvmlDeviceGetCurrPcieLinkWidth, card) or None,
            max_generation=ask(None, nvml.nvmlDeviceGetMaxPcieLinkGeneration, card) or None,
            max_width=ask(None, nvml.nvmlDeviceGetMaxPcieLinkWidth, card) or None,
        )
        return None if link == PcieLink() else link

    def _holders(self, slot: Slot) -> tuple[MemoryHolder, ...]:
        """Processes on the device, the largest first; one that computes and draws comes once."""
        without = f"{slot.label}: not all processes that hold its memory are known"
        used_bytes: dict[int, int | None] = {}
        for query in (
            self.session.nvml.nvmlDeviceGetComputeRunningProcesses,
            self.session.nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            for process in self.session.ask(without, query, slot.handle) or ():
                known = [n for n in (used_bytes.get(process.pid), process.usedGpuMemory) if n]
                used_bytes[process.pid] = max(known, default=None)
        holders = (
            MemoryHolder(pid=pid, name=self._process_name(pid), used_bytes=used)
            for pid, used in used_bytes.items()
        )
        return tuple(sorted(holders, key=lambda h: (-(h.used_bytes or 0), h.pid)))

    def _process_name(self, pid: int) -> str:
        """The program's name, without its folder and options."""
        command = self.session.text(None, self.session.nvml.nvmlSystemGetProcessName, pid)
        if command:
            program = command.split("\0")[0].split(" -")[0]
            return re.split(r"[/\\]", program)[-1].strip()
        with suppress(OSError):
            return (self.session.root / f"proc/{pid}/comm").read_text(encoding="utf-8").strip()
        return f"pid {pid}"

    def _uuid(self, handle: object, label: str) -> str | None:
        query = self.session.nvml.nvmlDeviceGetUUID
        return self.session.text(f"{label}: UUID unknown", query, handle)


def _times(share: float, rates: Mapping[str, float]) -> dict[str, float]:
    return {dtype: share * rate for dtype, rate in rates.items()}


def _rates_share(slot: Slot, entry: GpuEntry, memory_bytes: int) -> tuple[float, str]:
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
