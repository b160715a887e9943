"""What GPUs reach each other by, as NVML tells it, and what collective operations get of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from ftplan.launcher.probe import probe_machine
from ftplan.launcher.probing import nvidia_links
from ftplan.planner.gpu_links import ring_bytes_per_second
from ftplan.planner.hardware_spec import GpuLink, Machine, PcieLink
from ftplan.profiles import find_gpu
from tests.fake_nvml import (
    GIB,
    SWITCH,
    FakeGpu,
    FakeNvml,
    NVMLError,
    NVMLError_GpuIsLost,
    NVMLError_NoPermission,
    NVMLError_NotSupported,
)

A100 = "NVIDIA A100-SXM4-80GB"
V100 = "Tesla V100-SXM2-32GB"
RTX_3090 = "NVIDIA GeForce RTX 3090"
PCIE_SHARE = 0.6
NVLINK_SHARE = 0.8
PCIE_4_X16 = 16 * 1.969e9


def bus(number: int) -> str:
    return f"00000000:{number + 0x3B:02X}:00.0"


def gpus(name: str, ends: Sequence[Sequence[str | None] | None], **more: object) -> list[FakeGpu]:
    """A GPU for each list of what its NVLinks end in."""
    return [
        FakeGpu(name=name, uuid=f"GPU-{n}", bus_id=bus(n), nvlinks=links, **more)  # type: ignore[arg-type]
        for n, links in enumerate(ends)
    ]


def probe(nvml: FakeNvml, root: Path, **environ: str) -> Machine:
    return probe_machine(nvml=nvml, environ=environ, root=root)


def rate(machine: Machine) -> float | None:
    """What collective operations reach, the same on each."""
    (only,) = {gpu.link_bytes_per_second for gpu in machine.gpus}
    return only


def test_a_switch_gives_each_gpu_all_its_links(tmp_path: Path) -> None:
    machine = probe(FakeNvml(gpus(A100, [[SWITCH] * 12] * 4)), tmp_path)
    assert [(link.first, link.second) for link in machine.links] == [
        *itertools.combinations(range(4), 2)
    ]
    assert {(link.kind, link.num_links) for link in machine.links} == {("nvswitch", 12)}
    assert rate(machine) == pytest.approx(NVLINK_SHARE * 300e9)
    assert rate(machine) == pytest.approx(find_gpu("a100-80gb-sxm").link_bytes_per_second)


def test_data_centre_cards_without_nvlink_have_pcie(tmp_path: Path) -> None:
    """A virtual machine with two cards of a board, but not its switch."""
    nvml = FakeNvml(gpus(A100, [None, None]), topology_level=50)
    machine = probe(nvml, tmp_path)
    (link,) = machine.links
    assert (link.kind, link.num_links, link.path, link.peer_access) == ("pcie", 0, "SYS", True)
    assert rate(machine) == pytest.approx(PCIE_SHARE * PCIE_4_X16)


def test_a_bridge_between_two_is_nvlink_and_none_is_pcie(tmp_path: Path) -> None:
    bridged = probe(FakeNvml(gpus(RTX_3090, [[bus(1)] * 4, [bus(0)] * 4])), tmp_path)
    assert (bridged.links[0].kind, bridged.links[0].num_links) == ("nvlink", 4)
    assert bridged.links[0].bytes_per_second == pytest.approx(56.25e9)
    assert rate(bridged) == pytest.approx(NVLINK_SHARE * 56.25e9)
    bare = probe(FakeNvml(gpus(RTX_3090, [[None] * 4] * 2), p2p_status=1), tmp_path)
    assert (bare.links[0].kind, bare.links[0].peer_access) == ("pcie", False)
    assert rate(bare) == pytest.approx(PCIE_SHARE * PCIE_4_X16)


def test_pairs_with_bridges_send_over_pcie_all_the_same(tmp_path: Path) -> None:
    pairs = [[bus(1)] * 4, [bus(0)] * 4, [bus(3)] * 4, [bus(2)] * 4]
    machine = probe(FakeNvml(gpus(RTX_3090, pairs)), tmp_path)
    assert sorted(link.kind for link in machine.links) == ["nvlink"] * 2 + ["pcie"] * 4
    assert rate(machine) == pytest.approx(PCIE_SHARE * PCIE_4_X16)
    one_pair = probe(FakeNvml(gpus(RTX_3090, pairs)), tmp_path, CUDA_VISIBLE_DEVICES="3,2")
    assert [(link.first, link.second) for link in one_pair.links] == [(3, 2)]
    assert rate(one_pair) == pytest.approx(NVLINK_SHARE * 56.25e9)


def test_half_a_cube_mesh_uses_the_links_within_it(tmp_path: Path) -> None:
    """Of a V100's six links, four lead to the other three of its half (DGX-1 whitepaper), one or
    two to each; the other two leave it."""
    far = [bus(n) for n in range(4, 8)]
    within = [(1, 2, 3, 3), (0, 2, 2, 3), (0, 1, 1, 3), (0, 0, 1, 2)]
    ends = [[*map(bus, near), far[n], far[n]] for n, near in enumerate(within)]
    nvml = FakeNvml(gpus(V100, [*ends, *[[None]] * 4], compute_capability=(7, 0), total=32 * GIB))
    machine = probe(nvml, tmp_path, CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert {link.num_links for link in machine.links} == {1, 2}
    assert rate(machine) == pytest.approx(NVLINK_SHARE * 4 * 25e9)


def test_bus_ids_are_one_whatever_their_spelling(tmp_path: Path) -> None:
    ends = [["0000:3c:00.0"] * 4, [b"00000000:3B:00.0"] * 4]
    machine = probe(FakeNvml(gpus(RTX_3090, ends)), tmp_path)  # type: ignore[arg-type]
    assert machine.links[0].num_links == 4


def test_an_older_driver_does_not_name_the_switch(tmp_path: Path) -> None:
    fails = {"nvmlDeviceGetNvLinkRemoteDeviceType": NVMLError_NotSupported}
    machine = probe(FakeNvml(gpus(A100, [[SWITCH] * 12] * 2, fails=fails)), tmp_path)
    assert (machine.links[0].kind, machine.links[0].num_links) == ("nvswitch", 12)
    bridged = gpus(RTX_3090, [[bus(1)] * 4, [bus(0)] * 4], fails=fails)
    assert probe(FakeNvml(bridged), tmp_path).links[0].kind == "nvlink"


def test_links_that_lead_nowhere_known_are_no_links(tmp_path: Path) -> None:
    fails = {"nvmlDeviceGetNvLinkRemotePciInfo": NVMLError}
    bridged = gpus(RTX_3090, [[bus(1)] * 4, [bus(0)] * 4], fails=fails)
    assert probe(FakeNvml(bridged), tmp_path).links[0].kind == "pcie"


@pytest.mark.parametrize("error", [NVMLError_NotSupported, NVMLError_NoPermission])
def test_a_refused_query_costs_its_field(tmp_path: Path, error: type[NVMLError]) -> None:
    calls = ("nvmlDeviceGetTopologyCommonAncestor", "nvmlDeviceGetP2PStatus")
    nvml = FakeNvml(gpus(A100, [[SWITCH] * 12] * 2, fails=dict.fromkeys(calls, error)))
    machine = probe(nvml, tmp_path)
    assert (machine.links[0].path, machine.links[0].peer_access) == (None, None)
    assert machine.links[0].num_links == 12
    assert machine.notes == ()


def test_a_gpu_lost_meanwhile_costs_the_links(tmp_path: Path) -> None:
    fails = {"nvmlDeviceGetNvLinkState": NVMLError_GpuIsLost}
    machine = probe(FakeNvml(gpus(A100, [None, None], fails=fails)), tmp_path)
    assert (len(machine.gpus), machine.links) == (2, ())
    assert machine.notes == (
        "the driver has lost a GPU while its links were read; restart the machine",
    )


def test_one_gpu_has_no_links_and_its_catalogued_rate(tmp_path: Path) -> None:
    machine = probe(FakeNvml(gpus(A100, [[SWITCH] * 12])), tmp_path)
    assert machine.links == ()
    assert rate(machine) == find_gpu("a100-80gb-sxm").link_bytes_per_second


def test_mig_devices_have_no_links(tmp_path: Path) -> None:
    slices = [FakeGpu(name=f"{A100} MIG 1g.10gb", uuid=f"MIG-{n}", total=10 * GIB) for n in "ab"]
    machine = probe(FakeNvml([FakeGpu(name=A100, mig=slices, nvlinks=[SWITCH] * 12)]), tmp_path)
    assert (len(machine.gpus), machine.links) == (2, ())
    assert rate(machine) == pytest.approx(PCIE_SHARE * PCIE_4_X16)


def test_the_narrowest_slot_counts_for_all(tmp_path: Path) -> None:
    """At the generation that the link rises to: at rest it is the first."""
    cards = [FakeGpu(pcie=(1, 16, 4, 16)), FakeGpu(pcie=(1, 4, 3, 16))]
    machine = probe(FakeNvml(cards), tmp_path)
    assert machine.gpus[1].pcie == PcieLink(generation=1, width=4, max_generation=3, max_width=16)
    assert rate(machine) == pytest.approx(PCIE_SHARE * 4 * 984.6e6)
    assert machine.notes == (
        "GPU 1 has 4 of its 16 PCIe lanes: what moves between it, the RAM and other GPUs moves "
        "slowly; a slot with more lanes would help",
    )


def test_a_slot_of_few_lanes_is_seen_by_what_the_card_has(tmp_path: Path) -> None:
    """The driver's maximum may be that of the slot."""
    (note,) = probe(FakeNvml([FakeGpu(pcie=(4, 4, 4, 4))]), tmp_path).notes
    assert note.startswith("GPU 0 has 4 of its 16 PCIe lanes")


def test_half_of_the_lanes_is_not_worth_a_word(tmp_path: Path) -> None:
    assert probe(FakeNvml([FakeGpu(pcie=(4, 8, 4, 16))]), tmp_path).notes == ()


def test_without_a_word_on_pcie_the_catalog_speaks(tmp_path: Path) -> None:
    calls = [
        f"nvmlDeviceGet{w}PcieLink{h}" for w in ("Curr", "Max") for h in ("Width", "Generation")
    ]
    fails = dict.fromkeys(calls, NVMLError_NotSupported)
    machine = probe(FakeNvml([FakeGpu(fails=fails), FakeGpu(fails=fails)]), tmp_path)
    assert {gpu.pcie for gpu in machine.gpus} == {None}
    assert rate(machine) == pytest.approx(PCIE_SHARE * PCIE_4_X16)
    assert machine.notes == ()


def test_a_generation_of_the_future_is_unknown(tmp_path: Path) -> None:
    machine = probe(FakeNvml([FakeGpu(pcie=(9, 16, 9, 16))] * 2), tmp_path)
    assert rate(machine) is None


@pytest.mark.parametrize(
    ("level", "path"),
    [(0, "PIX"), (10, "PIX"), (20, "PXB"), (30, "PHB"), (40, "NODE"), (50, "SYS"), (7, None)],
)
def test_paths_are_nvidia_smis(tmp_path: Path, level: int, path: str | None) -> None:
    machine = probe(FakeNvml([FakeGpu(), FakeGpu()], topology_level=level), tmp_path)
    assert machine.links[0].path == path


def test_the_constants_are_pynvmls() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert pynvml.NVML_NVLINK_MAX_LINKS <= nvidia_links.MAX_LINKS
    assert nvidia_links._ACTIVE == pynvml.NVML_FEATURE_ENABLED
    assert nvidia_links._REMOTE_SWITCH == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
    read = pynvml.NVML_P2P_CAPS_INDEX_READ
    assert (read[0] if isinstance(read, tuple) else read) == nvidia_links._P2P_READ  # `0,` in 13
    assert nvidia_links._P2P_OK == pynvml.NVML_P2P_STATUS_OK
    levels = ("INTERNAL", "SINGLE", "MULTIPLE", "HOSTBRIDGE", "NODE", "SYSTEM")
    assert list(nvidia_links.PATHS) == [getattr(pynvml, f"NVML_TOPOLOGY_{x}") for x in levels]


# --- rings


def nvlinks(*pairs: tuple[int, int], each: float = 1.0) -> list[GpuLink]:
    return [
        GpuLink(first=one, second=other, kind="nvlink", num_links=1, bytes_per_second=each)
        for one, other in pairs
    ]


def test_a_chain_is_no_ring() -> None:
    assert ring_bytes_per_second([0, 1, 2], nvlinks((0, 1), (1, 2)), {}) is None
    assert ring_bytes_per_second([0, 1, 2], nvlinks((0, 1), (1, 2), (0, 2)), {}) == 2.0


def test_two_are_a_ring_and_one_is_none() -> None:
    assert ring_bytes_per_second([4, 7], nvlinks((4, 7), each=3.0), {}) == 3.0
    assert ring_bytes_per_second([4], [], {}) is None


def test_the_gpu_with_the_fewest_links_bounds_the_ring() -> None:
    square = nvlinks((0, 1), (1, 2), (2, 3), (0, 3))
    assert ring_bytes_per_second([0, 1, 2, 3], [*square, *nvlinks((0, 2))], {}) == 2.0


def test_what_a_switch_gives_to_each_pair_is_shared() -> None:
    pairs = itertools.combinations(range(16), 2)
    links = nvlinks(*pairs, each=450.0)
    assert ring_bytes_per_second(range(16), links, dict.fromkeys(range(16), 450.0)) == 450.0


def test_links_to_hidden_gpus_do_not_count() -> None:
    assert ring_bytes_per_second([0, 1], nvlinks((0, 1), (0, 2), (1, 2)), {}) == 1.0
