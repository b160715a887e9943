"""`ftplan estimate`: what it prints, its JSON, its exit status, and what it must not import."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import cli
from ftplan.launcher.commands import estimate
from ftplan.launcher.ui import Ui
from ftplan.planner.plan import SETTING_NAMES
from ftplan.planner.units import format_bytes

README = Path(__file__).parent.parent / "README.md"

HEAVY = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "numpy", "matplotlib")


def printed(*words: str, width: int = 80) -> tuple[int, str]:
    """Exit status and standard output of `ftplan estimate`, as in a terminal of that width."""
    out = io.StringIO()
    ui = Ui(stdout=out, stderr=io.StringIO(), width=width)
    arguments = cli.make_parser("estimate", estimate).parse_args(list(words))
    ui.as_json = arguments.json
    status = estimate.run(arguments, ui)
    return status, out.getvalue()


def as_json(*words: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(printed(*words, "--json")[1])
    return value


def shown(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_the_readme_shows_what_is_printed() -> None:
    block = re.search(
        r"\$ ftplan estimate 7B --method full\n(.*?)```", README.read_text(encoding="utf-8"), re.S
    )
    assert block is not None
    assert shown(block[1]) == shown(printed("7B", "--method", "full")[1])


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("words", [("7B", "--method", "full"), ("llama-3.1-8b", "--gpu", "l4")])
def test_no_line_is_wider_than_the_terminal(words: tuple[str, ...], width: int) -> None:
    _, text = printed(*words, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text, "nothing is cut off"


def test_the_rule_stands_beside_the_computed_parts_and_the_other_methods() -> None:
    _, text = printed("7B", "--method", "full")
    for part in ("parameters", "gradients", "optimizer states", "activations", "framework"):
        assert part in text
    assert "17.5" in text
    assert "qlora" in text and "lora" in text


def rule_rows() -> dict[str, list[str]]:
    """The cells behind each part of the rule's table."""
    lines = [
        re.split(r" {2,}", line.strip())
        for line in printed("7B", "--method", "full")[1].splitlines()
    ]
    parts = ("parameters", "gradients", "optimizer states", "activations", "framework", "total")
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 6 and cells[0] in parts}


def test_each_part_of_the_rule_stands_beside_the_most_it_takes_in_any_phase() -> None:
    """The peak's own activations may be 0 B: it is where backward ends."""
    per_gpu, count = as_json("7B", "--method", "full")["per_gpu"], 6_738_415_616
    phases = {phase["name"]: phase["components"] for phase in per_gpu["phases"]}
    assert phases[per_gpu["peak_phase"]]["activations"] == 0
    rows = rule_rows()
    kept = max(c["activations"] + c["logits_and_loss"] for c in phases.values())
    assert rows["activations"][2:] == [format_bytes(kept), f"{kept / count:.2f}", "loss"]
    highest = max(c["weights"] + c["autocast_copies"] for c in phases.values())
    assert rows["parameters"][2] == format_bytes(highest)
    assert rows["gradients"][2:] == [format_bytes(4 * count), "4.00", "optimizer step"]
    assert rows["optimizer states"][4] == "throughout"
    assert rows["total"][2] == format_bytes(per_gpu["device_peak_bytes"])


def test_the_memory_models_page_has_the_rules_parts_of_today() -> None:
    text = (README.parent / "docs" / "memory-model.md").read_text(encoding="utf-8")
    rows = rule_rows()
    for said in (
        f"the total is close, {rows['total'][3]} bytes",
        f"adds copies: {rows['parameters'][3]} at most",
        f"{rows['activations'][3]} bytes a parameter in the example",
    ):
        assert said in text


@pytest.mark.parametrize("width", [80, 120])
def test_methods_side_by_side_are_all_there(width: int) -> None:
    methods = ("full", "lora", "qlora", "freeze", "ia3")
    _, text = printed("7B", "--compare", ",".join(methods), width=width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert next(line for line in text.splitlines() if "qlora" in line).split() == [*methods]
    assert rows["weights in"][2:] == ["float32", "bfloat16", "nf4", "float32", "bfloat16"]
    sizes = [as_json("7B", "--method", m)["per_gpu"]["allocated_peak_bytes"] for m in methods]
    assert rows["allocated"][1:] == " ".join(map(format_bytes, sizes)).split()


def test_methods_side_by_side_on_a_named_gpu() -> None:
    _, text = printed("7B", "--compare", "full,qlora", "--gpu", "l4")
    (line,) = (line for line in text.splitlines() if line.startswith("fits "))
    assert line.split() == ["fits", "L4", "no", "yes"]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_explanations_terms_sum_to_the_peak_and_are_printed(method: str) -> None:
    value = as_json("7B", "--method", method, "--explain")
    terms = value["explain"]
    assert sum(term["num_bytes"] for term in terms) == value["per_gpu"]["allocated_peak_bytes"]
    _, text = printed("7B", "--method", method, "--explain", width=200)
    for term in terms:
        assert f"({term['equation']})   {term['formula']}" in text


def test_the_explanation_says_what_a_bare_number_is() -> None:
    terms = as_json("7B", "--method", "full", "--explain")["explain"]
    formulas = {term["component"]: term["formula"] for term in terms}
    assert formulas["gradients"] == "those that backward has made by then: 26,429,374,464 B"
    assert formulas["optimizer_states"] == "6,738,415,616 trained x 8 B, by adamw_torch_fused"


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora"])
def test_components_of_the_peak_sum_to_the_peak(method: str) -> None:
    per_gpu = as_json("llama-3.1-8b", "--method", method)["per_gpu"]
    assert sum(per_gpu["components"].values()) == per_gpu["allocated_peak_bytes"]
    peak = next(p for p in per_gpu["phases"] if p["name"] == per_gpu["peak_phase"])
    assert peak["components"] == per_gpu["components"]
    assert per_gpu["allocated_peak_bytes"] == max(
        phase["allocated_peak_bytes"] for phase in per_gpu["phases"]
    )


def test_the_json_follows_the_contract() -> None:
    value = as_json("7B", "--method", "full", "--gpu", "a100-80gb-sxm")
    assert value["schema"] == 1
    assert set(value) == {
        *("schema", "model", "plan", "per_gpu", "host_ram_peak_bytes", "disk_bytes", "step"),
        *("rule_of_thumb", "fits", "estimated_by", "warnings"),
    }
    assert set(value["plan"]) == set(SETTING_NAMES)
    for setting in value["plan"].values():
        assert set(setting) == {"value", "from", "why"}
        assert setting["from"] in ("given", "derived", "default")
    assert value["plan"]["method"] == {"value": "full", "from": "given", "why": "asked for"}
    assert value["rule_of_thumb"] == {
        "bytes_per_parameter": 17.5,
        "bytes": round(17.5 * value["model"]["num_parameters"]),
        "parts": {
            "parameters": 2,
            "gradients": 4,
            "optimizer_states": 8,
            "activations": 2,
            "framework": 1.5,
        },
    }
    assert set(value["fits"]) == {"gpu", "free_bytes", "verdict", "margin_bytes"}
    assert value["estimated_by"] == "closed-form"


def test_the_exit_status_says_whether_it_fits() -> None:
    assert printed("7B", "--method", "qlora", "--gpu", "l4")[0] == 0
    status, text = printed("7B", "--method", "full", "--gpu", "l4")
    assert status == 1
    assert "does not fit" in text


def test_a_given_setting_is_kept() -> None:
    plan = as_json("7B", "--lora-rank", "64", "--max-length", "512")["plan"]
    assert (plan["lora_rank"]["value"], plan["max_length"]["value"]) == (64, 512)
    assert plan["lora_rank"]["from"] == "given"


def test_nothing_heavy_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ftplan", "estimate", "7B", "--method", "full"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "ftplan" in imported
    assert not imported & set(HEAVY)
