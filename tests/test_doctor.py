"""`ftplan doctor`: every check with every outcome, on faked facts; how facts are found out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ftplan.launcher.checkup import facts as found_out
from ftplan.launcher.checkup import libraries
from ftplan.launcher.checkup.facts import Facts, Finding, Folder, gather
from ftplan.launcher.checkup.libraries import Answer
from ftplan.launcher.checkup.stack import runs_on
from ftplan.launcher.commands import doctor
from ftplan.launcher.doctor import findings
from ftplan.launcher.packages import TRAIN_PACKAGES
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.ui import Ui
from ftplan.planner.hardware_spec import Machine
from ftplan.profiles import find_gpu
from tests.fake_nvml import (
    GIB,
    FakeGpu,
    FakeNvml,
    FakeProcess,
    NVMLError_DriverNotLoaded,
    NVMLError_GpuIsLost,
    NVMLError_LibraryNotFound,
)

AMPLE = Folder(path="/data", free_bytes=500 * GIB, writable=True)
TORCH: Mapping[str, Any] = {
    "version": "2.13.0+cu126",
    "cuda": "12.6",
    "hip": None,
    "mps": False,
    "available": True,
    "num_gpus": 1,
    "architectures": ["sm_80", "sm_86", "sm_90", "compute_90"],
    "why_not": None,
}
BITSANDBYTES = {"version": "0.50.2", "library": "CudaBNBNativeLibrary", "error": None}
HEALTHY = {
    "torch": Answer(facts=TORCH),
    "bitsandbytes": Answer(facts=BITSANDBYTES),
    "trainer": Answer(),
}


def machine_of(nvml: FakeNvml) -> Machine:
    """A machine with 64 GiB of RAM and these GPUs."""
    machine = probe_machine(nvml=nvml, environ={}, root=Path("/nowhere"))
    host = structs.replace(machine.host, ram_total_bytes=64 * GIB, ram_available_bytes=48 * GIB)
    return structs.replace(machine, host=host)


def with_gpus(*gpus: FakeGpu) -> Machine:
    return machine_of(FakeNvml(gpus or [FakeGpu()]))


NO_GPU = machine_of(FakeNvml(fails={"nvmlInit": NVMLError_LibraryNotFound}))


def facts(**changes: Any) -> Facts:
    """Those of a machine with an RTX 4090 on which nothing is wrong."""
    healthy = {
        "python": "3.12.1",
        "ftplan": "0.1.0",
        "machine": with_gpus(),
        "required": {name: "1.2" for name in TRAIN_PACKAGES},
        "installed": {name: "1.10.0" for name in (*TRAIN_PACKAGES, "bitsandbytes")},
        "answers": HEALTHY,
        "hub_endpoint": "https://hub.example",
        "runs": AMPLE,
        "cache": AMPLE,
        "shared_memory_bytes": 16 * GIB,
    }
    return Facts(**{**healthy, **changes})


def only(name: str, **changes: Any) -> Finding:
    """The one finding of that name; no other than it may be wrong."""
    found = findings(facts(**changes))
    assert [f for f in found if f.name != name and f.status != "ok"] == []
    (finding,) = [f for f in found if f.name == name]
    return finding


def torch_says(**changes: Any) -> dict[str, Answer]:
    return {**HEALTHY, "torch": Answer(facts={**TORCH, **changes})}


def without(name: str) -> dict[str, Answer]:
    return {key: answer for key, answer in HEALTHY.items() if key != name}


def test_nothing_is_wrong() -> None:
    found = findings(facts())
    assert {f.status for f in found} == {"ok"}
    assert all(f.mend is None for f in found)
    names = list(dict.fromkeys(f.name for f in found))
    assert names == [
        "python",
        "driver",
        "gpus",
        "torch",
        *TRAIN_PACKAGES[1:],
        "trainer",
        "bitsandbytes",
        "flash-attn",
        "accelerate config",
        "hub",
        "disk for runs",
        "disk for models",
        "ram",
        "shared memory",
    ]


def test_python_and_ftplan() -> None:
    assert only("python").found == "3.12.1, ftplan 0.1.0"


# --- driver and GPUs


def test_the_driver_and_what_it_runs() -> None:
    assert only("driver").found == "NVIDIA 550.54.15, runs CUDA up to 12.4"
    unknown = structs.replace(with_gpus(), driver_version=None)
    assert only("driver", machine=unknown).found == "NVIDIA's, of unknown version"


def test_a_machine_without_gpus_is_no_problem() -> None:
    cpu_only = torch_says(version="2.13.0+cpu", cuda=None, available=False, architectures=[])
    found = findings(facts(machine=NO_GPU, answers={**cpu_only, "bitsandbytes": Answer()}))
    assert {f.status for f in found} == {"ok"}
    told = {f.name: f.found for f in found}
    assert told["driver"] == "no NVIDIA driver found, and no NVIDIA GPU to drive"
    assert told["gpus"] == "none: small models train on the processor"
    assert told["torch"] == "2.13.0+cpu, for the processor"
    assert told["bitsandbytes"] == "1.10.0; only NVIDIA's and AMD's GPUs use it"


def test_a_driver_that_does_not_start_is_a_problem() -> None:
    machine = machine_of(FakeNvml(fails={"nvmlInit": NVMLError_DriverNotLoaded}))
    finding = only("gpus", machine=machine)
    assert finding.status == "problem"
    assert finding.found == "NVIDIA's driver is installed but not loaded"
    assert (finding.mend or "").startswith("run `sudo modprobe nvidia`")


def test_a_lost_gpu_is_a_problem() -> None:
    lost = FakeGpu(fails={"nvmlDeviceGetName": NVMLError_GpuIsLost})
    here, gone = (
        f for f in findings(facts(machine=with_gpus(FakeGpu(), lost))) if f.name == "gpus"
    )
    assert (here.status, gone.status) == ("ok", "problem")
    assert (gone.mend or "").startswith("restart the machine")


def test_hidden_gpus_are_a_warning() -> None:
    machine = probe_machine(
        nvml=FakeNvml([FakeGpu()]), environ={"CUDA_VISIBLE_DEVICES": "-1"}, root=Path("/nowhere")
    )
    machine = structs.replace(machine, host=NO_GPU.host)
    finding = only("gpus", machine=machine)
    assert (finding.status, finding.found) == (
        "warning",
        "`CUDA_VISIBLE_DEVICES=-1` hides every GPU",
    )


def test_a_gpu_that_the_catalog_lacks_is_a_problem() -> None:
    error = ("the driver reports a GPU named `X`", "add an entry")
    finding = only("gpus", machine=NO_GPU, machine_error=error)
    assert (finding.status, finding.found, finding.mend) == ("problem", *error)


def test_capped_and_narrow_cards_are_warnings() -> None:
    machine = with_gpus(FakeGpu(power_limit=200_000, pcie=(4, 4, 4, 16)))
    card, capped, narrow = (f for f in findings(facts(machine=machine)) if f.name == "gpus")
    assert (card.status, capped.status, narrow.status) == ("ok", "warning", "warning")
    assert "200 W of 450" in capped.found
    assert capped.mend == "`sudo nvidia-smi -i 0 -pl 450` lifts the limit"
    assert "4 of its 16 PCIe lanes" in narrow.found
    assert narrow.mend == "a slot with more lanes would help"


def test_a_busy_gpu_names_who_holds_it() -> None:
    busy = FakeGpu(free=4 * GIB, compute=[FakeProcess(7, 20 * GIB)])
    nvml = FakeNvml([busy], process_names={7: "/usr/bin/python3"})
    finding = only("gpus", machine=machine_of(nvml))
    assert finding.status == "warning"
    assert finding.found == (
        "GPU 0, NVIDIA GeForce RTX 4090: 4.00 GiB free of 24.0 GiB; held by python3 20.0 GiB"
    )
    assert finding.mend is not None
    unseen = only("gpus", machine=with_gpus(FakeGpu(free=4 * GIB)))
    assert "processes that this user may not see" in unseen.found


def test_a_desktops_windows_are_not_busy() -> None:
    machine = with_gpus(FakeGpu(free=23 * GIB, graphics=[FakeProcess(7, GIB)]))
    assert only("gpus", machine=machine).status == "ok"


# --- torch


def test_torch_and_what_it_is_built_for() -> None:
    assert only("torch").found == "2.13.0+cu126, built for CUDA 12.6"


def test_torch_missing_is_a_problem() -> None:
    found = findings(facts(answers=without("torch"), installed={}))
    missing = {f.name for f in found if f.found.startswith("not installed: nothing can be trained")}
    assert missing == set(TRAIN_PACKAGES)
    assert all(f.mend for f in found if f.name in missing)
    assert [f.name for f in found].count("torch") == 1


@pytest.mark.parametrize("error", ["its process died by SIGSEGV", "ImportError: libcudart.so.12"])
def test_torch_that_cannot_be_imported_is_a_problem(error: str) -> None:
    finding = only("torch", answers={**HEALTHY, "torch": Answer(error=error)})
    assert (finding.status, finding.found) == ("problem", f"cannot be imported: {error}")


@pytest.mark.parametrize(
    ("said", "found", "mend"),
    [
        (
            {"version": "2.13.0+cpu", "cuda": None, "available": False},
            "is built for processors only, beside NVIDIA GeForce RTX 4090",
            "install torch's build for CUDA 12.4 or older",
        ),
        (
            {"cuda": None, "hip": "7.0", "available": False},
            "is built for ROCm only, beside NVIDIA GeForce RTX 4090",
            "install torch's build for CUDA 12.4 or older",
        ),
        (
            {"cuda": "13.0", "available": False},
            "is built for CUDA 13.0, and the driver runs up to 12.4",
            "update NVIDIA's driver, or install torch's build for CUDA 12.4 or older",
        ),
        (
            {"architectures": ["sm_50", "sm_75"]},
            "has no kernels for NVIDIA GeForce RTX 4090 of compute capability 8.9, only for sm_50, "
            "sm_75",
            "install a build of torch that has them",
        ),
        (
            {"available": False, "why_not": "CUDA unknown error"},
            "sees no GPU: CUDA unknown error",
            "restart the machine",
        ),
        (
            {"available": False},
            "sees no GPU: it does not say why",
            "restart the machine",
        ),
    ],
)
def test_a_build_that_does_not_compute_here(said: Mapping[str, Any], found: str, mend: str) -> None:
    finding = only("torch", answers=torch_says(**said))
    assert finding.status == "problem"
    assert found in finding.found
    assert mend in (finding.mend or "")


def test_a_newer_minor_version_of_cuda_runs_on_an_older_driver() -> None:
    assert only("torch", answers=torch_says(cuda="12.8")).status == "ok"


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((8, 9), ["sm_80"], True),
        ((8, 9), ["sm_90"], False),
        ((8, 0), ["sm_86"], False),
        ((7, 5), ["sm_70"], True),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((8, 0), ["compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 1), ["sm_120"], True),
        ((6, 1), ["gfx90a"], False),
    ],
)
def test_which_kernels_run_on_which_card(
    capability: tuple[int, int], built_for: list[str], runs: bool
) -> None:
    assert runs_on(capability, built_for) == runs


def other_vendor(name: str) -> Machine:
    return structs.replace(NO_GPU, gpus=(find_gpu(name).device(),), notes=())


def test_amds_gpus_want_a_build_for_rocm() -> None:
    machine = other_vendor("mi300x")
    wrong = only("torch", machine=machine)
    assert wrong.status == "problem"
    assert "is built for CUDA only, beside MI300X" in wrong.found
    assert "build for ROCm: " in (wrong.mend or "")
    blind = torch_says(cuda=None, hip="7.0", available=False, why_not="No HIP GPUs")
    finding = only("torch", machine=machine, answers=blind)
    assert "sees no GPU: No HIP GPUs" in finding.found
    assert "rocminfo" in (finding.mend or "")
    right = torch_says(cuda=None, hip="7.0", architectures=["gfx942"])
    assert only("torch", machine=machine, answers=right).found.endswith("built for ROCm 7.0")
    assert only("driver", machine=machine, answers=right).found == "the kernel's amdgpu"


def test_apples_gpus_want_metal() -> None:
    machine = other_vendor("m2-max")
    right = torch_says(version="2.13.0", cuda=None, mps=True, available=False)
    assert only("torch", machine=machine, answers=right).found == "2.13.0, with Metal"
    wrong = only("torch", machine=machine, answers=torch_says(cuda=None))
    assert "does not see Apple's GPU" in wrong.found
    assert only("bitsandbytes", machine=machine, answers=right).status == "ok"


# --- the other libraries


def test_a_library_too_old_is_a_problem() -> None:
    installed = {**facts().installed, "peft": "1.1.9"}
    finding = only("peft", installed=installed)
    assert (finding.status, finding.found) == ("problem", "1.1.9, older than 1.2")


def test_versions_compare_as_numbers() -> None:
    installed = {**facts().installed, "trl": "1.2.0.dev0+abc"}
    assert only("trl", installed=installed).status == "ok"


def test_libraries_that_do_not_go_together_are_a_problem() -> None:
    answers = {**HEALTHY, "trainer": Answer(error="ImportError: cannot import name 'x'")}
    finding = only("trainer", answers=answers)
    assert (finding.status, finding.found) == (
        "problem",
        "cannot be imported: ImportError: cannot import name 'x'",
    )


def bitsandbytes_says(**changes: Any) -> dict[str, Answer]:
    return {**HEALTHY, "bitsandbytes": Answer(facts={**BITSANDBYTES, **changes})}


def test_bitsandbytes_with_its_library() -> None:
    assert only("bitsandbytes").found == "0.50.2, its library for this GPU loads"


def test_bitsandbytes_missing_costs_qlora() -> None:
    finding = only("bitsandbytes", answers=without("bitsandbytes"))
    assert finding.status == "warning"
    assert "`qlora` and 8-bit optimizers do not run" in finding.found


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (
            bitsandbytes_says(
                library="ErrorHandlerMockBNBNativeLibrary", error="libcudart.so.12:\n cannot open"
            ),
            "libcudart.so.12: cannot open",
        ),
        (bitsandbytes_says(library="BNBNativeLibrary"), "its library for processors"),
        ({**HEALTHY, "bitsandbytes": Answer(error="RuntimeError: x")}, "RuntimeError: x"),
    ],
)
def test_bitsandbytes_without_its_library(answers: dict[str, Answer], why: str) -> None:
    finding = only("bitsandbytes", answers=answers)
    assert finding.status == "problem"
    assert why in finding.found
    assert "--force-reinstall" in (finding.mend or "")


def test_bitsandbytes_on_a_card_too_old() -> None:
    gpu = structs.replace(with_gpus().gpus[0], compute_capability=(5, 2))
    machine = structs.replace(with_gpus(), gpus=(gpu,))
    answers = torch_says(architectures=["sm_50"])
    assert (
        "need compute capability 6.0"
        in only("bitsandbytes", machine=machine, answers=answers).found
    )


@pytest.mark.parametrize(
    ("answer", "status", "found"),
    [
        (None, "ok", "not needed"),
        (Answer(facts={"version": "2.8.3"}), "ok", "2.8.3"),
        (Answer(error="ImportError: undefined symbol"), "warning", "undefined symbol"),
    ],
)
def test_flash_attention(answer: Answer | None, status: str, found: str) -> None:
    answers = {**HEALTHY, **({"flash_attn": answer} if answer else {})}
    finding = only("flash-attn", answers=answers)
    assert finding.status == status
    assert found in finding.found


def test_flash_attention_on_a_card_too_old() -> None:
    machine = with_gpus(FakeGpu(name="Tesla T4", compute_capability=(7, 5), total=15 * GIB))
    gpus = (structs.replace(machine.gpus[0], free_bytes=15 * GIB, power_watts=None),)
    answers = {
        **torch_says(architectures=["sm_75"]),
        "flash_attn": Answer(facts={"version": "2.8.3"}),
    }
    machine = structs.replace(machine, gpus=gpus, notes=())
    found = only("flash-attn", machine=machine, answers=answers).found
    assert found == "2.8.3; it needs a GPU of compute capability 8.0, so `sdpa` is used"
    rocm = {**torch_says(cuda=None, hip="7.0"), "flash_attn": answers["flash_attn"]}
    assert only("flash-attn", machine=other_vendor("mi300x"), answers=rocm).found == "2.8.3"


# --- configuration, Hub, disk, memory


def test_accelerates_own_configuration_is_not_read() -> None:
    path = Path("somewhere/default_config.yaml")
    assert "is not read" in only("accelerate config", accelerate_config=path).found
    broken = only(
        "accelerate config", accelerate_config=path, accelerate_config_error="it holds no settings"
    )
    assert broken.status == "warning"
    assert "is broken: it holds no settings" in broken.found


def test_accelerates_variables_are_heeded() -> None:
    found = findings(facts(accelerate_variables=("ACCELERATE_USE_FSDP",)))
    (warning,) = [f for f in found if f.status == "warning"]
    assert "ACCELERATE_USE_FSDP" in warning.found
    assert warning.mend == "unset them"


def test_the_hub() -> None:
    assert only("hub").found == (
        "https://hub.example answers; no token, which only gated models need (`hf auth login`)"
    )
    assert only("hub", hub_token="HF_TOKEN").found.endswith("answers; token: HF_TOKEN")
    assert only("hub", hub_offline=True, hub_reachable=False).status == "ok"
    silent = only("hub", hub_reachable=False)
    assert silent.status == "warning"
    assert "HF_ENDPOINT" in (silent.mend or "")


@pytest.mark.parametrize(
    ("folder", "status"),
    [
        (Folder(path="/d", free_bytes=100 * GIB, writable=False), "problem"),
        (Folder(path="/d", free_bytes=GIB // 2, writable=True), "problem"),
        (Folder(path="/d", free_bytes=10 * GIB, writable=True), "warning"),
        (AMPLE, "ok"),
    ],
)
def test_disk(folder: Folder, status: str) -> None:
    for name, field in (("disk for runs", "runs"), ("disk for models", "cache")):
        finding = only(name, **{field: folder})
        assert finding.status == status
        assert (finding.mend is None) == (status == "ok")


def with_ram(available: int) -> Machine:
    machine = with_gpus()
    return structs.replace(
        machine, host=structs.replace(machine.host, ram_available_bytes=available)
    )


def test_ram() -> None:
    assert only("ram").found == "48.0 GiB available of 64.0 GiB"
    assert only("ram", ram_limit_bytes=64 * GIB).found.endswith("the container's limit")
    assert only("ram", machine=with_ram(4 * GIB)).status == "warning"


def test_shared_memory_matters_to_several_gpus() -> None:
    little = {"shared_memory_bytes": 64 * 1024**2}
    assert only("shared memory", **little).status == "ok"
    finding = only("shared memory", machine=with_gpus(FakeGpu(), FakeGpu()), **little)
    assert finding.status == "problem"
    assert "--ipc=host" in (finding.mend or "")
    assert "shared memory" not in {f.name for f in findings(facts(shared_memory_bytes=None))}


# --- finding out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library is imported and no Hub asked."""
    monkeypatch.setattr(found_out, "ask_libraries", lambda environ, answered: HEALTHY)
    monkeypatch.setattr(found_out.default_model, "hub_reachable", lambda environ: True)


@pytest.mark.usefixtures("quick")
def test_facts_are_the_environments(tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    config = tmp_path / "accelerate/default_config.yaml"
    config.write_text("distributed_type: FSDP\n", encoding="utf-8")
    environ = {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "https://me:secret@mirror.example/hf/",
        "HF_TOKEN": "hf_secret",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "fp16",  # `accelerate launch` sets it anew
    }
    found = gather(runs_dir=tmp_path / "runs", nvml=FakeNvml([FakeGpu()]), environ=environ)
    assert found.accelerate_config == config
    assert found.accelerate_config_error is None
    assert found.accelerate_variables == ("ACCELERATE_USE_FSDP",)
    assert found.hub_endpoint == "https://mirror.example/hf"
    assert found.hub_token == "HF_TOKEN"
    assert "secret" not in repr(found)
    assert found.runs.path == found.cache.path == str(tmp_path)
    assert found.gpu is not None
    assert found.installed["torch"]
    assert found.shared_memory_bytes


@pytest.mark.usefixtures("quick")
def test_a_stored_token_counts_and_is_not_read(tmp_path: Path) -> None:
    environ = {"HF_HOME": str(tmp_path)}
    assert gather(runs_dir=tmp_path, nvml=FakeNvml(), environ=environ).hub_token is None
    (tmp_path / "token").write_text("hf_secret", encoding="utf-8")
    found = gather(runs_dir=tmp_path, nvml=FakeNvml(), environ=environ)
    assert found.hub_token == "stored by `hf auth login`"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("text", "fault"), [("- a\n", "it holds no settings"), ("a: [\n", "while parsing")]
)
def test_a_broken_configuration_is_said(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text(text, encoding="utf-8")
    found = gather(runs_dir=tmp_path, nvml=FakeNvml(), environ={"HF_HOME": str(tmp_path)})
    assert fault in (found.accelerate_config_error or "")


@pytest.mark.usefixtures("quick")
def test_offline_nobody_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(environ: Mapping[str, str]) -> bool:
        raise AssertionError

    monkeypatch.setattr(found_out.default_model, "hub_reachable", never)
    environ = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert gather(runs_dir=tmp_path, nvml=FakeNvml(), environ=environ).hub_offline


@pytest.mark.usefixtures("quick")
def test_an_uncatalogued_gpu_does_not_end_the_check_up(tmp_path: Path) -> None:
    nvml = FakeNvml([FakeGpu(name="NVIDIA Q9")])
    found = gather(runs_dir=tmp_path, nvml=nvml, environ={"HF_HOME": str(tmp_path)})
    assert found.machine_error is not None
    assert "`NVIDIA Q9`" in found.machine_error[0]
    assert found.machine.gpus == ()
    assert found.machine.driver_version == "550.54.15"


def test_required_versions_are_those_of_the_extra() -> None:
    required = found_out.required_versions()
    assert set(TRAIN_PACKAGES) <= set(required)
    assert "pytest" not in required
    assert "rich" not in required


# --- asking libraries


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Answer]:
    """Ask a library whose child is this program."""
    run = subprocess.run

    def ask(program: str) -> Answer:
        def child(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            assert command == [sys.executable, "-m", "ftplan.launcher.checkup.libraries", "torch"]
            assert options["env"]["PYTHONSAFEPATH"] == options["env"]["HF_HUB_OFFLINE"] == "1"
            return run([sys.executable, "-c", program], **options)

        monkeypatch.setattr(subprocess, "run", child)
        return libraries.ask("torch", os.environ, timeout_seconds=1)

    return ask


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("print('greeting'); print('{\"version\": \"1\"}')", Answer(facts={"version": "1"})),
        ("raise ImportError('libx.so')", Answer(error="ImportError: libx.so")),
        ("import sys; sys.exit(3)", Answer(error="it failed without a word")),
        ("import os; os.kill(os.getpid(), 11)", Answer(error="its process died by SIGSEGV")),
        ("import time; time.sleep(9)", Answer(error="no answer after 1 s")),
        ("print('hello')", Answer(error="its answer could not be read")),
        ("print('[]')", Answer(error="its answer could not be read")),
        ("pass", Answer(error="its answer could not be read")),
    ],
)
def test_a_child_answers_or_does_not(
    library: Callable[[str], Answer], program: str, answer: Answer
) -> None:
    assert library(program) == answer


def test_a_child_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "run", run)
    assert libraries.ask("torch", {}).error == "no more processes"


def test_what_is_not_installed_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: name == "torch" or None)
    monkeypatch.setattr(libraries, "ask", lambda name, environ: Answer(facts={"name": name}))
    heard: list[str] = []
    assert libraries.ask_libraries({}, heard.append) == {"torch": Answer(facts={"name": "torch"})}
    assert heard == ["torch"]


def test_every_library_that_is_asked_has_its_facts() -> None:
    assert set(libraries.ASKED) == set(libraries.FACTS)


def test_torch_itself_answers() -> None:
    torch = pytest.importorskip("torch")
    answer = libraries.ask("torch", os.environ)
    assert answer.error is None
    assert answer.facts["version"] == torch.__version__
    assert set(answer.facts) == set(TORCH)


# --- the command


def run_doctor(
    monkeypatch: pytest.MonkeyPatch, found: Facts, *, as_json: bool
) -> tuple[int, str, str]:
    from argparse import Namespace

    def gathered(*, runs_dir: Path, answered: Callable[[str], None]) -> Facts:
        answered("torch")
        return found

    monkeypatch.setattr(doctor, "gather", gathered)
    out, err = io.StringIO(), io.StringIO()
    ui = Ui(as_json=as_json, stdout=out, stderr=err, width=80)
    return doctor.run(Namespace(runs_dir=Path("runs")), ui), out.getvalue(), err.getvalue()


def test_the_exit_status_tells_of_problems_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_doctor(monkeypatch, facts(), as_json=False)[0] == 0
    assert run_doctor(monkeypatch, facts(hub_reachable=False), as_json=False)[0] == 0
    assert run_doctor(monkeypatch, facts(answers=without("torch")), as_json=False)[0] == 1


def test_the_table_has_what_to_do_below_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = facts(answers=torch_says(version="2.13.0+cpu", cuda=None), hub_reachable=False)
    _, out, err = run_doctor(monkeypatch, wrong, as_json=False)
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 80
    at = next(n for n, line in enumerate(lines) if line.startswith("problem"))
    assert "2.13.0+cpu is built for processors only, beside" in lines[at]
    assert lines[at + 2].strip().startswith("-> install torch's build for CUDA 12.4 or older")
    assert lines[-1] == "1 problem, 1 warning"
    assert "torch: " in err


def test_the_verdict_on_a_healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_doctor(monkeypatch, facts(), as_json=False)[1].endswith("nothing to mend\n")


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run_doctor(monkeypatch, facts(hub_reachable=False), as_json=True)
    found = json.loads(out)
    assert set(found) == {"schema", "checks", "num_problems", "num_warnings"}
    assert (found["schema"], found["num_problems"], found["num_warnings"]) == (1, 0, 1)
    assert all(set(check) == {"name", "status", "found", "mend"} for check in found["checks"])
    assert status == 0
