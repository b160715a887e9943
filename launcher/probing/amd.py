"""AMD's GPUs on Linux, from what its kernel driver shows under /sys. No ROCm and no torch.

`/sys/class/kfd/kfd/topology/nodes` lists what ROCm can compute on, in the order in which ROCm
numbers it; `/sys/class/drm/renderD*/device` has each card's memory, name, PCIe and power.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from msgspec import Struct, structs

from ftplan.launcher.host import read_text
from ftplan.launcher.probing.linked import Found, notes_on, with_links
from ftplan.planner.hardware_spec import Device, GpuLink, MemoryHolder, PcieLink
from ftplan.profiles import (
    find_gpu_by_driver_name,
    find_gpu_by_pci_id,
    gpu_catalog,
)

_NODES = "sys/class/kfd/kfd/topology/nodes"
_PROCESSES = "sys/class/kfd/kfd/proc"
_VENDOR = "0x1002"
_XGMI = 11  # HSA_IOLINKTYPE_XGMI, kfd_crat.h

# libdrm's list of marketing names, installed with Mesa and with ROCm.
_NAME_LISTS = ("usr/share/libdrm/amdgpu.ids", "opt/amdgpu/share/libdrm/amdgpu.ids")

# GT/s of a lane, as the kernel spells them, by PCIe generation.
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}


class _Card(Struct, frozen=True, kw_only=True):
    """A GPU as the kernel lists it. `node`: its number in the topology; `folder`: of its PCI
    device; `kfd_id`: by which processes refer to it."""

    index: int
    node: int
    kfd_id: str
    folder: Path
    properties: Mapping[str, int]

    @property
    def label(self) -> str:
        return f"GPU {self.index}"

    @property
    def uuid(self) -> str | None:
        """As ROCR_VISIBLE_DEVICES spells it; cards without one say 0."""
        number = self.properties.get("unique_id", 0)
        return f"GPU-{number:016x}" if number else None

    @property
    def architecture(self) -> str:
        """`gfx90a` of 90010: minor version and stepping are hexadecimal digits."""
        version = self.properties.get("gfx_target_version", 0)
        return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"

    def text(self, name: str) -> str:
        return read_text(self.folder / name).strip()

    def number(self, name: str) -> int | None:
        text = self.text(name)
        return int(text) if text.isdigit() else None

    def pci_id(self, name: str) -> str:
        """`744c` of the file `device`, which says 0x744c."""
        return self.text(name).removeprefix("0x").lower()


def amd_gpus(
    root: Path, environ: Mapping[str, str], notes: list[str]
) -> tuple[tuple[Device, ...], tuple[GpuLink, ...]]:
    """The visible GPUs, in ROCm's order, and the links between them. One that the catalog lacks is
    left out with a note: many processors have a small one, which nobody trains on."""
    cards = _cards(root)
    if not cards or not _may_compute(root, notes):
        return (), ()
    names = _names(root)
    found = [
        (card, gpu)
        for card in _visible(cards, environ, notes)
        if (gpu := _found(root, card, names, notes)) is not None
    ]
    for card, gpu in found:
        notes += notes_on(card.label, gpu.device, gpu.entry)
    links = _links(root, [card for card, _ in found])
    return with_links([gpu for _, gpu in found], links, _own_bytes_per_second(root, cards)), links


def _cards(root: Path) -> list[_Card]:
    """What ROCm can compute on: nodes with compute units, in the order of their numbers."""
    cards: list[_Card] = []
    nodes = (folder for folder in (root / _NODES).glob("*") if folder.name.isdigit())
    for node in sorted(nodes, key=lambda folder: int(folder.name)):
        properties = _numbers(node / "properties")
        if not properties.get("simd_count") or "drm_render_minor" not in properties:
            continue  # a processor, or a GPU that a container hides
        minor = properties["drm_render_minor"]
        cards.append(
            _Card(
                index=len(cards),
                node=int(node.name),
                kfd_id=read_text(node / "gpu_id").strip(),
                folder=root / f"sys/class/drm/renderD{minor}/device",
                properties=properties,
            )
        )
    return cards


def _numbers(path: Path) -> dict[str, int]:
    """The kernel's list of a name and a number a line."""
    words = (line.split() for line in read_text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}


def _may_compute(root: Path, notes: list[str]) -> bool:
    device = root / "dev/kfd"
    if not device.exists():
        notes.append(
            "there is an AMD GPU but no /dev/kfd; start the container with "
            "`--device=/dev/kfd --device=/dev/dri`"
        )
        return False
    if not os.access(device, os.R_OK | os.W_OK):
        notes.append(
            "this user may not compute on the AMD GPU; `sudo usermod -aG render,video $USER`, "
            "then log in again"
        )
        return False
    return True


def _visible(cards: Sequence[_Card], environ: Mapping[str, str], notes: list[str]) -> list[_Card]:
    """What the two settings leave: ROCm's runtime numbers what ROCR_VISIBLE_DEVICES names anew,
    and of that HIP selects by HIP_VISIBLE_DEVICES, or else CUDA_VISIBLE_DEVICES."""
    hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"
    chosen = list(cards)
    for name in ("ROCR_VISIBLE_DEVICES", hip):
        if name in environ and chosen:
            chosen = _selected(chosen, name, environ[name], notes)
    return chosen


def _selected(cards: Sequence[_Card], name: str, setting: str, notes: list[str]) -> list[_Card]:
    """The cards of a list of numbers or beginnings of UUIDs; the first that is none ends it."""
    chosen: dict[int, _Card] = {}
    for token in map(str.strip, setting.split(",")):
        if token.isdigit():
            matching = list(cards[int(token) : int(token) + 1])
        else:
            begun = token.casefold()
            matching = [c for c in cards if begun and (c.uuid or "").casefold().startswith(begun)]
        if len(matching) != 1:
            if token not in ("", "-1"):
                notes.append(
                    f"{name} names `{token}`, which is no single GPU here: "
                    "ROCm ignores it and all that follows"
                )
            break
        chosen[matching[0].index] = matching[0]
    if not chosen:
        notes.append(f"`{name}={setting}` hides every AMD GPU")
    return list(chosen.values())


def _found(root: Path, card: _Card, names: Mapping[str, str], notes: list[str]) -> Found | None:
    device_id, revision = card.pci_id("device"), card.pci_id("revision")
    reported = card.text("product_name") or names.get(f"{device_id}:{revision}", "")
    total, used = card.number("mem_info_vram_total"), card.number("mem_info_vram_used")
    if total is None or used is None:
        notes.append(f"{card.label} is left out: its memory is unknown")
        return None
    entry = find_gpu_by_driver_name(reported) or find_gpu_by_pci_id(device_id, revision)
    if entry is None:
        notes.append(_unknown_note(card, reported, f"{device_id}:{revision}"))
        return None
    power = _watts(card, "power1_cap")
    default_power = _watts(card, "power1_cap_default") or entry.power_watts
    device = structs.replace(
        entry.device(),
        name=reported or entry.name,
        index=card.index,
        total_bytes=total,
        free_bytes=max(0, total - used),
        power_watts=power or default_power,
        default_power_watts=default_power,
        pcie=_pcie(card),
        holders=_holders(root, card),
        uuid=card.uuid,
    )
    return Found(device=device, entry=entry)


def _unknown_note(card: _Card, reported: str, pci_id: str) -> str:
    alike = [e.name for e in gpu_catalog().values() if e.architecture == card.architecture]
    nearest = f"; of its architecture the catalog has {', '.join(alike)}" if alike else ""
    return (
        f"{card.label} is left out: the catalog has no {reported or 'AMD GPU'} "
        f"({card.architecture}, PCI {pci_id}){nearest}; an entry in profiles/gpus would add it"
    )


def _names(root: Path) -> dict[str, str]:
    """Marketing names by `device:revision`, where the system has libdrm's list."""
    for path in _NAME_LISTS:
        rows = re.findall(r"^(\w{4}),\s*(\w+),\s*(.+)$", read_text(root / path), re.MULTILINE)
        if rows:
            return {f"{d}:{r}".lower(): name.strip() for d, r, name in rows}
    return {}


def _watts(card: _Card, name: str) -> float | None:
    """A power limit, of which the kernel tells microwatts."""
    for monitor in sorted((card.folder / "hwmon").glob("hwmon*")):
        text = read_text(monitor / name).strip()
        if text.isdigit() and int(text):
            return int(text) / 1e6
    return None


def _pcie(card: _Card) -> PcieLink | None:
    slot = structs.replace(card, folder=_at_the_slot(card.folder))
    link = PcieLink(
        generation=_generation(slot.text("current_link_speed")),
        width=slot.number("current_link_width"),
        max_generation=_generation(slot.text("max_link_speed")),
        max_width=slot.number("max_link_width"),
    )
    return None if link == PcieLink() else link


def _at_the_slot(folder: Path) -> Path:
    """The PCI device that sits in the slot: many cards have a switch of AMD's own before the GPU,
    whose inner link is always full. The processor's ports are of another vendor."""
    found = folder = folder.resolve()
    while read_text(folder / "vendor").strip() == _VENDOR:
        found, folder = folder, folder.parent
    return found


def _generation(speed: str) -> int | None:
    """4 of `16.0 GT/s PCIe`."""
    return _GENERATIONS.get(speed.split(" ")[0])


def _holders(root: Path, card: _Card) -> tuple[MemoryHolder, ...]:
    """Processes that compute on the card, the largest first."""
    found = []
    for process in (root / _PROCESSES).glob("*"):
        used = read_text(process / f"vram_{card.kfd_id}").strip()
        if process.name.isdigit() and used.isdigit() and int(used):
            name = read_text(root / f"proc/{process.name}/comm").strip() or f"pid {process.name}"
            found.append(MemoryHolder(pid=int(process.name), name=name, used_bytes=int(used)))
    return tuple(sorted(found, key=lambda h: (-(h.used_bytes or 0), h.pid)))


def _links(root: Path, cards: Sequence[_Card]) -> tuple[GpuLink, ...]:
    rates = {card.node: _xgmi_bytes_per_second(root, card) for card in cards}
    return tuple(
        GpuLink(
            first=one.index,
            second=other.index,
            kind="xgmi" if other.node in rates[one.node] else "pcie",
            num_links=int(other.node in rates[one.node]),
            bytes_per_second=rates[one.node].get(other.node, 0.0),
        )
        for one, other in combinations(cards, 2)
    )


def _own_bytes_per_second(root: Path, cards: Sequence[_Card]) -> dict[int, float]:
    return {card.index: sum(_xgmi_bytes_per_second(root, card).values()) for card in cards}


def _xgmi_bytes_per_second(root: Path, card: _Card) -> dict[int, float]:
    """What XGMI carries to each other node in one direction; the kernel tells MB/s."""
    links = map(_numbers, (root / _NODES / str(card.node) / "io_links").glob("*/properties"))
    return {
        link["node_to"]: link.get("max_bandwidth", 0) * 1e6
        for link in links
        if link.get("type") == _XGMI and "node_to" in link
    }
