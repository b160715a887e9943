"""`ftplan models`: the catalog."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import groupby

from rich.text import Text

from ftplan.launcher.ui import Ui, table
from ftplan.planner.units import format_count
from ftplan.profiles import ModelEntry, model_catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="", help="only names that contain this")


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    wanted = arguments.pattern.casefold()
    found = [
        entry
        for entry in sorted(model_catalog().values(), key=lambda e: e.num_parameters)
        if any(wanted in name for name in (entry.name, entry.hub_id.casefold(), *entry.aliases))
    ]
    ui.json(
        {
            "schema": 1,
            "models": [
                {
                    "name": e.name,
                    "hub_id": e.hub_id,
                    "num_parameters": e.num_parameters,
                    "kind": e.kind,
                    "licence": e.licence,
                }
                for e in found
            ],
        }
    )
    ui.show(table("", ("name", ">parameters", "kind", "licence"), list(_rows(found))))
    if not found:
        ui.say(f"no model of the catalog has `{arguments.pattern}` in its name")
    return 0


def _rows(found: list[ModelEntry]) -> Iterable[list[str | Text]]:
    """A line for each publisher, its models below it from small to large: both make the Hub id."""
    by_publisher = sorted(found, key=lambda e: _publisher(e).casefold())
    for publisher, entries in groupby(by_publisher, key=_publisher):
        yield [Text(f"{publisher}/", style="bold"), "", "", ""]
        for e in entries:
            name = e.hub_id.removeprefix(f"{publisher}/")
            yield [f"  {name}", format_count(e.num_parameters), e.kind, e.licence]


def _publisher(entry: ModelEntry) -> str:
    return entry.hub_id.split("/")[0]
