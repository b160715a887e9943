"""AMD's GPUs, on a fake /sys as the kernel's driver lays it out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ftplan.launcher.probe import probe_machine
from ftplan.planner.hardware_spec import Machine, MemoryHolder, PcieLink
from ftplan.profiles import find_gpu
from tests.fake_nvml import (
    GIB,
    FakeGpu,
    FakeNvml,
    NVMLError_LibraryNotFound,
)

NO_NVML = {"nvmlInit": NVMLError_LibraryNotFound}
MI300X, XTX, RX_6800 = ("74a1", "00", 90402), ("744c", "c8", 110000), ("73bf", "c3", 100300)
PROCESSOR = "cpu_cores_count 96\nsimd_count 0\ndrm_render_minor 0\nunique_id 0\n"


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def add_gpu(
    root: Path,
    node: int,
    card: tuple[str, str, int] = XTX,
    *,
    total: int = 24 * GIB,
    unique_id: int = 0,
    name: str | None = None,
    **files: str,
) -> None:
    """A GPU as the topology's `node` and the DRM device behind render node 127 + node. `files`
    of the PCI device replace or add to its own."""
    device, revision, target = card
    topology = f"sys/class/kfd/kfd/topology/nodes/{node}"
    write(root, f"{topology}/gpu_id", f"{1000 + node}\n")
    write(
        root,
        f"{topology}/properties",
        f"cpu_cores_count 0\nsimd_count 192\ngfx_target_version {target}\nvendor_id 4098\n"
        f"drm_render_minor {127 + node}\nunique_id {unique_id}\n",
    )
    own = {
        "vendor": "0x1002",
        "device": f"0x{device}",
        "revision": f"0x{revision}",
        "mem_info_vram_total": str(total),
        "mem_info_vram_used": str(GIB),
        "current_link_speed": "2.5 GT/s PCIe",
        "current_link_width": "16",
        "max_link_speed": "16.0 GT/s PCIe",
        "max_link_width": "16",
        "hwmon/hwmon4/power1_cap": "355000000",
        "hwmon/hwmon4/power1_cap_default": "355000000",
        **({"product_name": name} if name else {}),
        **files,
    }
    for file, text in own.items():
        write(root, f"sys/class/drm/renderD{127 + node}/device/{file}", f"{text}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with a processor as node 0, and room for GPUs."""
    write(tmp_path, "dev/kfd", "")
    write(tmp_path, "sys/class/kfd/kfd/topology/nodes/0/properties", PROCESSOR)
    return tmp_path


def probe(root: Path, nvml: FakeNvml | None = None, **environ: str) -> Machine:
    return probe_machine(nvml=nvml or FakeNvml(fails=NO_NVML), environ=environ, root=root)


def test_memory_is_the_kernels_and_rates_are_the_catalogs(root: Path) -> None:
    add_gpu(root, 1, unique_id=0x21B6D61638A86F8C)
    machine = probe(root)
    (gpu,) = machine.gpus
    entry = find_gpu("rx-7900-xtx")
    assert (gpu.vendor, gpu.kind, gpu.name, gpu.index) == ("amd", "cuda", "RX 7900 XTX", 0)
    assert (gpu.total_bytes, gpu.free_bytes) == (24 * GIB, 23 * GIB)
    assert gpu.peak_flops_per_second == entry.peak_flops_per_second
    assert gpu.uuid == "GPU-21b6d61638a86f8c"
    assert gpu.compute_capability is None
    assert gpu.pcie == PcieLink(generation=1, width=16, max_generation=4, max_width=16)
    assert (gpu.power_watts, gpu.power_capped) == (355, False)
    assert machine.notes == ()
    assert machine.best_device is gpu


def test_the_products_name_counts_before_its_ids(root: Path) -> None:
    add_gpu(root, 1, MI300X, total=192 * GIB, name="AMD Instinct MI325X")
    assert probe(root).gpus[0].name == "AMD Instinct MI325X"
    assert probe(root).gpus[0].total_bytes == 192 * GIB


def test_one_device_id_is_many_cards_told_apart_by_revision(root: Path) -> None:
    for node, revision in enumerate(("c8", "cc", "ce"), start=1):
        add_gpu(root, node, ("744c", revision, 110000))
    names = [gpu.name for gpu in probe(root).gpus]
    assert names == ["RX 7900 XTX", "RX 7900 XT", "RX 7900 GRE"]


def test_numbers_are_rocms(root: Path) -> None:
    """By node, as numbers: 10 after 9; processors do not count."""
    for node in (10, 9, 2):
        add_gpu(root, node, unique_id=node)
    gpus = probe(root).gpus
    assert [gpu.index for gpu in gpus] == [0, 1, 2]
    assert [gpu.uuid for gpu in gpus] == [f"GPU-{n:016x}" for n in (2, 9, 10)]


def test_an_unknown_card_is_left_out_with_its_nearest(root: Path) -> None:
    write(root, "usr/share/libdrm/amdgpu.ids", "# list\n1.0.0\n73BF,\tC3,\tAMD Radeon RX 6800\n")
    add_gpu(root, 1, RX_6800)
    add_gpu(root, 2, ("744c", "cf", 110000))
    add_gpu(root, 3)
    machine = probe(root)
    assert [gpu.index for gpu in machine.gpus] == [2]
    known, alike = machine.notes
    assert known.startswith("GPU 0 is left out: the catalog has no AMD Radeon RX 6800 (gfx1030, ")
    assert "PCI 73bf:c3" in known
    assert "of its architecture" not in known
    assert "the catalog has no AMD GPU (gfx1100, PCI 744c:cf)" in alike
    assert "RX 7900 XTX" in alike


def test_a_processors_own_gpu_leaves_the_processor_to_train(root: Path) -> None:
    add_gpu(root, 1, ("13c0", "c1", 100306), total=GIB // 2)
    machine = probe(root)
    assert machine.best_device is machine.cpu
    assert "gfx1036" in machine.notes[-1]


def test_memory_unknown(root: Path) -> None:
    add_gpu(root, 1, mem_info_vram_used="")
    assert probe(root).gpus == ()
    assert "GPU 0 is left out: its memory is unknown" in probe(root).notes


def test_sensors_that_are_missing_cost_their_fields(root: Path) -> None:
    names = ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width")
    power = {"hwmon/hwmon4/power1_cap": "", "hwmon/hwmon4/power1_cap_default": ""}
    add_gpu(root, 1, **dict.fromkeys(names, ""), **power)
    (gpu,) = probe(root).gpus
    assert (gpu.pcie, gpu.uuid) == (None, None)
    assert gpu.power_watts == find_gpu("rx-7900-xtx").power_watts
    assert probe(root).notes == ()


def test_a_capped_card_and_a_narrow_slot_are_noted(root: Path) -> None:
    add_gpu(root, 1, current_link_width="4", **{"hwmon/hwmon4/power1_cap": "250000000"})
    capped, narrow = probe(root).notes
    assert capped.startswith("GPU 0 is held at 250 W of 355")
    assert narrow.startswith("GPU 0 has 4 of its 16 PCIe lanes")


def test_the_slot_counts_and_not_the_cards_own_switch(root: Path) -> None:
    """As Linux nests them: the processor's port, the card's switch, the GPU."""
    add_gpu(root, 1)
    port = root / "sys/devices/pci0000:00/0000:00:01.1"
    gpu = port / "0000:01:00.0/0000:02:00.0/0000:03:00.0"
    gpu.parent.mkdir(parents=True)
    device = root / "sys/class/drm/renderD128/device"
    device.rename(gpu)
    device.symlink_to(gpu)
    write(port, "vendor", "0x1022\n")
    for bridge, width in ((gpu.parent, "16"), (gpu.parent.parent, "4")):
        write(bridge, "vendor", "0x1002\n")
        write(bridge, "current_link_width", f"{width}\n")
        write(bridge, "max_link_width", "16\n")
        write(bridge, "max_link_speed", "8.0 GT/s PCIe\n")
    machine = probe(root)
    assert machine.gpus[0].pcie == PcieLink(width=4, max_generation=3, max_width=16)
    assert machine.gpus[0].total_bytes == 24 * GIB
    assert "4 of its 16 PCIe lanes" in machine.notes[-1]


def test_who_holds_memory(root: Path) -> None:
    add_gpu(root, 1)
    processes = "sys/class/kfd/kfd/proc"
    write(root, f"{processes}/41/vram_1001", "1073741824\n")
    write(root, f"{processes}/42/vram_1001", "2147483648\n")
    write(root, f"{processes}/43/vram_1001", "0\n")
    write(root, f"{processes}/44/vram_1002", "7\n")
    write(root, "proc/42/comm", "python3\n")
    (gpu,) = probe(root).gpus
    assert gpu.holders == (
        MemoryHolder(pid=42, name="python3", used_bytes=2 * GIB),
        MemoryHolder(pid=41, name="pid 41", used_bytes=GIB),
    )


# --- which are visible


@pytest.mark.parametrize(
    ("environ", "indices"),
    [
        ({}, [0, 1, 2]),
        ({"HIP_VISIBLE_DEVICES": "2,0"}, [2, 0]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, [0]),
        ({"ROCR_VISIBLE_DEVICES": "1,2"}, [1, 2]),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-0000000000000003,0"}, [2, 0]),
        ({"ROCR_VISIBLE_DEVICES": "gpu-0000000000000002"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "0,0"}, [0]),
    ],
)
def test_the_settings_choose(root: Path, environ: dict[str, str], indices: list[int]) -> None:
    for node in (1, 2, 3):
        add_gpu(root, node, unique_id=node)
    machine = probe(root, **environ)
    assert [gpu.index for gpu in machine.gpus] == indices
    assert machine.notes == ()


@pytest.mark.parametrize("token", ["7", "GPU-", "x"])
def test_what_is_no_gpu_ends_the_list(root: Path, token: str) -> None:
    for node in (1, 2):
        add_gpu(root, node, unique_id=node)
    machine = probe(root, HIP_VISIBLE_DEVICES=f"1,{token},0")
    assert [gpu.index for gpu in machine.gpus] == [1]
    assert f"HIP_VISIBLE_DEVICES names `{token}`" in machine.notes[-1]


@pytest.mark.parametrize("setting", ["", "-1"])
def test_all_hidden(root: Path, setting: str) -> None:
    add_gpu(root, 1)
    machine = probe(root, ROCR_VISIBLE_DEVICES=setting)
    assert machine.gpus == ()
    assert machine.notes[-1] == f"`ROCR_VISIBLE_DEVICES={setting}` hides every AMD GPU"


# --- who may compute


def test_a_container_without_the_device_is_told_how(root: Path) -> None:
    add_gpu(root, 1)
    (root / "dev/kfd").unlink()
    machine = probe(root)
    assert machine.gpus == ()
    assert "--device=/dev/kfd" in machine.notes[-1]


def test_a_user_without_rights_is_told_how(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gpu(root, 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert probe(root).gpus == ()
    assert "usermod -aG render,video" in probe(root).notes[-1]


def test_nvidias_gpus_come_first(root: Path) -> None:
    add_gpu(root, 1)
    both = FakeNvml([FakeGpu()])
    assert [gpu.vendor for gpu in probe(root, both).gpus] == ["nvidia"]
    hidden = probe(root, both, CUDA_VISIBLE_DEVICES="-1", HIP_VISIBLE_DEVICES="0")
    assert [gpu.vendor for gpu in hidden.gpus] == ["amd"]


def test_a_machine_without_amds_driver_says_nothing(tmp_path: Path) -> None:
    assert probe(tmp_path).notes == ("no NVIDIA driver found",)


# --- links


def link_up(root: Path, one: int, other: int, **properties: int) -> None:
    for node, far in ((one, other), (other, one)):
        rows = {"type": 11, "node_from": node, "node_to": far, **properties}
        write(
            root,
            f"sys/class/kfd/kfd/topology/nodes/{node}/io_links/{far}/properties",
            "".join(f"{name} {value}\n" for name, value in rows.items()),
        )


def test_xgmi_between_all_counts_those_to_visible_gpus(root: Path) -> None:
    """An MI300X has seven links of 64 GB/s, one to each other of a board."""
    for node in range(1, 5):
        add_gpu(root, node, MI300X)
        for other in range(1, node):
            link_up(root, node, other, max_bandwidth=64000)
    machine = probe(root, HIP_VISIBLE_DEVICES="0,1,2")
    assert {link.kind for link in machine.links} == {"xgmi"}
    assert machine.gpus[0].link_bytes_per_second == pytest.approx(0.8 * 2 * 64e9)
    pair = probe(root, HIP_VISIBLE_DEVICES="0,1")
    assert pair.gpus[0].link_bytes_per_second == pytest.approx(0.8 * 64e9)


def test_cards_without_xgmi_have_pcie(root: Path) -> None:
    add_gpu(root, 1)
    add_gpu(root, 2)
    link_up(root, 1, 2, type=2)
    machine = probe(root)
    assert [link.kind for link in machine.links] == ["pcie"]
    assert machine.gpus[0].link_bytes_per_second == pytest.approx(0.6 * 16 * 1.969e9)
