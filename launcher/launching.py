"""From a plan to a run directory, and from a run directory to a finished run and its report."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import structs

from ftplan.launcher import emit, remote_code
from ftplan.launcher.backends.jobs import check_no_job
from ftplan.launcher.data.data_file import DataFile
from ftplan.launcher.data.overlong import Fate
from ftplan.launcher.data.profiling import (
    held_out_fate,
    left_out_for_length,
    make_split,
    profile_to_dict,
)
from ftplan.launcher.data.tasks import tasks_of
from ftplan.launcher.deepspeed import check_installed, check_parts
from ftplan.launcher.estimate_json import estimate_to_dict
from ftplan.launcher.formula_figures import uncalibrated
from ftplan.launcher.gpu_samples import Sampling
from ftplan.launcher.hangs import HangWatch
from ftplan.launcher.host import usable_cores
from ftplan.launcher.lock import HELD_BY_LAUNCHER, held
from ftplan.launcher.manifest import total_bytes
from ftplan.launcher.model_source import source_from_folder
from ftplan.launcher.next_plans import cheaper_plans, write_next_plans
from ftplan.launcher.notices import Notices
from ftplan.launcher.packages import require_training
from ftplan.launcher.parallelism import on_processes, sizes_on
from ftplan.launcher.plan_cautions import plan_cautions
from ftplan.launcher.planning import Planned, settled
from ftplan.launcher.probe import probe_machine
from ftplan.launcher.process import Watch, run_to_end, watched_by
from ftplan.launcher.ran_out import ladder_at_the_end
from ftplan.launcher.reward_source import folders
from ftplan.launcher.run_dir import (
    RunDir,
    create_run,
    read_mapping,
    write_json,
    write_text,
    write_yaml,
)
from ftplan.launcher.trackers import require_trackers
from ftplan.launcher.training.config import MicroBatches
from ftplan.launcher.ui import Ui
from ftplan.launcher.user_data import remember
from ftplan.launcher.version import version
from ftplan.launcher.versions import unlike
from ftplan.launcher.watching import live_view
from ftplan.planner.errors import InputError, RunFailedError
from ftplan.planner.hardware_spec import Device
from ftplan.planner.host_verdict import run_disk_bytes
from ftplan.planner.methods import resolve_method
from ftplan.planner.plan import ReasonedPlan, TrainingPlan
from ftplan.planner.ranking import Evaluated
from ftplan.planner.teams import divided, roomiest
from ftplan.planner.trained import target_names
from ftplan.planner.units import GIB, MIB, format_bytes

# Data files up to this size are copied into the run directory, so that the run can be repeated
# from it alone; larger ones are pointed at, and their SHA-256 is checked.
COPIED_DATA_BYTES = 64 * MIB

# The check of a checkpoint this large takes a second or more, which is said.
_SAID_BYTES = GIB


def write_run(
    planned: Planned, name: str | None, runs_dir: Path, of_stage: Mapping[str, Any] | None = None
) -> RunDir:
    """The run directory of a plan, whole or not at all. `of_stage`: what train.yaml says of a run
    that is one of several stages."""
    run = create_run(runs_dir, name or default_name(planned))
    try:
        _write_files(run, planned, of_stage or {})
    except BaseException:
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    return run


def default_name(planned: Planned) -> str:
    """`smollm2-135m-instruct-lora-python_docs`."""
    parts = (
        planned.source.spec.name,
        planned.chosen.plan.method,
        planned.data.source.files[0].path.name.partition(".")[0],
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.")


def _write_files(run: RunDir, planned: Planned, of_stage: Mapping[str, Any]) -> None:
    plan, device = planned.chosen.plan, planned.device
    model = planned.source
    assert planned.hashes and planned.tokenizer, "what is launched has a tokenizer"
    tasks = tasks_of(planned.data, planned.eval_data)
    train_config = partial(
        emit.train_config,
        device=device,
        model=str((model.folder or Path()).resolve()),
        data=_data_config(run, planned.data),
        eval_data=_data_config(run, planned.eval_data) if planned.eval_data else None,
        test_share=planned.asked.test_share,
        hashes=planned.hashes.to_dict(),
        reward_model=folders(model.reward_model),
        template_text=planned.tokenizer.chosen.text,
        token_ids=planned.tokenizer.trained_ids,
        tasks=tasks.to_dict() if tasks else None,
    )

    def train_of(plan: TrainingPlan) -> dict[str, Any]:
        named = target_names(model.spec, plan.target_modules)
        return train_config(plan.replace(target_modules=named))

    train = {**train_of(plan), **of_stage}
    write_yaml(run.train, train, "Read by the training process.")
    if not of_stage:  # the stages after it go on from what this one trains
        _write_next_plans(run, planned, train_of)
    write_yaml(run.accelerate, emit.accelerate_config(plan, device))
    profile = profile_to_dict(planned.profile, model.spec, plan.max_length)
    write_json(run.data_profile, profile)
    _write_left_out(run, planned)
    write_text(run.command, command_text(run, planned))
    # Last: a directory without its plan is not a run directory.
    write_yaml(run.plan, plan_to_dict(planned), "What was planned, and why.")


def _write_next_plans(
    run: RunDir, planned: Planned, train_of: Callable[[TrainingPlan], dict[str, Any]]
) -> None:
    """The runners-up that need less, for when memory runs out."""

    def files_of(other: Evaluated) -> dict[str, Any]:
        instead = structs.replace(planned, chosen=other, closed_form=None)
        return {
            "plan": plan_to_dict(instead),
            "train": train_of(other.plan),
            "accelerate": emit.accelerate_config(other.plan, planned.device),
        }

    cheaper = cheaper_plans(planned.chosen, planned.ranking)
    profile, given = planned.profile, planned.offer.given
    write_next_plans(run, [settled(other, profile, given) for other in cheaper], files_of)


def _data_config(run: RunDir, data: DataFile) -> dict[str, Any]:
    """What the training process needs to read the same rows."""
    return {
        "files": _keep_data(run, data),
        "sha256": data.sha256,
        "columns": dict(data.columns),
    }


def _keep_data(run: RunDir, data: DataFile) -> list[str]:
    """The files' paths as the run knows them: copies inside, or where they are."""
    paths = [file.path for file in data.source.files]
    if data.source.size_bytes > COPIED_DATA_BYTES:
        return [str(path.resolve()) for path in paths]
    run.data.mkdir(exist_ok=True)
    kept = []
    for path in paths:
        target, number = run.data / path.name, 2
        while target.exists():  # files of several folders may have one name
            target = run.data / f"{number}-{path.name}"
            number += 1
        shutil.copyfile(path, target)
        kept.append(str(target.relative_to(run.root)))
    return kept


def _write_left_out(run: RunDir, planned: Planned) -> None:
    """Every row that is not trained on, with its reason; no file where there is none."""
    data, eval_data = planned.data, planned.eval_data
    split = make_split(data, eval_data, planned.asked.test_share)
    fates = [data.fate(split.trains), held_out_fate(data, split, eval_data)]
    if eval_data:
        lines = [*_left_out_of(data, fates[0]), *_left_out_of(eval_data, fates[1])]
    else:
        lines = _left_out_of(data, *fates)
    if lines:
        write_text(run.left_out, "".join(json.dumps(line) + "\n" for line in lines))


def _left_out_of(data: DataFile, *fates: Fate) -> list[dict[str, Any]]:
    """A file's rows that cannot be used and those left out for their length, in its order."""
    unusable = data.left_out() if data.troubles else ()
    found = sorted((*unusable, *left_out_for_length(data, *fates)))
    return [
        {"file": data.source.files[file].path.name, "number": number, "why": why}
        for (file, number), why in found
    ]


def command_text(run: RunDir, planned: Planned) -> str:
    """What command.txt holds: the run as a line for a shell."""
    plan, team = planned.chosen.plan, planned.chosen.team
    devices = team.members or (team.device,)
    settings = emit.environment_changes(devices, plan, usable_cores())
    return emit.shell_line(emit.launch_command(run), settings) + "\n"


def plan_to_dict(planned: Planned) -> dict[str, Any]:
    """plan.yaml: what was planned for what, and the figures that the run is compared with."""
    spec, device = planned.source.spec, planned.device
    return {
        "schema": 1,
        "ftplan": version(),
        "planned_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": {
            "name": spec.name,
            "hub_id": planned.source.hub_id,
            "num_parameters": spec.num_parameters,
            "why": planned.model_why,
        },
        "device": {
            "name": device.name,
            "kind": device.kind,
            "free_bytes": device.free_bytes,
            "rates_source": device.rates_source,
        },
        "steps": planned.steps,
        "plan": planned.chosen.reasoned.to_dict(),
        "predicted": predicted(planned),
        "needs": _needs(planned),
        "estimate": estimate_to_dict(
            spec,
            planned.chosen.reasoned,
            planned.chosen.memory,
            device,
            plan_cautions(planned),
            planned.chosen.step,
            confirmed=planned.confirmed,
            margin=planned.ranking.margin,
        ),
    }


def _needs(planned: Planned) -> dict[str, int]:
    """Of the machine around the device, which the training process asks for once more."""
    profile, memory = planned.profile, planned.chosen.memory
    num_tokens = profile.train_counts.num_tokens + profile.eval_counts.num_tokens
    return {
        "host_ram_bytes": memory.host.required_bytes,
        "disk_bytes": run_disk_bytes(memory, planned.chosen.plan, planned.steps, num_tokens),
    }


def predicted(planned: Planned) -> dict[str, Any]:
    """The figures that a run measures, under the names of record.json's `measured`."""
    memory, step = planned.chosen.memory, planned.chosen.step
    return {
        "allocated_bytes": memory.allocated_peak_bytes,
        "reserved_bytes": memory.reserved_peak_bytes,
        "device_bytes": memory.device_peak_bytes,
        "closed_form_device_bytes": planned.closed_form and planned.closed_form.device_peak_bytes,
        "step_seconds": step.step_seconds,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "train_seconds": planned.steps * step.step_seconds,
        "evaluation_seconds": planned.evaluation_time.whole.expected,
        **uncalibrated(planned),
    }


def carry_out(
    ui: Ui,
    run: RunDir,
    planned: Planned | None = None,
    *,
    resume: bool = False,
    anew: bool = False,
    is_last: bool = True,
    num_gpus: int | None = None,
) -> dict[str, Any]:
    """Launch the run, show how it goes, and report; returns its record. `planned`: what it came
    of, where that is at hand; `resume`: from its last whole checkpoint; `anew`: after the results
    of an earlier attempt have been set aside; `is_last`: nothing follows that goes on with what
    was made; `num_gpus`: another number than was planned, with the same rows in each step.

    Raises RunFailedError, InterruptedRunError, or InputError when it cannot start here or goes on
    already.
    """
    require_training()
    check_no_job(run)
    _plan_on(run, run.read_plan(), num_gpus)  # before results are set aside
    model = Path(read_mapping(run.train).get("model", ""))
    if (model / "config.json").is_file():
        remote_code.check(source_from_folder(model, any_architecture=True))
    with held(run.root):
        checkpoint = going_on_from(ui, run) if resume else None
        anew = anew or (resume and checkpoint is None)
        if anew and (kept := run.set_results_aside()) is not None:
            ui.say(f"results of the earlier attempt are kept in {kept}")
        with ladder_at_the_end(ui, run, planned):
            return _carry_out(ui, run, checkpoint, is_last, num_gpus)


def going_on_from(ui: Ui, run: RunDir) -> Path | None:
    """The last checkpoint whose files are what was written; None without any."""
    newest = run.last_checkpoint()
    size = (total_bytes(newest) if newest else None) or 0
    if size > _SAID_BYTES:
        ui.say(f"checking the last checkpoint, {format_bytes(size)} ...")
    checkpoint = run.last_checkpoint(ui.warn, hashes=True)
    if checkpoint is None:
        ui.say("there is no checkpoint to go on from: beginning anew")
        return None
    ui.say(f"going on from {checkpoint.name}")
    if run.environment.is_file():
        for said in unlike(read_mapping(run.environment)):
            ui.warn(said)
    return checkpoint


def _carry_out(
    ui: Ui, run: RunDir, checkpoint: Path | None, is_last: bool, num_gpus: int | None
) -> dict[str, Any]:
    from ftplan.launcher.report.write import report_end

    written = run.read_plan()
    plan = _plan_on(run, written, num_gpus)
    check_installed(plan.sharding)
    check_parts(checkpoint, plan.num_gpus)
    devices = _devices_for(ui, run, written, plan)
    for notice in require_trackers(plan.report_to, os.environ, run):
        ui.say(notice)
    environment = emit.launch_environment(os.environ, devices, plan, usable_cores())
    environment[HELD_BY_LAUNCHER] = "1"
    try:
        with (
            Sampling(run, devices) as samples,
            live_view(ui, run, written, samples, resumes=checkpoint is not None) as live,
        ):
            hangs = HangWatch(ui, run, written["predicted"].get("step_seconds"))
            watch = watched_by(Notices(ui).update, live.update, hangs.update)
            run_through(run, environment, watch, checkpoint, num_gpus)
    finally:
        report_end(ui, run)
    record = run.read_record()
    remember(ui, run)
    from ftplan.launcher import views

    if not ui.as_json:
        ui.show("", views.report(record), "")
        if is_last:
            ui.show_lines(result_lines(run, record))
    if said := views.said_forgetting(record):
        ui.warn(said)
    return record


def _plan_on(run: RunDir, written: Mapping[str, Any], num_gpus: int | None) -> TrainingPlan:
    """The plan; raises InputError where so many GPUs cannot carry it out."""
    plan = planned_settings(run, written)
    if num_gpus is None:
        return plan
    plan = on_processes(plan, read_mapping(run.accelerate), num_gpus)
    MicroBatches.planned(read_mapping(run.train)).accumulation_steps_of(plan.data_parallel_size)
    return plan


def run_through(
    run: RunDir,
    environment: Mapping[str, str],
    watch: Watch,
    checkpoint: Path | None,
    num_processes: int | None = None,
) -> None:
    """The run to its end. Where memory has run out on one of several GPUs, all processes are
    started again, with what it has given up. `num_processes`: None for as many as planned."""
    command_for = partial(
        emit.launch_command,
        run,
        trusts_code=remote_code.is_allowed(),
        sizes=sizes_on(read_mapping(run.accelerate), num_processes) if num_processes else None,
    )
    command = command_for(checkpoint)
    while True:
        try:
            return run_to_end(run, command, environment, watch)
        except RunFailedError:
            if not run.read_status().get("again"):
                raise
        command = command_for(run.last_checkpoint(hashes=True), again=True)


def planned_settings(run: RunDir, written: Mapping[str, Any]) -> TrainingPlan:
    """The plan's settings; raises InputError where plan.yaml has been damaged."""
    settings = written.get("plan")
    if not isinstance(settings, Mapping) or "predicted" not in written or "model" not in written:
        raise InputError(f"`{run.plan}` lacks `plan`, `model` or `predicted`")
    return ReasonedPlan.from_dict(settings).plan


def _devices_for(
    ui: Ui, run: RunDir, written: Mapping[str, Any], plan: TrainingPlan
) -> Sequence[Device]:
    """The devices to run on now: of the planned kind, with the most free memory."""
    kind = (written.get("device") or {}).get("kind")
    machine = probe_machine(run_dir=run.root)
    if kind == "cpu":
        return (divided(machine.cpu, plan.num_gpus),)
    if not machine.gpus:
        raise InputError(
            "this run was planned for a GPU, and there is none here",
            f"plan again for this machine with `ftplan auto {run.data}/...`",
        )
    if plan.num_gpus > len(machine.gpus):
        raise InputError(
            f"this run is for {plan.num_gpus} GPUs, and {len(machine.gpus)} are here",
            f"`ftplan resume {run.quoted} --num-gpus {len(machine.gpus)}` carries it out on those",
        )
    team = roomiest(machine.gpus, plan.num_gpus)
    device = team.device
    required = written["estimate"]["per_gpu"]["required_bytes"]
    if required > device.free_bytes:
        ui.warn(
            f"the plan needs {format_bytes(required)}, "
            f"{format_bytes(device.free_bytes)} is free on {device.name} now"
        )
    return team.members


def result_lines(run: RunDir, record: Mapping[str, Any]) -> list[str]:
    """What was made, where it is, and how to use it: lines to be copied."""
    folder, root = run.root / record["output"], run.quoted
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [
        f"{record['output']:<10}  {folder} ({format_bytes(size)})",
        f"report      {run.report}",
        f"figures     {run.record}",
        f"again       ftplan launch {root}",
        *([f"one model   ftplan merge {root}"] if is_merged_by_ftplan(record) else []),
        "use it",
        *(f"    {line}" for line in _loading_lines(record, folder)),
    ]


def is_merged_by_ftplan(record: Mapping[str, Any]) -> bool:
    """Whether a run's result is an adapter that `ftplan merge` takes."""
    method = resolve_method(record["method"])
    return record["output"] == "adapter" and method.has_rank and method.peft_type is not None


def _loading_lines(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Python that loads what was trained."""
    if record["method"] == "bottleneck":
        imported, call = "from ftplan.launcher.training import bottlenecks", "bottlenecks.load("
    elif record["output"] == "adapter":
        imported = "from peft import AutoPeftModelForCausalLM"
        call = "AutoPeftModelForCausalLM.from_pretrained("
    else:
        imported = "from transformers import AutoModelForCausalLM"
        call = "AutoModelForCausalLM.from_pretrained("
    return [
        imported,
        f"model = {call}",
        f'    "{folder}"',
        ")",
        *_stopping_lines(folder, record),
    ]


def _stopping_lines(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Adapters are loaded with the base's ends of generation, of which answers may have others."""
    ends = record.get("tokenizer", {}).get("end_token_ids", ())
    if record["output"] != "adapter" or len(ends) < 2:
        return []
    return [
        "from transformers import GenerationConfig",
        "model.generation_config = GenerationConfig.from_pretrained(",
        f'    "{folder}"',
        ")",
    ]
