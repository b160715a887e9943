"""What is kept free of memory, by the runs that were finished on such a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ftplan.launcher.cli import main
from ftplan.launcher.past_runs import margin_of
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.families import spec_from_size
from ftplan.planner.hardware_spec import Device
from ftplan.planner.margin import ASSUMED_MARGIN, Margin, measured_margin
from ftplan.planner.memory import MEMORY_MARGIN, fits, needed_bytes
from ftplan.planner.search import choose_plan


def finished(
    runs: Path, name: str, device: Any, measured: Any, predicted: Any, **more: Any
) -> None:
    folder = runs / name
    folder.mkdir(parents=True)
    record = {
        "device": device,
        "measured": {"device_bytes": measured},
        "predicted": {"device_bytes": predicted, **more},
    }
    (folder / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("errors", "share"),
    [
        ([], MEMORY_MARGIN),
        ([0.001, 0.002], MEMORY_MARGIN),
        ([0.001, 0.002, 0.008], 0.018),
        ([-0.2, -0.1, -0.001], 0.01),
        ([0.0, 0.0, 0.3], MEMORY_MARGIN),
    ],
)
def test_the_margin_is_one_percent_above_the_worst(errors: list[float], share: float) -> None:
    margin = measured_margin(errors)
    assert margin.share == pytest.approx(share)
    assert margin.num_runs == (len(errors) if len(errors) >= 3 else 0)


def test_runs_of_the_same_gpu_count(tmp_path: Path, devices: dict[str, Device]) -> None:
    gpu = devices["RTX 4090"]
    for number, measured in enumerate((1000, 1008, 900)):
        finished(tmp_path, f"run-{number}", gpu.name, measured, 1000)
    finished(tmp_path, "elsewhere", "another GPU", 5000, 1000)
    assert margin_of(gpu, tmp_path) == Margin(share=pytest.approx(0.018), num_runs=3)
    assert margin_of(devices["T4"], tmp_path) == ASSUMED_MARGIN
    assert margin_of(gpu, tmp_path / "nowhere") == ASSUMED_MARGIN


def test_the_lower_of_dry_run_and_closed_form_counts(
    tmp_path: Path, devices: dict[str, Device]
) -> None:
    for number in range(3):
        finished(
            tmp_path, f"run-{number}", devices["T4"].name, 1000, 1000, closed_form_device_bytes=980
        )
    assert margin_of(devices["T4"], tmp_path).share == pytest.approx(1000 / 980 - 1 + 0.01)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00",
        "{}",
        '{"device": 3}',
        '{"device": "NAME"}',
        '{"device": "NAME", "measured": [], "predicted": {}}',
        '{"device": "NAME", "measured": {"device_bytes": null}, "predicted": {"device_bytes": 9}}',
        '{"device": "NAME", "measured": {"device_bytes": 9}, "predicted": {"device_bytes": 0}}',
        '{"device": "NAME", "measured": {"device_bytes": true}, "predicted": {"device_bytes": 9}}',
        '{"device": "NAME", "measured": {"device_bytes": "9"}, "predicted": {"device_bytes": -9}}',
    ],
)
def test_a_broken_record_is_passed_over(
    text: str, tmp_path: Path, devices: dict[str, Device]
) -> None:
    gpu = devices["RTX 4090"]
    for number in range(3):
        finished(tmp_path, f"run-{number}", gpu.name, 1000, 1000)
    broken = tmp_path / "broken" / "record.json"
    broken.parent.mkdir()
    broken.write_text(text.replace("NAME", gpu.name))
    (tmp_path / "folder" / "record.json").mkdir(parents=True)
    assert margin_of(gpu, tmp_path) == Margin(share=0.01, num_runs=3)


def test_a_processors_runs_vary_and_do_not_count(
    tmp_path: Path, devices: dict[str, Device]
) -> None:
    for number in range(4):
        finished(tmp_path, f"run-{number}", devices["CPU"].name, 1000, 1000)
    assert margin_of(devices["CPU"], tmp_path) == ASSUMED_MARGIN


def test_with_a_smaller_margin_more_fits(
    devices: dict[str, Device], few_short_rows: DataProfile
) -> None:
    """A plan that needs a little less than there is fits by the smaller margin alone."""
    model, given = spec_from_size(17 * 10**8, "1.7B"), {"method": "lora"}
    small = {
        **given,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "loss": "trl-fused",
        "lora_rank": 16,
        "optim": "adamw_torch_fused",
    }
    gpu = devices["RTX 4090"]
    best = choose_plan(model, few_short_rows, gpu, small).best
    assert best is not None
    tight = structs.replace(gpu, free_bytes=needed_bytes(best.memory, 0.02))
    assert choose_plan(model, few_short_rows, tight, small).best is None
    ranking = choose_plan(model, few_short_rows, tight, small, margin=0.02)
    assert ranking.best is not None and ranking.margin == 0.02
    assert fits(ranking.best.memory, tight, 0.02) and not fits(ranking.best.memory, tight)


def test_what_is_missing_follows_the_margin(
    devices: dict[str, Device], few_short_rows: DataProfile
) -> None:
    model = spec_from_size(70 * 10**9, "70B")
    usual, less = (
        choose_plan(model, few_short_rows, devices["T4"], {"method": "lora"}, margin=margin)
        for margin in (MEMORY_MARGIN, 0.01)
    )
    needs = [ranking.rejected[0].needs_bytes for ranking in (usual, less)]
    assert needs[0] and needs[1]
    assert needs[0] / needs[1] == pytest.approx(1.05 / 1.01)


def test_a_plan_takes_the_margin_of_its_gpus_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ({"prompt": f"Why {n}?", "completion": "A reason."} for n in range(40))
    data, runs = tmp_path / "rows.jsonl", tmp_path / "runs"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["plan", str(data), "--gpu", "l4", "--model", "qwen2.5-7b", "--runs-dir", str(runs)]
    assert main([*words, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    for number in range(7):
        finished(runs, f"run-{number}", "L4", 1008, 1000)
    assert main([*words, "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert before["margin"] == {"share": MEMORY_MARGIN, "num_runs": 0}
    assert after["margin"] == {"share": pytest.approx(0.018), "num_runs": 7}
    required = after["estimate"]["per_gpu"]["required_bytes"]
    fit = after["estimate"]["fits"]
    assert fit["margin_bytes"] == fit["free_bytes"] - round(
        required * (1 + after["margin"]["share"])
    )
    assert main(words) == 0
    assert "margin 1.8 %: 7 runs on this GPU" in capsys.readouterr().out
