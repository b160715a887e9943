"""What a model, a dataset, a plan or a library may not do to whoever runs ftplan."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftplan.launcher import run_dir
from ftplan.launcher.escaped import escaped
from ftplan.launcher.masking import MASK, MaskedStream, mask_files, masked, secrets_of
from ftplan.launcher.model_choice import with_weights
from ftplan.launcher.model_source import check_safetensors, find_source
from ftplan.launcher.plan_file import read_plan_file
from ftplan.launcher.run_dir import RunDir, checked_folder_name, read_mapping, write_yaml
from ftplan.launcher.ui import Ui, table
from ftplan.planner.errors import InputError, UnknownNameError
from tests.launcher_fixtures import CHATML, tiny_tokenizer

ROOT = Path(__file__).parent.parent
FOLDERS = ("launcher", "planner", "profiles")

# A key that was never given out, in the form that the Hub's have, and one of no known form.
HUB_TOKEN = "hf_" + "QxWzRtYpLkJhGfDsAzXcVbNmQwErTyUiOp"
API_KEY = "f3b1c5d7e9a02468bdf1357913579bdf02468ace"
SECRETS = {"HF_TOKEN": HUB_TOKEN, "WANDB_API_KEY": API_KEY}


def calls(words: str) -> Iterator[tuple[Path, ast.Call]]:
    """Calls in those files of ftplan that have one of the words."""
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(words, text):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call):
                    yield path, node


# --- code and pickles ---------------------------------------------------------------------------


def test_nothing_loads_yaml_or_pickles_unsafely_or_switches_remote_code_on() -> None:
    refused = re.compile(
        r"(yaml\.(unsafe_|full_)?load(_all)?|pickle\.loads?|(torch|joblib)\.load)$"
    )
    assert issubclass(run_dir._YAML, (yaml.SafeLoader, yaml.CSafeLoader))
    for path, call in calls(r"yaml|pickle|torch\.load|trust_remote_code"):
        if ast.unparse(call) == "yaml.load(text, _YAML)":
            continue
        if ast.unparse(call.func) == "torch.load":  # without objects, of tensors and numbers
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert said.get("weights_only") == "True", f"{path}: {ast.unparse(call)}"
            continue
        assert not refused.search(ast.unparse(call.func)), f"{path}: {ast.unparse(call)}"
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert asked_first(keyword.value, path), f"{path}: {ast.unparse(call)}"


def asked_first(value: ast.expr, path: Path) -> bool:
    """Whether a value of `trust_remote_code` is off, or what `remote_code.trusted` has said."""
    said = ast.unparse(value)
    if said in ("trust", "self.trust"):
        return f"{said} = remote_code.trusted(" in path.read_text(encoding="utf-8")
    return said == "False" or said.startswith("remote_code.trusted(")


def test_every_tokenizer_and_configuration_is_read_without_code_of_its_repository() -> None:
    """Where nothing is said, transformers asks whoever sits at the terminal."""
    asked = re.compile(r"Auto(Tokenizer|Config|Processor)\.from_pretrained$")
    found = [
        (path, ast.unparse(call))
        for path, call in calls(r"Auto(Tokenizer|Config|Processor)")
        if asked.search(ast.unparse(call.func))
    ]
    assert len(found) >= 4
    for path, call in found:
        assert "trust_remote_code=" in call, f"{path}: {call}"


def model_with_code(folder: Path) -> Path:
    """A model of an architecture that transformers does not know, whose code leaves a trace."""
    folder.mkdir(parents=True)
    tiny_tokenizer(CHATML).save_pretrained(folder)
    trace = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (folder / name).write_text(trace + "class Own: ...\nclass OwnConfig: ...\n")
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.Own",
    }
    config = {"model_type": "own", "architectures": ["Own"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_code_of_a_model_s_repository_does_not_run_whatever_the_terminal_answers(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers", reason="needs the `train` extra")
    folder = model_with_code(tmp_path / "own")
    script = """
import sys
from ftplan.launcher.data.tokens import load_tokenizer
from ftplan.launcher.training.build import load_model
from ftplan.planner.errors import InputError
for load in (load_tokenizer, lambda folder: load_model(folder, SETTINGS, "cpu")):
    try:
        load(sys.argv[1])
    except InputError as error:
        print(error.message)
"""
    settings = "{'dtype': 'float32', 'attn_implementation': 'sdpa', 'trains_biases': False}"
    done = subprocess.run(
        [sys.executable, "-c", script.replace("SETTINGS", settings), str(folder)],
        input="y\ny\ny\n",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("brings Python code of its own") == 2
    assert not (folder / "ran").exists()


def test_a_plan_file_cannot_trust_remote_code(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    asked = {"schema": 1, "model": "7B", "data": {"paths": ["a.jsonl"]}}
    write_yaml(plan, {**asked, "plan": {"trust_remote_code": True}})
    with pytest.raises(UnknownNameError, match="trust_remote_code"):
        read_plan_file(plan)
    write_yaml(plan, {**asked, "plan": {}, "trust_remote_code": True})
    with pytest.raises(UnknownNameError, match="trust_remote_code"):
        read_plan_file(plan)


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    file = tmp_path / "plan.yaml"
    file.write_text(f"schema: !!python/object/apply:pathlib.Path.touch [{trace}]\n")
    with pytest.raises(InputError, match="is damaged"):
        read_mapping(file)
    assert not trace.exists()


class Trace:
    """Runs code when its pickle is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
def test_pickled_weights_are_refused_unread(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Trace(tmp_path / "ran")))
    with pytest.raises(InputError, match="as a pickle") as refused:
        check_safetensors(folder)
    assert name in refused.value.message and "save_pretrained" in str(refused.value.hint)
    assert not (tmp_path / "ran").exists()
    (folder / "model.safetensors").touch()
    check_safetensors(folder)


def test_a_model_of_pickles_is_refused_before_a_plan_is_made(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the `train` extra")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(find_source("1B").config))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trace(tmp_path / "ran")))
    with pytest.raises(InputError, match="as a pickle"):
        with_weights(Ui(), find_source(str(folder)))


# --- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "/etc", "a/b", "a\\b", "a\0"])
def test_a_folder_of_a_run_stays_within_it(name: str) -> None:
    with pytest.raises(InputError, match="plain name"):
        checked_folder_name(name, Path("stages.yaml"))


def test_stages_are_folders_of_their_own_folder(tmp_path: Path) -> None:
    from ftplan.launcher.stages_dir import StagesDir

    stages = StagesDir(tmp_path)
    write_yaml(stages.stages, {"stages": [{"folder": "../elsewhere"}]})
    with pytest.raises(InputError, match="plain name"):
        stages.runs()


@pytest.mark.parametrize(
    "name",
    [
        *("output_dir", "logging_dir", "push_to_hub", "hub_token", "hub_model_id"),
        *("trust_remote_code", "model_init_kwargs", "resume_from_checkpoint", "trackio_space_id"),
    ],
)
def test_a_run_cannot_write_or_send_anything_elsewhere(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the `train` extra")
    from ftplan.launcher.training.config import _checked_arguments

    with pytest.raises(InputError, match=f"sets `{name}`"):
        _checked_arguments(RunDir(tmp_path), {"learning_rate": 1e-4, name: "x"})


def test_what_a_plan_sets_is_not_refused(tmp_path: Path) -> None:
    from ftplan.launcher.emit import training_arguments
    from ftplan.launcher.training.config import _checked_arguments
    from ftplan.planner.objectives import OBJECTIVES
    from ftplan.planner.plan import TrainingPlan

    for objective in OBJECTIVES:
        loss = "stock" if objective == "reward" else "trl-fused"
        plan = TrainingPlan(objective=objective, loss=loss, per_device_train_batch_size=8)
        arguments = training_arguments(plan, "cpu")
        assert _checked_arguments(RunDir(tmp_path), arguments) == arguments


# --- the terminal -------------------------------------------------------------------------------

# Clears the screen, sets the title, rings, turns text around, and a colour by one byte of 8 bits.
HOSTILE = "name\x1b[2J\x1b]0;title\x07\u202etxt.exe\x9b31m"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert escaped(HOSTILE) == r"name\x1b[2J\x1b]0;title\x07\u202etxt.exe\x9b31m"
    for kept in ("tab\tand\nline", "שלום\u200f", "naïve 日本 👩\u200d👧"):
        assert escaped(kept) == kept


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_dataset_cannot_make_the_terminal_do_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out, err = Terminal(), Terminal()
    ui = Ui(stdout=out, stderr=err, width=90)
    ui.show(HOSTILE, table(HOSTILE, [HOSTILE], [[HOSTILE]]))
    ui.show_lines([HOSTILE])
    ui.say(HOSTILE)
    ui.warn(HOSTILE)
    ui.fail(InputError(HOSTILE, HOSTILE))
    shown = out.getvalue() + err.getvalue()
    assert shown.count(r"\x1b[2J") >= 6
    assert "\x1b[1;31merror" in shown, "ftplan's own colours are there"
    own_styles = re.compile(r"\x1b\[[\d;]*m")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", own_styles.sub("", shown))


def test_a_hostile_column_name_and_file_name_are_shown_escaped(tmp_path: Path) -> None:
    file = tmp_path / "rows\x1b[2J.jsonl"
    rows = [{"q\x1b]0;t\x07": f"question {n}", "a\u202e": f"answer\x1b[5m {n}"} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, "-m", "ftplan", "data", str(file)],
        capture_output=True,
        env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100"},
        check=False,
        timeout=120,
    )
    shown = re.sub(r"\x1b\[[\d;]*m", "", (done.stdout + done.stderr).decode())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert r"\x1b" in shown


# --- tokens and keys ----------------------------------------------------------------------------


def test_what_is_named_as_a_key_is_one() -> None:
    environ = {
        **SECRETS,
        "AWS_SECRET_ACCESS_KEY": "not a real one",
        "HF_TOKEN_PATH": "/home/me/.cache/huggingface/token",
        "SSH_KEY": "/home/me/.ssh/id",
        "TOKENIZERS_PARALLELISM": "false-ish",
        "API_KEY": "short",
    }
    assert set(secrets_of(environ)) == {HUB_TOKEN, API_KEY, "not a real one"}


def test_keys_are_masked_by_value_and_by_form() -> None:
    text = f"login with {HUB_TOKEN}, then {API_KEY}: ok"
    assert masked(text, secrets_of(SECRETS)) == f"login with {MASK}, then {MASK}: ok"
    assert masked(text, ()) == f"login with {MASK}, then {API_KEY}: ok"


def test_a_masked_stream_is_a_stream_all_the_same() -> None:
    below = io.StringIO()
    stream = MaskedStream(below, (API_KEY,))
    print("key:", API_KEY, file=stream)  # type: ignore[call-overload]
    stream.writelines([API_KEY, "\n"])
    assert not stream.isatty() and below.getvalue() == f"key: {MASK}\n{MASK}\n"


def test_a_run_s_files_hold_no_key_once_it_has_ended(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.stderr.write_bytes(b"as C writes it: " + API_KEY.encode() + b"\xff\n")
    run.metrics.write_text('{"step": 1}\n')
    run.data.mkdir()
    (run.data / "rows.txt").write_text(API_KEY)
    assert mask_files(run, (API_KEY,)) == [run.stderr]
    assert run.stderr.read_bytes() == f"as C writes it: {MASK}".encode() + b"\xff\n"
    assert (run.data / "rows.txt").read_text() == API_KEY, "rows are the person's own"


def test_a_training_process_that_prints_its_keys_leaves_none(tmp_path: Path) -> None:
    """Printed, logged and in a traceback; by Python and past it."""
    from ftplan.launcher.process import run_to_end
    from ftplan.planner.errors import RunFailedError

    script = """
import os, sys
from ftplan.launcher import train
def open_run(path):
    import logging
    print(os.environ["HF_TOKEN"], flush=True)
    logging.getLogger("a library").error("key %s", os.environ["WANDB_API_KEY"])
    os.write(1, os.environ["WANDB_API_KEY"].encode())
    raise ValueError("refused: " + os.environ["HF_TOKEN"])
train.open_run = open_run
train.mask_output()
sys.exit(train.main([sys.argv[1]]))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    run = RunDir(tmp_path)
    with pytest.raises(RunFailedError, match=re.escape(f"ValueError: refused: {MASK}")):
        run_to_end(run, command, {**os.environ, **SECRETS}, lambda status, rows: None)
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    assert written.count(MASK) == 5  # the log thrice, the error there and in status.json
    assert HUB_TOKEN not in written and API_KEY not in written
