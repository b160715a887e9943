"""The probe, against a fake NVML and fake /proc and /sys trees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftplan.launcher import cpu_rates, host
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.probing.nvml import NvmlModule
from ftplan.planner.errors import InputError
from ftplan.planner.hardware_spec import Machine, MemoryHolder
from ftplan.planner.units import KIB
from ftplan.profiles import find_gpu
from tests.fake_nvml import (
    GIB,
    FakeGpu,
    FakeNvml,
    FakeProcess,
    NVMLError,
    NVMLError_DriverNotLoaded,
    NVMLError_GpuIsLost,
    NVMLError_LibraryNotFound,
    NVMLError_LibRmVersionMismatch,
    NVMLError_NoPermission,
    NVMLError_NotSupported,
)

A100 = "NVIDIA A100-SXM4-40GB"
RTX_4090 = "NVIDIA GeForce RTX 4090"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


MACHINE_FILES = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t: fpu AVX2 amx_bf16\n",
    "proc/meminfo": "MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   50331648 kB\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "root", MACHINE_FILES)


def probe(nvml: FakeNvml, root: Path, **environ: str) -> Machine:
    machine = probe_machine(nvml=nvml, environ=environ, root=root)
    assert nvml.open_sessions == 0, "nvmlInit without nvmlShutdown"
    return machine


def four_gpus() -> FakeNvml:
    return FakeNvml([FakeGpu(uuid=f"GPU-{i}{i}aa-{i}", free=i * GIB) for i in range(4)])


def notes(machine: Machine) -> str:
    return "\n".join(machine.notes)


class TestGpus:
    def test_memory_is_the_drivers_and_rates_are_the_catalogs(self, root: Path) -> None:
        nvml = FakeNvml([FakeGpu(total=25757220864, free=20 * GIB, uuid="GPU-a")])
        machine = probe(nvml, root)
        (gpu,) = machine.gpus
        entry = find_gpu("rtx-4090")
        assert (gpu.total_bytes, gpu.free_bytes) == (25757220864, 20 * GIB)
        assert gpu.peak_flops_per_second == entry.peak_flops_per_second
        assert gpu.memory_bandwidth_bytes_per_second == entry.memory_bandwidth_bytes_per_second
        assert (gpu.name, gpu.uuid, gpu.kind) == (RTX_4090, "GPU-a", "cuda")
        assert gpu.compute_capability == (8, 9)
        assert gpu.rates_source == "data sheet"
        assert machine.driver_version == "550.54.15"
        assert machine.notes == ()

    def test_several_unlike_gpus_keep_the_drivers_numbers(self, root: Path) -> None:
        nvml = FakeNvml([FakeGpu(), FakeGpu(name=A100, total=40 * GIB, compute_capability=(8, 0))])
        machine = probe(nvml, root)
        assert [(gpu.index, gpu.name) for gpu in machine.gpus] == [(0, RTX_4090), (1, A100)]
        assert machine.notes == ()

    def test_bytes_are_decoded(self, root: Path) -> None:
        gpu = FakeGpu(name=A100.encode(), uuid=b"GPU-b", compute=[FakeProcess(7, 5)])
        nvml = FakeNvml([gpu], driver_version=b"535.1", process_names={7: b"/usr/bin/python3"})
        machine = probe(nvml, root)
        (found,) = machine.gpus
        assert (found.name, found.uuid, machine.driver_version) == (A100, "GPU-b", "535.1")
        assert found.holders[0].name == "python3"

    @pytest.mark.parametrize(
        "call",
        [
            "nvmlDeviceGetHandleByIndex",
            "nvmlDeviceGetUUID",
            "nvmlDeviceGetMigMode",
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetComputeRunningProcesses",
        ],
    )
    def test_a_lost_gpu_is_left_out(self, root: Path, call: str) -> None:
        nvml = FakeNvml([FakeGpu(), FakeGpu(fails={call: NVMLError_GpuIsLost}), FakeGpu()])
        machine = probe(nvml, root)
        assert [gpu.index for gpu in machine.gpus] == [0, 2]
        (note,) = machine.notes
        assert note.startswith("GPU 1 is left out: the driver has lost it; restart")

    @pytest.mark.parametrize("error", [NVMLError_NotSupported, NVMLError_NoPermission, NVMLError])
    @pytest.mark.parametrize(
        ("call", "note"),
        [
            ("nvmlDeviceGetUUID", "GPU 0: UUID unknown"),
            ("nvmlDeviceGetCudaComputeCapability", "GPU 0: compute capability taken from the cat"),
            ("nvmlDeviceGetComputeRunningProcesses", "GPU 0: not all processes that hold its mem"),
            ("nvmlDeviceGetGraphicsRunningProcesses", "GPU 0: not all processes that hold its me"),
        ],
    )
    def test_a_missing_sensor_costs_its_field_only(
        self, root: Path, call: str, note: str, error: type[NVMLError]
    ) -> None:
        machine = probe(FakeNvml([FakeGpu(fails={call: error})]), root)
        (gpu,) = machine.gpus
        assert gpu.total_bytes == 24 * GIB
        assert gpu.compute_capability == (8, 9)
        assert (gpu.uuid is None) == (call == "nvmlDeviceGetUUID")
        assert len(machine.notes) == 1
        assert machine.notes[0].startswith(note)
        assert machine.notes[0].endswith(f"({error.text})")

    def test_the_power_limit_in_force_and_the_boards_own(self, root: Path) -> None:
        machine = probe(FakeNvml([FakeGpu(power_limit=300_000)]), root)
        (gpu,) = machine.gpus
        assert (gpu.power_watts, gpu.default_power_watts, gpu.power_capped) == (300, 450, True)
        assert machine.notes == (
            "GPU 0 is held at 300 W of 450: it computes more slowly than its data sheet says, "
            "which predictions count on; `sudo nvidia-smi -i 0 -pl 450` lifts the limit",
        )

    def test_a_board_made_for_less_power_is_not_capped(self, root: Path) -> None:
        """Its own limit counts, not that of the card in the catalog."""
        (gpu,) = probe(
            FakeNvml([FakeGpu(power_limit=320_000, default_power_limit=320_000)]), root
        ).gpus
        assert (gpu.power_watts, gpu.power_capped) == (320, False)
        assert find_gpu("rtx-4090").power_watts == 450

    def test_a_power_limit_unknown_is_the_data_sheets(self, root: Path) -> None:
        calls = ["nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementDefaultLimit"]
        machine = probe(FakeNvml([FakeGpu(fails=dict.fromkeys(calls, NVMLError))]), root)
        assert (machine.gpus[0].power_watts, machine.gpus[0].power_capped) == (450, False)
        assert machine.notes == ()

    @pytest.mark.parametrize(("number", "version"), [(12040, (12, 4)), (13000, (13, 0)), (0, None)])
    def test_the_newest_cuda_of_the_driver(
        self, root: Path, number: int, version: tuple[int, int] | None
    ) -> None:
        assert probe(FakeNvml([FakeGpu()], cuda_version=number), root).cuda_version == version

    @pytest.mark.parametrize("call", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName"])
    def test_a_gpu_without_memory_or_name_is_left_out(self, root: Path, call: str) -> None:
        machine = probe(FakeNvml([FakeGpu(fails={call: NVMLError_NotSupported})]), root)
        assert machine.gpus == ()
        assert machine.notes[0].startswith("GPU 0 is left out: ")

    def test_system_queries_may_fail(self, root: Path) -> None:
        fails = dict.fromkeys(
            ["nvmlSystemGetDriverVersion", "nvmlDeviceGetCount"], NVMLError_NoPermission
        )
        machine = probe(FakeNvml([FakeGpu()], fails=fails), root)
        assert (machine.gpus, machine.driver_version) == ((), None)
        assert len(machine.notes) == 2

    def test_a_failing_shutdown_harms_nothing(self, root: Path) -> None:
        nvml = FakeNvml([FakeGpu()], fails={"nvmlShutdown": NVMLError})
        assert len(probe(nvml, root).gpus) == 1


class TestHolders:
    def test_the_largest_first_each_once_with_a_name(self, root: Path) -> None:
        write(root, {"proc/30/comm": "Xorg\n"})
        gpu = FakeGpu(
            compute=[FakeProcess(10, None), FakeProcess(20, 3 * GIB), FakeProcess(40, 2)],
            graphics=[FakeProcess(30, GIB), FakeProcess(20, 3 * GIB), FakeProcess(10, 5)],
        )
        names = {20: "/opt/a b/chrome --type=gpu-process --token=secret\0rest", 40: r"C:\x\y.exe"}
        (found,) = probe(FakeNvml([gpu], process_names=names), root).gpus
        assert found.holders == (
            MemoryHolder(pid=20, name="chrome", used_bytes=3 * GIB),
            MemoryHolder(pid=30, name="Xorg", used_bytes=GIB),
            MemoryHolder(pid=10, name="pid 10", used_bytes=5),
            MemoryHolder(pid=40, name="y.exe", used_bytes=2),
        )

    def test_memory_that_the_driver_does_not_tell_is_none(self, root: Path) -> None:
        (gpu,) = probe(FakeNvml([FakeGpu(compute=[FakeProcess(10, None)])]), root).gpus
        assert gpu.holders == (MemoryHolder(pid=10, name="pid 10", used_bytes=None),)


class TestNoDriver:
    def test_no_library_and_no_gpu_is_no_trouble(self, root: Path) -> None:
        nvml = FakeNvml(fails={"nvmlInit": NVMLError_LibraryNotFound})
        machine = probe(nvml, root)
        assert machine.gpus == ()
        assert machine.notes == ("no NVIDIA driver found",)
        assert machine.best_device is machine.cpu

    def test_no_library_but_a_gpu_says_what_to_do(self, root: Path) -> None:
        card, bridge = "sys/bus/pci/devices/0000:01:00.0", "sys/bus/pci/devices/0000:00:00.0"
        write(root, {f"{card}/vendor": "0x10de\n", f"{card}/class": "0x030200\n"})
        write(root, {f"{bridge}/vendor": "0x8086\n", f"{bridge}/class": "0x060000\n"})
        machine = probe(FakeNvml(fails={"nvmlInit": NVMLError_LibraryNotFound}), root)
        assert "install NVIDIA's driver" in notes(machine)
        assert "--gpus all" in notes(machine)

    def test_nvidias_network_card_is_no_gpu(self, root: Path) -> None:
        card = "sys/bus/pci/devices/0000:01:00.0"
        write(root, {f"{card}/vendor": "0x10de\n", f"{card}/class": "0x020000\n"})
        machine = probe(FakeNvml(fails={"nvmlInit": NVMLError_LibraryNotFound}), root)
        assert machine.notes == ("no NVIDIA driver found",)

    @pytest.mark.parametrize(
        ("error", "advice"),
        [
            (NVMLError_DriverNotLoaded, "modprobe nvidia"),
            (NVMLError_NoPermission, "/dev/nvidiactl"),
            (NVMLError_LibRmVersionMismatch, "restart the machine"),
            (NVMLError, "does not answer: Unknown Error"),
        ],
    )
    def test_each_failure_says_what_to_do(
        self, root: Path, error: type[NVMLError], advice: str
    ) -> None:
        machine = probe(FakeNvml([FakeGpu()], fails={"nvmlInit": error}), root)
        assert machine.gpus == ()
        assert advice in notes(machine)

    def test_pynvml_missing(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        machine = probe_machine(environ={}, root=root)
        assert machine.gpus == ()
        assert "pip install nvidia-ml-py" in notes(machine)

    def test_the_real_library_or_its_absence(self) -> None:
        assert probe_machine(environ={"CUDA_VISIBLE_DEVICES": ""}).gpus == ()

    def test_the_fake_has_pynvmls_names(self) -> None:
        pynvml = pytest.importorskip("pynvml")
        asked = {name for name in vars(NvmlModule) if name.lower().startswith("nvml")}
        errors = {error.__name__ for error in NVMLError.__subclasses__()}
        assert len(asked) == 34
        assert [name for name in asked if not hasattr(FakeNvml, name)] == []
        assert [name for name in asked | errors if not hasattr(pynvml, name)] == []


class TestUnknownGpu:
    NAME = "NVIDIA GeForce RTX 9099 Ti"

    def test_the_only_gpu_is_an_error_that_says_what_to_add(self, root: Path) -> None:
        nvml = FakeNvml([FakeGpu(name=self.NAME)])
        with pytest.raises(InputError) as caught:
            probe(nvml, root)
        assert nvml.open_sessions == 0
        assert f"`{self.NAME}`" in caught.value.message
        assert "add an entry `rtx-9099-ti` to a file of profiles/gpus" in (caught.value.hint or "")

    def test_beside_a_known_one_it_is_left_out(self, root: Path) -> None:
        machine = probe(FakeNvml([FakeGpu(name=self.NAME), FakeGpu()]), root)
        assert [gpu.index for gpu in machine.gpus] == [1]
        (note,) = machine.notes
        assert f"`{self.NAME}`" in note
        assert "profiles/gpus" in note

    def test_hidden_it_matters_to_nobody(self, root: Path) -> None:
        nvml = FakeNvml([FakeGpu(name=self.NAME)])
        machine = probe(nvml, root, CUDA_VISIBLE_DEVICES="")
        assert machine.gpus == ()

    def test_a_part_of_a_name_never_matches(self, root: Path) -> None:
        with pytest.raises(InputError):
            probe(FakeNvml([FakeGpu(name="NVIDIA L40SX")]), root)


class TestMig:
    def nvml(self) -> FakeNvml:
        slices = [
            FakeGpu(name=f"{A100} MIG 3g.20gb", uuid="MIG-aa1", total=20937965568, free=19 * GIB),
            None,
            FakeGpu(name=f"{A100} MIG 1g.5gb", uuid="MIG-bb2", total=5100273664, free=4 * GIB),
        ]
        whole = FakeGpu(name=A100, uuid="GPU-aa", total=42949672960, mig=slices)
        whole.compute_capability = (8, 0)
        other = FakeGpu(name=A100, uuid="GPU-bb", total=42949672960, compute_capability=(8, 0))
        return FakeNvml([whole, other])

    def test_slices_are_devices_of_their_own(self, root: Path) -> None:
        machine = probe(self.nvml(), root)
        large, small, whole = machine.gpus
        assert (large.name, large.uuid, large.index) == (f"{A100} MIG 3g.20gb", "MIG-aa1", 0)
        assert (large.total_bytes, large.free_bytes) == (20937965568, 19 * GIB)
        assert (small.name, small.index, whole.index) == (f"{A100} MIG 1g.5gb", 0, 1)
        assert large.compute_capability == (8, 0)

    def test_rates_are_shares_and_say_so(self, root: Path) -> None:
        large, small, whole = probe(self.nvml(), root).gpus
        assert large.peak_flops_per_second["bfloat16"] == pytest.approx(312e12 * 4 / 8)
        assert small.memory_bandwidth_bytes_per_second == pytest.approx(1555e9 / 8)
        assert large.rates_source == (
            "data sheet of the whole GPU, times the assumed share 4/8 by memory slices"
        )
        assert whole.rates_source == "data sheet"

    def test_more_than_one_is_noted(self, root: Path) -> None:
        assert "only one MIG device" in notes(probe(self.nvml(), root))
        one = probe(self.nvml(), root, CUDA_VISIBLE_DEVICES="MIG-b")
        assert [gpu.uuid for gpu in one.gpus] == ["MIG-bb2"]
        assert one.notes == ()

    @pytest.mark.parametrize("setting", ["0", "GPU-aa"])
    def test_the_whole_gpu_stands_for_its_first_slice(self, root: Path, setting: str) -> None:
        machine = probe(self.nvml(), root, CUDA_VISIBLE_DEVICES=setting)
        assert [gpu.uuid for gpu in machine.gpus] == ["MIG-aa1"]

    def test_mig_without_slices(self, root: Path) -> None:
        machine = probe(FakeNvml([FakeGpu(name=A100, mig=[None, None])]), root)
        assert machine.gpus == ()
        assert "MIG is on, but it has no MIG device" in notes(machine)

    def test_mig_switched_off(self, root: Path) -> None:
        machine = probe(FakeNvml([FakeGpu(name=A100, mig=[], mig_mode=0)]), root)
        assert [gpu.name for gpu in machine.gpus] == [A100]
        assert machine.notes == ()


class TestVisibleDevices:
    @pytest.mark.parametrize(
        ("setting", "indices"),
        [
            ("0,1,2,3", [0, 1, 2, 3]),
            ("1,0", [1, 0]),
            (" 3 , 1 ", [3, 1]),
            ("2,-1,0", [2]),
            ("GPU-22aa-2", [2]),
            ("GPU-3,GPU-0", [3, 0]),
            ("GPU-1,0", [1, 0]),
        ],
    )
    def test_order_is_kept(self, root: Path, setting: str, indices: list[int]) -> None:
        machine = probe(four_gpus(), root, CUDA_VISIBLE_DEVICES=setting)
        assert [gpu.index for gpu in machine.gpus] == indices
        assert machine.notes == ()

    @pytest.mark.parametrize(
        ("setting", "indices", "token"),
        [
            ("1,7,0", [1], "7"),
            ("0,GPU-x,1", [0], "GPU-x"),
            ("0,GPU-", [0], "GPU-"),  # ambiguous
            ("0,MIG-1", [0], "MIG-1"),
            ("2,two", [2], "two"),
        ],
    )
    def test_the_first_invalid_name_ends_the_list(
        self, root: Path, setting: str, indices: list[int], token: str
    ) -> None:
        machine = probe(four_gpus(), root, CUDA_VISIBLE_DEVICES=setting)
        assert [gpu.index for gpu in machine.gpus] == indices
        assert f"names `{token}`" in notes(machine)

    @pytest.mark.parametrize("setting", ["", "-1", " ", "NoDevFiles", "9", "1,1", "0,GPU-00aa"])
    def test_all_hidden(self, root: Path, setting: str) -> None:
        machine = probe(four_gpus(), root, CUDA_VISIBLE_DEVICES=setting)
        assert machine.gpus == ()
        assert f"`CUDA_VISIBLE_DEVICES={setting}` hides every GPU" in machine.notes

    def test_without_gpus_nothing_is_hidden(self, root: Path) -> None:
        assert probe(FakeNvml(), root, CUDA_VISIBLE_DEVICES="").notes == ()

    def test_a_lost_gpu_keeps_its_number(self, root: Path) -> None:
        lost = FakeGpu(fails={"nvmlDeviceGetName": NVMLError_GpuIsLost})
        machine = probe(FakeNvml([FakeGpu(), lost, FakeGpu()]), root, CUDA_VISIBLE_DEVICES="2,1,0")
        assert [gpu.index for gpu in machine.gpus] == [2, 0]

    @pytest.mark.parametrize(
        ("environ", "noted"),
        [
            ({"CUDA_VISIBLE_DEVICES": "1"}, True),
            ({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, True),
            ({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, False),
            ({"CUDA_VISIBLE_DEVICES": "GPU-b"}, False),
            ({}, False),
        ],
    )
    def test_order_of_unlike_gpus(self, root: Path, environ: dict[str, str], noted: bool) -> None:
        nvml = FakeNvml([FakeGpu(uuid="GPU-a"), FakeGpu(name=A100, uuid="GPU-b")])
        machine = probe(nvml, root, **environ)
        assert ("CUDA_DEVICE_ORDER=PCI_BUS_ID" in notes(machine)) == noted


class TestHost:
    def test_the_machine_without_limits(self, root: Path, tmp_path: Path) -> None:
        found = host.read_host(tmp_path / "runs" / "not" / "yet", root)
        assert found.cpu_name == "Some CPU @ 3 GHz"
        assert found.num_cores == len(os.sched_getaffinity(0))
        assert (found.ram_total_bytes, found.ram_available_bytes) == (64 * GIB, 48 * GIB)
        assert found.disk_path == str(tmp_path)
        assert found.disk_free_bytes > 0

    def test_cgroup_v2(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        group = "sys/fs/cgroup/user.slice/job.scope"
        write(
            root,
            {
                "proc/self/cgroup": "0::/user.slice/job.scope\n",
                f"{group}/memory.max": "max\n",
                f"{group}/cpu.max": "max 100000\n",
                "sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/user.slice/memory.current": f"{5 * GIB}\n",
                "sys/fs/cgroup/user.slice/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
                "sys/fs/cgroup/user.slice/cpu.max": "250000 100000\n",
            },
        )
        assert host.ram_bytes(root) == (8 * GIB, 5 * GIB)
        assert host.usable_cores(root) == 2

    def test_cgroup_v1(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        write(
            root,
            {
                # The group's path is the host's: only the top folder exists in the container.
                "proc/self/cgroup": "4:memory:/docker/0123\n2:cpu,cpuacct:/docker/0123\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"inactive_file 9\ntotal_inactive_file {GIB}\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
        )
        assert host.ram_bytes(root) == (4 * GIB, 2 * GIB)
        assert host.usable_cores(root) == 1  # half a core still runs

    def test_cgroup_v1_without_limits(self, root: Path) -> None:
        write(
            root,
            {
                "proc/self/cgroup": "4:memory:/\n2:cpu:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
        )
        assert host.ram_bytes(root) == (64 * GIB, 48 * GIB)
        assert host.usable_cores(root) == len(os.sched_getaffinity(0))

    def test_a_limit_is_told_where_it_binds(self, root: Path, tmp_path: Path) -> None:
        write(root, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": str(4 * GIB)})
        assert host.ram_limit_bytes(root) == 4 * GIB
        write(root, {"sys/fs/cgroup/memory.max": str(128 * GIB)})
        assert host.ram_limit_bytes(root) is None
        assert host.ram_limit_bytes(tmp_path / "nothing") is None

    def test_use_beyond_the_limit_leaves_nothing(self, root: Path) -> None:
        write(
            root,
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": str(GIB),
                "sys/fs/cgroup/memory.current": str(2 * GIB),
            },
        )
        assert host.ram_bytes(root) == (GIB, 0)

    def test_a_system_without_proc(self, tmp_path: Path) -> None:
        found = host.read_host(tmp_path, tmp_path / "nothing")
        assert found.cpu_name
        assert found.num_cores >= 1
        assert found.ram_total_bytes > found.ram_available_bytes > 0

    def test_available_ram_unknown(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def sysconf(name: str) -> int:
            if name == "SC_AVPHYS_PAGES":
                raise ValueError
            return {"SC_PAGE_SIZE": 4 * KIB, "SC_PHYS_PAGES": 1000}[name]

        monkeypatch.setattr(os, "sysconf", sysconf)
        assert host.ram_bytes(tmp_path) == (4_096_000, 2_048_000)

    def test_flags(self, root: Path, tmp_path: Path) -> None:
        assert host.cpu_flags(root) == {"fpu", "avx2", "amx_bf16"}
        arm = write(tmp_path / "arm", {"proc/cpuinfo": "Features\t: fp asimd bf16\n"})
        assert host.cpu_flags(arm) == {"fp", "asimd", "bf16"}
        assert host.cpu_flags(tmp_path) == set()

    def test_of_this_machine(self) -> None:
        found = host.read_host(Path("."))
        assert 0 < found.ram_available_bytes <= found.ram_total_bytes
        assert found.num_cores >= 1
        assert found.cpu_name


class TestProcessor:
    def test_assumed_rates(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
        cpu = probe(FakeNvml(), root).cpu
        assert (cpu.kind, cpu.name) == ("cpu", "Some CPU @ 3 GHz")
        assert (cpu.total_bytes, cpu.free_bytes) == (64 * GIB, 48 * GIB)
        assert cpu.peak_flops_per_second == {"float32": 4 * 2.0e9 * 32 * 0.5}
        assert cpu.memory_bandwidth_bytes_per_second == 10e9
        assert cpu.rates_source == "assumed"

    def child(
        self, monkeypatch: pytest.MonkeyPatch, stdout: str = "", stderr: str = "", status: int = 0
    ) -> list[dict[str, str]]:
        """Stand in for the child process; returns the environments that it is given."""
        environments: list[dict[str, str]] = []

        def run(
            command: list[str], *, env: dict[str, str], **_: object
        ) -> subprocess.CompletedProcess[str]:
            assert command == [sys.executable, "-m", "ftplan.launcher.cpu_rates"]
            environments.append(env)
            return subprocess.CompletedProcess(command, status, stdout, stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return environments

    def measured(self, root: Path, **environ: str) -> Machine:
        return probe_machine(nvml=FakeNvml(), environ=environ, root=root, measure_cpu=True)

    @pytest.mark.parametrize("bfloat16", [4e11, None])
    def test_measured_rates(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, bfloat16: float | None
    ) -> None:
        result = {
            "float32": 2e11,
            "bfloat16": bfloat16,
            "memory_bandwidth_bytes_per_second": 9e9,
            "num_threads": 2,
        }
        environments = self.child(monkeypatch, f"a library's greeting\n{json.dumps(result)}\n")
        machine = self.measured(root, HOME="/h", PYTHONSAFEPATH="")
        assert machine.cpu.rates_source == "measured on this machine"
        assert machine.cpu.memory_bandwidth_bytes_per_second == 9e9
        native = {} if bfloat16 is None else {"bfloat16": bfloat16}
        assert machine.cpu.peak_flops_per_second == {"float32": 2e11, **native}
        assert machine.notes == ()
        assert environments[0]["HOME"] == "/h"
        assert environments[0]["PYTHONSAFEPATH"] == "1"

    def test_threads_follow_a_quota_unless_set(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
        environments = self.child(monkeypatch, status=1)
        self.measured(root)
        self.measured(root, OMP_NUM_THREADS="3")
        assert [environment["OMP_NUM_THREADS"] for environment in environments] == ["4", "3"]

    @pytest.mark.parametrize(
        ("child", "reason"),
        [
            (
                {"status": 1, "stderr": "Traceback\nModuleNotFoundError: No module named 'torch'"},
                "exit status 1, ModuleNotFoundError: No module named 'torch'",
            ),
            ({"status": -9}, "exit status -9, no message"),
            ({"stdout": ""}, "its output could not be read"),
            ({"stdout": "hello"}, "its output could not be read"),
            ({"stdout": '{"float32": 1e9}'}, "its output could not be read"),
            ({"stdout": "[]"}, "its output could not be read"),
        ],
    )
    def test_a_failed_measurement_falls_back(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        child: dict[str, str | int],
        reason: str,
    ) -> None:
        self.child(monkeypatch, **child)  # type: ignore[arg-type]
        machine = self.measured(root)
        assert machine.cpu.rates_source == "assumed"
        assert notes(machine).startswith("the processor's rates are assumed")
        assert notes(machine).endswith(reason)

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (subprocess.TimeoutExpired("python", 60), "no result after 60 s"),
            (OSError("no more processes"), "no more processes"),
        ],
    )
    def test_a_child_that_hangs_or_never_starts(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
    ) -> None:
        def run(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(subprocess, "run", run)
        machine = self.measured(root)
        assert machine.cpu.rates_source == "assumed"
        assert notes(machine).endswith(reason)

    def test_torch_missing_for_real(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = write(tmp_path / "path", {"torch.py": "raise ImportError('no torch here')\n"})
        machine = self.measured(root, **{**os.environ, "PYTHONPATH": str(broken)})
        assert machine.cpu.rates_source == "assumed"
        assert "no torch here" in notes(machine)

    def test_probing_does_not_import_torch(self) -> None:
        code = (
            "import sys, ftplan.launcher.probe as p; p.probe_machine(); "
            "assert 'torch' not in sys.modules"
        )
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-c", code], check=True, env=environ)

    def test_a_real_measurement(self) -> None:
        """Magnitudes only: any processor that trains lies within."""
        pytest.importorskip("torch")
        rates = cpu_rates.measured_rates(host.usable_cores(), os.environ)
        assert 1e9 < rates.flops_per_second["float32"] < 1e14
        assert 1e8 < rates.memory_bandwidth_bytes_per_second < 2e12
        native = bool(cpu_rates.NATIVE_BFLOAT16_FLAGS & host.cpu_flags())
        assert ("bfloat16" in rates.flops_per_second) == native
