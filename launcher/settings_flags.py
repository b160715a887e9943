"""A command-line flag for every setting of a plan, made from TrainingPlan's fields."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan, flag_name, parse_setting

_SWITCHES = {
    flag_name(item.name): item.name
    for item in dataclasses.fields(TrainingPlan)
    if isinstance(item.default, bool)
}


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a setting under its Hugging Face name, dashes for underscores.

    Values are checked when the plan is made, so that messages name the nearest choice.
    """
    group = parser.add_argument_group(
        "settings of the plan", "what is given is kept; the rest is chosen around it"
    )
    for item in dataclasses.fields(TrainingPlan):
        switch = isinstance(item.default, bool)
        choices = item.metadata["choices"]
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if switch else {}
        metavar = "yes|no" if switch else "|".join(choices) if choices else None
        group.add_argument(
            flag_name(item.name),
            dest=item.name,
            metavar=metavar,
            help=item.metadata["help"],
            **extra,
        )


def complete_switches(words: list[str]) -> list[str]:
    """Command-line words with `yes` after every switch that stands alone.

    argparse would take `7B` in `--gradient-checkpointing 7B` for the switch's value.
    """
    completed = []
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        completed.append(word)
        if word in _SWITCHES and not _is_value(_SWITCHES[word], following):
            completed.append("yes")
    return completed


def _is_value(setting: str, word: str) -> bool:
    try:
        parse_setting(setting, word)
    except InputError:
        return False
    return True


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, as their types; raises InputError.

    There `num_gpus` is of each machine, in a plan it is of all."""
    given = {
        item.name: parse_setting(item.name, text)
        for item in dataclasses.fields(TrainingPlan)
        if (text := getattr(arguments, item.name)) is not None
    }
    if given.get("num_machines", 0) > 0 and "num_gpus" in given:
        given["num_gpus"] *= given["num_machines"]
    if "add_tokens" in given:
        given["add_tokens"] = _listed(given["add_tokens"])
    return given


def _listed(tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Tokens, or those that a file names: one a line. Raises InputError for a file without."""
    if len(tokens) != 1 or not os.path.isfile(tokens[0]):
        return tokens
    try:
        lines = Path(tokens[0]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the tokens of `{tokens[0]}`: {error}") from error
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise InputError(f"`{tokens[0]}` names no token", "write one on each line")
    return found


def command_line(
    verb: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    arguments: argparse.Namespace,
    settled: Mapping[str, str | None],
    leave_out: Sequence[str] = (),
) -> str:
    """What to type to get the same again, for a shell: all that was given, defaults left out.

    `settled`: what a person was asked, in the place of what was given.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    words, flags = ["ftplan", verb], []
    for action in parser._actions:
        value = settled.get(action.dest) or getattr(arguments, action.dest)
        if action.dest in leave_out or value == action.default:
            continue
        given = [str(part) for part in value] if isinstance(value, list) else [str(value)]
        if not action.option_strings:
            words += given
        else:
            flags += [action.option_strings[0], *(given if action.nargs != 0 else ())]
    return shlex.join(words + flags)
