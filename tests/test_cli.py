"""The command line: which commands and flags there are, what is said, which status it ends with."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ftplan
from ftplan.launcher import cli
from ftplan.launcher.cli import COMMANDS, main, make_parser, overview
from ftplan.launcher.settings_flags import add_setting_flags, given_settings
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import (
    DoesNotFitError,
    FtplanError,
    InputError,
    InterruptedRunError,
    RunFailedError,
)
from ftplan.planner.plan import SETTING_NAMES, TrainingPlan, setting_type

ROOT = Path(__file__).parents[1]
ON_DISK = sorted(
    path.stem for path in (ROOT / "launcher" / "commands").glob("*.py") if path.stem != "__init__"
)

# People and scripts rely on these: a change here is a change for them.
SETTING_FLAGS = [
    "--method",
    "--quantization",
    "--double-quant",
    "--dtype",
    "--mixed-precision",
    "--lora-rank",
    "--lora-alpha",
    "--lora-dropout",
    "--loraplus-lr-ratio",
    "--target-modules",
    "--modules-to-save",
    "--peft-config",
    "--add-tokens",
    "--train-tokens",
    "--num-tasks",
    "--autocast-adapter-dtype",
    "--num-trainable-layers",
    "--trainable-modules",
    "--jagged-restart-steps",
    "--jagged-restart-warmup-steps",
    "--relora-prune-ratio",
    "--relora-prune-method",
    "--plora-momentum",
    "--lora-drop-threshold",
    "--optim",
    "--per-device-train-batch-size",
    "--gradient-accumulation-steps",
    "--max-length",
    "--chat-template",
    "--overlong",
    "--packing",
    "--gradient-checkpointing",
    "--every-n-layers",
    "--use-reentrant",
    "--attn-implementation",
    "--loss",
    "--trainer",
    "--objective",
    "--precompute-ref-log-probs",
    "--num-generations",
    "--max-completion-length",
    "--steps-per-generation",
    "--reward-model",
    "--reward",
    "--beta",
    "--loss-type",
    "--gamma-beta-ratio",
    "--num-gpus",
    "--num-machines",
    "--sharding",
    "--dp-replicate-size",
    "--offload",
    "--tp-size",
    "--cp-size",
    "--learning-rate",
    "--lr-scheduler-type",
    "--warmup-ratio",
    "--weight-decay",
    "--max-grad-norm",
    "--num-train-epochs",
    "--max-steps",
    "--save-steps",
    "--report-to",
    "--task-weighting",
    "--task-temperature",
    "--task-weights",
    "--seed",
]

Run = Callable[[argparse.Namespace, Ui], int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Puts another `run` in the place of `ftplan models`."""

    def replace(run: Run) -> None:
        module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, "ftplan.launcher.commands.models", module)

    return replace


def ftplan_process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m ftplan WORDS`, with Python's usual buffering."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [sys.executable, "-m", "ftplan", *words]
    return subprocess.run(command, env=environment, text=True, timeout=30, **options)


class TestCommands:
    def test_they_are_the_files_on_disk(self) -> None:
        assert sorted(COMMANDS) == ON_DISK

    def test_the_overview_tells_each_with_what_it_does(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        for verb, what in COMMANDS.items():
            assert re.search(rf"^  {verb} +{re.escape(what)}$", text, re.MULTILINE)
        assert text == overview()
        assert max(map(len, text.splitlines())) <= 100

    def test_a_word_too_few_shows_the_overview_as_bad_usage(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([]) == 2
        assert capsys.readouterr().out == overview()

    @pytest.mark.parametrize("verb", ON_DISK)
    def test_each_has_a_parser_with_help_and_json(self, verb: str) -> None:
        """`%` in a help text breaks only when the help is shown."""
        parser = make_parser(verb, importlib.import_module(f"ftplan.launcher.commands.{verb}"))
        text = parser.format_help()
        assert "--json" in text
        assert "exit status: 0 fits or done" in " ".join(text.split())
        options = [o for action in parser._actions for o in action.option_strings]
        assert all(re.fullmatch(r"-[a-z]|--[a-z][a-z0-9-]*[a-z0-9]", option) for option in options)
        assert all(action.help for action in parser._actions if action.option_strings)

    @pytest.mark.parametrize("verb", ON_DISK)
    def test_the_help_of_each_is_shown(self, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: ftplan {verb}")

    def test_help_and_version_load_nothing_heavy(self) -> None:
        script = (
            "import sys; from ftplan.launcher.cli import main\n"
            "main(['--help']); main(['--version'])\n"
            "heavy = {'torch', 'transformers', 'rich', 'yaml', 'numpy', 'huggingface_hub'}\n"
            "sys.exit(f'loaded: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
        )
        subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)

    @pytest.mark.parametrize("verb", ON_DISK)
    def test_each_loads_with_the_planners_dependencies_alone(self, verb: str) -> None:
        script = (
            f"import sys, ftplan.launcher.commands.{verb}\n"
            "extra = {'torch', 'transformers', 'numpy', 'datasets', 'pyarrow', 'huggingface_hub'}\n"
            "sys.exit(f'loaded: {extra & set(sys.modules)}' if extra & set(sys.modules) else 0)"
        )
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_the_module_and_its_folder_are_the_command(self) -> None:
        done = ftplan_process("--version", capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (
            0,
            f"ftplan {ftplan.__version__}\n",
            "",
        )

    def test_the_version_is_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert re.fullmatch(r"ftplan \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "error", "hint"),
        [
            (
                ["estimat", "7B"],
                "unknown command `estimat`",
                "did you mean `estimate`? See `ftplan --help`.",
            ),
            (["--hlep"], "unknown command `--hlep`", None),
            (
                ["Gpus"],
                "unknown command `Gpus`",
                "did you mean `gpus` or `runs`? See `ftplan --help`.",
            ),
            ([""], "unknown command ``", None),
            (
                ["estimate", "7B", "--lora-rnk", "8"],
                "unknown option `--lora-rnk`",
                "did you mean `--lora-rank`",
            ),
            (
                ["estimate", "7B", "--gradient_checkpointing=no"],
                "unknown option `--gradient_checkpointing`",
                "did you mean `--gradient-checkpointing`",
            ),
            (["estimate", "7B", "--lora"], "unknown option `--lora`", "did you mean `--lora-"),
            (["models", "-x"], "unknown option `-x`", None),
            (
                ["models", "a", "b"],
                "`b` is one argument too many",
                "see `ftplan models --help`",
            ),
            (
                ["estimate"],
                "the following arguments are required: MODEL",
                "see `ftplan estimate --help`",
            ),
            (
                ["estimate", "7B", "--lora-rank"],
                "argument --lora-rank: expected one argument",
                "see `ftplan estimate --help`",
            ),
            (
                ["estimate", "7B", "--double-quant", "maybe"],
                "`maybe` is one argument too many",
                "see `ftplan estimate --help`",
            ),
            (
                ["estimate", "7B", "--lora-rank", "many"],
                "`--lora-rank many`: a whole number is expected",
                None,
            ),
            (
                ["estimate", "7B", "--method", "lroa"],
                "unknown method `lroa`",
                "did you mean `lora`",
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_they_are_told_with_the_nearest_names_and_status_2(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        words: list[str],
        error: str,
        hint: str | None,
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert lines[0] == f"error: {error}"
        if hint is not None:
            assert lines[1].startswith(f"hint: {hint}")

    @pytest.mark.parametrize("flag", ["--gradient-checkpointing", "--double-quant"])
    @pytest.mark.parametrize("value", ["", "yes", "No", "TRUE", "false"])
    def test_a_switch_before_the_model_does_not_swallow_it(
        self, flag: str, value: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["estimate", flag, *filter(None, [value]), "7B", "--json"]) == 0
        estimated = json.loads(capsys.readouterr().out)
        setting = estimated["plan"][flag.removeprefix("--").replace("-", "_")]
        assert setting["value"] is (value.lower() not in ("no", "false"))
        assert setting["from"] == "given"

    def test_they_are_told_on_stderr_under_json_too(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["estimate", "no-such-model", "--json"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: unknown model `no-such-model`\nhint: ")

    def test_markup_in_a_name_is_shown_as_it_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["[red]x[/red]"]) == 2
        assert capsys.readouterr().err.startswith("error: unknown command `[red]x[/red]`\n")

    @pytest.mark.parametrize("words", [["\udcff"], ["estimate", "\udcff"], ["models", "\udcff"]])
    def test_an_argument_that_is_no_text_breaks_nothing(self, words: list[str]) -> None:
        """Bytes of another encoding, as a shell hands them over."""
        done = ftplan_process(*words, capture_output=True)
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 2)


class TestExitStatuses:
    @pytest.mark.parametrize("status", [0, 1, 2])
    def test_a_command_s_own_is_handed_on(
        self, command: Callable[[Run], None], status: int
    ) -> None:
        command(lambda arguments, ui: status)
        assert main(["models"]) == status

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (InputError("bad row", "mend it"), 2),
            (DoesNotFitError("too large", "mend it"), 1),
            (RunFailedError("training failed", "mend it"), 1),
            (InterruptedRunError("interrupted", "mend it"), 130),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_an_error_is_told_and_has_its_own(
        self,
        command: Callable[[Run], None],
        capsys: pytest.CaptureFixture[str],
        error: FtplanError,
        status: int,
    ) -> None:
        def fail(arguments: argparse.Namespace, ui: Ui) -> int:
            raise error

        command(fail)
        assert main(["models"]) == status
        assert capsys.readouterr() == ("", f"error: {error.message}\nhint: mend it\n")

    def test_an_error_without_advice_has_no_empty_hint(
        self, command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(arguments: argparse.Namespace, ui: Ui) -> int:
            raise InputError("bad row")

        command(fail)
        main(["models"])
        assert capsys.readouterr().err == "error: bad row\n"

    def test_ctrl_c_is_130_without_a_traceback(
        self, command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(arguments: argparse.Namespace, ui: Ui) -> int:
            raise KeyboardInterrupt

        command(interrupt)
        assert main(["models"]) == 130
        assert capsys.readouterr().err == "interrupted\n"

    def test_an_encoding_without_a_sign_shows_another(self) -> None:
        options = {"capture_output": True, "encoding": "latin-1"}
        environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
        command = [sys.executable, "-m", "ftplan", "estimate", "7B"]
        done = subprocess.run(command, env=environment, check=True, **options)
        assert "|  89 % | ???" in done.stdout
        done = subprocess.run([*command, "--json"], env=environment, check=True, **options)
        assert json.loads(done.stdout)["schema"] == 1

    def test_a_mistake_of_ours_is_not_hidden(self, command: Callable[[Run], None]) -> None:
        def fail(arguments: argparse.Namespace, ui: Ui) -> int:
            raise ZeroDivisionError

        command(fail)
        with pytest.raises(ZeroDivisionError):
            main(["models"])

    def test_json_reaches_the_command(
        self, command: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        def show(arguments: argparse.Namespace, ui: Ui) -> int:
            ui.show("a table")
            ui.json({"a": "é"})
            return 0

        command(show)
        main(["models", "--json"])
        assert json.loads(capsys.readouterr().out) == {"a": "é"}
        main(["models"])
        assert capsys.readouterr().out == "a table\n"

    def test_the_help_names_them_all(self) -> None:
        for status in ("0 fits or done", "1 does not fit", "2 bad usage", "130 interrupted"):
            assert status in cli.EXIT_STATUS_HELP


class TestBrokenPipe:
    @pytest.mark.parametrize(
        "words",
        ["--help", "--version", "models", "models --json", "estimate 7B", "estimate 7B --json"],
    )
    def test_a_reader_that_has_gone_is_no_failure(self, words: str) -> None:
        """`ftplan models | head -1`: status 1 would mean that something does not fit."""
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = ftplan_process(*words.split(), stdout=writing, stderr=subprocess.PIPE)
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("words", "status"),
        [("estimate --help", 0), ("estimate 405B --gpu l4 --json", 1), ("estimat", 2)],
    )
    def test_the_status_stays_what_it_is(self, words: str, status: int) -> None:
        """Of both streams, as in `2>&1 | head`."""
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = ftplan_process(*words.split(), stdout=writing, stderr=writing)
        finally:
            os.close(writing)
        assert done.returncode == status


class TestSettingsFlags:
    def parse(self, *words: str) -> dict[str, Any]:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_setting_flags(parser)
        return given_settings(parser.parse_args(words))

    def test_there_is_one_for_every_setting_of_a_plan(self) -> None:
        parser = argparse.ArgumentParser(add_help=False)
        add_setting_flags(parser)
        flags = [option for action in parser._actions for option in action.option_strings]
        assert flags == SETTING_FLAGS
        assert [action.dest for action in parser._actions] == list(SETTING_NAMES)

    @pytest.mark.parametrize("verb", ["estimate", "plan", "auto"])
    def test_these_commands_have_them_all(self, verb: str) -> None:
        parser = make_parser(verb, importlib.import_module(f"ftplan.launcher.commands.{verb}"))
        assert set(SETTING_FLAGS) <= set(parser._option_string_actions)

    def test_what_is_not_given_is_not_there(self) -> None:
        assert self.parse() == {}
        assert self.parse("--seed", "0") == {"seed": 0}

    @pytest.mark.parametrize("item", dataclasses.fields(TrainingPlan), ids=lambda item: item.name)
    def test_each_gives_a_value_of_its_setting_s_type(self, item: dataclasses.Field[Any]) -> None:
        optional = item.default is None
        default = setting_type(item.name)(7) if optional else item.default
        text = ",".join(default) if isinstance(default, tuple) else str(default).lower()
        flag = "--" + item.name.replace("_", "-")
        for words in ([flag, text], [f"{flag}={text}"]):
            given = self.parse(*words)
            assert given == {item.name: default}
            assert type(given[item.name]) is type(default)
        # Some are of one objective or method alone.
        if not optional or item.name == "max_steps":
            assert TrainingPlan(**given) == TrainingPlan().replace(**given)

    @pytest.mark.parametrize(
        ("words", "value"),
        [
            ([], True),
            (["yes"], True),
            (["true"], True),
            (["True"], True),
            (["no"], False),
            (["false"], False),
            (["NO"], False),
        ],
    )
    def test_a_switch_is_on_by_its_name_alone(self, words: list[str], value: bool) -> None:
        assert self.parse("--double-quant", *words) == {"double_quant": value}

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--double-quant maybe", "true or false is expected"),
            ("--lora-rank 1.5", "a whole number is expected"),
            ("--max-steps x", "a whole number is expected"),
            ("--learning-rate high", "a number is expected"),
            ("--seed ", "a whole number is expected"),
        ],
    )
    def test_a_value_of_the_wrong_kind_is_told(self, words: str, expected: str) -> None:
        with pytest.raises(InputError) as caught:
            self.parse(*words.split(" "))
        assert caught.value.message == f"`{words}`: {expected}"

    def test_short_names_of_dtypes_are_known(self) -> None:
        assert self.parse("--dtype", "bf16") == {"dtype": "bfloat16"}

    def test_modules_are_separated_by_commas(self) -> None:
        given = self.parse("--target-modules", "q_proj, v_proj,")
        assert given == {"target_modules": ("q_proj", "v_proj")}

    @pytest.mark.parametrize("value", ["-1", "-0.5", "1e-4"])
    def test_a_number_below_zero_is_a_value_and_no_option(self, value: str) -> None:
        assert self.parse("--learning-rate", value) == {"learning_rate": float(value)}
