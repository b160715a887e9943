"""`ftplan data FILE...`: format, problems and token lengths of data files."""

from __future__ import annotations

import argparse
from pathlib import Path

from msgspec import structs

from ftplan.launcher.commands.plan import add_data_arguments, data_asked
from ftplan.launcher.data.profiling import make_split, profile_data, profile_to_dict
from ftplan.launcher.model_source import find_source
from ftplan.launcher.planning import default_source, tokenizer_of
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.objectives import OBJECTIVES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser)
    parser.add_argument(
        "--model", metavar="MODEL", help="whose tokenizer counts (default: the embedded model's)"
    )
    parser.add_argument(
        "--objective", choices=tuple(OBJECTIVES), help="what rows shall train (default: by shape)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw the histogram of lengths, as PNG"
    )
    parser.add_argument(
        "--sample",
        metavar="N",
        type=int,
        help="look at about N rows of large files of JSON lines, and estimate the rest",
    )


def run(arguments: argparse.Namespace, ui: Ui) -> int:
    asked = structs.replace(
        data_asked(arguments, arguments.objective), sample=_checked_sample(arguments.sample)
    )
    asked.check()
    asked = asked.settled(ui)
    source = find_source(arguments.model) if arguments.model else default_source()
    tokenizer = tokenizer_of(ui, source)
    data, eval_data = asked.read(ui, tokenizer)
    split = make_split(data, eval_data, asked.test_share)
    profile = profile_data(data, split, eval_data)
    described = profile_to_dict(profile, source.spec.max_position_embeddings)
    if data.sample:
        described["sample"] = data.sample.to_dict()
    ui.json(described)
    if not ui.as_json:
        from ftplan.launcher.data import views

        ui.show(*views.report(profile, described, tokenizer.template if tokenizer else ""))
        for note in data.notes():
            ui.warn(note)
        if data.sample:
            ui.show("", views.sample_table(data.sample))
    if arguments.plot:
        from ftplan.launcher.data.plot import plot_lengths

        plot_lengths(profile, arguments.plot)
        ui.say(f"histogram: {arguments.plot}")
    return 0


def _checked_sample(sample: int | None) -> int | None:
    if sample is not None and sample < 100:
        raise InputError(f"`--sample {sample}` is too small to say anything", "take 1000 or more")
    return sample
