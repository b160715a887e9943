"""Stages carried out: on a tiny model, each from the last one's result."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import stage_runs
from ftplan.launcher.cli import main
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.stage_file import AskedStage
from ftplan.launcher.stage_runs import begin_anew, carry_out_stages, write_stages
from ftplan.launcher.stages import PlannedStage, plan_stages
from ftplan.launcher.stages_dir import StagesDir
from ftplan.launcher.training import loop
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import FtplanError, RunFailedError
from tests.test_training import CPU, environment, ftplan, wait_for

pytestmark = pytest.mark.train

PARTS = ("question", "answer", "start", "end", "middle", "rest")
SUBJECTS = ("list", "tuple", "set", "dict", "range", "string", "file", "socket")
ASKED = [
    (f"Where is the {part} of the {subject}?", f"The {part} of the {subject}")
    for subject in SUBJECTS
    for part in PARTS
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.launcher_fixtures import CHATML, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = tiny_tokenizer(CHATML, pad_token="<|bos|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.25,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Questions with one answer, with another that contradicts it, and a preference for the
    first."""
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "here": [{"instruction": q, "output": f"{what} is here."} for q, what in ASKED],
        "lost": [{"instruction": q, "output": f"{what} was lost long ago."} for q, what in ASKED],
        "prefs": [
            {"prompt": q, "chosen": f"{what} is here.", "rejected": "It is lost."}
            for q, what in ASKED
        ],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {name: folder / f"{name}.jsonl" for name in rows}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training and merging without processes of their own, which take ten seconds each."""

    def carry_out(ui: Ui, run: RunDir, *, resume: bool, is_last: bool) -> Mapping[str, Any]:
        assert loop.train(run, resume=resume) == 0
        return run.read_record()

    def merge(run: RunDir, folder: Path) -> None:
        words = ["merge", str(run.root), "--out", str(folder), "--dtype", "float32"]
        assert main(words) == 0
        logging.disable(logging.NOTSET)  # which the command turns off for its own process

    monkeypatch.setattr(stage_runs, "carry_out", carry_out)
    monkeypatch.setattr(stage_runs, "merge_adapter", merge)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def quiet() -> Ui:
    return Ui(as_json=True, stdout=io.StringIO(), stderr=io.StringIO())


def stage(path: Path, replay_share: float = 0.0, **settings: Any) -> AskedStage:
    """Six steps, of a rate that shows."""
    given = {"max_steps": 6, "learning_rate": 0.01, "per_device_train_batch_size": 8, **settings}
    return AskedStage(
        name=path.stem,
        asked=DataAsked(paths=(str(path),)),
        settings=given,
        replay_share=replay_share,
    )


def planned(model: Path, folder: Path, *asked: AskedStage) -> list[PlannedStage]:
    return plan_stages(
        quiet(), asked, model=str(model), named_device=CPU, runs_dir=folder, for_launch=True
    )


def trained(model: Path, folder: Path, *asked: AskedStage) -> tuple[dict[str, Any], StagesDir]:
    """The record of all, and their directory."""
    stages = write_stages(planned(model, folder, *asked), "stages", folder)
    return carry_out_stages(quiet(), stages), stages


def losses(record: Mapping[str, Any], number: int) -> tuple[float, float]:
    """Of a stage's held-out rows: before it, and at its end."""
    evaluation = record["stages"][number - 1]["evaluation"]
    return evaluation["before"], evaluation["after"]


@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_goes_on_and_the_reference_is_the_model_of_the_stage_before(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """The second stage begins where the first ended; of preferences the first loss is that of a
    model which is its own reference; at the end nothing is left of TRL's copy."""
    import torch
    from peft import AutoPeftModelForCausalLM

    record, stages = trained(
        model,
        tmp_path,
        stage(files["here"], lora_rank=4),
        stage(files["here"]),
        stage(files["prefs"]),
    )
    assert [one["begin"] for one in record["stages"]] == [None, "adapter", "adapter"]
    assert losses(record, 2)[0] == pytest.approx(losses(record, 1)[1], rel=1e-5)
    assert losses(record, 2)[1] < losses(record, 2)[0] < losses(record, 1)[0]
    assert losses(record, 3)[0] == pytest.approx(0.6931, abs=1e-3)  # log 2
    assert losses(record, 3)[1] < 0.5
    last = stages.runs()[-1].run
    first_step = next(row for row in last.metric_rows() if row.get("step") == 1)
    assert first_step["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert sorted(path.name for path in last.adapter.iterdir() if path.is_dir()) == []
    assert not last.tokens.exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(stages.root / record["output"])
    assert set(loaded.peft_config) == {"default"}
    assert Path(loaded.peft_config["default"].base_model_name_or_path) == model.resolve()
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


@pytest.mark.usefixtures("in_this_process")
def test_what_a_later_stage_undoes_is_measured(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """The loss of the first stage after the second is that of its rows under the last adapter."""
    import torch
    from datasets import load_from_disk
    from peft import AutoPeftModelForCausalLM

    record, stages = trained(
        model, tmp_path, stage(files["here"], max_steps=20), stage(files["lost"], max_steps=20)
    )
    first, last = stages.runs()
    (kept,) = record["stages"][1]["earlier"]
    assert kept["stage"] == "1-here"
    assert (kept["before"], kept["at_its_end"]) == losses(record, 1)
    loaded = AutoPeftModelForCausalLM.from_pretrained(last.run.adapter).eval()
    found = []
    rows = load_from_disk(str(first.run.held_out))
    for row in rows:
        tokens = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            found.append(loaded(**tokens).loss.item())
    # The trainer's is a mean over tokens, this one over rows.
    assert kept["after"] == pytest.approx(sum(found) / len(found), rel=0.05)
    rise = kept["after"] - kept["at_its_end"]
    assert rise > 0.1, "the answers contradict each other"
    assert record["backward_transfer"] == {"sft": pytest.approx(-rise)}
    assert record["lost"] == ["1-here"] and "replay" in record["what_helps"][0]
    events = [row for row in last.run.metric_rows() if row.get("stage") == "1-here"]
    assert [row["after"] for row in events] == [kept["after"]]


@pytest.mark.usefixtures("in_this_process")
def test_replayed_rows_are_trained_on_as_planned_and_keep_more(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    asked = stage(files["here"], max_steps=20), stage(files["lost"], 0.4, max_steps=20)
    stages = planned(model, tmp_path, *asked)
    (rows,) = stages[1].replayed
    made = write_stages(stages, "stages", tmp_path)
    record = carry_out_stages(quiet(), made)
    _, last = made.runs()
    config = loop.read_train_config(last.run)
    tokenizer = loop.load_tokenizer(config.model)
    own = loop.read_rows(config, tokenizer, tmp_path / "tokens").train
    together = loop.with_replayed(own, config, tmp_path / "tokens")
    assert len(together.dataset) - len(own.dataset) == rows.rows > 10
    lengths = tuple(sorted(together.lengths, reverse=True))
    assert lengths == stages[1].planned.profile.trained_lengths
    texts = tokenizer.tokenizer.batch_decode(list(together.dataset["input_ids"]))
    assert sum("is here" in text for text in texts) == rows.rows
    assert [len(row) for row in together.dataset["input_ids"]] == list(together.lengths)
    (tmp_path / "without").mkdir()
    without, _ = trained(model, tmp_path / "without", asked[0], stage(files["lost"], max_steps=20))
    assert record["backward_transfer"]["sft"] > without["backward_transfer"]["sft"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"method": "lora", "lora_rank": 4}, {"lora_rank": 8}),
        ({"method": "dora", "lora_rank": 4}, {"method": "full", "learning_rate": 1e-3}),
        ({"method": "full", "learning_rate": 1e-3}, {}),
    ],
    ids=["lora-merged", "dora-to-full", "full-to-full"],
)
@pytest.mark.usefixtures("in_this_process")
def test_a_stage_begins_where_the_last_one_ended(
    first: dict[str, Any],
    second: dict[str, Any],
    model: Path,
    files: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Whole models and merged ones; the base that was asked for is left as it is."""
    record, stages = trained(
        model, tmp_path, stage(files["here"], **first), stage(files["here"], **second)
    )
    begin = "model" if first["method"] == "full" else "merged"
    assert record["stages"][1]["begin"] == begin
    assert losses(record, 2)[0] == pytest.approx(losses(record, 1)[1], rel=1e-4)
    assert losses(record, 2)[1] < losses(record, 2)[0]
    assert stages.runs()[1].run.base.is_dir() == (begin == "merged")


@pytest.mark.usefixtures("in_this_process")
def test_pissa_goes_on_into_preferences_with_its_base_as_it_was(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """Its initialization takes weights out of the base: a copy for the reference must not. A stage
    that learns nothing leaves the first one as it was."""
    nothing = stage(files["prefs"], learning_rate=1e-12)
    record, _ = trained(model, tmp_path, stage(files["here"], method="pissa"), nothing)
    assert record["stages"][1]["begin"] == "adapter"
    assert losses(record, 2)[0] == pytest.approx(0.6931, abs=1e-3)
    (kept,) = record["stages"][1]["earlier"]
    assert kept["after"] == pytest.approx(kept["at_its_end"], rel=1e-4)


@pytest.mark.usefixtures("in_this_process")
def test_judged_answers_and_scores_follow_texts(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """KTO's first loss is that of a model which is its own reference. A reward model begins from
    the merged one, and has no text by which to look back."""
    judged = tmp_path / "judged.jsonl"
    rows = [json.loads(line) for line in files["prefs"].read_text().splitlines()]
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    judged.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    record, _ = trained(
        model,
        tmp_path,
        stage(files["here"], lora_rank=4),
        stage(judged),
        stage(files["prefs"], objective="reward"),
    )
    assert [one["objective"] for one in record["stages"]] == ["sft", "kto", "reward"]
    assert [one["begin"] for one in record["stages"]] == [None, "adapter", "merged"]
    assert losses(record, 2)[0] == pytest.approx(0.5, abs=1e-3)
    assert [one["stage"] for one in record["stages"][1]["earlier"]] == ["1-here"]
    assert record["stages"][2]["earlier"] == [] and record["backward_transfer"] == {}


@pytest.mark.usefixtures("in_this_process")
def test_a_failed_stage_is_named_and_what_has_finished_stays(
    model: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = write_stages(
        planned(model, tmp_path, stage(files["here"]), stage(files["lost"])), "stages", tmp_path
    )
    works = stage_runs.carry_out

    def fails_once(ui: Ui, run: RunDir, **more: Any) -> Any:
        if run.root.name == "2-lost":
            raise RunFailedError("training failed: no reason", f"see `ftplan launch {run.root}`")
        return works(ui, run, **more)

    monkeypatch.setattr(stage_runs, "carry_out", fails_once)
    with pytest.raises(FtplanError, match=r"^stage 2: training failed") as told:
        carry_out_stages(quiet(), stages)
    assert told.value.exit_status == 1
    assert f"`ftplan resume {stages.root}`" in str(told.value.hint)
    done = stages.runs()[0].run.record.read_bytes()
    monkeypatch.setattr(stage_runs, "carry_out", works)
    record = carry_out_stages(quiet(), stages)
    assert stages.finished and len(record["stages"]) == 2
    assert stages.runs()[0].run.record.read_bytes() == done
    begin_anew(quiet(), stages)
    assert not stages.finished and not any(one.run.finished for one in stages.runs())
    assert (stages.previous / "1" / "record.json").is_file()


@pytest.mark.usefixtures("in_this_process")
def test_one_stage_is_not_launched_alone(
    model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = write_stages(
        planned(model, tmp_path, stage(files["here"]), stage(files["lost"])), "stages", tmp_path
    )
    for verb in ("launch", "resume"):
        assert main([verb, str(stages.root / "2-lost")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "is a stage of" in said and f"ftplan resume {stages.root}" in said


def test_a_stage_that_does_not_fit_is_refused_before_anything_runs(
    model: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "stages.yaml"
    file.write_text(
        f"schema: 1\nmodel: {model}\nstages:\n- data: {files['here']}\n- data: {files['lost']}\n"
        "  plan: {per_device_train_batch_size: 4000000, max_length: 256}\n"
    )
    assert main(["launch", str(file)]) == 1
    assert "stage 2: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_in_the_second_stage_leaves_stages_that_resume_finishes(
    model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = StagesDir(tmp_path / "runs" / "cut")
    second = RunDir(stages.root / "2-lost")
    file = tmp_path / "stages.yaml"
    file.write_text(
        f"schema: 1\nmodel: {model}\nplan: {{lora_rank: 4}}\nstages:\n"
        f"- data: {files['here']}\n  plan: {{max_steps: 2}}\n"
        f"- data: {files['lost']}\n  plan: {{max_steps: 300, save_steps: 100}}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "ftplan", "launch", file, "--name", "cut"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: sum("step" in row for row in second.metric_rows()) > 3, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "stage 2: interrupted" in err and "ftplan resume runs/cut`" in " ".join(err.split())
    first = RunDir(stages.root / "1-here").record.read_bytes()
    checkpoint = second.last_checkpoint()
    assert checkpoint is not None and not stages.finished
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    shortened = second.train.read_text().replace("max_steps: 300", f"max_steps: {step + 3}")
    second.train.write_text(shortened)
    done = ftplan("resume", stages.root, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)["record"]
    assert [one["name"] for one in record["stages"]] == ["here", "lost"]
    assert RunDir(stages.root / "1-here").record.read_bytes() == first
    rows = [row["step"] for row in second.metric_rows() if "step" in row]
    assert rows == [*range(1, step + 4)]
    assert main(["resume", str(stages.root)]) == 2
    assert "has finished" in " ".join(capsys.readouterr().err.split())
