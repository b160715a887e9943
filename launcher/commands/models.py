"""`ftplan models`: the catalog."""

from __future__ import annotations

import argparse

from ftplan.launcher.ui import Ui, table
from ftplan.planner.units import format_count
from ftplan.profiles import model_catalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="", help="only names that contain this")


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    wanted = arguments.pattern.casefold()
    found = [
        entry
        for entry in sorted(model_catalog().values(), key=lambda e: e.num_parameters)
        if wanted in entry.name or wanted in entry.hub_id.casefold()
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
    rows = [[e.name, format_count(e.num_parameters), e.kind, e.licence, e.hub_id] for e in found]
    ui.show(table("", ("name", ">parameters", "kind", "licence", "Hub id"), rows))
    if not found:
        ui.say(f"no model of the catalog has `{arguments.pattern}` in its name")
    return 0
