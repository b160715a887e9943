"""ftplan's version, from the installed distribution."""

from __future__ import annotations


def version() -> str:
    from importlib import metadata  # 50 ms that few commands need

    return metadata.version("ftplan")
