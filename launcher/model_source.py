"""From what a person calls a model to its shape and, for training, its files.

MODEL is a size (`7B`), a catalog name (`llama-3.1-8b`), a Hub id, or a folder with a
`config.json`. Everything that needs no weights works offline.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import spec_from_config, spec_from_size
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.units import parse_count
from ftplan.profiles import find_model, model_catalog

_HUB_TIMEOUT_SECONDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model's shape and where it came from.

    `hub_id` and `folder` say where weights are: either, both or (for a bare size) neither.
    """

    spec: ModelSpec
    origin: str
    hub_id: str | None = None
    folder: Path | None = None


def find_source(name: str, environ: Mapping[str, str] = os.environ) -> ModelSource:
    """The model of that name.

    Order: folder, size, catalog, local Hub cache, Hub. Raises InputError (UnknownNameError with
    the nearest catalog names) when nothing is found.
    """
    folder = Path(name)
    if folder.is_dir():
        return source_from_folder(folder)
    size = parse_count(name)
    if size is not None:
        spec = spec_from_size(size, name)
        return ModelSource(spec=spec, origin=spec.approximate or "")
    entry = find_model(name)
    if entry is not None:
        return ModelSource(spec=entry.spec, origin="catalog", hub_id=entry.hub_id)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _source_from_hub(name, environ)
    if "/" in name or name.startswith("~"):
        raise InputError(
            f"no folder `{name}`", "give a folder with a config.json, a Hub id or a catalog name"
        )
    raise UnknownNameError(
        "model",
        name,
        model_catalog(),
        "A size (`7B`), a Hub id (`org/name`) or a folder with a config.json works too.",
    )


def source_from_folder(folder: Path) -> ModelSource:
    """A folder with a `config.json`, as `save_pretrained` writes it."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"`{folder}` has no config.json", "give the folder of a transformers model"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read `{path}`: {error}") from error
    name = folder.resolve().name
    return ModelSource(spec=spec_from_config(config, name), origin="folder", folder=folder)


def cached_folder(hub_id: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The newest snapshot of a Hub model in the local cache that has a config.json."""
    home = (
        environ.get("HF_HOME")
        or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    hub = Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    snapshots = hub / ("models--" + hub_id.replace("/", "--")) / "snapshots"
    if not snapshots.is_dir():
        return None
    found = [s for s in snapshots.iterdir() if (s / "config.json").is_file()]
    return max(found, key=lambda s: s.stat().st_mtime, default=None)


def has_weights(folder: Path) -> bool:
    """Whether all safetensors files of a model folder are there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def _source_from_hub(hub_id: str, environ: Mapping[str, str]) -> ModelSource:
    folder = cached_folder(hub_id, environ)
    if folder is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        origin = "local Hub cache"
    else:
        config = _fetch_config(hub_id, environ)
        origin = "Hub"
    spec = spec_from_config(config, hub_id)
    return ModelSource(spec=spec, origin=origin, hub_id=hub_id, folder=folder)


def hub_offline(environ: Mapping[str, str] = os.environ) -> bool:
    return environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")


def _fetch_config(hub_id: str, environ: Mapping[str, str]) -> Any:
    """config.json of a Hub model; raises InputError saying what to do instead."""
    near = UnknownNameError("model", hub_id, [entry.hub_id for entry in model_catalog().values()])
    instead = " ".join(filter(None, (near.hint, "Or give a folder with its config.json.")))
    if hub_offline(environ):
        raise InputError(
            f"`{hub_id}` is not in the catalog or the local cache, and HF_HUB_OFFLINE is set",
            instead,
        )
    import urllib.error  # 40 ms that only this path needs
    import urllib.request

    endpoint = environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{hub_id}/resolve/main/config.json")
    token = environ.get("HF_TOKEN")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise InputError(
                f"the Hub does not show `{hub_id}` to you ({error.code})",
                "the name may be wrong, or the model gated: accept its licence and set HF_TOKEN",
            ) from error
        raise InputError(f"the Hub has no model `{hub_id}` ({error.code})", instead) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"`{hub_id}` is not in the catalog, and the Hub is out of reach", instead
        ) from error
