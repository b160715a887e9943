"""Tokens and keys, kept out of what is written into a run directory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ftplan.launcher.run_dir import RunDir, write_bytes

MASK = "[masked]"

# HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, ...; not HF_TOKEN_PATH.
_NAMES = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSPHRASE)$|PASSWORD$|PASSWD$", re.IGNORECASE)

# What is shorter may be any word.
_FEWEST_CHARACTERS = 8

_TEXT = frozenset({".json", ".jsonl", ".yaml", ".txt", ".log", ".html"})


def names_a_secret(variable: str) -> bool:
    """Whether an environment variable is named as those are that hold a token or key."""
    return _NAMES.search(variable) is not None


def secrets_of(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Values of variables that are named as keys are, the longest first."""
    found = {
        value
        for name, value in environ.items()
        if names_a_secret(name) and len(value) >= _FEWEST_CHARACTERS and not value.startswith("/")
    }
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def masked(text: str, secrets: Sequence[str]) -> str:
    """Without the secrets, and without what has the form of a key."""
    from ftplan.launcher.data.private_text import keys_masked

    for secret in secrets:
        text = text.replace(secret, MASK)
    return keys_masked(text, MASK)


class MaskedStream:
    """A text stream that writes no secret. What is written in pieces is left for `mask_files`."""

    def __init__(self, stream: TextIO, secrets: Sequence[str]) -> None:
        self._stream = stream
        self._secrets = secrets

    def write(self, text: str) -> int:
        self._stream.write(masked(text, self._secrets))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mask_files(run: RunDir, secrets: Sequence[str]) -> list[Path]:
    """Take secrets out of the run's own text files, once nothing writes them any more: libraries in
    C write past Python's streams. Returns the files that held one. Rows of the data stay as they
    are."""
    changed = []
    for path in sorted(run.root.iterdir()):
        if path.suffix not in _TEXT or not path.is_file():
            continue
        written = clean = path.read_bytes()
        for secret in secrets:
            clean = clean.replace(secret.encode(), MASK.encode())
        if clean != written:
            write_bytes(path, clean)
            changed.append(path)
    return changed
