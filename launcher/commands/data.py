"""`ftplan data FILE`: format, problems and token lengths of a data file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ftplan.launcher.data_reader import read_data
from ftplan.launcher.model_source import find_source
from ftplan.launcher.planning import default_source, tokenizer_of
from ftplan.launcher.profiling import make_split, profile_data, profile_to_dict
from ftplan.launcher.ui import Ui


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="FILE", type=Path, help="a .json or .jsonl file")
    parser.add_argument(
        "--model", metavar="MODEL", help="whose tokenizer counts (default: the embedded model's)"
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    data = read_data(arguments.data)
    source = find_source(arguments.model) if arguments.model else default_source()
    split = make_split(data, None)
    tokenizer = tokenizer_of(ui, source)
    profile = profile_data(data, split, tokenizer)
    described = profile_to_dict(profile, source.spec.max_position_embeddings)
    ui.json(described)
    if not ui.as_json:
        from ftplan.launcher import views

        ui.show(
            views.data_table(profile, tokenizer.template if tokenizer else ""),
            "",
            views.advice_table(described["advice"]),
        )
        for warning in profile.warnings:
            ui.warn(warning)
    return 0
