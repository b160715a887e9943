"""Facts as data: a JSON file for each model and each generation of GPUs, every number with its
source.

Loaders only; what the numbers mean stands in `ftplan.planner`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct

from ftplan.planner.errors import UnknownNameError
from ftplan.planner.families import spec_from_config
from ftplan.planner.hardware_spec import ASSUMED_CUDA_CONTEXT_BYTES, Device, Network, Vendor
from ftplan.planner.model_spec import ModelSpec


class ModelEntry(Struct, frozen=True, kw_only=True):
    """A catalogued model. `config` is what stands in its config.json.

    `languages`: those that its makers name, of those that ftplan tells apart; empty where they are
    not known. `specialty`: what it was made for, where that is not text of any kind.
    """

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    licence: str
    kind: str
    num_parameters: int
    config: Mapping[str, Any]
    languages: tuple[str, ...] = ()
    specialty: str = ""

    @property
    def spec(self) -> ModelSpec:
        return spec_from_config(self.config, self.name)


class GpuEntry(Struct, frozen=True, kw_only=True):
    """A catalogued GPU. Numbers are the values; their sources stay in the file.

    `driver_names`: what the vendor's driver calls it: NVML, ROCm, macOS. `pci_ids`: AMD's, device
    and revision (`744c:c8`) or device alone, since drivers often give no name. `architecture`:
    AMD's (`gfx1100`). `compute_capability`: NVIDIA's only. `pcie`, `nvlink`: generation, and lanes
    or links. `link_bytes_per_second`: what collective operations reach to GPUs beside it, in
    one direction, by NVLink or Infinity Fabric where it has that, else by PCIe.
    `matmul_flops_per_second`: what large matrix products were measured to reach, often empty.
    `context_bytes`: what a training process holds besides the allocator's memory, where it was
    measured.
    """

    key: str
    name: str
    vendor: Vendor
    aliases: tuple[str, ...]
    driver_names: tuple[str, ...]
    compute_capability: tuple[int, int] | None
    memory_bytes: int
    memory_bandwidth_bytes_per_second: float
    peak_flops_per_second: Mapping[str, float]
    matmul_flops_per_second: Mapping[str, float]
    context_bytes: int
    link_bytes_per_second: float | None
    power_watts: float | None
    pci_ids: tuple[str, ...] = ()
    architecture: str | None = None
    pcie: tuple[str, int] | None = None
    nvlink: tuple[str, int] | None = None

    def device(self) -> Device:
        """The card as it is when nothing else runs on it."""
        return Device(
            name=self.name,
            kind="cuda",
            total_bytes=self.memory_bytes,
            free_bytes=self.memory_bytes,
            memory_bandwidth_bytes_per_second=self.memory_bandwidth_bytes_per_second,
            peak_flops_per_second=self.peak_flops_per_second,
            matmul_flops_per_second=self.matmul_flops_per_second,
            rates_source="data sheet",
            vendor=self.vendor,
            compute_capability=self.compute_capability,
            link_bytes_per_second=self.link_bytes_per_second,
            host_link_bytes_per_second=(
                copied_share() * link_bytes_per_second("pcie", *self.pcie) if self.pcie else None
            ),
            power_watts=self.power_watts,
            default_power_watts=self.power_watts,
            context_bytes=self.context_bytes,
        )


# Ways of billing that prices are known of.
BILLINGS = ("on-demand", "spot")


class Price(Struct, frozen=True, kw_only=True):
    """What somebody asked for one GPU for an hour, as one of `num_gpus` of an instance."""

    gpu: str
    provider: str
    instance: str
    num_gpus: int
    region: str
    usd_per_gpu_hour: float
    billing: str
    date: str
    source: str


def _texts(folder: str) -> Iterator[str]:
    """Every file of a data folder."""
    for item in sorted(_path(folder).iterdir()):
        if item.name.endswith(".json"):
            yield item.read_text(encoding="utf-8")


def _path(name: str) -> Path:
    return Path(__file__).parent / name


@cache
def model_catalog() -> Mapping[str, ModelEntry]:
    """The model catalog, by name."""
    entries = map(_model_entry, _texts("models"))
    return {entry.name: entry for entry in entries}


def _model_entry(text: str) -> ModelEntry:
    entry = json.loads(text)
    return ModelEntry(
        name=entry["name"],
        hub_id=entry["hub_id"],
        aliases=tuple(entry["aliases"]),
        licence=entry["licence"],
        kind=entry["kind"],
        num_parameters=entry["num_parameters"],
        config=entry["config"],
        languages=tuple(_value(entry, "languages") or ()),
        specialty=entry.get("specialty", ""),
    )


@cache
def gpu_catalog() -> Mapping[str, GpuEntry]:
    """The GPU catalog, by key, in the order of the keys."""
    entries = {key: entry for text in _texts("gpus") for key, entry in json.loads(text).items()}
    measured = _data("matmul_rates.json")
    return {key: _gpu_entry(key, entries[key], measured.get(key, {})) for key in sorted(entries)}


# By which key an entry says what the vendor's driver calls the card.
DRIVER_NAMES: Mapping[Vendor, str] = {
    "nvidia": "nvml_names",
    "amd": "rocm_names",
    "apple": "chip_names",
}


def _gpu_entry(
    key: str, entry: Mapping[str, Any], matmul: Mapping[str, Mapping[str, Any]]
) -> GpuEntry:
    capability = entry.get("compute_capability")
    context = entry.get("context_bytes", {"value": ASSUMED_CUDA_CONTEXT_BYTES})
    return GpuEntry(
        key=key,
        name=entry["name"],
        vendor=entry["vendor"],
        aliases=tuple(entry["aliases"]),
        driver_names=tuple(entry[DRIVER_NAMES[entry["vendor"]]]),
        compute_capability=tuple(capability) if capability else None,
        memory_bytes=entry["memory_bytes"]["value"],
        memory_bandwidth_bytes_per_second=entry["memory_bandwidth_bytes_per_second"]["value"],
        peak_flops_per_second=_values(entry["peak_flops_per_second"]),
        matmul_flops_per_second=_values(matmul),
        context_bytes=context["value"],
        link_bytes_per_second=_link(entry),
        power_watts=_value(entry, "tdp_watts"),
        pci_ids=tuple(_value(entry, "pci_ids") or ()),
        architecture=entry.get("architecture"),
        pcie=_generation_and_number(entry, "pcie"),
        nvlink=_generation_and_number(entry, "nvlink"),
    )


def _value(entry: Mapping[str, Any], name: str) -> Any:
    return entry[name]["value"] if name in entry else None


def _generation_and_number(entry: Mapping[str, Any], name: str) -> tuple[str, int] | None:
    value = _value(entry, name)
    return (str(value[0]), int(value[1])) if value else None


def _link(entry: Mapping[str, Any]) -> float | None:
    """A generation's rate times lanes or links, and the share of that which is reached; of Infinity
    Fabric no share is known, so NVLink's stands in."""
    fabric = _value(entry, "infinity_fabric_bytes_per_second")
    if fabric is not None:
        return reached_share("nvlink") * float(fabric)
    for kind in ("nvlink", "pcie"):
        if found := _generation_and_number(entry, kind):
            return reached_share(kind) * link_bytes_per_second(kind, *found)
    return None


def link_bytes_per_second(kind: str, generation: str, number: int) -> float:
    """Lanes or links of a generation of `pcie`, `nvlink`, ... in one direction, as on paper. Raises
    KeyError for a generation that is not known."""
    known = _data("interconnects.json")[kind]["bytes_per_second"]
    return number * float(known[generation]["value"])


def reached_share(kind: str) -> float:
    """The share of such a link's rate that collective operations reach."""
    return float(_data("interconnects.json")[kind]["achieved_share"]["value"])


def copied_share() -> float:
    """The share of PCIe's rate that copies from and to the host's memory reach."""
    return float(_data("interconnects.json")["pcie"]["copied_share"]["value"])


# Kinds of networks between machines.
NETWORK_KINDS = ("infiniband", "roce", "efa", "ethernet")


@cache
def network_names() -> tuple[str, ...]:
    """Networks between machines, by kind and speed: `infiniband-ndr`, `ethernet-100g`, ..."""
    known = _data("interconnects.json")
    return tuple(f"{kind}-{speed}" for kind in NETWORK_KINDS for speed in known[kind][_RATES])


_RATES = "bytes_per_second"


def find_network(name: str, gpus_per_machine: int) -> Network:
    """The network of that name, as each of a machine's GPUs has it; raises UnknownNameError.

    InfiniBand, RoCE and EFA have a card for each GPU; plain Ethernet one for the machine.
    """
    wanted = name.casefold().replace(" ", "-").replace("_", "-")
    if wanted not in network_names():
        raise UnknownNameError("interconnect", name, network_names())
    kind, _, speed = wanted.partition("-")
    facts = _data("interconnects.json")[kind]
    sharing = gpus_per_machine if facts["a_card_for_each"] == "machine" else 1
    return Network(
        name=wanted,
        bytes_per_second=reached_share(kind) * float(facts[_RATES][speed]["value"]) / sharing,
        latency_seconds=float(facts["latency_seconds"]["value"]),
    )


def usual_network(gpu: GpuEntry) -> str:
    """What joins machines of such GPUs as a rule: InfiniBand where NVLink joins them within."""
    generation = gpu.nvlink[0] if gpu.nvlink else ""
    usual = _data("interconnects.json")["infiniband"]["usual_of_nvlink"]["generations"]
    return f"infiniband-{usual[generation]}" if generation in usual else "ethernet-100g"


@cache
def prices() -> tuple[Price, ...]:
    """What GPUs were to be had for."""
    known = Price.__struct_fields__
    rows = _data("prices.json")["prices"]
    return tuple(Price(**{name: row[name] for name in known}) for row in rows)


def lowest_prices(gpu_name: str) -> dict[str, Price]:
    """The lowest price of the GPU that goes by exactly this name, in the catalog or with its
    driver, for each of BILLINGS that there is one of."""
    keys = {e.key for e in gpu_catalog().values() if gpu_name in (e.name, *e.driver_names)}
    found: dict[str, Price] = {}
    for price in prices():
        lowest = found.get(price.billing)
        if price.gpu in keys and (
            lowest is None or price.usd_per_gpu_hour < lowest.usd_per_gpu_hour
        ):
            found[price.billing] = price
    return found


def sky_accelerators(gpu_key: str) -> tuple[str, ...]:
    """What SkyPilot calls a catalogued GPU, the most widespread name first; empty where none of its
    clouds has it."""
    return tuple(_data("sky_accelerators.json")["accelerators"].get(gpu_key, ()))


@cache
def _data(name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(_path(name).read_text(encoding="utf-8"))
    return found


def _values(numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: number["value"] for name, number in numbers.items()}


@cache
def find_model(name: str) -> ModelEntry | None:
    """The catalogued model of that name, alias or Hub id, in any case; None if there is none."""
    wanted = name.casefold()
    file = _path("models") / f"{wanted}.json"
    # The other files need not be read. Path.is_file raises for a name that is too long.
    if "/" not in wanted and os.path.isfile(file):
        return _model_entry(file.read_text(encoding="utf-8"))
    for entry in model_catalog().values():
        if wanted in (entry.hub_id.casefold(), *entry.aliases):
            return entry
    return None


def find_gpu(name: str) -> GpuEntry:
    """The catalogued GPU of that name: exact, in any case, with dashes or blanks.

    Raises UnknownNameError with the nearest names; a part of a name never matches.
    """
    wanted = _gpu_key(name)
    for entry in gpu_catalog().values():
        spellings = (entry.key, entry.name, *entry.aliases, *entry.driver_names)
        if wanted in map(_gpu_key, spellings):
            return entry
    raise UnknownNameError("GPU", name, gpu_catalog())


def find_gpu_by_driver_name(name: str) -> GpuEntry | None:
    """The GPU whose driver reports exactly this name; None if no entry lists it."""
    for entry in gpu_catalog().values():
        if name in entry.driver_names:
            return entry
    return None


def find_gpu_by_pci_id(device: str, revision: str) -> GpuEntry | None:
    """AMD's GPU of these hexadecimal ids (`744c`, `c8`), as Linux shows them; None if no entry
    lists them."""
    wanted = {device, f"{device}:{revision}"}
    for entry in gpu_catalog().values():
        if wanted & set(entry.pci_ids):
            return entry
    return None


def _gpu_key(name: str) -> str:
    return name.casefold().replace(" ", "-").replace("_", "-").removeprefix("nvidia-")


def require_model(name: str) -> ModelEntry:
    """Like `find_model`, but raises UnknownNameError."""
    entry = find_model(name)
    if entry is None:
        raise UnknownNameError("model", name, model_catalog())
    return entry


__all__ = [
    "BILLINGS",
    "DRIVER_NAMES",
    "NETWORK_KINDS",
    "GpuEntry",
    "ModelEntry",
    "Price",
    "copied_share",
    "find_gpu",
    "find_gpu_by_driver_name",
    "find_gpu_by_pci_id",
    "find_model",
    "find_network",
    "gpu_catalog",
    "link_bytes_per_second",
    "lowest_prices",
    "model_catalog",
    "network_names",
    "prices",
    "reached_share",
    "require_model",
    "usual_network",
]
