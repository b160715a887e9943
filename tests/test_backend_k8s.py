"""TrainJobs: by Kubeflow Trainer's own classes, through a stand-in of kubectl; and what accelerate
makes of the variables that pods are given."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import (
    TrainerV1alpha1TrainingRuntime,
)

from ftplan.launcher.backends import k8s
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.units import MIB
from tests.engine_jobs import StandIn, job, noting, run_directory, wrapper

GIVEN = {"claim": "runs", "image": "registry.example/ftplan:1"}
KINDS = {"TrainJob": TrainerV1alpha1TrainJob, "TrainingRuntime": TrainerV1alpha1TrainingRuntime}


def documents(root: Path, options: dict[str, str] = GIVEN, **changes: Any) -> list[dict[str, Any]]:
    text = k8s.Backend().files(job(root, k8s.Backend(), options, **changes))[k8s.MANIFEST]
    found = list(yaml.safe_load_all(text))
    for each in found:
        check(each)
    return found


def check(document: dict[str, Any]) -> None:
    """A field that the class does not know is lost on the way, a wrong type is refused."""
    known = KINDS[document["kind"]].from_dict(document)
    assert known is not None
    assert known.to_dict() == document


def pod(document: dict[str, Any]) -> dict[str, Any]:
    (patch,) = document["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    found: dict[str, Any] = replicated["template"]["spec"]["template"]["spec"]
    return found


def test_the_classes_refuse_what_kubeflow_does_not_know(tmp_path: Path) -> None:
    (found,) = documents(tmp_path / "run")
    with pytest.raises(AssertionError):
        check({**found, "spec": {**found["spec"], "nodes": 2}})
    with pytest.raises(ValueError):
        check({**found, "spec": {**found["spec"], "runtimeRef": "torch-distributed"}})


def test_a_train_job_asks_for_what_the_plan_needs(tmp_path: Path) -> None:
    (found,) = documents(tmp_path / "runs" / "one")
    assert found["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = found["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    resources = trainer["resourcesPerNode"]
    assert resources["limits"] == {"nvidia.com/gpu": "8"}
    assert resources["requests"]["nvidia.com/gpu"] == "8" and resources["requests"]["cpu"] == "32"
    assert resources["requests"]["memory"] == "204801Mi"
    assert 204801 * MIB > 200 * 1024 * MIB
    spec = pod(found)
    assert spec["terminationGracePeriodSeconds"] == 300
    assert spec["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    mounts = {each["name"]: each["mountPath"] for each in spec["containers"][0]["volumeMounts"]}
    assert mounts == {"runs": str(tmp_path / "runs"), "shared-memory": "/dev/shm"}
    (term,) = spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert "NVIDIA-H100-80GB-HBM3" in term["preference"]["matchExpressions"][0]["values"]


def test_on_processors_and_on_amd_no_gpu_of_nvidia_is_asked_for(tmp_path: Path) -> None:
    (found,) = documents(tmp_path / "run", gpus_per_machine=0, gpu=None)
    assert "limits" not in found["spec"]["trainer"]["resourcesPerNode"]
    assert found["spec"]["trainer"]["numProcPerNode"] == 1
    (found,) = documents(tmp_path / "run", gpu="MI300X")
    assert found["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"amd.com/gpu": "8"}
    assert "affinity" not in pod(found)


def test_with_restarts_the_job_has_a_runtime_that_makes_all_pods_anew(tmp_path: Path) -> None:
    runtime, found = documents(tmp_path / "run", {**GIVEN, "restarts": "5"})
    assert runtime["spec"]["template"]["spec"]["failurePolicy"] == {"maxRestarts": 5}
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["spec"]["backoffLimit"] == 0
    reference = found["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (
        "TrainingRuntime",
        runtime["metadata"]["name"],
    )


def test_options_place_the_job(tmp_path: Path) -> None:
    options = {"namespace": "team-a", "queue": "gpus", "node-selector": "pool=h100,zone=a"}
    (found,) = documents(tmp_path / "run", {**GIVEN, **options, "service-account": "trainer"})
    assert found["metadata"]["namespace"] == "team-a"
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert pod(found)["nodeSelector"] == {"pool": "h100", "zone": "a"}
    assert pod(found)["serviceAccountName"] == "trainer"
    assert "affinity" not in pod(found)


def test_secrets_are_named_and_kept_by_kubernetes(tmp_path: Path) -> None:
    (found,) = documents(tmp_path / "run", {**GIVEN, "secret": "hub", "secret-env": "HF_TOKEN"})
    env = {each["name"]: each for each in found["spec"]["trainer"]["env"]}
    assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}
    assert env["FTPLAN_GRACE_SECONDS"]["value"] == "300"
    # Kubeflow Trainer refuses a job that sets those itself.
    assert not any(name.startswith("PET_") for name in env)


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ({"image": "i"}, {}, "the volume that the run directory is on"),
        ({"claim": "runs"}, {}, "pods have no ftplan"),
        ({**GIVEN, "mount-path": "/elsewhere"}, {}, "is not below `/elsewhere`"),
        ({**GIVEN, "queue": "-x"}, {}, "queue=-x` is not a name of Kubernetes"),
        ({**GIVEN, "service-account": "A"}, {}, "service-account=A` is not a name"),
        ({**GIVEN, "claim": "My_Claim"}, {}, "claim=My_Claim` is not a name of Kubernetes"),
        ({**GIVEN, "secret-env": "HF_TOKEN"}, {}, "no Secret is named"),
        ({**GIVEN, "node-selector": "h100"}, {}, "takes labels, not `h100`"),
        (GIVEN, {"environment": {"WANDB_API_KEY": "x"}}, "`WANDB_API_KEY` is not written"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    options: dict[str, str], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r".") as raised:
        documents(tmp_path / "run", options, **changes)
    assert said in raised.value.message and raised.value.hint


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("llama-3.1-8b-lora-Tickets_v2", "llama-3-1-8b-lora-tickets-v2"),
        ("7b", "run-7b"),
        ("___", "run"),
    ],
)
def test_names_become_those_of_kubernetes(name: str, label: str) -> None:
    assert k8s.job_name(name) == label


def test_long_names_that_begin_alike_stay_two() -> None:
    names = {k8s.job_name("smollm2-135m-instruct-lora-support-tickets-" + end) for end in "ab"}
    assert len(names) == 2
    # The pods of JobSet, whose names may have 63 characters.
    assert all(len(f"{name}-node-0-1023-abcde") <= 63 for name in names)


def test_a_python_on_the_claim_needs_no_image(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    options = {"claim": "runs", "mount-path": str(tmp_path)}
    (found,) = documents(tmp_path / "runs" / "one", options, command=(str(python), "-m", "x"))
    assert f"exec {python} -m" in found["spec"]["trainer"]["args"][0]
    assert "image" not in found["spec"]["trainer"]


def test_pods_find_each_other_by_what_the_torch_plugin_sets(tmp_path: Path) -> None:
    (found,) = documents(tmp_path / "it's")
    assert found["spec"]["trainer"]["command"] == ["/bin/sh", "-c"]
    lines = found["spec"]["trainer"]["args"][0].splitlines()
    assert 'export FTPLAN_MACHINE_RANK="$PET_NODE_RANK"' in lines
    assert 'export FTPLAN_MAIN_ADDRESS="$PET_MASTER_ADDR"' in lines
    # Kubernetes would fill in `$(NAME)` before the shell sees it.
    assert "$(" not in "\n".join(lines)
    words = shlex.split(lines[-1])
    assert words[0] == "exec" and str(tmp_path / "it's") in words


def test_the_containers_command_runs_with_what_the_plugin_sets(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    run = run_directory(tmp_path / "it's" / "one", str(tmp_path / "model"))
    python, noted = tmp_path / "it's" / "bin" / "python", tmp_path / "told"
    wrapper(python)
    command = (str(python), *noting(noted)[1:])
    options = {"claim": "runs", "mount-path": str(tmp_path / "it's")}
    (found,) = documents(run.root, options, command=command, environment={"OMP_NUM_THREADS": "4"})
    trainer = found["spec"]["trainer"]
    told = {"NODE_RANK": "1", "NNODES": "2", "MASTER_ADDR": "one-node-0-0.one"}
    environ = {**os.environ, **{f"PET_{name}": value for name, value in told.items()}}
    environ |= {"PET_MASTER_PORT": "29400"} | {e["name"]: e["value"] for e in trainer["env"]}
    subprocess.run([*trainer["command"], *trainer["args"]], env=environ, check=True, timeout=60)
    assert noted.with_suffix(".1").read_text() == "1 2 one-node-0-0.one 29400 4"


@pytest.mark.train
def test_pet_variables_alone_would_give_accelerate_the_processes_of_all_machines_on_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("accelerate", reason="needs the `train` extra")
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env
    from torch.distributed import run as torchrun

    told = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29400"}
    for name, value in told.items():
        monkeypatch.setenv(f"PET_{name}", value)

    def world(*options: str) -> tuple[str, str, int, str]:
        plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
        words = ["--multi_gpu", "--num_processes", "16", *plain, *options, "-m", "train"]
        arguments = launch_command_parser().parse_args(words)
        prepare_multi_gpu_env(arguments)
        found = _filter_args(arguments, torchrun.get_args_parser(), ["train"])
        address = str(found.master_addr or found.rdzv_endpoint)
        return str(found.nnodes), str(found.nproc_per_node), int(found.node_rank), address

    # Half from each: 32 processes for 16 GPUs.
    assert world("--num_machines", "1", "--main_process_port", "0")[:2] == ("2", "16")
    options = ["--num_machines", "2", "--machine_rank", "1"]
    together = world(*options, "--main_process_ip", "first", "--main_process_port", "29400")
    assert together[:3] == ("2", "8", 1) and "first" in together[3]


def test_a_job_is_created_asked_for_and_deleted_by_kubectl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "kubectl", monkeypatch)
    run = run_directory(tmp_path / "runs" / "one", "/models/own")
    options = {**GIVEN, "namespace": "team-a", "context": "arn:aws:eks/lab"}
    wanted = job(run.root, k8s.Backend(), options)
    job_id = k8s.Backend().submit(Ui(), wanted)
    assert job_id == "team-a/llama-3-1-8b-lora-tickets-v2@arn:aws:eks/lab"
    path = run.root / k8s.MANIFEST
    access = ["--context=arn:aws:eks/lab", "--namespace=team-a"]
    assert client.calls == [["create", *access, "-f", str(path)]]
    assert path.read_text() == k8s.Backend().files(wanted)[k8s.MANIFEST]
    client.answers(json.dumps({"status": {"conditions": []}}))
    assert k8s.Backend().state(job_id) == "pending"
    name = "llama-3-1-8b-lora-tickets-v2"
    assert client.calls[-1][:5] == ["get", "trainjob", name, *access]
    client.answers("")
    k8s.Backend().cancel(job_id)
    assert client.calls[-1][:3] == ["delete", "trainjob,trainingruntime", name]


def test_an_id_that_kubectl_would_take_for_an_option_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "kubectl", monkeypatch)
    for job_id in ("--kubeconfig=/tmp/theirs", "team/--kubeconfig=x", "a b", ""):
        assert k8s.Backend().state(job_id) == "unknown"
        with pytest.raises(InputError, match="is not the id of a job"):
            k8s.Backend().cancel(job_id)
    assert client.calls == []


def test_a_model_that_pods_do_not_see_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    StandIn(tmp_path, "kubectl", monkeypatch)
    run = run_directory(tmp_path / "runs" / "one", "/models/own")
    assert k8s.Backend().submit(Ui(), job(run.root, k8s.Backend(), GIVEN))
    assert "`/models/own` is not on the claim" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, "pending"),
        ({"jobsStatus": [{"name": "node", "active": 2, "ready": 2}]}, "running"),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, "pending"),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, "finished"),
        ({"conditions": [{"type": "Failed", "status": "True"}]}, "failed"),
        (
            {
                "conditions": [{"type": "Suspended", "status": "False"}],
                "jobsStatus": [{"name": "node", "active": 1}],
            },
            "running",
        ),
    ],
)
def test_the_state_is_what_the_conditions_say(
    status: dict[str, Any], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIn(tmp_path, "kubectl", monkeypatch).answers(json.dumps({"status": status}))
    assert k8s.Backend().state("one") == state


def test_a_job_that_is_gone_is_unknown_and_one_that_is_there_already_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = StandIn(tmp_path, "kubectl", monkeypatch)
    assert k8s.Backend().state("gone") == "unknown"
    client.answers('Error from server (AlreadyExists): trainjobs "one" already exists', status=1)
    with pytest.raises(InputError, match="already exists") as raised:
        k8s.Backend().submit(Ui(), job(tmp_path / "run", k8s.Backend(), GIVEN))
    assert "ftplan cancel" in str(raised.value.hint)
