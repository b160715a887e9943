"""Permission to run the Python code that comes in a model's repository.

It is given for one process, on its command line, and stands in no file: neither a plan nor a run
directory that somebody else wrote can bring a machine to run code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ftplan.launcher.model_source import ModelSource
from ftplan.planner.errors import InputError

FLAG = "--trust-remote-code"
MODEL, TOKENIZER = "config.json", "tokenizer_config.json"


class _Permission:
    """What the process's command line allows, and the repositories that were named for it."""

    def __init__(self) -> None:
        self.given = False
        self.named: set[str] = set()
        self.warn: Callable[[str], None] = lambda _: None


_permission = _Permission()


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        FLAG,
        action="store_true",
        help="run the Python code that the model's repository brings: read it first, it can do "
        "anything that you can",
    )


@contextmanager
def allowed(warn: Callable[[str], None]) -> Iterator[None]:
    """Code may run within; each repository is named by `warn` before its code runs."""
    before = (_permission.given, _permission.named, _permission.warn)
    _permission.given, _permission.named, _permission.warn = True, set(), warn
    try:
        yield
    finally:
        _permission.given, _permission.named, _permission.warn = before


def is_allowed() -> bool:
    return _permission.given


def trusted(model: str | Path, part: str = MODEL) -> bool:
    """transformers' `trust_remote_code` for the model or tokenizer of a folder: it brings code for
    that, which may run. Says so the first time."""
    modules = _modules(Path(model) / part)
    if not (_permission.given and modules):
        return False
    for repository in sorted({repository or str(model) for repository, _ in modules}):
        if repository not in _permission.named:
            _permission.named.add(repository)
            _permission.warn(f"running the Python code that `{repository}` brings ({FLAG})")
    return True


def lacks_code(folder: Path) -> bool:
    """Whether the Python files that a model's folder names are not in it."""
    modules = {named for part in (MODEL, TOKENIZER) for named in _modules(folder / part)}
    return any(
        not (folder / f"{name.replace('.', '/')}.py").is_file()
        for repository, name in modules
        if not repository
    )


def _modules(settings: Path) -> set[tuple[str, str]]:
    """What `auto_map` names: repositories (none for the folder's own) and modules in them, of
    `module.Class` or `org/name--module.Class`."""
    try:
        auto_map = json.loads(settings.read_text(encoding="utf-8")).get("auto_map") or {}
    except (OSError, ValueError, AttributeError):
        return set()
    found = set()
    for named in auto_map.values() if isinstance(auto_map, dict) else (auto_map,):
        for reference in named if isinstance(named, list) else (named,):
            if isinstance(reference, str):
                repository, _, name = reference.rpartition("--")
                found.add((repository, name.rpartition(".")[0]))
    return found


def check(source: ModelSource) -> None:
    """Raises InputError for a model that needs code which may not run."""
    if source.spec.code == "remote" and source.folder and not trusted(source.folder):
        raise refusal(source.folder)


@contextmanager
def refused(model: str | Path) -> Iterator[None]:
    """Raises InputError where transformers finds that it would need code that may not run."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise refusal(model) from error
        raise


def refusal(model: str | Path) -> InputError:
    """What is said of a model whose code is needed and may not run."""
    return InputError(
        f"`{model}` brings Python code of its own, and needs it",
        f"read that code, and add `{FLAG}` if you trust whoever wrote it; or take a model that "
        "transformers itself knows",
    )
