"""The rows of a dataset on the Hugging Face Hub, as local files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ftplan.launcher.data.folders import choose
from ftplan.launcher.model_source import hub_endpoint, hub_offline
from ftplan.planner.errors import InputError

_HUB_TIMEOUT_SECONDS = 10


def fetch_dataset(
    hub_id: str, environ: Mapping[str, str] = os.environ
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """A dataset's files to train on, fetched into the Hub's cache, and what was left out.

    What was fetched before is found without a connection. Raises InputError.
    """
    hub = _hub(hub_id)
    try:
        names = _listing(hub_id, hub.get_token(), environ)
    except (OSError, ValueError, KeyError) as error:
        if cached := _cached(hub, hub_id):
            return cached
        raise _unreachable(hub_id, error) from error
    chosen = choose(names)
    _refuse_several(hub_id, chosen.paths)
    try:
        folder = Path(
            hub.snapshot_download(hub_id, repo_type="dataset", allow_patterns=list(chosen.paths))
        )
    except Exception as error:
        raise _unreachable(hub_id, error) from error
    return tuple(folder / name for name in chosen.paths), chosen.remarks


def _hub(hub_id: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"no such file: `{hub_id}`; to fetch it from the Hub, huggingface_hub is missing",
            '`pip install "ftplan[train]"`, or give a file',
        ) from None
    return huggingface_hub


def _listing(hub_id: str, token: str | None, environ: Mapping[str, str]) -> list[str]:
    """The names of a dataset's files. Raises OSError, ValueError, KeyError.

    Asked once: huggingface_hub asks six times, for half a minute without a connection.
    """
    from urllib.request import Request, urlopen

    if hub_offline(environ):
        raise OSError("HF_HUB_OFFLINE is set")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = Request(f"{hub_endpoint(environ)}/api/datasets/{hub_id}", headers=headers)
    with urlopen(request, timeout=_HUB_TIMEOUT_SECONDS) as answer:
        return [str(file["rfilename"]) for file in json.load(answer)["siblings"]]


def _cached(hub: Any, hub_id: str) -> tuple[tuple[Path, ...], tuple[str, ...]] | None:
    try:
        folder = Path(hub.snapshot_download(hub_id, repo_type="dataset", local_files_only=True))
    except Exception:  # not there, by whichever of its errors
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    chosen = choose(names)
    if not chosen.paths:
        return None
    _refuse_several(hub_id, chosen.paths)
    remarks = (*chosen.remarks, "the Hub is not in reach: read as it was fetched before")
    return tuple(folder / name for name in chosen.paths), remarks


def _refuse_several(hub_id: str, paths: Sequence[str]) -> None:
    """A repository may hold several datasets, a folder each: their rows are not mixed unasked."""
    if not paths:
        raise InputError(
            f"`{hub_id}` on the Hub holds no data file that ftplan reads",
            "fetch its files and write them as JSON lines",
        )
    folders = sorted({PurePosixPath(path).parts[0] for path in paths if "/" in path})
    if len(folders) > 1:
        raise InputError(
            f"`{hub_id}` on the Hub holds several datasets: {', '.join(folders[:8])}",
            f"fetch one and give its folder: `hf download {hub_id} --repo-type dataset "
            f"--include '{folders[0]}/*' --local-dir DIR`",
        )


def _unreachable(hub_id: str, error: Exception) -> InputError:
    status = getattr(error, "code", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    if status in (401, 404):
        return InputError(
            f"neither a file here nor a dataset on the Hub: `{hub_id}`",
            "check the name; a private dataset needs `hf auth login`",
        )
    if status == 403:
        return InputError(
            f"the dataset `{hub_id}` on the Hub is gated",
            "accept its terms on its page there, then `hf auth login`",
        )
    reason = (str(getattr(error, "reason", error)) or type(error).__name__).splitlines()[0]
    return InputError(
        f"no such file: `{hub_id}`; as a dataset on the Hub it is out of reach ({reason})",
        "check the path or the connection, or fetch it elsewhere and give the file",
    )
