"""What `ftplan gpus` prints of the cards themselves and of the ways between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ftplan.launcher.ui import table
from ftplan.planner.hardware_spec import Device, GpuLink, Machine, PcieLink

# What `nvidia-smi topo -m` abbreviates.
PATH_NAMES = {
    "PIX": "behind one PCIe switch",
    "PXB": "behind several PCIe switches",
    "PHB": "through the processor's PCIe bridge",
    "NODE": "within one processor socket",
    "SYS": "across processor sockets",
}


def cards_table(gpus: Sequence[Device]) -> Table | None:
    """Power limit, PCIe and UUID of each; None where no driver tells of any."""
    if not any(gpu.pcie or gpu.power_watts or gpu.uuid for gpu in gpus):
        return None
    rows: list[list[RenderableType]] = [
        [f"GPU {gpu.index}", power(gpu), pcie(gpu.pcie), gpu.uuid or "-"] for gpu in gpus
    ]
    return table("Cards", ("", ">power limit", "PCIe", "UUID"), rows)


def power(gpu: Device) -> str:
    """`450 W`, or `300 of 450 W` where the limit is below the board's own."""
    if gpu.power_watts is None:
        return "-"
    of = f" of {gpu.default_power_watts:.0f}" if gpu.power_capped else ""
    return f"{gpu.power_watts:.0f}{of} W"


def pcie(link: PcieLink | None) -> str:
    """`4.0 x16`, or `4.0 x4 of x16`: the generation that it rises to under load."""
    if link is None:
        return "-"
    generation = link.max_generation or link.generation
    text = f"{generation}.0" if generation else ""
    width = link.width or link.max_width
    if width:
        text += f" x{width}"
        if link.max_width and width < link.max_width:
            text += f" of x{link.max_width}"
    return text.strip()


def between_gpus(machine: Machine) -> Iterator[RenderableType]:
    """How the visible GPUs reach each other, and what collective operations get of it: a sentence
    where all ways are one, else each beside each other as `nvidia-smi topo -m` shows it."""
    ways = set(map(describe, machine.links))
    if not ways:
        return
    if len(ways) == 1:
        yield Text.assemble(("Between the GPUs: ", "bold"), ways.pop())
    else:
        yield _matrix(machine)
        yield _legend(machine.links)
    rate = machine.gpus[0].link_bytes_per_second
    if rate:
        yield f"Collective operations reach about {rate / 1e9:.3g} GB/s in each direction."


def describe(link: GpuLink) -> str:
    """The way between two GPUs in words."""
    if link.kind == "nvswitch":
        return f"{link.num_links} NVLinks each, through NVSwitch"
    if link.kind == "nvlink":
        return f"{link.num_links} NVLink" + ("s" if link.num_links > 1 else "")
    if link.kind == "xgmi":
        return "XGMI (Infinity Fabric)"
    where = f" {PATH_NAMES[link.path]}" if link.path else ""
    detour = ", without direct access to each other's memory" if link.peer_access is False else ""
    return f"PCIe{where}{detour}"


def _matrix(machine: Machine) -> Table:
    short = {frozenset((link.first, link.second)): _short(link) for link in machine.links}
    indices = [gpu.index for gpu in machine.gpus]
    rows: list[list[RenderableType]] = [
        [f"GPU {one}", *(short.get(frozenset((one, other)), "X") for other in indices)]
        for one in indices
    ]
    return table("Between the GPUs", ("", *map(str, indices)), rows)


def _legend(links: Sequence[GpuLink]) -> str:
    """What the table's abbreviations mean, of those that occur."""
    counts = sorted({link.num_links for link in links if link.kind in ("nvlink", "nvswitch")})
    names = [f"NV{count}: {count} NVLink{'s' if count > 1 else ''}" for count in counts]
    paths = {link.path for link in links if link.kind == "pcie"}
    names += [f"{path}: PCIe {name}" for path, name in PATH_NAMES.items() if path in paths]
    return "; ".join(names)


def _short(link: GpuLink) -> str:
    if link.kind in ("nvlink", "nvswitch"):
        return f"NV{link.num_links}"
    return "XGMI" if link.kind == "xgmi" else link.path or "PCIe"
