"""TensorBoard, Weights & Biases and trackio: what each needs to be reported to.

Keys stay where their own programs keep them. Where one has none, it is run offline, and what it
keeps can be uploaded later.
"""

from __future__ import annotations

import importlib.util
import netrc
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from ftplan.launcher.run_dir import RunDir
from ftplan.planner.errors import InputError, UnknownNameError

PROJECT = "ftplan"


class Tracker(Struct, frozen=True, kw_only=True):
    """`packages`: any of these is enough, the first one is advised. `folder`, `project`, `mode` and
    `key`: environment variables that the package heeds, None where it has none.

    `below`: its folder within the run's `trackers`, where it makes none itself. `keys`: netrc files
    under the home directory in which its login keeps a key, for `key_host` where others keep
    theirs there too. `upload`: what brings it online later.
    """

    title: str
    packages: tuple[str, ...]
    folder: str | None = None
    below: str = ""
    project: str | None = None
    mode: str | None = None
    key: str | None = None
    keys: tuple[str, ...] = ()
    key_host: str | None = None
    upload: str = ""


# Variables: the docstrings of transformers' callbacks (transformers 5.23,
# `integrations/integration_utils.py`) and each package's own pages.
TRACKERS: Mapping[str, Tracker] = {
    "tensorboard": Tracker(
        title="TensorBoard",
        packages=("tensorboard", "tensorboardX"),
        folder="TENSORBOARD_LOGGING_DIR",
        below="tensorboard",
    ),
    "wandb": Tracker(
        title="Weights & Biases",
        packages=("wandb",),
        folder="WANDB_DIR",
        project="WANDB_PROJECT",
        mode="WANDB_MODE",
        key="WANDB_API_KEY",
        keys=(".netrc", "_netrc"),
        key_host="api.wandb.ai",
        upload="wandb sync {folder}/wandb/offline-run-*",
    ),
    # It keeps all of its runs in one place on this machine, where `trackio show` looks for them.
    "trackio": Tracker(title="trackio", packages=("trackio",)),
}


def checked_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """The names; raises UnknownNameError for one that is none."""
    names = tuple(names)
    for name in names:
        if name not in TRACKERS:
            raise UnknownNameError("tracker", str(name), TRACKERS)
    return names


def require_trackers(
    names: Iterable[str], environ: Mapping[str, str] | None = None, run: RunDir | None = None
) -> list[str]:
    """What is to be said of the trackers: that one is run offline. Raises InputError where a
    package is not installed."""
    chosen = [TRACKERS[name] for name in names]
    missing = [tracker for tracker in chosen if not any(map(_is_installed, tracker.packages))]
    if missing:
        titles = " and ".join(tracker.title for tracker in missing)
        packages = " ".join(tracker.packages[0] for tracker in missing)
        raise InputError(
            f"{titles}: the package is not installed",
            f"`pip install {packages}`, or leave it out of `--report-to`",
        )
    if environ is None:
        return []
    return [_said_offline(tracker, run) for tracker in chosen if goes_offline(tracker, environ)]


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _said_offline(tracker: Tracker, run: RunDir | None) -> str:
    folder = run.trackers if run else "RUN/trackers"
    upload = tracker.upload.format(folder=folder)
    return f"{tracker.title} has no key here and is run offline; later: `{upload}`"


def goes_offline(tracker: Tracker, environ: Mapping[str, str], home: Path | None = None) -> bool:
    """Whether it has a mode to be chosen, which nobody has, and no key to go online with."""
    if tracker.mode is None or tracker.mode in environ:
        return False
    if tracker.key and environ.get(tracker.key):
        return False
    folder = home or Path(environ.get("HOME", "~")).expanduser()
    return not any(_holds_key(folder / name, tracker.key_host) for name in tracker.keys)


def _holds_key(path: Path, host: str | None) -> bool:
    """Whether a netrc file has a login: for the host, or any."""
    with suppress(OSError, netrc.NetrcParseError):
        hosts = netrc.netrc(str(path)).hosts
        return host in hosts if host else bool(hosts)
    return False


def tracker_settings(
    names: Iterable[str], run: RunDir, environ: Mapping[str, str]
) -> dict[str, str]:
    """Environment variables that trackers are given on top of what is set already."""
    settings: dict[str, str] = {}
    for tracker in (TRACKERS[name] for name in names):
        if tracker.folder:
            settings[tracker.folder] = str(run.trackers.resolve() / tracker.below)
        if tracker.project:
            settings[tracker.project] = PROJECT
        if tracker.mode and goes_offline(tracker, environ):
            settings[tracker.mode] = "offline"
    return {name: value for name, value in settings.items() if name not in environ}
