"""Runs that are handed to an engine: the job, the command line, Slurm's script and its clients."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec import structs

from ftplan.launcher import cli
from ftplan.launcher.backends import BACKENDS, slurm
from ftplan.launcher.backends.ended import said_by_slurm
from ftplan.launcher.backends.job import Job, shell_line
from ftplan.launcher.backends.jobs import handed_over
from ftplan.launcher.backends.making import job_of, machine_command
from ftplan.launcher.launching import result_lines
from ftplan.launcher.processes import named_process
from ftplan.launcher.run_dir import RunDir, write_json, write_text, write_yaml
from ftplan.planner.errors import InputError
from ftplan.planner.units import GIB
from tests.engine_jobs import StandIn


def write_plan(root: Path, kind: str = "cuda", **settings: int) -> RunDir:
    """A run directory that has the inputs which a job is made of."""
    run = RunDir(root)
    plan = {
        "model": {"name": "tiny"},
        "device": {"kind": kind, "name": "H100 SXM", "free_bytes": 80 * GIB},
        "steps": 40,
        "plan": {"method": {"value": "lora"}} | {n: {"value": v} for n, v in settings.items()},
        "predicted": {"train_seconds": 7200.0},
        "needs": {"host_ram_bytes": 32 * GIB, "disk_bytes": 10 * GIB},
    }
    write_yaml(run.plan, plan)
    write_yaml(run.train, {})
    write_yaml(run.accelerate, {})
    write_text(run.command, "accelerate launch\n")
    return run


def job(run: RunDir, **options: str) -> Job:
    return job_of(run.read_plan(), run, options)


def directives(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH --")]
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in lines]
    return {name: value for name, _, value in pairs}


def test_a_job_needs_what_the_plan_says_of_one_machine(tmp_path: Path) -> None:
    made = job(write_plan(tmp_path / "a run", num_gpus=16, num_machines=2))
    assert (made.name, made.num_machines, made.gpus_per_machine) == ("a-run", 2, 8)
    assert (made.gpu, made.host_ram_bytes, made.seconds) == ("H100 SXM", 32 * GIB, 7200.0)
    assert "CUDA_VISIBLE_DEVICES" not in made.environment
    assert made.run.root.is_absolute()


def test_a_job_on_processors_has_no_gpus(tmp_path: Path) -> None:
    made = job(write_plan(tmp_path / "run", kind="cpu"))
    assert (made.gpus_per_machine, made.gpu) == (0, None)
    assert made.environment["CUDA_VISIBLE_DEVICES"] == ""


def test_a_damaged_plan_is_told(tmp_path: Path) -> None:
    run = write_plan(tmp_path / "run")
    with pytest.raises(InputError, match=r"does not say what the run needs .KeyError: 'disk"):
        job_of({**run.read_plan(), "needs": {"host_ram_bytes": 1}}, run, {})


def test_machines_are_told_their_rank_by_the_engine_s_shell(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a run")
    alone = machine_command(run, 1, 8)
    assert not any(word.startswith("$") for word in alone) and alone[-1] == "--resume"
    together = machine_command(run, 2, 16)
    at = together.index("--machine_rank")
    assert together[at + 1] == "$FTPLAN_MACHINE_RANK" and at < together.index(str(run.root))
    told = {**os.environ, "FTPLAN_MACHINE_RANK": "1", "FTPLAN_MAIN_ADDRESS": "a b"}
    line = shell_line(["printf", "%s\n", *together[at : at + 4], "$HOME", "x'y"])
    said = subprocess.check_output(["bash", "-c", line], env=told, text=True)
    words = ["--machine_rank", "1", "--main_process_ip", "a b", "$HOME", "x'y"]
    assert said.splitlines() == words


def test_accelerate_takes_the_words_of_several_machines(tmp_path: Path) -> None:
    launch = pytest.importorskip("accelerate.commands.launch", reason="needs the `train` extra")
    command = machine_command(RunDir(tmp_path), 2, 16)
    words = [word.replace("$FTPLAN_MAIN_PORT", "2").replace("$FTPLAN_MACHINE_RANK", "1")
             for word in command[command.index("--config_file") :]]  # fmt: skip
    told = launch.launch_command_parser().parse_args(words)
    assert (told.num_machines, told.num_processes, told.machine_rank) == (2, 16, 1)
    assert told.training_script == "ftplan.launcher.train"


# --- Slurm's script


def test_the_script_asks_for_what_the_job_needs(tmp_path: Path) -> None:
    run = write_plan(tmp_path / "100 %", num_gpus=16, num_machines=2)
    asked = directives(slurm.script(job(run, partition="gpu", time="1-0")))
    assert asked["nodes"] == "2" and asked["ntasks-per-node"] == "1"
    assert asked["gpus-per-node"] == "8" and asked["cpus-per-task"] == "32"
    assert asked["mem"] == f"{40 * 1024}M"
    assert asked["partition"] == "gpu" and asked["time"] == "1-0"
    assert asked["requeue"] == "" and asked["signal"] == "B:TERM@360"
    assert asked["output"] == f"'{tmp_path}/100 %%/stdout.log'"


def test_the_time_limit_leaves_room() -> None:
    assert slurm.time_limit(7200, 360) == "0-03:36:00"
    assert slurm.time_limit(20 * 86_400, 0) == "30-00:30:00"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86_400), ("1-2:30", 95_400),
     ("1-2:30:05", 95_405), ("UNLIMITED", None), ("x-1", None), ("1:2:3:4", None)],
)  # fmt: skip
def test_limits_are_read_as_sbatch_reads_them(limit: str, seconds: int | None) -> None:
    assert slurm.seconds_of(limit) == seconds


def test_a_short_limit_leaves_most_of_it_to_training(tmp_path: Path) -> None:
    text = slurm.script(job(write_plan(tmp_path / "run"), time="10"))
    assert directives(text)["signal"] == "B:TERM@150"
    assert "export FTPLAN_GRACE_SECONDS=125\n" in text
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=125\n" in text


def test_only_several_machines_meet_at_an_address(tmp_path: Path) -> None:
    assert "FTPLAN_MAIN" not in slurm.script(job(write_plan(tmp_path / "one", num_gpus=8)))
    run = write_plan(tmp_path / "two", num_gpus=16, num_machines=2)
    assert "export FTPLAN_MAIN_ADDRESS=" in slurm.script(job(run))


def test_the_script_is_bash_wherever_the_run_lies(tmp_path: Path) -> None:
    run = write_plan(tmp_path / "it's a $run", num_gpus=4, num_machines=2)
    text = slurm.script(job(run, setup="module load cuda"))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "\nmodule load cuda\n" in text


def test_no_secret_is_in_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert "verysecret" not in slurm.script(job(write_plan(tmp_path / "run")))


@pytest.mark.parametrize("value", ["", "a\nb"])
def test_a_value_of_no_line_or_of_two_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a value of one line"):
        slurm.script(job(write_plan(tmp_path / "run"), account=value))


def test_what_slurm_itself_said_is_why_a_run_failed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    said = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some processes were killed"
    run.stderr.write_text(f"before\n{said}\nsrun: error: node1: task 0: Exited with exit code 1\n")
    assert str(said_by_slurm(run, 7)).startswith("training failed: Detected 1 oom_kill event")
    run.stderr.write_text("srun: error: node1: task 0: Exited with exit code 1\n")
    assert said_by_slurm(run, 0) is None


# --- the command line, with stand-ins of Slurm's programs


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs: each notes its words in `called`, and prints what is in the file of its
    name, or fails with what is in `NAME.error`."""
    folder = tmp_path / "clients"
    folder.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel"):
        path = folder / name
        path.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {folder}/called\n'
            f"[ -f {folder}/{name}.error ] && /bin/cat {folder}/{name}.error >&2 && exit 1\n"
            f"/bin/cat {folder}/{name}.says 2>/dev/null; exit 0\n"
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    (folder / "sbatch.says").write_text("4711;cluster\n")
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, Any, str]:
    """Exit status, the JSON object, and the messages as one line."""
    capsys.readouterr()
    status = cli.main([str(words[0]), "--json", *map(str, words[1:])])
    said = capsys.readouterr()
    return status, json.loads(said.out) if said.out else None, " ".join(said.err.split())


def called(clients: Path) -> list[str]:
    path = clients / "called"
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_is_submitted_and_remembered(
    clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "runs" / "one")
    words = ("launch", run.root, "--backend", "slurm", "--backend-option", "partition=gpu")
    words += ("--backend-option", "begin=now+1hour")
    status, shown, _ = told(capsys, *words)
    assert status == 0 and shown["job"]["id"] == "4711"
    submitted = f"sbatch --parsable {run.root / 'slurm.sh'}"
    assert called(clients) == [submitted]
    assert directives((run.root / "slurm.sh").read_text())["partition"] == "gpu"
    (clients / "squeue.says").write_text("FAILED   0\n")
    again = ("resume", run.root, "--backend", "slurm", "--backend-option", "qos=low")
    assert told(capsys, *again)[0] == 0
    asked = directives((run.root / "slurm.sh").read_text())
    assert (asked["partition"], asked["qos"]) == ("gpu", "low") and "begin" not in asked
    handed = handed_over(run)
    assert handed and (handed.said, handed.files) == ("slurm job 4711", ("slurm.sh",))


def test_a_dry_run_prints_the_script_and_touches_nothing(
    clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "one")
    before = sorted(run.root.iterdir())
    assert cli.main(["launch", str(run.root), "--backend", "slurm", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown == slurm.script(job(run))
    assert told(capsys, "launch", run.root, "--dry-run")[1]["command"] == "accelerate launch"
    assert sorted(run.root.iterdir()) == before and not called(clients)


def test_what_the_engine_has_is_not_launched_twice(
    clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "one")
    words = ("launch", run.root, "--backend", "slurm")
    assert told(capsys, *words)[0] == 0
    (clients / "squeue.says").write_text("RUNNING   0\n")
    for again in (words, ("resume", *words[1:])):
        status, _, said = told(capsys, *again)
        assert status == 2 and "was handed over as slurm job 4711, which is running" in said
    (clients / "squeue.says").write_text("COMPLETED   0\n")
    assert told(capsys, *words)[0] == 0


def test_the_results_of_an_earlier_attempt_are_kept(
    clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "one")
    write_text(run.metrics, "{}\n")
    assert told(capsys, "resume", run.root, "--backend", "slurm")[0] == 0
    assert run.metrics.exists()
    (clients / "squeue.says").write_text("FAILED   0\n")
    assert told(capsys, "launch", run.root, "--backend", "slurm")[0] == 0
    assert not run.metrics.exists() and (run.previous / "1" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "slum"], "unknown backend `slum` hint: did you mean `slurm`?"),
        (
            ["--backend", "slurm", "--backend-option", "acount=x"],
            "unknown option `acount` hint: did you mean `account`",
        ),
        (["--backend", "slurm", "--backend-option", "account"], "write it `account=VALUE`"),
        (["--backend-option", "account=x"], "the run is carried out here"),
    ],
)
def test_what_no_engine_takes_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, message = told(capsys, "launch", write_plan(tmp_path / "one").root, *words)
    assert status == 2 and said in message


def test_a_missing_client_and_its_refusal_are_told(
    clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "one")
    (clients / "sbatch.error").write_text("sbatch: error: invalid partition\n")
    status, _, said = told(capsys, "launch", run.root, "--backend", "slurm")
    assert status == 2 and "`sbatch` refused: invalid partition" in said
    assert not run.job.exists()
    (clients / "sbatch").unlink()
    status, _, said = told(capsys, "launch", run.root, "--backend", "slurm")
    assert status == 2 and "Slurm's `sbatch` is not here" in said


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        ("PENDING  0", "", "pending"),
        ("PENDING  2", "", "requeued"),
        ("RUNNING  2", "", "running"),
        ("COMPLETED  0", "", "finished"),
        ("TIMEOUT  0", "", "failed"),
        ("", "CANCELLED by 1000", "cancelled"),
        ("", "OUT_OF_MEMORY", "failed"),
        ("", "", "unknown"),
    ],
)
def test_states_of_slurm_are_understood(squeue: str, sacct: str, state: str, clients: Path) -> None:
    (clients / "squeue.says").write_text(squeue)
    (clients / "sacct.says").write_text(sacct)
    assert slurm.Backend().state("7") == state


def test_a_forgotten_job_is_unknown_also_where_there_are_no_accounts(clients: Path) -> None:
    (clients / "squeue.error").write_text("slurm_load_jobs error: Invalid job id specified\n")
    (clients / "sacct.error").write_text("Slurm accounting storage is disabled\n")
    assert slurm.Backend().state("7") == "unknown"


@pytest.mark.parametrize(
    ("job_state", "files_say", "listed"),
    [
        ("PENDING  0", "not started", "pending"),
        ("PENDING  1", "interrupted", "pending"),
        ("RUNNING  0", "not started", "running"),
        ("RUNNING  0", "training", "running"),
        ("FAILED  0", "not started", "failed"),
        ("NODE_FAIL  0", "training", "failed"),
        ("CANCELLED  0", "not started", "not started"),
        ("CANCELLED  0", "training", "interrupted"),
        ("FAILED  0", "interrupted", "interrupted"),
        ("COMPLETED  0", "not started", "finished"),
        ("COMPLETED  0", "training", "finished"),
        ("COMPLETED  0", "interrupted", "interrupted"),
    ],
)
def test_the_list_of_runs_asks_the_engine(
    job_state: str, files_say: str, listed: str, clients: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = write_plan(tmp_path / "runs" / "one")
    assert told(capsys, "launch", run.root, "--backend", "slurm")[0] == 0
    if files_say != "not started":
        elsewhere = {**named_process(), "host": "node7"}
        write_json(run.status, {"stage": files_say, "process": elsewhere})
    (clients / "squeue.says").write_text(job_state)
    shown = told(capsys, "runs", "--runs-dir", tmp_path / "runs")[1]["runs"]
    assert [(one["state"], one["job"]) for one in shown] == [(listed, "slurm job 4711")]
    shown = told(capsys, "runs", "show", run.root)[1]
    going = listed in ("pending", "running")
    assert shown["state"] == listed
    assert (f"ftplan cancel {run.root}" in shown["commands"]) is going


def test_a_running_job_is_asked_to_end_and_not_started_again(
    clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "one")
    assert told(capsys, "launch", run.root, "--backend", "slurm")[0] == 0
    (clients / "squeue.says").write_text("RUNNING 0")
    status, shown, said = told(capsys, "cancel", run.root)
    assert status == 0 and not shown["ended"] and "asked to end" in said
    asked = ["scontrol update JobId=4711 Requeue=0", "scancel --batch --signal=TERM 4711"]
    assert [line for line in called(clients) if line.startswith("sc")] == asked


def test_a_pending_job_is_taken_out_of_the_queue(
    clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "one")
    assert told(capsys, "launch", run.root, "--backend", "slurm")[0] == 0
    (clients / "squeue.says").write_text("PENDING 0")
    assert told(capsys, "cancel", run.root)[1]["ended"]
    assert called(clients)[-1] == "scancel 4711"
    (clients / "squeue.says").write_text("CANCELLED 0")
    status, _, said = told(capsys, "cancel", run.root)
    assert status == 2 and "does not go on" in said


@pytest.mark.parametrize("job_id", ["1,2", "--user=me", "", "7; rm", "all"])
def test_what_is_no_number_of_a_job_is_not_cancelled(
    job_id: str, clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "runs" / "one")
    written = {"schema": 1, "backend": "slurm", "id": job_id, "submitted_at": "today"}
    write_json(run.job, written)
    status, _, said = told(capsys, "cancel", run.root)
    assert status == 2 and "is not the id of a job" in said and "job.json" in said
    assert not called(clients)
    assert told(capsys, "runs", "--runs-dir", tmp_path / "runs")[0] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "lsf"}, "of an engine that is not known here: `lsf`"),
        ({"id": None}, "is damaged"),
        ({"files": 5}, "is damaged"),
        ({"options": ["partition=gpu"]}, "is damaged"),
        ({"options": {"partition": 5}}, "is damaged"),
    ],
)
def test_a_damaged_or_foreign_job_file_is_told(
    changes: dict[str, Any], said: str, clients: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = write_plan(tmp_path / "runs" / "one")
    whole = {"schema": 1, "backend": "slurm", "id": "7", "submitted_at": "today"}
    write_json(run.job, whole | changes)
    for words in (("cancel", run.root), ("resume", run.root, "--backend", "slurm")):
        status, _, message = told(capsys, *words)
        assert status == 2 and said in message and "job.json" in message
    status, shown, _ = told(capsys, "runs", "--runs-dir", tmp_path / "runs")
    assert status == 0 and [one["state"] for one in shown["runs"]] == ["not started"]
    assert not called(clients)


def test_commands_to_be_copied_are_quoted(
    clients: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "my runs" / "one")
    assert cli.main(["launch", str(run.root), "--backend", "slurm"]) == 0
    assert f"ftplan cancel '{run.root}'" in capsys.readouterr().out
    write_json(run.record, {"schema": 1})
    status, _, said = told(capsys, "resume", run.root, "--backend", "slurm")
    assert status == 2 and f"`ftplan launch '{run.root}'`" in said
    assert f"again       ftplan launch '{run.root}'" in result_lines(
        run, {"method": "lora", "output": "adapter"}
    )


def test_a_run_in_a_bucket_is_told_from_the_engine_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it is written here; SkyPilot does not wait for a checkpoint, which is said."""
    client = StandIn(tmp_path, "sky", monkeypatch)
    run = write_plan(tmp_path / "runs" / "one")
    handed = {"backend": "sky", "id": "12", "options": {"bucket": "s3://mine/runs/"}}
    write_json(run.job, {"schema": 1, "submitted_at": "today", **handed})
    client.answers('[{"job_id": 12, "status": "RUNNING"}]')
    status, shown, said = told(capsys, "cancel", run.root)
    assert status == 0 and not shown["ended"] and "sky does not wait for a checkpoint" in said
    assert client.calls[-1] == ["jobs", "cancel", "--yes", "--graceful", "12"]
    client.answers('[{"job_id": 12, "status": "SUCCEEDED"}]')
    shown = told(capsys, "runs", "show", run.root)[1]
    assert shown["state"] == "finished"
    assert shown["why"] == "sky job 12 has finished; its results are in s3://mine/runs/one"


def test_a_run_of_this_machine_gets_sigterm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "one")
    with subprocess.Popen(["sleep", "60"]) as child:
        write_json(run.status, {"stage": "training", "process": named_process(child.pid)})
        status, shown, _ = told(capsys, "cancel", run.root)
        assert child.wait() == -15
    assert status == 0 and shown == {
        "schema": 1, "run_dir": str(run.root), "job": None, "ended": True, "checkpoint": None,
    }  # fmt: skip


def test_a_run_of_another_machine_is_not_ended_from_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_plan(tmp_path / "one")
    write_json(run.status, {"stage": "training", "process": {"pid": 7, "host": "elsewhere"}})
    status, _, said = told(capsys, "cancel", run.root)
    assert status == 2 and "process 7 on elsewhere" in said


def test_stages_are_carried_out_on_one_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump({"schema": 1, "stages": []}))
    for backend, way in (("slurm", "srun --nodes=1"), ("ray", "without `--backend`")):
        for verb in ("launch", "resume"):
            status, _, said = told(capsys, verb, tmp_path, "--backend", backend)
            assert status == 2 and "several stages" in said
            assert way in said and f"ftplan {verb} {tmp_path}`" in said


def test_an_unfilled_job_is_the_engine_s_to_fill(tmp_path: Path) -> None:
    """What no plan says is left to the cluster's own defaults."""
    made = structs.replace(job(write_plan(tmp_path / "run")), cpus_per_machine=None, seconds=None)
    asked = directives(slurm.script(made))
    assert "cpus-per-task" not in asked and "time" not in asked


def test_every_engine_is_listed() -> None:
    modules = Path(slurm.__file__).parent.glob("*.py")
    engines = {path.stem for path in modules if "\nclass Backend:" in path.read_text()}
    assert engines <= set(BACKENDS)
    assert BACKENDS["slurm"] == slurm.__name__
