"""What a check-up finds out before it judges."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct, structs

from ftplan.launcher import default_model
from ftplan.launcher.checkup.libraries import Answer, ask_libraries
from ftplan.launcher.host import existing_parent, ram_limit_bytes
from ftplan.launcher.model_source import hub_cache, hub_endpoint, hub_home, hub_offline
from ftplan.launcher.packages import TRAIN_PACKAGES
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.probing.nvml import NvmlModule
from ftplan.launcher.version import version
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Device, Machine

Status = Literal["ok", "warning", "problem"]

# What the training process heeds of accelerate's variables and `accelerate launch` does not set
# from its configuration (accelerate 1.15, utils/launch.py).
ACCELERATE_VARIABLES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
)


class Finding(Struct, frozen=True, kw_only=True):
    """One check's outcome: what was found, and how to mend it."""

    name: str
    status: Status
    found: str
    mend: str | None = None


class Folder(Struct, frozen=True, kw_only=True):
    """Where files will go: its nearest folder that exists, what is free there, and whether one may
    write."""

    path: str
    free_bytes: int
    writable: bool


class Facts(Struct, frozen=True, kw_only=True):
    """What the checks look at. `machine_error`: why GPUs that are there cannot be used."""

    python: str
    ftplan: str
    machine: Machine
    machine_error: tuple[str, str | None] | None = None
    required: Mapping[str, str]
    """The least versions, of what the `train` extra asks for here."""
    installed: Mapping[str, str]
    """Versions by package."""
    answers: Mapping[str, Answer]
    """By the names of `libraries.ASKED`."""
    accelerate_config: Path | None = None
    accelerate_config_error: str | None = None
    accelerate_variables: tuple[str, ...] = ()
    hub_endpoint: str = ""
    hub_offline: bool = False
    hub_reachable: bool = True
    hub_token: str | None = None
    """Where a token comes from, never the token."""
    runs: Folder
    cache: Folder
    shared_memory_bytes: int | None = None
    ram_limit_bytes: int | None = None
    """Of the container, where it is less than the machine's RAM."""

    @property
    def gpu(self) -> Device | None:
        return self.machine.best_device if self.machine.gpus else None


def dotted(numbers: tuple[int, int]) -> str:
    """`12.4` of (12, 4)."""
    return f"{numbers[0]}.{numbers[1]}"


def gather(
    *,
    runs_dir: Path,
    nvml: NvmlModule | None = None,
    environ: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
    answered: Callable[[str], None] = lambda name: None,
) -> Facts:
    """Find out everything; it takes as long as importing the libraries does. `answered` hears of
    each library."""
    machine, machine_error = _machine(runs_dir, nvml, environ, root)
    config = hub_home(environ) / "accelerate" / "default_config.yaml"
    offline = hub_offline(environ)
    return Facts(
        python=platform.python_version(),
        ftplan=version(),
        machine=machine,
        machine_error=machine_error,
        required=required_versions(),
        installed=_installed((*TRAIN_PACKAGES, "bitsandbytes")),
        answers=ask_libraries(environ, answered),
        accelerate_config=config if config.is_file() else None,
        accelerate_config_error=_fault_of(config) if config.is_file() else None,
        accelerate_variables=tuple(name for name in ACCELERATE_VARIABLES if name in environ),
        hub_endpoint=_without_password(hub_endpoint(environ)),
        hub_offline=offline,
        hub_reachable=not offline and default_model.hub_reachable(environ),
        hub_token=_token(environ),
        runs=_folder(runs_dir),
        cache=_folder(hub_cache(environ)),
        shared_memory_bytes=_shared_memory_bytes(root),
        ram_limit_bytes=ram_limit_bytes(root),
    )


def _machine(
    runs_dir: Path, nvml: NvmlModule | None, environ: Mapping[str, str], root: Path
) -> tuple[Machine, tuple[str, str | None] | None]:
    """The machine, without GPUs where those that are there cannot be used, and why."""
    try:
        return probe_machine(run_dir=runs_dir, nvml=nvml, environ=environ, root=root), None
    except InputError as error:
        hidden = {**environ, "CUDA_VISIBLE_DEVICES": ""}
        machine = probe_machine(run_dir=runs_dir, nvml=nvml, environ=hidden, root=root)
        return structs.replace(machine, notes=()), (error.message, error.hint)


def required_versions() -> dict[str, str]:
    """The least version of each package of the `train` extra, as ftplan's own metadata says."""
    from importlib import metadata

    required = {}
    for line in metadata.requires("ftplan") or ():
        match = re.match(r"([\w.-]+)>=([\d.]+)", line)
        if match is not None and 'extra == "train"' in line:
            required[match[1]] = match[2]
    return required


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _fault_of(config: Path) -> str | None:
    """What is wrong with accelerate's own file; None where nothing is."""
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return str(error).splitlines()[0]
    return None if isinstance(content, dict) else "it holds no settings"


def _without_password(address: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(address)
    return address.replace(parts.netloc, parts.netloc.rpartition("@")[2], 1)


def _token(environ: Mapping[str, str]) -> str | None:
    """Where huggingface_hub would find a token; it is not read."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environ.get(name, "").strip():
            return name
    stored = Path(environ.get("HF_TOKEN_PATH") or hub_home(environ) / "token").expanduser()
    return "stored by `hf auth login`" if stored.is_file() else None


def _folder(path: Path) -> Folder:
    folder = existing_parent(path)
    return Folder(
        path=str(folder),
        free_bytes=shutil.disk_usage(folder).free,
        writable=os.access(folder, os.W_OK),
    )


def _shared_memory_bytes(root: Path) -> int | None:
    folder = root / "dev/shm"
    return shutil.disk_usage(folder).total if folder.is_dir() else None
