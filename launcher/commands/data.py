"""`ftplan data FILE...`: format, problems and token lengths of data files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msgspec import structs

from ftplan.launcher.commands.plan import add_data_arguments, data_asked
from ftplan.launcher.data.profiling import (
    check_lengths,
    make_split,
    profile_data,
    profile_to_dict,
    weighting_to_dict,
)
from ftplan.launcher.data.templates import check_template_name
from ftplan.launcher.model_choice import default_source
from ftplan.launcher.model_source import find_source
from ftplan.launcher.planning import overlong_rule, tokenizer_of
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.overlong import OVERLONG
from ftplan.planner.plan import TrainingPlan, check_setting, flag_name, parse_setting
from ftplan.planner.recipe import asks_for_tasks, task_weighting

_TASK_SETTINGS = ("task_weighting", "task_temperature", "task_weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser)
    parser.add_argument(
        "--model", metavar="MODEL", help="whose tokenizer counts (default: the embedded model's)"
    )
    parser.add_argument(
        "--objective", choices=tuple(OBJECTIVES), help="what rows shall train (default: by shape)"
    )
    parser.add_argument(
        "--max-length", metavar="N", help="tokens a row may have (default: what the model takes)"
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        default=TrainingPlan().chat_template,
        help="what puts conversations into text (default: by model and data)",
    )
    parser.add_argument(
        "--overlong",
        metavar="|".join(OVERLONG),
        default=TrainingPlan().overlong,
        help="what becomes of longer rows (default: their end is cut off)",
    )
    for name in _TASK_SETTINGS:
        setting = TrainingPlan.__dataclass_fields__[name].metadata
        choices = setting["choices"]
        metavar = "|".join(choices) if choices else None
        parser.add_argument(flag_name(name), metavar=metavar, help=setting["help"])
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
    given = _given(arguments)
    asked = structs.replace(asked.settled(ui), files_are_tasks=asks_for_tasks(given))
    source = find_source(arguments.model) if arguments.model else default_source()
    tokenizer = tokenizer_of(ui, source, given)
    longest = given.get("max_length", source.spec.max_position_embeddings)
    asked = structs.replace(asked, rule=overlong_rule(given, longest))
    data, eval_data = asked.read(ui, tokenizer)
    split = make_split(data, eval_data, asked.test_share)
    check_lengths(data, split, eval_data, strict=asked.strict)
    profile = profile_data(data, split, eval_data)
    described = profile_to_dict(profile, source.spec, given.get("max_length"))
    if profile.task_lengths:
        described["task_weighting"] = weighting_to_dict(profile, task_weighting(profile, given))
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


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """`max_length`, `overlong`, `chat_template` and the tasks' weights as a plan has them; raises
    InputError."""
    check_template_name(arguments.chat_template)
    given: dict[str, Any] = {
        "overlong": arguments.overlong,
        "chat_template": arguments.chat_template,
    }
    if arguments.max_length is not None:
        given["max_length"] = parse_setting("max_length", arguments.max_length)
    for name in _TASK_SETTINGS:
        if getattr(arguments, name) is not None:
            given[name] = parse_setting(name, getattr(arguments, name))
    for name, value in given.items():
        check_setting(name, value)
    return given


def _checked_sample(sample: int | None) -> int | None:
    if sample is not None and sample < 100:
        raise InputError(f"`--sample {sample}` is too small to say anything", "take 1000 or more")
    return sample
