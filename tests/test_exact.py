"""`--exact` from the command line: the process boundary, the answers, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftplan.launcher import exact
from ftplan.launcher.cli import main
from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.serve import _load_and_remember
from ftplan.launcher.dry_run_views import tables, timeline
from ftplan.launcher.exact import DryRunner, case_of, memory_of, server_environment
from ftplan.launcher.model_source import find_source
from ftplan.launcher.ui import Ui
from ftplan.planner.dry_run_summary import DryRunSummary
from ftplan.planner.errors import InputError, RunFailedError
from ftplan.planner.plan import TrainingPlan
from ftplan.profiles import find_gpu

# A family that the closed form does not know, small enough for a test.
UNKNOWN = {
    "model_type": "olmo3",
    "architectures": ["Olmo3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 256,
    "layer_types": ["full_attention"] * 7,
}


@pytest.fixture
def unknown_model(tmp_path: Path) -> Path:
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(UNKNOWN))
    return folder


def ftplan(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main([*map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.train
def test_a_model_that_the_closed_form_does_not_know(
    unknown_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: another process, transformers' own classes, a replay, the JSON contract."""
    pytest.importorskip("trl", reason="needs the `train` extra")
    status, out, err = ftplan(
        capsys, "estimate", unknown_model, "--exact", "--json", "--gpu", "l4", "--max-length", "128"
    )
    assert status == 0, err
    told = json.loads(out)
    assert told["estimated_by"] == "dry-run"
    assert told["model"]["architecture"] == "Olmo3ForCausalLM"
    # Embeddings and head; q, k, v, o and their two norms; three matrices; two norms; the last norm.
    layer = 64 * (64 + 32 + 32 + 64) + 64 + 32 + 3 * 64 * 160 + 2 * 64
    assert told["model"]["num_parameters"] == 2 * 500 * 64 + 7 * layer + 64
    per_gpu = told["per_gpu"]
    assert sum(per_gpu["components"].values()) == per_gpu["allocated_peak_bytes"]
    assert per_gpu["allocated_peak_bytes"] <= per_gpu["reserved_peak_bytes"]
    assert per_gpu["required_bytes"] <= per_gpu["device_peak_bytes"] * 1.01
    assert {phase["name"] for phase in per_gpu["phases"]} >= {"forward", "backward", "save"}
    dry_run = told["dry_run"]
    assert (dry_run["num_layers"], dry_run["num_layers_traced"]) == (7, 4)
    levels = [level for _, level in dry_run["curve"]]
    assert max(levels) == per_gpu["allocated_peak_bytes"]
    summary = DryRunSummary.from_dict(
        {**dry_run, "phases": per_gpu["phases"], "num_parameters": 1, "num_trainable_parameters": 1}
    )
    show_within(summary, 80)


def show_within(summary: DryRunSummary, width: int) -> None:
    """The tables keep within so many columns, the timeline in one line."""
    screen = io.StringIO()
    Ui(stdout=screen, width=width).show(*tables(summary))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    line = str(timeline(summary)).splitlines()[1]
    assert len(line) <= width and line in (text.rstrip() for text in lines)


def test_without_exact_the_unknown_family_is_pointed_to_it(
    unknown_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = ftplan(capsys, "estimate", unknown_model)
    assert status == 2
    assert "unknown architecture `olmo3`" in err
    assert "`ftplan estimate --exact` takes any decoder" in " ".join(err.split())


def test_a_config_without_a_shape_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    status, _, err = ftplan(capsys, "estimate", tmp_path, "--exact")
    assert status == 2
    assert "does not know `mystery`, nor does its config.json say `hidden_size`" in " ".join(
        err.split()
    )


def test_an_encoder_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    status, _, err = ftplan(capsys, "estimate", tmp_path, "--exact")
    assert status == 2
    assert "is an encoder-decoder" in err


def test_a_plot_needs_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = ftplan(capsys, "estimate", "7B", "--plot", "memory.png")
    assert status == 2
    assert "add `--exact`" in err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "missing_packages", lambda: ["peft", "trl"])
    with pytest.raises(InputError, match="a dry run needs peft, trl") as raised:
        DryRunner().__enter__()
    assert "pip install" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("settings", "message", "install"),
    [
        ({"optim": "galore_adamw"}, "`--optim galore_adamw` needs galore-torch", "galore-torch"),
        ({"optim": "stable_adamw"}, "`--optim stable_adamw` needs torch-optimi", "torch-optimi"),
        (
            {"method": "qlora", "quantization": "nf4", "optim": "paged_adamw_8bit"},
            "a nf4 base needs bitsandbytes",
            "bitsandbytes",
        ),
    ],
)
def test_an_optimizers_package_is_named(
    settings: dict[str, Any], message: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "find_spec", lambda name: None)
    case = case_of(find_source("7B"), TrainingPlan(**settings), None)
    with pytest.raises(InputError, match=message) as raised:
        DryRunner().run(case)
    assert f"pip install {install}" in str(raised.value.hint)


def test_trls_loss_belongs_to_its_trainer() -> None:
    plan = TrainingPlan(trainer="transformers", loss="trl-fused")
    with pytest.raises(InputError, match="`--trainer transformers` has it not"):
        case_of(find_source("llama-3.1-8b"), plan, None)


def test_adapters_go_to_the_modules_that_training_gives_them() -> None:
    """PEFT's own `all-linear` would take a mixture's router too."""
    case = case_of(find_source("qwen3-30b-a3b"), TrainingPlan(), None)
    assert case.plan.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_a_case_crosses_the_process_boundary() -> None:
    case = case_of(
        find_source("7B"), TrainingPlan(), find_gpu("t4").device(), transformers_version=(4, 48)
    )
    assert DryRunCase.from_dict(json.loads(json.dumps(case.to_dict()))) == case
    assert case.capability == (7, 5)


def test_the_process_sees_no_gpu_and_no_network() -> None:
    environment = server_environment({"CUDA_VISIBLE_DEVICES": "3", "HOME": "/home/me"})
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HOME"] == "/home/me"


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    popen = subprocess.Popen

    def dying(words: list[str], **kwargs: Any) -> subprocess.Popen[str]:
        script = "import sys; sys.exit('Killed for want of memory')"
        started.append(popen([words[0], "-c", script], **kwargs))
        return started[-1]

    monkeypatch.setattr(exact, "missing_packages", list)
    monkeypatch.setattr(exact.subprocess, "Popen", dying)
    case = case_of(find_source("7B"), TrainingPlan(), None)
    with DryRunner() as runner, pytest.raises(RunFailedError) as raised:
        runner.run(case)
    assert "status 1: Killed for want of memory" in raised.value.message
    assert "leave out `--exact`" in str(raised.value.hint)
    assert started[0].poll() is not None


@pytest.mark.train
def test_what_transformers_refuses_is_an_answer_and_the_next_case_works() -> None:
    pytest.importorskip("trl", reason="needs the `train` extra")
    source = find_source("7B")
    tiny = {**source.config, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}
    tiny["num_key_value_heads"] = 4
    plan = TrainingPlan(max_length=64)
    good = case_of(source, plan, None, config={**tiny, "num_attention_heads": 4})
    bad = case_of(source, plan, None, config={**tiny, "num_attention_heads": 5})
    said: list[str] = []
    with DryRunner(said.append) as runner:
        with pytest.raises(InputError) as raised:
            runner.run(bad)
        summary = runner.run(good)
    assert "transformers cannot build this model" in raised.value.message
    assert "tracing two steps" in said
    memory = memory_of(summary, source, plan, None)
    assert memory.allocated_peak_bytes == summary.peak_phase.allocated_peak_bytes
    assert memory.reserved_peak_bytes == summary.expandable.reserved_peak_bytes


def test_the_command_line_does_not_load_torch() -> None:
    """Not even for a dry run: that happens in another process."""
    script = (
        "import sys\n"
        "from ftplan.launcher import exact, confirm, dry_run_views\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), check=False)
    assert done.returncode == 0


def test_a_folder_of_transformers_is_looked_through_once(tmp_path: Path) -> None:
    """By the folder or a file in it; what is done to one answer does not change the next."""
    scanned: list[Path] = []

    def scan(path: Path) -> dict[str, list[str]]:
        scanned.append(path)
        return {"llama": ["LlamaConfig"]}

    module = ModuleType("import_utils")
    module.__dict__["create_import_structure_from_path"] = scan
    _load_and_remember(lambda loaded: None, module)
    (tmp_path / "__init__.py").touch()
    first = module.__dict__["create_import_structure_from_path"](tmp_path / "__init__.py")
    first["llama"].append("spoiled")
    again = module.__dict__["create_import_structure_from_path"](tmp_path)
    assert again == {"llama": ["LlamaConfig"]}
    assert len(scanned) == 1
