"""From what a person calls a model to its shape and, for training, its files.

MODEL is a size (`7B`), a catalog name (`llama-3.1-8b`), a Hub id, or a folder with a
`config.json`. Everything that needs no weights works offline.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.families import (
    config_of_size,
    spec_from_config,
    spec_from_size,
    stand_in_spec,
)
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.units import parse_count
from ftplan.planner.vocabulary import config_with_vocabulary, with_vocabulary
from ftplan.profiles import find_model, model_catalog

_HUB_TIMEOUT_SECONDS = 5

# As huggingface_hub checks it, whose import would take longer than an estimate may.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class ModelSource(Struct, frozen=True, kw_only=True):
    """A model's shape and where it came from.

    `config`: what its config.json holds. `hub_id` and `folder` say where weights are: either, both
    or (for a bare size) neither.
    """

    spec: ModelSpec
    config: Mapping[str, Any]
    origin: str
    hub_id: str | None = None
    folder: Path | None = None
    stand_in: bool = False
    """`spec` only stands for an architecture that the closed form does not know."""
    adapter: Path | None = None
    """What belongs on these weights, where that is asked for."""
    reward_model: ModelSource | None = None
    """What judges this model's completions (`launcher.reward_source`); `spec` knows it too."""

    def with_vocabulary(self, num_tokens: int) -> ModelSource:
        """The model with a row for each token, where it has not as many."""
        if num_tokens <= self.spec.vocab_size:
            return self
        return structs.replace(
            self,
            spec=with_vocabulary(self.spec, num_tokens),
            config=config_with_vocabulary(self.config, num_tokens),
        )

    def with_new_tokens(self, given: Mapping[str, Any]) -> ModelSource:
        """With rows for the given settings' `add_tokens`, as if none of them were in the vocabulary
        and no row to spare: where no tokenizer is asked."""
        return self.with_vocabulary(self.spec.vocab_size + len(given.get("add_tokens", ())))


def find_source(
    name: str, environ: Mapping[str, str] = os.environ, *, any_architecture: bool = False
) -> ModelSource:
    """The model of that name.

    `any_architecture`: one that the closed form does not know gets a stand-in for its shape.

    Order: folder, size, catalog, local Hub cache, Hub. Raises InputError (UnknownNameError with
    the nearest catalog names) when nothing is found.
    """
    if os.path.isdir(name):  # Path.is_dir raises for a name that is too long
        return source_from_folder(Path(name), any_architecture=any_architecture)
    size = parse_count(name)
    if size is not None:
        spec = spec_from_size(size, name)
        return ModelSource(spec=spec, config=config_of_size(spec), origin=spec.approximate or "")
    entry = find_model(name)
    if entry is not None:
        return ModelSource(
            spec=entry.spec, config=entry.config, origin="catalog", hub_id=entry.hub_id
        )
    if _HUB_ID.fullmatch(name):
        return _source_from_hub(name, environ, any_architecture)
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


def source_from_folder(folder: Path, *, any_architecture: bool = False) -> ModelSource:
    """A folder with a `config.json`, as `save_pretrained` writes it."""
    config = _read_config(folder)
    spec, stand_in = _spec(config, folder.resolve().name, any_architecture)
    return ModelSource(spec=spec, config=config, origin="folder", folder=folder, stand_in=stand_in)


def _spec(config: Any, name: str, any_architecture: bool) -> tuple[ModelSpec, bool]:
    """The shape that a config.json describes, and whether it is a stand-in."""
    try:
        return spec_from_config(config, name), False
    except UnknownNameError:
        if any_architecture:
            return stand_in_spec(config, name), True
        raise


def _read_config(folder: Path) -> Any:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"`{folder}` has no config.json", "give the folder of a transformers model"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read `{path}`: {error}", "it is damaged: fetch or save the model again"
        ) from error


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps models, by its own rules (`huggingface_hub.constants`)."""
    hub = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    return _expanded(hub) if hub else hub_home(environ) / "hub"


def hub_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub and accelerate keep everything: models, a token, a configuration."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(environ.get("HF_HOME") or os.path.join(cache, "huggingface"))


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


def cached_folder(hub_id: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The newest snapshot of a Hub model in the local cache that has a config.json."""
    snapshots = hub_cache(environ) / ("models--" + hub_id.replace("/", "--")) / "snapshots"
    if not os.path.isdir(snapshots):
        return None
    found = [s for s in snapshots.iterdir() if (s / "config.json").is_file()]
    return max(found, key=lambda s: s.stat().st_mtime, default=None)


def has_weights(folder: Path) -> bool:
    """Whether all safetensors files of a model folder are there; not where their index is
    damaged."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_safetensors(folder: Path) -> None:
    """Raises InputError where the weights of a model or adapter are there as pickles alone: reading
    those can run any code."""
    pickles = sorted(
        path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind)
    )
    if not pickles or any(folder.glob("*.safetensors")):
        return
    raise InputError(
        f"`{folder}` holds its weights as a pickle (`{pickles[0]}`), and reading one can run any "
        "code",
        "get a copy in safetensors; or, if you trust where it is from, load it with transformers "
        "or PEFT and `save_pretrained` it again",
    )


def _source_from_hub(
    hub_id: str, environ: Mapping[str, str], any_architecture: bool
) -> ModelSource:
    folder = cached_folder(hub_id, environ)
    if folder is not None:
        config = _read_config(folder)
        origin = "local Hub cache"
    else:
        config = _fetch_config(hub_id, environ)
        origin = "Hub"
    spec, stand_in = _spec(config, hub_id, any_architecture)
    return ModelSource(
        spec=spec, config=config, origin=origin, hub_id=hub_id, folder=folder, stand_in=stand_in
    )


def hub_offline(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment forbids asking the Hub; transformers' older variable counts too."""
    said = environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def config_url(hub_id: str, environ: Mapping[str, str]) -> str:
    """The address of a Hub model's config.json."""
    return f"{hub_endpoint(environ)}/{hub_id}/resolve/main/config.json"


def hub_endpoint(environ: Mapping[str, str]) -> str:
    """The Hub's address, or that of a mirror."""
    return environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _fetch_config(hub_id: str, environ: Mapping[str, str]) -> Any:
    """config.json of a Hub model; raises InputError saying what to do instead."""
    near = UnknownNameError("model", hub_id, [entry.hub_id for entry in model_catalog().values()])
    instead = " ".join(filter(None, (near.hint, "Or give a folder with its config.json.")))
    if hub_offline(environ):
        raise InputError(
            f"`{hub_id}` is not in the catalog or the local cache, and HF_HUB_OFFLINE is set",
            instead,
        )
    import http.client  # 40 ms that only this path needs
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(config_url(hub_id, environ))
        if token := environ.get("HF_TOKEN"):
            # The Hub redirects to other hosts, which must not see it.
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise InputError(
                f"the Hub does not show `{hub_id}` to you ({error.code})",
                "the name may be wrong, or the model gated: accept its licence and set HF_TOKEN",
            ) from error
        if error.code == 404:
            raise InputError(f"the Hub has no model `{hub_id}` (404)", instead) from error
        raise InputError(
            f"the Hub does not answer for `{hub_id}` now ({error.code} {error.reason})",
            "try again later, or give a folder with its config.json",
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(
            f"`{hub_id}` is not in the catalog, and the Hub is out of reach", instead
        ) from error
