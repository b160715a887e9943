"""What the machine around the GPUs lacks: told, warned of, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import planning
from ftplan.launcher.commands import estimate
from ftplan.launcher.data.asked import DataAsked
from ftplan.launcher.plan_cautions import plan_cautions
from ftplan.launcher.planning import Planned, make_plan
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import DoesNotFitError
from ftplan.planner.hardware_spec import Device, Host, Machine
from ftplan.planner.host_verdict import lacking_disk, lacking_ram
from ftplan.planner.memory import estimate_memory
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.units import GIB, TIB
from ftplan.profiles import find_gpu


def _host(ram: int, disk: int) -> Host:
    return Host(
        cpu_name="",
        num_cores=8,
        ram_total_bytes=ram,
        ram_available_bytes=ram,
        disk_free_bytes=disk,
        disk_path="/runs",
    )


def test_what_the_machine_lacks_is_said(llama_2_7b: ModelSpec, devices: dict[str, Device]) -> None:
    plan = TrainingPlan(method="full", dtype="float32")
    memory = estimate_memory(llama_2_7b, plan, device=devices["A100"])
    needed = memory.host.required_bytes
    assert lacking_ram(memory, _host(needed, 0), devices["A100"]) is None
    told = lacking_ram(memory, _host(needed - 1, 0), devices["A100"])
    assert told is not None and told.startswith("saving takes")
    assert lacking_ram(memory, _host(0, 0), devices["CPU"]) is None


def test_a_short_run_needs_disk_for_the_checkpoints_it_writes(
    llama_2_7b: ModelSpec, devices: dict[str, Device]
) -> None:
    plan = TrainingPlan(method="full", dtype="float32", save_steps=10)
    memory = estimate_memory(llama_2_7b, plan, device=devices["A100"])
    disk = memory.disk
    for steps, checkpoints in ((10, 1), (11, 2), (1000, 3), (None, 3)):
        needed = checkpoints * disk.checkpoint + disk.final_model
        assert lacking_disk(memory, _host(0, needed), plan, steps) is None
        assert "`/runs`" in (lacking_disk(memory, _host(0, needed - 1), plan, steps) or "")
        tokens = needed + 8 * 1000
        assert lacking_disk(memory, _host(0, tokens), plan, steps, 1000) is None
        assert lacking_disk(memory, _host(0, tokens - 1), plan, steps, 1000)


# --- in commands


def _planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, host: Host, *, for_launch: bool
) -> Planned:
    """A plan for a machine with one L4 and such RAM and disk; no weights are fetched."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"Why {n}?", "completion": "A reason."}) + "\n" for n in range(64)
        )
    )
    card = find_gpu("l4").device()
    machine = Machine(gpus=(card,), cpu=card, host=host)
    monkeypatch.setattr(planning, "probe_machine", lambda **_: machine)
    monkeypatch.setattr(planning, "with_weights", lambda ui, source: source)
    return make_plan(
        Ui(as_json=True),
        asked=DataAsked(paths=(str(rows),)),
        model_name="qwen2.5-7b",
        named_device=None,
        given={"save_steps": 1},
        runs_dir=folder / "runs",
        for_launch=for_launch,
    )


@pytest.mark.parametrize(
    ("ram", "disk", "said"),
    [(TIB, TIB, None), (GIB, TIB, "of the host's RAM"), (TIB, 100 * 10**6, "`/runs` has 95.4 MiB")],
)
def test_a_plan_warns_and_a_launch_is_refused(
    ram: int, disk: int, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = _host(ram, disk)
    planned = _planned(tmp_path, monkeypatch, host, for_launch=False)
    warned = "\n".join(map(str, plan_cautions(planned)))
    if said is None:
        assert "host's RAM" not in warned and "/runs" not in warned
        assert _planned(tmp_path, monkeypatch, host, for_launch=True).machine
        return
    assert said in warned
    with pytest.raises(DoesNotFitError) as refused:
        _planned(tmp_path, monkeypatch, host, for_launch=True)
    assert said in refused.value.message and refused.value.hint


def test_an_estimate_for_a_named_card_warns(
    llama_2_7b: ModelSpec, devices: dict[str, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = TrainingPlan()
    memory = estimate_memory(llama_2_7b, plan, device=devices["A100"])
    for host, count in ((_host(TIB, TIB), 0), (_host(GIB, GIB), 2)):
        monkeypatch.setattr(estimate, "read_host", lambda *_, host=host: host)
        told: list[Any] = estimate._host_cautions(memory, plan, devices["A100"])
        assert len(told) == count
