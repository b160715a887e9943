"""Engines' files as people write them: scripts in blocks of lines, no line broken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block; no references from one place to another."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def yaml_text(*documents: Mapping[str, Any], comment: str) -> str:
    """The documents, with the comment above them."""
    told = [
        yaml.dump(dict(each), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
        for each in documents
    ]
    return f"# {comment}\n" + "---\n".join(told)
