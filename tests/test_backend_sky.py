"""SkyPilot's tasks: by its own schema, through a stand-in of its client."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ftplan.launcher.backends import needs, sky
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.profiles import gpu_catalog, sky_accelerators
from tests.engine_jobs import StandIn, job, noting, run_directory, wrapper

SCHEMA = json.loads(Path(__file__).with_name("engines").joinpath("skypilot.json").read_text())
VOLUME = {"volume": "runs"}


def task(root: Path, options: dict[str, str] = VOLUME, **changes: Any) -> dict[str, Any]:
    text = sky.Backend().files(job(root, sky.Backend(), options, **changes))[sky.TASK]
    found: dict[str, Any] = yaml.safe_load(text)
    jsonschema.validate(found, SCHEMA["task"])
    jsonschema.validate(found["resources"], SCHEMA["resources"])
    for mount in found["file_mounts"].values():
        if isinstance(mount, dict):
            jsonschema.validate(mount, SCHEMA["storage"])
    return found


def test_the_schema_refuses_what_skypilot_does_not_know(tmp_path: Path) -> None:
    found = task(tmp_path / "run")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "nodes": 2}, SCHEMA["task"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found["resources"], "use_spot": "yes"}, SCHEMA["resources"])


def test_a_task_asks_for_what_the_plan_needs(tmp_path: Path) -> None:
    found = task(tmp_path / "runs" / "one")
    assert found["num_nodes"] == 2
    resources = found["resources"]
    names = [each["accelerators"] for each in resources["any_of"]]
    assert names == ["H100:8", "H100-SXM:8", "H100-MEGA:8"]
    assert (resources["cpus"], resources["memory"], resources["disk_size"]) == ("32+", "201+", 251)
    assert resources["use_spot"] is True
    assert resources["job_recovery"]["max_restarts_on_errors"] == 3
    assert 143 in resources["job_recovery"]["recover_on_exit_codes"]
    assert found["volumes"] == {str(tmp_path / "runs"): "runs"}
    assert found["envs"]["FTPLAN_GRACE_SECONDS"] == "300"
    assert "secrets" not in found


def test_options_change_what_is_asked_for(tmp_path: Path) -> None:
    options = {"spot": "no", "restarts": "7", "infra": "k8s", "accelerators": "H100-80GB"}
    resources = task(tmp_path, {**VOLUME, **options})["resources"]
    assert resources["use_spot"] is False and resources["infra"] == "k8s"
    assert resources["accelerators"] == "H100-80GB:8"
    assert resources["job_recovery"]["max_restarts_on_errors"] == 7
    on_cpu = task(tmp_path, gpus_per_machine=0, gpu=None)["resources"]
    assert "accelerators" not in on_cpu and "any_of" not in on_cpu


def test_one_machine_may_keep_its_run_in_a_bucket(tmp_path: Path) -> None:
    bucket = {"bucket": "s3://mine/runs/"}
    found = task(tmp_path / "runs" / "one", bucket, num_machines=1, gpu="L4")
    kept = found["file_mounts"][str(tmp_path / "runs")]
    assert kept == {"source": "s3://mine/runs", "mode": "MOUNT_CACHED"}
    assert found["resources"]["accelerators"] == "L4:8"


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({}, {}, "outlives its machines"),
        ({"bucket": "s3://b", "volume": "v"}, {}, "outlives its machines"),
        ({"bucket": "s3://b"}, {}, "several machines cannot train in a bucket"),
        ({"bucket": "mine"}, {"num_machines": 1}, "`mine` is not a bucket"),
        (VOLUME, {"gpu": "RTX 2060 6GB"}, "none of SkyPilot's clouds"),
        (VOLUME, {"name": "7b-lora"}, "does not take `7b-lora` as a name"),
        ({**VOLUME, "restarts": "often"}, {}, "takes a whole number, not `often`"),
        ({**VOLUME, "spot": "maybe"}, {}, "takes yes or no, not `maybe`"),
        ({**VOLUME, "secret-env": "HF_TOKEN=hf_abc"}, {}, "not `HF_TOKEN...`"),
        (VOLUME, {"environment": {"HF_TOKEN": "hf_abc"}}, "`HF_TOKEN` is not written"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    options: dict[str, str], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r".") as raised:
        task(tmp_path, options, **changes)
    assert said in raised.value.message
    assert "hf_abc" not in f"{raised.value.message} {raised.value.hint}"


def test_what_only_the_run_directory_names_is_said_before_it_is_written(tmp_path: Path) -> None:
    wanted = job(tmp_path / "run", sky.Backend(), VOLUME)
    assert "also gets the model's folder" in sky.Backend().files(wanted)[sky.TASK]
    run_directory(tmp_path / "run", "/models/own")
    assert "also gets the model's folder" not in sky.Backend().files(wanted)[sky.TASK]


def test_a_models_folder_and_large_data_go_along_and_the_hubs_models_do_not(
    tmp_path: Path,
) -> None:
    run = run_directory(tmp_path / "run", "/models/own", ["data/rows.jsonl", "/data/large.jsonl"])
    mounts = task(run.root)["file_mounts"]
    assert mounts["/models/own"] == "/models/own"
    assert mounts["/data/large.jsonl"] == "/data/large.jsonl"
    assert mounts["~/ftplan-inputs"] == str(run.root)
    hub = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/abc"
    assert hub not in task(run_directory(tmp_path / "two", hub).root)["file_mounts"]


def test_every_machine_knows_the_first_ones_address_and_its_own_number(tmp_path: Path) -> None:
    lines = task(tmp_path / "it's")["run"].splitlines()
    assert 'export FTPLAN_MACHINE_RANK="$SKYPILOT_NODE_RANK"' in lines
    assert 'export FTPLAN_MAIN_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"' in lines
    words = shlex.split(lines[-1])
    assert words[:3] == ["exec", "~/ftplan-venv/bin/python", "-m"]
    assert words[4:7] == [str(tmp_path / "it's"), "--inputs", "$inputs"]
    assert "$FTPLAN_MACHINE_RANK" in words and words[-1] == "--resume"


def test_the_task_runs_on_machines_that_have_nothing_but_the_inputs(tmp_path: Path) -> None:
    home = tmp_path / "home"
    wrapper(home / "ftplan-venv" / "bin" / "python")
    (tmp_path / "model").mkdir()
    run_directory(home / "ftplan-inputs", str(tmp_path / "model"))
    kept, noted = tmp_path / "kept it's" / "one", tmp_path / "told"
    found = task(kept, command=noting(noted), environment={"OMP_NUM_THREADS": "4"})
    for rank in "01":
        told = {"SKYPILOT_NODE_RANK": rank, "SKYPILOT_NUM_NODES": "2"}
        told |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "HOME": str(home)}
        environ = {**os.environ, **found["envs"], **told}
        subprocess.run(["bash", "-c", found["run"]], env=environ, check=True, timeout=60)
        assert noted.with_suffix(f".{rank}").read_text() == f"{rank} 2 10.0.0.1 29500 4"
    assert RunDir(kept).plan.is_file()


@pytest.mark.parametrize(
    ("package", "line", "mounted"),
    [
        (needs.Package(None, "ftplan[train]==1.0"), "'ftplan[train]==1.0'", None),
        (needs.Package(Path("/src/ftplan"), ""), '"$(eval echo ~/ftplan-package)[train]"', "~/ft"),
        (needs.Package(Path("/d/f.whl"), ""), '"$(eval echo ~/ftplan-package/f.whl)[train]"', "~/"),
    ],
)
def test_packages_are_those_that_are_installed_here(
    package: needs.Package,
    line: str,
    mounted: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(needs, "ftplan_package", lambda: package)
    found = task(tmp_path)
    install = found["setup"].splitlines()[-1]
    assert line in install
    pinned = [word for word in shlex.split(install) if "==" in word]
    assert any(word.startswith("accelerate==") for word in pinned)
    assert not any("+" in word for word in pinned)
    targets = [path for path in found["file_mounts"] if path.startswith("~/ftplan-package")]
    assert bool(targets) == bool(mounted)


def test_secrets_go_by_the_command_line_and_their_values_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "sky", monkeypatch)
    client.answers("Submitting...\n\n📋 Useful Commands\nManaged Job ID: \x1b[1m12\x1b[0m\n")
    wanted = job(tmp_path / "run", sky.Backend(), {**VOLUME, "secret-env": "HF_TOKEN"})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match="`HF_TOKEN` is not set here"):
        sky.Backend().submit(Ui(), wanted)
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert sky.Backend().submit(Ui(), wanted) == "12"
    written = RunDir(tmp_path / "run").root / sky.TASK
    assert "hf_very_secret" not in written.read_text()
    assert yaml.safe_load(written.read_text())["secrets"] == {"HF_TOKEN": None}
    launched = ["jobs", "launch", "--yes", "--detach-run", "--secret", "HF_TOKEN", str(written)]
    assert client.calls == [launched]
    assert written.read_text().startswith(f"# sky {shlex.join(launched)}\n")
    assert written.read_text() == sky.Backend().files(wanted)[sky.TASK]


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("PENDING", "pending"),
        ("STARTING", "pending"),
        ("RUNNING", "running"),
        ("RECOVERING", "requeued"),
        ("SUCCEEDED", "finished"),
        ("CANCELLED", "cancelled"),
        ("FAILED_NO_RESOURCE", "failed"),
        ("FAILED", "failed"),
        ("NEW_ONE", "unknown"),
    ],
)
def test_the_state_is_what_the_queue_says(
    status: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "sky", monkeypatch)
    queue = [{"job_id": 1, "status": "RUNNING"}, {"job_id": 12, "status": status}]
    client.answers(json.dumps(queue, indent=2))
    assert sky.Backend().state("12") == state
    assert client.calls[0] == ["jobs", "queue", "--all", "-o", "json"]


def test_a_job_that_is_forgotten_or_a_client_that_fails_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "sky", monkeypatch)
    client.answers("[]")
    assert sky.Backend().state("12") == "unknown"
    client.answers("no cloud is enabled", status=1)
    assert sky.Backend().state("12") == "unknown"
    with pytest.raises(InputError, match="no cloud is enabled"):
        sky.Backend().cancel("12")
    client.answers("")
    sky.Backend().cancel("12")
    assert client.calls[-1] == ["jobs", "cancel", "--yes", "--graceful", "12"]


def test_an_id_that_is_no_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "sky", monkeypatch)
    with pytest.raises(InputError, match="`--all` is not the id of a job"):
        sky.Backend().cancel("--all")
    assert client.calls == []


def test_a_missing_client_is_named_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="`sky` is not installed here") as raised:
        sky.Backend().submit(Ui(), job(tmp_path / "run", sky.Backend(), VOLUME))
    assert "pip install 'skypilot" in str(raised.value.hint)


def test_skypilots_names_are_of_catalogued_gpus_and_in_its_catalog() -> None:
    known = set(SKY_NAMES.split())
    mapped = {key: sky_accelerators(key) for key in gpu_catalog()}
    assert {name for names in mapped.values() for name in names} <= known
    profile = json.loads(
        (Path(__file__).parents[1] / "profiles" / "sky_accelerators.json").read_text()
    )
    assert set(profile["accelerators"]) <= set(gpu_catalog())


# Names of catalogs/v8/common/accelerators.csv of skypilot-org/skypilot-catalog, d4d53f0.
SKY_NAMES = """
    A10 A100 A100-80GB A100-80GB-SXM A10G A16 A30 A40 A4000 A5000 A6000 A800 B200 B300 GH200
    H100 H100-MEGA H100-NVL H100-NVLINK H100-SXM H200 H200-SXM K80 L4 L40 L40S M4000 M60 MI300X
    NVIDIA-H200-NVL P100 P4 P4000 RTX2000-Ada RTX3060 RTX3090 RTX4000-Ada RTX4060 RTX4070 RTX4090
    RTX5070 RTX5090 RTX5880-Ada RTX6000 RTX6000-Ada RTX6000Ada RTXA4000 RTXA4500 RTXA5000 RTXA6000
    RTXPRO6000 RTXPRO6000-WK RTXPRO6000WS T4 T4g V100 V100-32GB
"""
