"""A plan written to a file, changed by hand, read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftplan.launcher import cli, launch_elsewhere
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.plan_file import read_plan_file, write_plan_file
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError, UnknownNameError
from ftplan.planner.plan import SETTING_NAMES
from ftplan.profiles import find_gpu


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = ({"q": f"Why {n}?", "a": f"Because of {n}."} for n in range(64))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return plan(DataAsked(paths=(str(path),), columns={"instruction": "q", "output": "a"}))


def plan(asked: DataAsked, given: Any = None) -> Planned:
    return make_plan(
        Ui(as_json=True, stdout=io.StringIO(), stderr=io.StringIO()),
        asked=asked,
        model_name="qwen2.5-7b",
        named_device=find_gpu("l4").device(),
        given={"lora_rank": 8} if given is None else given,
        runs_dir=Path("runs"),
        for_launch=False,
    )


@pytest.fixture
def written(planned: Planned, tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    write_plan_file(planned, path)
    return path


def changed(path: Path, **parts: Any) -> Path:
    """With other parts, dotted names from the outside in; None takes one out."""
    raw = yaml.safe_load(path.read_text())
    for name, value in parts.items():
        *outer, last = name.split("__")
        place = raw
        for key in outer:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_what_is_read_back_is_planned_again_alike(planned: Planned, written: Path) -> None:
    file = read_plan_file(written)
    assert set(file.settings) == set(file.reasons) == set(SETTING_NAMES)
    again = file.with_reasons(plan(file.asked, file.settings))
    assert again.chosen.reasoned == planned.chosen.reasoned
    assert again.data.sha256 == file.sha256 == planned.data.sha256
    twice = written.with_name("again.yaml")
    write_plan_file(again, twice)
    assert twice.read_text() == written.read_text()


def test_what_is_changed_by_hand_is_kept_and_what_is_left_out_is_chosen(
    planned: Planned, written: Path
) -> None:
    changed(
        written,
        plan__lora_rank=4,
        plan__learning_rate=1e-3,
        plan__gradient_accumulation_steps=None,
        plan__per_device_train_batch_size=None,
    )
    file = read_plan_file(written)
    again = file.with_reasons(plan(file.asked, file.settings)).chosen
    assert (again.plan.lora_rank, again.plan.learning_rate) == (4, 1e-3)
    assert again.reasoned.reasons["lora_rank"].origin == "given"
    assert again.plan.effective_batch_size == planned.chosen.plan.effective_batch_size
    assert again.reasoned.reasons["per_device_train_batch_size"].origin == "derived"


_TWO_MACHINES = ["--gpu", "H100 SXM", "--num-gpus", "8", "--num-machines", "2"]
_UNLIKE = """
machines:
  - {gpu: H100 SXM, num_gpus: 8, interconnect: infiniband-ndr}
  - {gpu: A100 80GB SXM, num_gpus: 8, interconnect: roce-200g}
"""
_OWN_NETWORK = """
machines:
  - {gpu: H100 SXM, num_gpus: 8, count: 2, interconnect: 45GB/s, latency: 9us}
"""


@pytest.mark.parametrize(
    ("flags", "cluster"),
    [
        (["--gpu", "RTX 4090", "--free-memory", "20GiB"], None),
        (["--gpu", "H100 SXM", "--num-gpus", "8"], None),
        ([*_TWO_MACHINES, "--interconnect", "roce-400g"], None),
        (_TWO_MACHINES, None),
        ([], _OWN_NETWORK),
        ([], _UNLIKE),
    ],
)
def test_an_engine_is_handed_what_was_planned_for(
    flags: list[str], cluster: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every flag that names GPUs and machines comes back out of the file."""
    data, path = tmp_path / "rows.jsonl", tmp_path / "plan.yaml"
    data.write_text("".join(f'{{"prompt": "Why {n}?", "completion": "So."}}\n' for n in range(32)))
    if cluster is not None:
        (tmp_path / "cluster.yaml").write_text(cluster)
        flags = ["--cluster", str(tmp_path / "cluster.yaml")]
    kept: list[Planned] = []

    def keeping(planned: Planned, to: Path) -> None:
        kept.append(planned)
        write_plan_file(planned, to)

    monkeypatch.setattr("ftplan.launcher.commands.plan.write_plan_file", keeping)
    words = ["plan", str(data), "--model", "qwen2.5-1.5b", "--method", "lora", "--json"]
    assert cli.main([*words, "--out", str(path), *flags]) == 0
    file, ui = read_plan_file(path), Ui(as_json=True, stdout=io.StringIO(), stderr=io.StringIO())
    device = launch_elsewhere.named_device(ui, file)
    assert device == kept[0].device
    plan = kept[0].chosen.plan
    assert file.settings == {name: getattr(plan, name) for name in SETTING_NAMES}


@pytest.mark.parametrize("rates", [{"bytes_per_second": 5}, {"latency_seconds": 1e-6},
    {"bytes_per_second": "fast", "latency_seconds": 1e-6},
    {"bytes_per_second": 0, "latency_seconds": 1e-6}])  # fmt: skip
def test_a_network_without_its_figures_is_refused(rates: dict[str, Any], written: Path) -> None:
    device = {"name": "L4", "free_bytes": 5, "interconnect": "own", **rates}
    with pytest.raises(InputError, match="two numbers above 0"):
        read_plan_file(changed(written, device=device))


def test_a_file_that_is_there_is_left_alone(planned: Planned, written: Path) -> None:
    before = written.read_text()
    with pytest.raises(InputError, match="is there already"):
        write_plan_file(planned, written)
    assert written.read_text() == before


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"schema": 7}, "schema: 7"),
        ({"model": None}, "names no `model`"),
        ({"plan": None}, "lacks `data` or `plan`"),
        ({"data": ["rows.jsonl"]}, "lacks `data` or `plan`"),
        ({"data__paths": "rows.jsonl"}, "must be a list of files"),
        ({"data__paths": []}, "must be a list of files"),
        ({"data__paths": [3]}, "must be a list of files"),
        ({"data__columns": ["q"]}, "is a mapping"),
        ({"data__test_share": 0.9}, "not between 0 and 0.5"),
        ({"plan__lora_rank": {"from": "given"}}, "has no `value`"),
        ({"plan__lora_rank": "eight"}, "wrong type"),
        ({"plan__lora_rank": {"value": True}}, "wrong type"),
        ({"plan__target_modules": "q_proj"}, "list of names"),
    ],
)
def test_what_is_wrong_is_named(parts: dict[str, Any], said: str, written: Path) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        read_plan_file(changed(written, **parts))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("plan__lora_rnak", "lora_rank"), ("modle", "model"), ("data__column", "columns")],
)
def test_a_name_that_is_not_known_is_told_the_nearest(name: str, meant: str, written: Path) -> None:
    with pytest.raises(UnknownNameError) as refused:
        read_plan_file(changed(written, **{name: 1}))
    assert f"`{meant}`" in (refused.value.hint or "")


@pytest.mark.parametrize("text", ["", "[]", "a: b: c", "\x00", "- 1\n- 2"])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        read_plan_file(path)
