"""Apple's GPUs, from what a fake macOS says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from ftplan.launcher.host import read_host
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.probing import apple
from ftplan.planner.units import GIB, MIB
from ftplan.profiles import find_gpu
from tests.fake_nvml import FakeNvml, NVMLError_LibraryNotFound

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              500000.
Pages active:                            900000.
Pages inactive:                          800000.
Pages speculative:                       100000.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                           3000.
"Translation faults":                 123456789.
"""
AVAILABLE_BYTES = 1_400_000 * 16384


def macos(**answers: str) -> Callable[[Sequence[str]], str]:
    """Stands in for the commands; what it does not know, it says nothing of."""
    known: Mapping[str, str] = {
        "machdep.cpu.brand_string": "Apple M2 Max\n",
        "hw.memsize": f"{64 * GIB}\n",
        "vm_stat": VM_STAT,
        **{name.replace("__", "."): answer for name, answer in answers.items()},
    }
    return lambda command: known.get(command[-1], "")


def chip(**answers: str) -> apple.AppleChip:
    found = apple.read_chip(macos(**answers))
    assert found is not None
    return found


def test_the_chip_and_its_memory() -> None:
    assert chip() == apple.AppleChip(
        name="Apple M2 Max",
        memory_bytes=64 * GIB,
        available_bytes=AVAILABLE_BYTES,
        wired_limit_bytes=None,
    )


@pytest.mark.parametrize(
    ("gib", "held"), [(16, 10.667), (32, 21.333), (36, 27.0), (64, 48.0), (128, 96.0)]
)
def test_the_gpu_may_hold_a_part_of_the_memory(gib: int, held: float) -> None:
    """10.67 GiB of 16, 21.33 of 32 and 48 of 64 are what Metal was seen to recommend."""
    found = apple.working_set_bytes(chip(hw__memsize=str(gib * GIB)))
    assert found / GIB == pytest.approx(held, abs=0.001)


def test_a_limit_that_was_set_replaces_that() -> None:
    assert apple.working_set_bytes(chip(iogpu__wired_limit_mb="57344\n")) == 57344 * MIB
    assert apple.working_set_bytes(chip(iogpu__wired_limit_mb="99999999")) == 64 * GIB
    assert apple.working_set_bytes(chip(iogpu__wired_limit_mb="0\n")) == 48 * GIB


@pytest.mark.parametrize("missing", ["machdep__cpu__brand_string", "hw__memsize"])
def test_a_system_that_does_not_tell(missing: str) -> None:
    assert apple.read_chip(macos(**{missing: ""})) is None


def test_free_memory_is_what_both_leave(tmp_path: Path) -> None:
    host = apple.apple_host(chip(), read_host(tmp_path, tmp_path))
    assert (host.cpu_name, host.ram_total_bytes) == ("Apple M2 Max", 64 * GIB)
    assert host.ram_available_bytes == AVAILABLE_BYTES
    gpu = apple.apple_gpu(chip(), host, [])
    assert gpu is not None
    assert (gpu.total_bytes, gpu.free_bytes) == (48 * GIB, AVAILABLE_BYTES)
    assert gpu.peak_flops_per_second == find_gpu("m2-max").peak_flops_per_second
    roomy = apple.apple_host(chip(hw__memsize=str(16 * GIB)), host)
    small = apple.apple_gpu(chip(hw__memsize=str(16 * GIB)), roomy, [])
    assert small is not None
    assert small.free_bytes == small.total_bytes


def test_without_vm_stat_the_library_speaks(tmp_path: Path) -> None:
    host = read_host(tmp_path, tmp_path)
    assert apple.apple_host(chip(vm_stat=""), host).ram_available_bytes == host.ram_available_bytes


def test_a_new_chip_is_named_and_left_out(tmp_path: Path) -> None:
    notes: list[str] = []
    new = chip(machdep__cpu__brand_string="Apple M9 Ultra\n")
    assert apple.apple_gpu(new, read_host(tmp_path, tmp_path), notes) is None
    assert notes[0].startswith("the GPU of `Apple M9 Ultra` is left out")


def test_a_mac_has_its_gpu_and_no_word_of_nvidia(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apple, "is_apple_silicon", lambda: True)
    monkeypatch.setattr(apple.read_chip, "__defaults__", (macos(),))
    nvml = FakeNvml(fails={"nvmlInit": NVMLError_LibraryNotFound})
    machine = probe_machine(nvml=nvml, environ={}, root=tmp_path)
    assert [gpu.name for gpu in machine.gpus] == ["Apple M2 Max"]
    assert machine.best_device.vendor == "apple"
    assert machine.cpu.free_bytes == AVAILABLE_BYTES
    assert machine.notes == ()


def test_commands_that_fail_say_nothing() -> None:
    assert apple.run_command(["echo", "word"]) == "word\n"
    assert apple.run_command(["false"]) == ""
    assert apple.run_command(["no-such-command-anywhere"]) == ""
