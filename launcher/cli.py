"""The `ftplan` command: picks the verb, runs it, turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, NoReturn, Protocol

from ftplan.planner.errors import FtplanError, InputError, UnknownNameError

if TYPE_CHECKING:
    from ftplan.launcher.ui import Ui

# Verb -> what it does, in the order of `ftplan --help`. Each is a module of
# `ftplan.launcher.commands`; a test compares this list with the files there.
COMMANDS: dict[str, str] = {
    "estimate": "memory of one configuration, at once",
    "plan": "the best plan for a data file on this or a named GPU",
    "auto": "plan, show, launch, report",
    "launch": "start or repeat the run of a run directory",
    "resume": "go on with an interrupted run",
    "cancel": "end a run that goes on, with a checkpoint",
    "runs": "the runs of a folder and their states; one of them, also while it goes on",
    "report": "the report of a run, finished or not, as one page",
    "merge": "a run's adapter in the weights of its base model",
    "data": "what is in a data file",
    "validate": "predictions beside measured runs",
    "calibrate": "learn this machine's constants from its finished runs",
    "gpus": "what this machine has, free and total",
    "doctor": "what keeps this machine from training, and how to mend it",
    "hardware": "which GPUs, how many, how long, how much",
    "models": "the models ftplan knows by name",
    "methods": "the ways to fine-tune, and when to take which",
}

# Python looks for cycles of objects each 700 new ones, which takes 15 % of the processor time of
# `ftplan hardware` and finds next to none.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000

EXIT_STATUS_HELP = (
    "exit status: 0 fits or done, 1 does not fit or the run failed, 2 bad usage or input, "
    "130 interrupted"
)


class Command(Protocol):
    """What a module of `ftplan.launcher.commands` offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace, ui: Ui) -> int: ...


class _Parser(argparse.ArgumentParser):
    """Errors as InputError, so that all messages look alike."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, f"see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status and never raises for a person's mistake."""
    words = sys.argv[1:] if argv is None else argv
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        return _run(words)
    except BrokenPipeError:
        return 0  # the reader (`| head`) has seen enough
    finally:
        _flush()


def _flush() -> None:
    """Write what is left, or nowhere if the reader has gone: Python would end with status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0 if words else 2
    if words[0] == "--version":
        from ftplan.launcher.version import version

        sys.stdout.write(f"ftplan {version()}\n")
        return 0
    from ftplan.launcher.settings_flags import complete_switches
    from ftplan.launcher.ui import Ui

    ui = Ui()
    try:
        verb = words[0]
        if verb not in COMMANDS:
            raise UnknownNameError("command", verb, COMMANDS, "See `ftplan --help`.")
        command: Command = importlib.import_module(f"ftplan.launcher.commands.{verb}")
        parser = make_parser(verb, command)
        arguments, unknown = parser.parse_known_args(complete_switches(words[1:]))
        if unknown:
            raise _unknown_argument(parser, unknown[0])
        ui.as_json = arguments.json
        if not getattr(arguments, "trust_remote_code", False):
            return command.run(arguments, ui)
        from ftplan.launcher import remote_code

        with remote_code.allowed(ui.warn):
            return command.run(arguments, ui)
    except FtplanError as error:
        with contextlib.suppress(BrokenPipeError):
            ui.fail(error)
        return error.exit_status
    except KeyboardInterrupt:
        ui.say("interrupted")
        return 130


def make_parser(verb: str, command: Command) -> argparse.ArgumentParser:
    """The parser of one verb."""
    parser = _Parser(
        prog=f"ftplan {verb}",
        description=f"{COMMANDS[verb]}.",
        epilog=EXIT_STATUS_HELP,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    command.add_arguments(parser)
    return parser


def _unknown_argument(parser: argparse.ArgumentParser, word: str) -> InputError:
    if word.startswith("-"):
        options = [o for o in parser._option_string_actions if o.startswith("--")]
        return UnknownNameError("option", word.split("=")[0], options, f"See `{parser.prog} -h`.")
    return InputError(f"`{word}` is one argument too many", f"see `{parser.prog} --help`")


def overview() -> str:
    """The text of `ftplan --help`."""
    width = max(map(len, COMMANDS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in COMMANDS.items())
    return (
        "usage: ftplan COMMAND [options]\n\n"
        "Plan the memory, time and settings of a fine-tuning run, then launch it.\n\n"
        f"commands:\n{verbs}\n\n"
        "options:\n  --help     this text; `ftplan COMMAND --help` for one command\n"
        "  --version  the version\n\n"
        f"{EXIT_STATUS_HELP}\n"
    )
