"""Time, energy and cost as the commands tell them, and whose stack they are of."""

from __future__ import annotations

import json
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import costs, own_stack
from ftplan.launcher.estimate_json import full_step
from ftplan.planner.compiled_step import compiled_step
from ftplan.planner.memory import estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.run_time import RunTime
from ftplan.planner.stack import OWN_STACK, Stack
from ftplan.planner.step_time import STEP_KEYS, StepTime
from ftplan.profiles import BILLINGS, find_gpu, lowest_prices, prices
from tests.test_estimate import as_json, printed

EXAMPLE = Path(__file__).parent.parent / "examples" / "python_docs.jsonl"


def time_rows(*words: str, width: int = 80) -> list[str]:
    """The lines of estimate's table of times."""
    lines = [line.rstrip() for line in printed(*words, width=width)[1].splitlines()]
    begin = next((n for n, line in enumerate(lines) if line.startswith("Time on ")), None)
    if begin is None:
        return []
    return lines[begin : lines.index("", begin)]


# --- estimate


@pytest.mark.parametrize("width", [80, 120])
def test_estimate_shows_time_energy_and_cost_of_a_named_gpu(width: int) -> None:
    words = ("7B", "--method", "lora", "--gpu", "a100-80gb-sxm")
    title, _, rule, *rows = time_rows(*words, width=width)
    assert title == "Time on A100 SXM4 80GB" and set(rule) == {"─"}
    told = {row.split("  ")[0]: row for row in rows if not row.startswith(" ")}
    assert list(told) == ["a step", "tokens/s", "MFU", "energy", "cost"]
    step = as_json(*words)["step"]
    least, most = step["least_step_seconds"], step["most_step_seconds"]
    assert f"{least:.2f} s to {most:.2f} s; 1 full row of 2,048 tokens" in told["a step"]
    assert (
        f" {step['tokens_per_second_per_gpu']:,.0f}   bound by {step['bound_by']}"
        in (told["tokens/s"])
    )
    assert f" {100 * step['mfu']:.0f} %   of 312 TFLOP/s in bfloat16" in told["MFU"]
    assert "76 % of the GPU's 400 W" in told["energy"]
    assert f" {step['usd_per_million_tokens']['on-demand']:.2g} USD " in told["cost"]


def test_several_gpus_have_the_speed_of_each() -> None:
    words = ("7B", "--method", "full", "--gpu", "h100-sxm", "--num-gpus", "4", "--sharding", "fsdp")
    rows = time_rows(*words)
    assert any("1 full row of 2,048 tokens on each GPU" in row for row in rows)
    assert any(row.startswith("tokens/s") and "of each GPU; bound by" in row for row in rows)


def test_without_a_gpu_no_time_is_told() -> None:
    words = ("7B", "--method", "lora")
    assert time_rows(*words) == []
    step = as_json(*words)["step"]
    assert step == dict.fromkeys((*STEP_KEYS, "usd_per_million_tokens"))


def test_the_json_of_a_step_agrees_with_itself() -> None:
    step = as_json("7B", "--method", "full", "--gpu", "h100-sxm")["step"]
    assert set(step) == {*STEP_KEYS, "usd_per_million_tokens"}
    assert step["least_step_seconds"] < step["step_seconds"] < step["most_step_seconds"]
    speed = step["tokens_per_second_per_gpu"]
    assert speed == pytest.approx(2048 / step["step_seconds"])
    assert step["joules_per_token"] == pytest.approx(0.76 * 700 / speed)
    assert step["mfu"] == pytest.approx(step["model_flops"] / step["step_seconds"] / 989.4e12, 1e-3)
    dearest = prices_of("h100-sxm", "on-demand")
    assert step["usd_per_million_tokens"]["on-demand"] == pytest.approx(
        min(dearest) / 3600 * 1e6 / speed
    )


def prices_of(key: str, billing: str) -> list[float]:
    return [p.usd_per_gpu_hour for p in prices() if (p.gpu, p.billing) == (key, billing)]


def test_the_lowest_price_is_found_by_the_names_of_a_gpu() -> None:
    entry = find_gpu("h100-sxm")
    for name in (entry.name, *entry.driver_names):
        found = lowest_prices(name)
        assert set(found) <= set(BILLINGS)
        for billing, price in found.items():
            assert price.usd_per_gpu_hour == min(prices_of("h100-sxm", billing))
    assert lowest_prices("no such card") == {}
    assert set(BILLINGS) == {price.billing for price in prices()}


def test_a_card_without_a_price_costs_nothing_that_is_known(llama_2_7b: ModelSpec) -> None:
    device = find_gpu("gtx-1080-ti").device()
    assert not lowest_prices(device.name)
    assert costs.usd_for(device, 3600) == dict.fromkeys(BILLINGS)


# --- a run


def test_a_run_is_its_steps() -> None:
    step = StepTime(
        step_seconds=2.0, least_step_seconds=1.0, most_step_seconds=3.0, tokens_per_step=1.0,
        forward_flops=1.0, step_flops=1.0, model_flops=1.0, bound_by="arithmetic", mfu=0.5,
        step_joules=600.0,
    )  # fmt: skip
    plan = TrainingPlan(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_gpus=2,
        num_train_epochs=3,
    )
    assert RunTime.of(plan, step, 17) == RunTime(
        steps=9, seconds=18.0, least_seconds=9.0, most_seconds=27.0, epoch_seconds=6.0,
        joules=9 * 2 * 600.0,
    )  # fmt: skip
    cut = RunTime.of(plan.replace(max_steps=5), step, 17)
    assert (cut.steps, cut.seconds, cut.epoch_seconds) == (5, 10.0, 6.0)


def test_plan_tells_the_time_of_the_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    from ftplan.launcher import cli

    words = ["plan", str(EXAMPLE), "--gpu", "l4", "--model", "smollm2-135m-instruct"]
    assert cli.main([*words, "--method", "lora"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{row}  " in shown for row in ("time", "speed", "cost"))
    assert "MFU" in shown and "Wh" in shown
    assert cli.main([*words, "--method", "lora", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    run, step = told["run"], told["estimate"]["step"]
    assert run["seconds"] == pytest.approx(run["steps"] * step["step_seconds"])
    assert run["least_seconds"] < run["seconds"] < run["most_seconds"]
    assert run["joules"] == pytest.approx(0.76 * 72 * run["seconds"])
    (price,) = {min(prices_of("l4", "on-demand"))}
    assert run["usd"]["on-demand"] == pytest.approx(price * run["seconds"] / 3600)


# --- one's own stack


@pytest.mark.parametrize(
    ("text", "takes_groups"),
    [
        ("__version__ = '2.13.0+cpu'\n", False),
        ("import x\n__version__ = '2.14.0+cu130'\ndebug = False\n", True),
        ('__version__ = "3.0.1"\n', True),
        ("nothing\n", False),
        (None, False),
    ],
)
def test_before_ampere_the_installed_torch_decides(
    text: str | None, takes_groups: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not to be imported')")
    if text is not None:
        (tmp_path / "torch" / "version.py").write_text(text)
    spec = PathFinder.find_spec("torch", [str(tmp_path)])
    monkeypatch.setattr(own_stack, "find_spec", lambda name: spec)
    own_stack.torch_release.cache_clear()
    stack = own_stack.installed_stack(find_gpu("t4").device())
    own_stack.torch_release.cache_clear()
    assert stack == Stack(efficient_takes_groups=takes_groups)


def test_the_release_is_the_one_that_is_imported() -> None:
    torch = pytest.importorskip("torch", reason="its own version is the reference")
    own_stack.torch_release.cache_clear()
    assert own_stack.torch_release() == tuple(map(int, torch.__version__.split(".")[:2]))


def test_without_torch_the_stack_is_the_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_stack, "find_spec", lambda name: None)
    own_stack.torch_release.cache_clear()
    assert own_stack.installed_stack(find_gpu("t4").device()) == OWN_STACK
    own_stack.torch_release.cache_clear()


@pytest.mark.parametrize("gpu", ["a100-80gb-sxm", "l4", "mi300x", None])
def test_elsewhere_nothing_is_asked(gpu: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_stack, "torch_release", None)
    device = find_gpu(gpu).device() if gpu else None
    assert own_stack.installed_stack(device) == OWN_STACK


def test_the_commands_hand_the_stack_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.14 repeats no grouped heads on a T4, which takes memory and time."""
    from ftplan.launcher.model_source import find_source

    model = find_source("qwen2.5-1.5b").spec
    device = find_gpu("t4").device()
    plan = estimate_recipe(model, device, {"method": "lora"}).plan
    words = ("qwen2.5-1.5b", "--method", "lora", "--gpu", "t4")
    for takes_groups in (False, True):
        stack = Stack(efficient_takes_groups=takes_groups)
        release = (2, 14) if takes_groups else (2, 13)
        monkeypatch.setattr(own_stack, "torch_release", lambda of=release: of)
        told = as_json(*words)
        memory = estimate_memory(model, plan, device=device, stack=stack)
        assert told["per_gpu"]["allocated_peak_bytes"] == memory.allocated_peak_bytes
        step = full_step(model, plan, device)
        assert step is not None
        assert told["step"]["step_seconds"] == step.step_seconds
    trace = [
        compiled_step(model, plan, 1, 2048, device, Stack(efficient_takes_groups=takes)).trace
        for takes in (False, True)
    ]
    assert trace[0].num_kernels > trace[1].num_kernels
