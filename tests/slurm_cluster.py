"""Slurm itself on this machine: a controller and two simulated nodes, started for the tests.

Debian's packages slurmctld, slurmd, slurm-client and munge are all it needs; nothing of the
system's own configuration is read or written.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")

# Where Debian keeps daemons, which is not on everybody's path.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"

_PATIENCE_SECONDS = 30.0

# A credential of a job is valid for `cred_expire` seconds, and a job that was requeued waits as
# long.
_CONFIGURATION = """\
ClusterName=ftplan
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=16000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=16000
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


@contextmanager
def slurm_cluster() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's programs find the cluster. Raises RuntimeError, with the
    daemons' own words, where it does not come up."""
    # munge wants a folder that everybody may pass through, which pytest's are not.
    folder = Path(tempfile.mkdtemp(prefix="ftplan-slurm-"))
    folder.chmod(0o711)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder, host=socket.gethostname(), user=getpass.getuser(), ports=_free_ports(3)
        )
    )
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(configuration)}
    environment.pop("SLURM_JOB_ID", None)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file")]
        munge[0] = f"--socket={folder}/munge.sock"
        seed = f"--seed-file={folder}/munge.seed"
        words = ["munged", "--foreground", f"--key-file={key}", *munge, seed]
        _daemon(stack, folder, environment, words)
        _until(folder, (folder / "munge.sock").exists)
        _daemon(stack, folder, environment, ["slurmctld", "-D"])
        for node in ("node1", "node2"):
            _daemon(stack, folder, environment, ["slurmd", "-D", "-N", node])
        _until(folder, lambda: _idle(environment) == 2)
        yield environment


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _daemon(
    stack: ExitStack, folder: Path, environment: dict[str, str], command: list[str]
) -> None:
    log = stack.enter_context((folder / "daemons.log").open("a"))
    child = subprocess.Popen(
        command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
    )
    stack.callback(_end, child)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _idle(environment: dict[str, str]) -> int:
    said = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.split().count("idle")


def _until(folder: Path, true: object) -> None:
    assert callable(true)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not true():
        if time.monotonic() > deadline:
            log = (folder / "daemons.log").read_text(errors="replace")
            raise RuntimeError(f"Slurm did not start: {log[-600:]}")
        time.sleep(0.2)
