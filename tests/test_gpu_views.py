"""What `ftplan gpus` prints of cards and links."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from ftplan.launcher import gpu_views
from ftplan.launcher.commands import gpus
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.ui import Ui
from ftplan.planner.hardware_spec import Device, GpuLink, Machine, PcieLink
from ftplan.profiles import find_gpu
from tests.fake_nvml import SWITCH, FakeGpu, FakeNvml

RTX_3090 = "NVIDIA GeForce RTX 3090"
UUID = "GPU-5fd4f08{}-f0c1-4b52-8b2c-1d0c1a2b3c4d"


def bridged_pairs() -> list[FakeGpu]:
    """Four cards, a bridge between each two."""
    return [
        FakeGpu(
            name=RTX_3090,
            uuid=UUID.format(n),
            bus_id=f"0000:0{n}:00.0",
            nvlinks=[f"0000:0{n ^ 1}:00.0"] * 4,
            power_limit=300_000 if n else 350_000,
            default_power_limit=350_000,
            compute_capability=(8, 6),
        )
        for n in range(4)
    ]


def shown(machine: Machine, width: int = 80) -> str:
    out = io.StringIO()
    gpus.show(machine, Ui(stdout=out, stderr=io.StringIO(), width=width))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def machine_of(cards: list[FakeGpu], root: Path, **more: Any) -> Machine:
    return probe_machine(nvml=FakeNvml(cards, **more), environ={}, root=root)


@pytest.mark.parametrize("width", [80, 120])
def test_unlike_ways_are_a_matrix(tmp_path: Path, width: int) -> None:
    machine = machine_of(bridged_pairs(), tmp_path, topology_level=50)
    text = shown(machine, width)
    assert f"GPU 1   300 of 350 W   4.0 x16   {UUID.format(1)}" in text
    assert text.endswith(
        """
Between the GPUs
        0     1     2     3
─────────────────────────────
GPU 0   X     NV4   SYS   SYS
GPU 1   NV4   X     SYS   SYS
GPU 2   SYS   SYS   X     NV4
GPU 3   SYS   SYS   NV4   X
NV4: 4 NVLinks; SYS: PCIe across processor sockets
Collective operations reach about 18.9 GB/s in each direction."""
    )
    assert max(map(len, text.splitlines())) <= width


def test_one_way_is_a_sentence(tmp_path: Path) -> None:
    cards = [FakeGpu(name="NVIDIA A100-SXM4-80GB", nvlinks=[SWITCH] * 12) for _ in range(3)]
    assert shown(machine_of(cards, tmp_path)).endswith(
        "\nBetween the GPUs: 12 NVLinks each, through NVSwitch\n"
        "Collective operations reach about 240 GB/s in each direction."
    )


def test_one_gpu_has_nothing_between(tmp_path: Path) -> None:
    text = shown(machine_of([FakeGpu(uuid=UUID.format(0))], tmp_path))
    assert "Between" not in text
    assert f"GPU 0         450 W   4.0 x16   {UUID.format(0)}" in text


def test_a_machine_without_gpus_has_no_cards(tmp_path: Path) -> None:
    text = shown(machine_of([], tmp_path))
    assert "none found" in text
    assert "Cards" not in text


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (GpuLink(first=0, second=1, kind="nvlink", num_links=1), "1 NVLink"),
        (GpuLink(first=0, second=1, kind="xgmi", num_links=1), "XGMI (Infinity Fabric)"),
        (GpuLink(first=0, second=1, kind="pcie"), "PCIe"),
        (
            GpuLink(first=0, second=1, kind="pcie", path="PHB", peer_access=False),
            "PCIe through the processor's PCIe bridge, without direct access to each other's "
            "memory",
        ),
    ],
)
def test_ways_in_words(link: GpuLink, words: str) -> None:
    assert gpu_views.describe(link) == words


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (None, "-"),
        (PcieLink(generation=1, width=16, max_generation=4, max_width=16), "4.0 x16"),
        (PcieLink(generation=3, width=4, max_generation=3, max_width=16), "3.0 x4 of x16"),
        (PcieLink(width=8), "x8"),
        (PcieLink(generation=5), "5.0"),
    ],
)
def test_pcie_in_words(link: PcieLink | None, words: str) -> None:
    assert gpu_views.pcie(link) == words


def test_json_has_every_fact(tmp_path: Path) -> None:
    machine = machine_of(bridged_pairs(), tmp_path)
    found = json.loads(json.dumps(gpus.machine_to_dict(machine)))
    first = found["gpus"][0]
    assert set(first) == set(Device.__struct_fields__) - {"calibration"}
    assert first["pcie"] == {"generation": 1, "width": 16, "max_generation": 4, "max_width": 16}
    assert (first["power_watts"], first["default_power_watts"]) == (350, 350)
    assert found["cuda_version"] == [12, 4]
    assert found["links"][0] == {
        "first": 0,
        "second": 1,
        "kind": "nvlink",
        "num_links": 4,
        "bytes_per_second": 56.25e9,
        "path": "PXB",
        "peer_access": True,
    }
    assert len(found["links"]) == 6


def test_a_catalogued_card_says_its_data_sheets_power() -> None:
    card = find_gpu("rtx-4090").device()
    assert gpu_views.power(card) == "450 W"
    assert not card.power_capped
