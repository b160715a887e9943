"""What a run needs besides its directory on a machine that is not this one."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from ftplan.launcher.backends.job import GRACE_SECONDS, Job
from ftplan.launcher.packages import TRAIN_PACKAGES
from ftplan.launcher.run_dir import RunDir, read_mapping
from ftplan.launcher.version import version
from ftplan.launcher.versions import installed

MACHINE_MODULE = "ftplan.launcher.backends.machine"

# How the Hub's cache names a model's folder.
_SNAPSHOT = re.compile(r"models--(?P<id>.+)/snapshots/(?P<revision>[^/]+)$")


class Package(Struct, frozen=True):
    """Where ftplan is installed from: a folder or wheel of this machine, or else a requirement."""

    local: Path | None
    requirement: str


def training_words(job: Job, *own: str) -> list[str]:
    """Words behind `python` that carry out one machine's part. `own`: for `machine`."""
    return ["-m", MACHINE_MODULE, str(job.run.root), *own, "--", *job.command[1:]]


def training_line(job: Job, python: str, *own: str) -> str:
    """The same for a shell; names of ftplan's variables stay, `machine` fills them in."""
    return f"{python} {shlex.join(training_words(job, *own))}"


def variables(job: Job, environment: dict[str, str]) -> dict[str, str]:
    """What training processes find set. torch's launcher kills what it has started half a minute
    after SIGTERM unless told otherwise (torch 2.13, `LaunchConfig.shutdown_timeout`)."""
    grace = str(job.grace_seconds)
    return {**environment, GRACE_SECONDS: grace, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace}


def model_folders(run: RunDir) -> list[Path]:
    """Folders of models that train.yaml names outside of the run; none before it is written."""
    train = read_mapping(run.train) if run.train.is_file() else {}
    rewards = train.get("rewards") or {}
    named = [train.get("model"), rewards.get("model"), rewards.get("adapter")]
    return list(_outside(run, named))


def data_files(run: RunDir) -> list[Path]:
    """Data files that were too large to be copied into the run directory."""
    train = read_mapping(run.train) if run.train.is_file() else {}
    parts = [train.get("data") or {}, train.get("eval_data") or {}]
    return list(_outside(run, [name for part in parts for name in part.get("files", ())]))


def _outside(run: RunDir, names: list[object]) -> Iterator[Path]:
    for path in dict.fromkeys(Path(str(name)) for name in names if name):
        if path.is_absolute() and not path.is_relative_to(run.root.absolute()):
            yield path


def hub_snapshot(folder: Path) -> tuple[str, str] | None:
    """The Hub's name and the revision of a folder of its cache; None of any other folder."""
    found = _SNAPSHOT.search(folder.as_posix())
    return (found["id"].replace("--", "/"), found["revision"]) if found else None


def ftplan_package() -> Package:
    """By what pip wrote down when it installed ftplan (PEP 610)."""
    text = importlib.metadata.distribution("ftplan").read_text("direct_url.json")
    origin = json.loads(text) if text else {}
    url = str(origin.get("url", ""))
    if url.startswith("file:"):
        return Package(Path(unquote(urlsplit(url).path)), "")
    if vcs := origin.get("vcs_info"):
        return Package(None, f"ftplan[train] @ {vcs['vcs']}+{url}@{vcs['commit_id']}")
    return Package(None, f"ftplan[train] @ {url}" if url else f"ftplan[train]=={version()}")


def pinned_packages() -> list[str]:
    """What training is done with here, as pip's requirements; without a build's own suffix
    (`2.13.0+cpu`), which other indexes have."""
    found = installed()
    versions = {name: found.get(name) for name in (*TRAIN_PACKAGES, "bitsandbytes")}
    return [f"{name}=={v.partition('+')[0]}" for name, v in versions.items() if v]


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
