"""Facts as data: models and GPUs, one YAML file each, every number with its source.

Loaders only; what the numbers mean stands in `ftplan.planner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from ftplan.planner.errors import UnknownNameError
from ftplan.planner.families import spec_from_config
from ftplan.planner.hardware_spec import ASSUMED_CUDA_CONTEXT_BYTES, Device
from ftplan.planner.model_spec import ModelSpec

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """A catalogued model. Its configuration is parsed when it is asked for: of the many models
    of the catalog, a command needs one."""

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    licence: str
    kind: str
    num_parameters: int
    config_text: str

    @property
    def config(self) -> Mapping[str, Any]:
        """What stands in the model's config.json."""
        return _parsed(self.config_text)

    @property
    def spec(self) -> ModelSpec:
        return spec_from_config(self.config, self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuEntry:
    """A catalogued GPU. Numbers are the values; their sources stay in the file."""

    key: str
    name: str
    aliases: tuple[str, ...]
    nvml_names: tuple[str, ...]
    compute_capability: tuple[int, int]
    memory_bytes: int
    memory_bandwidth_bytes_per_second: float
    peak_flops_per_second: Mapping[str, float]
    context_bytes: int = ASSUMED_CUDA_CONTEXT_BYTES
    """What a training process holds besides the allocator's memory, where it was measured."""

    def device(self) -> Device:
        """The card as it is when nothing else runs on it."""
        return Device(
            name=self.name,
            kind="cuda",
            total_bytes=self.memory_bytes,
            free_bytes=self.memory_bytes,
            memory_bandwidth_bytes_per_second=self.memory_bandwidth_bytes_per_second,
            peak_flops_per_second=self.peak_flops_per_second,
            compute_capability=self.compute_capability,
            rates_source="data sheet",
            context_bytes=self.context_bytes,
        )


def read_yaml(text: str) -> Any:
    """Parse YAML with the safe loader."""
    return yaml.load(text, Loader=_Loader)


@cache
def _parsed(config_text: str) -> Mapping[str, Any]:
    parsed: Mapping[str, Any] = read_yaml(config_text)
    return parsed


@cache
def _texts(folder: str) -> Mapping[str, str]:
    """Every YAML file of a data folder, by stem."""
    root = files(f"ftplan.profiles.{folder}")
    return {
        item.name.removesuffix(".yaml"): item.read_text(encoding="utf-8")
        for item in sorted(root.iterdir(), key=lambda i: i.name)
        if item.name.endswith(".yaml")
    }


@cache
def model_catalog() -> Mapping[str, ModelEntry]:
    """The model catalog, by name."""
    return {stem: _model_entry(text) for stem, text in _texts("models").items()}


@cache
def _model_entry(text: str) -> ModelEntry:
    """A file of the catalog, whose last key is `config`."""
    facts, _, config_text = text.partition("\nconfig:\n")
    entry = read_yaml(facts)
    return ModelEntry(
        name=entry["name"],
        hub_id=entry["hub_id"],
        aliases=tuple(entry["aliases"]),
        licence=entry["licence"],
        kind=entry["kind"],
        num_parameters=entry["num_parameters"],
        config_text=config_text,
    )


@cache
def gpu_catalog() -> Mapping[str, GpuEntry]:
    """The GPU catalog, by key."""
    return {
        stem: GpuEntry(
            key=stem,
            name=entry["name"],
            aliases=tuple(entry["aliases"]),
            nvml_names=tuple(entry["nvml_names"]),
            compute_capability=tuple(entry["compute_capability"]),
            memory_bytes=entry["memory_bytes"]["value"],
            memory_bandwidth_bytes_per_second=entry["memory_bandwidth_bytes_per_second"]["value"],
            peak_flops_per_second={
                dtype: number["value"] for dtype, number in entry["peak_flops_per_second"].items()
            },
            **(
                {"context_bytes": entry["context_bytes"]["value"]}
                if "context_bytes" in entry
                else {}
            ),
        )
        for stem, entry in ((stem, read_yaml(text)) for stem, text in _texts("gpus").items())
    }


def find_model(name: str) -> ModelEntry | None:
    """The catalogued model of that name, alias or Hub id, in any case; None if there is none."""
    wanted = name.casefold()
    for text in _texts("models").values():
        if wanted in text.casefold():  # to parse every file takes longer than an estimate may
            entry = _model_entry(text)
            if wanted in (entry.name, entry.hub_id.casefold(), *entry.aliases):
                return entry
    return None


def find_gpu(name: str) -> GpuEntry:
    """The catalogued GPU of that name: exact, in any case, with dashes or blanks.

    Raises UnknownNameError with the nearest names; a part of a name never matches.
    """
    wanted = _gpu_key(name)
    for entry in gpu_catalog().values():
        spellings = (entry.key, entry.name, *entry.aliases, *entry.nvml_names)
        if wanted in map(_gpu_key, spellings):
            return entry
    raise UnknownNameError("GPU", name, gpu_catalog())


def find_gpu_by_nvml_name(nvml_name: str) -> GpuEntry | None:
    """The GPU whose driver reports exactly this name; None if no entry lists it."""
    for entry in gpu_catalog().values():
        if nvml_name in entry.nvml_names:
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
    "GpuEntry",
    "ModelEntry",
    "find_gpu",
    "find_gpu_by_nvml_name",
    "find_model",
    "gpu_catalog",
    "model_catalog",
    "read_yaml",
    "require_model",
]
