"""Kubernetes: a TrainJob of Kubeflow Trainer 2.3 or later, where runtimePatches may say
how long pods have to save a checkpoint (docs/engines.md).

The Torch plugin of Kubeflow Trainer tells each pod its number and the first pod's address in PET_
variables, which torchrun takes for the defaults of its own options. accelerate sets all of them
itself once its command line names several machines (accelerate 1.15, `prepare_multi_gpu_env`).
Without, it sets the number of processes alone, and each machine would start those of all. So the
variables are handed to accelerate's options.

The run directory is on a claim that pods mount at the path that it has here.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftplan.launcher.backends import client, needs
from ftplan.launcher.backends.job import (
    MACHINE_RANK,
    MAIN_ADDRESS,
    MAIN_PORT,
    NUM_MACHINES,
    Job,
    JobState,
)
from ftplan.launcher.backends.yaml_text import yaml_text
from ftplan.launcher.run_dir import write_text
from ftplan.launcher.ui import Ui
from ftplan.planner.errors import InputError
from ftplan.planner.units import MIB
from ftplan.profiles import GpuEntry, find_gpu

MANIFEST = "k8s.yaml"
INSTALL = "get `kubectl` from kubernetes.io/docs/tasks/tools, and access to a cluster"

_API = "trainer.kubeflow.org/v1alpha1"
_RUNTIME = "torch-distributed"
_MANAGER = "ftplan.launcher/launch"
# What runtimes of Kubeflow Trainer call the job and the container of training.
_NODE = "node"

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NOT_IN_A_LABEL = re.compile(r"[^a-z0-9]+")
# JobSet makes pods NAME-node-0-INDEX-SUFFIX, whose names have at most 63 characters.
_LONGEST_NAME = 40

# NVIDIA's and AMD's device plugins; what their feature discoveries call the product.
_GPU_RESOURCE = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}
_PRODUCT_LABEL = "nvidia.com/gpu.product"


class Backend:
    """By `kubectl create`, `kubectl get` and `kubectl delete`."""

    name = "k8s"
    saves_on_cancel = True
    options: Mapping[str, str] = {
        "claim": "the PersistentVolumeClaim that holds the run directory",
        "mount-path": "where the claim is mounted, here and in pods (the folder of the runs)",
        "image": "with ftplan and its packages (needed unless the claim holds this Python)",
        "namespace": "where the job is made (that of kubectl's context)",
        "context": "of kubectl (the current one)",
        "runtime": f"the ClusterTrainingRuntime ({_RUNTIME})",
        "restarts": "of all pods together, by a runtime of its own (as the runtime says)",
        "secret": "the Secret whose keys are given to training by `secret-env`",
        "secret-env": "variables of that Secret, such as HF_TOKEN",
        "node-selector": "labels that machines must have, such as pool=h100",
        "queue": "the LocalQueue of Kueue",
        "service-account": "that pods run as",
    }

    def files(self, job: Job) -> dict[str, str]:
        return {MANIFEST: yaml_text(*manifests(job), comment=shlex.join(_create(job)))}

    def submit(self, ui: Ui, job: Job) -> str:
        for name, text in self.files(job).items():
            write_text(job.run.root / name, text)
        for path in _elsewhere(job):
            ui.warn(f"`{path}` is not on the claim: the image must have it at that path")
        again = f"a job of that name goes first: `ftplan cancel {job.run.quoted}`"
        client.call(_create(job), install=INSTALL, advice=again)
        return _job_id(job)

    def state(self, job_id: str) -> JobState:
        try:
            name, options = _parsed(job_id)
            found = ["get", "trainjob", name, *options, "--ignore-not-found", "-o", "json"]
            said = client.call(["kubectl", *found], install=INSTALL)
            return _state(json.loads(said)) if said.strip() else "unknown"
        except (InputError, ValueError):
            return "unknown"

    def cancel(self, job_id: str) -> None:
        """Pods get SIGTERM and their grace; the job and its runtime are gone afterwards."""
        name, options = _parsed(job_id)
        kinds = "trainjob,trainingruntime"
        command = ["kubectl", "delete", kinds, name, *options, "--ignore-not-found", "--wait=false"]
        client.call(command, install=INSTALL)


def _create(job: Job) -> list[str]:
    path = str(job.run.root.absolute() / MANIFEST)
    return ["kubectl", "create", *_access(job.options), "-f", path]


def _access(options: Mapping[str, str]) -> list[str]:
    return [f"--{name}={options[name]}" for name in ("context", "namespace") if name in options]


def _job_id(job: Job) -> str:
    """`[NAMESPACE/]NAME[@CONTEXT]`: enough to find it without the options."""
    namespace = f"{job.options['namespace']}/" if "namespace" in job.options else ""
    context = f"@{job.options['context']}" if "context" in job.options else ""
    return f"{namespace}{job_name(job.name)}{context}"


def _parsed(job_id: str) -> tuple[str, list[str]]:
    known = client.checked_id(job_id, r"([a-z0-9][-.a-z0-9]*/)?[a-z0-9][-a-z0-9]*(@.+)?")
    path, _, context = known.partition("@")
    namespace, _, name = path.rpartition("/")
    options = {"context": context, "namespace": namespace}
    return name, _access({key: value for key, value in options.items() if value})


def job_name(name: str) -> str:
    """A name of Kubernetes (RFC 1035) that leaves room for what pods add. Two long names that begin
    alike stay two."""
    label = _NOT_IN_A_LABEL.sub("-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"run-{label}".strip("-")
    if len(label) <= _LONGEST_NAME:
        return label
    import hashlib

    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{label[: _LONGEST_NAME - 7].rstrip('-')}-{digest}"


def _state(found: Mapping[str, Any]) -> JobState:
    """Of a TrainJob: by its conditions, then by the pods of its jobs."""
    status = found.get("status") or {}
    holds = {c["type"] for c in status.get("conditions", ()) if c.get("status") == "True"}
    if "Complete" in holds:
        return "finished"
    if "Failed" in holds:
        return "failed"
    if found.get("metadata", {}).get("deletionTimestamp"):
        return "cancelled"
    if "Suspended" in holds:
        return "pending"
    active = sum(int(part.get("active") or 0) for part in status.get("jobsStatus", ()))
    return "running" if active else "pending"


def manifests(job: Job) -> list[dict[str, Any]]:
    """The TrainJob; before it its runtime, where it has one of its own. Raises InputError for
    options that cannot be."""
    name, restarts = job_name(job.name), client.whole_number(job, "restarts")
    if restarts is None:
        runtime = {"name": _label(job, "runtime", _RUNTIME)}
        return [_train_job(job, name, runtime)]
    runtime = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
    return [_runtime(job, name, restarts), _train_job(job, name, runtime)]


def _metadata(job: Job, name: str) -> dict[str, Any]:
    queue = _label(job, "queue") if "queue" in job.options else ""
    labels = {"app.kubernetes.io/managed-by": "ftplan"}
    labels |= {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    namespace = {"namespace": _label(job, "namespace")} if "namespace" in job.options else {}
    return {"name": name, **namespace, "labels": labels}


def _train_job(job: Job, name: str, runtime: dict[str, str]) -> dict[str, Any]:
    pod = _pod(job)
    template = {"spec": {"template": {"spec": pod}}}
    jobs = [{"name": _NODE, "template": template}]
    patch = {"template": {"spec": {"replicatedJobs": jobs}}}
    return {
        "apiVersion": _API,
        "kind": "TrainJob",
        "metadata": _metadata(job, name),
        "spec": {
            "runtimeRef": runtime,
            "trainer": _trainer(job),
            "runtimePatches": [{"manager": _MANAGER, "trainingRuntimeSpec": patch}],
        },
    }


def _runtime(job: Job, name: str, restarts: int) -> dict[str, Any]:
    """As torch-distributed, but that all pods are made anew when one has failed. Pods made anew one
    by one, as a Job does, find the others waiting for one that has gone."""
    container = {"name": _NODE, "image": _image(job)}
    pod = {"restartPolicy": "Never", "containers": [container]}
    template = {
        "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }
    return {
        "apiVersion": _API,
        "kind": "TrainingRuntime",
        "metadata": _metadata(job, name) | {"labels": {"app.kubernetes.io/managed-by": "ftplan"}},
        "spec": {
            "mlPolicy": {"numNodes": job.num_machines, "torch": {}},
            "template": {
                "spec": {
                    "failurePolicy": {"maxRestarts": restarts},
                    "replicatedJobs": [{"name": _NODE, "template": template}],
                }
            },
        },
    }


def _trainer(job: Job) -> dict[str, Any]:
    given = job.options.get("image")
    return {
        **({"image": given} if given else {}),
        "numNodes": job.num_machines,
        "numProcPerNode": max(1, job.gpus_per_machine),
        "command": ["/bin/sh", "-c"],
        "args": [_script(job)],
        "env": [*_plain_variables(job), *_secret_variables(job)],
        "resourcesPerNode": _resources(job),
    }


def _image(job: Job) -> str:
    """A runtime names one; the job's is what counts."""
    return job.options.get("image") or "pytorch/pytorch"


def _script(job: Job) -> str:
    """The first process of the container, which Kubernetes sends SIGTERM to, becomes `machine`."""
    return "\n".join(
        [
            f'export {MACHINE_RANK}="$PET_NODE_RANK"',
            f'export {NUM_MACHINES}="$PET_NNODES"',
            f'export {MAIN_ADDRESS}="$PET_MASTER_ADDR"',
            f'export {MAIN_PORT}="$PET_MASTER_PORT"',
            f"exec {needs.training_line(job, shlex.quote(_python(job)))}",
            "",
        ]
    )


def _python(job: Job) -> str:
    """This Python where pods see it too, else the image's. Raises InputError where neither is
    there."""
    own = Path(job.command[0])
    if own.is_relative_to(_mount_path(job)):
        return str(own)
    if "image" not in job.options:
        raise InputError(
            f"pods have no ftplan: `{own}` is not on the claim",
            "give an image that holds it with `--backend-option image=NAME` (docs/engines.md has "
            "one), or install ftplan into an environment on the claim",
        )
    return "python"


def _plain_variables(job: Job) -> list[dict[str, Any]]:
    found = needs.variables(job, client.plain_environment(job))
    return [{"name": name, "value": value} for name, value in found.items()]


def _secret_variables(job: Job) -> list[dict[str, Any]]:
    names = client.variable_names(job)
    if not names:
        return []
    if "secret" not in job.options:
        raise InputError(
            f"no Secret is named that holds {', '.join(names)}",
            f"`kubectl create secret generic ftplan --from-literal={names[0]}=...`, then "
            "`--backend-option secret=ftplan`",
        )
    secret = _label(job, "secret")
    return [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}}
        for name in names
    ]


def _resources(job: Job) -> dict[str, Any]:
    """Host memory is asked for and not limited: a prediction should not end a run."""
    requests = {"memory": f"{math.ceil(job.host_ram_bytes / MIB)}Mi"}
    if job.cpus_per_machine:
        requests["cpu"] = str(job.cpus_per_machine)
    if not job.gpus_per_machine:
        return {"requests": requests}
    gpus = {_GPU_RESOURCE[_gpu(job).vendor]: str(job.gpus_per_machine)}
    return {"requests": {**requests, **gpus}, "limits": gpus}


def _gpu(job: Job) -> GpuEntry:
    entry = find_gpu(job.gpu or "")
    if entry.vendor not in _GPU_RESOURCE:
        raise InputError(f"Kubernetes does not share out a {entry.name}", "plan for another GPU")
    return entry


def _pod(job: Job) -> dict[str, Any]:
    """What the runtime's pods have besides: volumes, time to save a checkpoint, where they go."""
    mounts = [
        {"name": "runs", "mountPath": str(_mount_path(job))},
        # NCCL and the loaders share memory among processes; containers have 64 MiB of it.
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    claim = job.options.get("claim")
    if not claim:
        raise InputError(
            "Kubernetes needs the volume that the run directory is on",
            "`--backend-option claim=NAME` of a PersistentVolumeClaim that is mounted here as well",
        )
    return {
        "terminationGracePeriodSeconds": job.grace_seconds,
        **_placement(job),
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": _label(job, "claim")}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
        "containers": [{"name": _NODE, "volumeMounts": mounts}],
    }


def _placement(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "service-account" in job.options:
        found["serviceAccountName"] = _label(job, "service-account")
    if selector := job.options.get("node-selector"):
        found["nodeSelector"] = dict(map(_pair, client.names(selector)))
    elif job.gpus_per_machine and (products := _products(_gpu(job))):
        # Only preferred: clusters without NVIDIA's feature discovery have no such label.
        wanted = {"key": _PRODUCT_LABEL, "operator": "In", "values": products}
        term = {"weight": 100, "preference": {"matchExpressions": [wanted]}}
        found["affinity"] = {
            "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [term]}
        }
    return found


def _products(gpu: GpuEntry) -> list[str]:
    """The driver's names as labels have them: `NVIDIA-H100-80GB-HBM3`."""
    return [n.replace(" ", "-") for n in gpu.driver_names] if gpu.vendor == "nvidia" else []


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise InputError(
            f"`node-selector` takes labels, not `{text}`",
            "for example `--backend-option node-selector=pool=h100,zone=a`",
        )
    return name, value


def _mount_path(job: Job) -> Path:
    """Raises InputError where the run directory is not below it."""
    root = job.run.root.absolute()
    path = Path(job.options.get("mount-path", root.parent))
    if not path.is_absolute() or not root.is_relative_to(path):
        raise InputError(
            f"the run directory `{root}` is not below `{path}`, where the claim is mounted",
            f"plan with `--runs-dir {path}/runs`",
        )
    return path


def _elsewhere(job: Job) -> list[Path]:
    """What training reads that is neither on the claim nor comes from the Hub."""
    outside = [*needs.model_folders(job.run), *needs.data_files(job.run)]
    mount = _mount_path(job)
    return [p for p in outside if not p.is_relative_to(mount) and needs.hub_snapshot(p) is None]


def _label(job: Job, option: str, default: str = "") -> str:
    """An option that names an object of Kubernetes; raises InputError for what cannot."""
    value = job.options.get(option, default)
    if len(value) > 63 or not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", value):
        raise InputError(
            f"`--backend-option {option}={value}` is not a name of Kubernetes",
            "names have lower-case letters, digits and `-`",
        )
    return value
