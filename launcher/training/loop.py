"""One run from its directory: load, evaluate, train, evaluate, save, record."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct, field, to_builtins
from transformers import set_seed

from ftplan.launcher.data.tokens import RowTokenizer, load_tokenizer
from ftplan.launcher.deepspeed import check_parts
from ftplan.launcher.disk_full import is_disk_full
from ftplan.launcher.gpu_samples import sampled_peaks
from ftplan.launcher.lock import held_for_training
from ftplan.launcher.manifest import read_manifest
from ftplan.launcher.metrics_file import append_row
from ftplan.launcher.model_card import write_card
from ftplan.launcher.processes import named_process
from ftplan.launcher.run_dir import (
    RunDir,
    overwrite_json,
    parsed_row,
    write_bytes,
    write_json,
)
from ftplan.launcher.step_seconds import mean_step_seconds, settled_tokens_per_second
from ftplan.launcher.training.adapters import settle_adapters
from ftplan.launcher.training.bad_steps import StepGuard
from ftplan.launcher.training.build import apply_method, count_trainable, load_model
from ftplan.launcher.training.checkpoints import CheckpointKeeper
from ftplan.launcher.training.config import TrainConfig, read_train_config
from ftplan.launcher.training.cycles.choice import add_cycle
from ftplan.launcher.training.cycles.cycle import Cycle
from ftplan.launcher.training.cycles.restarts import Restarts
from ftplan.launcher.training.evaluation import (
    Evaluator,
    asked_rows,
    evaluation_record,
    forgetting_record,
    samples_record,
)
from ftplan.launcher.training.heartbeat import Heartbeat
from ftplan.launcher.training.loftq import begin_with_what_is_lost
from ftplan.launcher.training.machine_facts import machine_facts
from ftplan.launcher.training.measure import (
    CpuAllocationRecorder,
    measured_memory,
)
from ftplan.launcher.training.objectives import make_trainer, trainer_arguments
from ftplan.launcher.training.optimizers import settle_optimizer
from ftplan.launcher.training.out_of_memory import Recovery, StartAgain, carried_through
from ftplan.launcher.training.phase_peaks import PhasePeaks
from ftplan.launcher.training.prefix_start import begin_with_words
from ftplan.launcher.training.preflight import (
    MOVED_ROW,
    PREFLIGHT,
    WeightsMovedError,
    check_machine,
    has_moved_weights,
    is_worth_trying,
    preflight_record,
    try_longest_batches,
)
from ftplan.launcher.training.reporting import settle_reporting
from ftplan.launcher.training.rewards import reward_functions
from ftplan.launcher.training.rows import RunRows, TrainingRows, read_rows, remove_token_files
from ftplan.launcher.training.saving import write_whole
from ftplan.launcher.training.sharded import divided_on_processors, is_divided, spread, whole_state
from ftplan.launcher.training.stages import (
    going_on,
    keep_rows,
    look_back,
    with_replayed,
    with_trained_adapter,
)
from ftplan.launcher.training.stopping import StopOnSignal, Stopped
from ftplan.launcher.training.tasks import TaskMix, TaskReporter
from ftplan.launcher.training.trainer import PlannedTrainer, StepReporter, append_metric
from ftplan.launcher.training.vocabulary import (
    add_rows,
    save_rows_alone,
    save_tokenizer,
    settle_ends,
)
from ftplan.launcher.training.zero import join, with_deepspeed
from ftplan.launcher.versions import installed
from ftplan.planner.errors import RunFailedError
from ftplan.planner.methods import resolve_method
from ftplan.planner.out_of_memory import EVENT as OUT_OF_MEMORY
from ftplan.planner.overlong import overlong_to_dict


class _Session(Struct):
    """What is needed throughout a run."""

    run: RunDir
    config: TrainConfig
    tokenizer: RowTokenizer
    reporter: StepReporter
    recorder: CpuAllocationRecorder
    recovery: Recovery
    phases: PhasePeaks
    stopping: StopOnSignal = field(default_factory=StopOnSignal)
    training: bool = False
    status: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    cycle: Cycle | None = None
    guard: StepGuard | None = None
    told: float = field(default_factory=time.monotonic)
    process: dict[str, Any] = field(default_factory=named_process)

    def say(self, stage: str, **details: Any) -> None:
        """Tell the launcher what is going on."""
        self.status = {"stage": stage, "pid": os.getpid(), "process": self.process, **details}
        self._write_status()

    def notice(self, text: str) -> None:
        """Tell the person at the terminal of something, once."""
        self.notices.append(text)
        self._write_status()

    def _write_status(self) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        told = {"notices": self.notices} if self.notices else {}
        try:
            write_json(self.run.status, {**self.status, **told})
        except OSError as error:
            if not is_disk_full(error):
                raise
            # What fits into the file's own block needs no room.
            overwrite_json(self.run.status, {**self.status, **told})

    def note_lacking(self, lacking: Sequence[str]) -> None:
        """Tell what a person should know before the model is loaded."""
        if os.environ.get("RANK", "0") == "0":
            for said in lacking:
                append_metric(self.run, {"event": PREFLIGHT, "said": said})

    def tell_rows(self, done: int, of: int) -> None:
        """How many rows have been put into tokens; once a second."""
        if time.monotonic() - self.told > 1:
            self.told = time.monotonic()
            self.say("reading the data", rows=done, of_rows=of)

    def on_signal(self, number: int, frame: object) -> None:
        if not self.training:
            raise Stopped(128 + number)
        self.stopping.ask(number)


def train(run: RunDir, *, resume: bool | str) -> int:
    """Carry the run out; returns the exit status. `record.json` is written last.

    `resume`: from the last whole checkpoint, or from that of a name. Raises RunFailedError where
    memory runs out and nothing is left to give up.
    """
    with held_for_training(run.root):
        return carried_through(run, read_train_config, partial(_attempt, run), resume=resume)


def _attempt(run: RunDir, recovery: Recovery, resume: bool | str) -> int:
    started = time.time()
    config = recovery.lowered_config()
    recorder = CpuAllocationRecorder()
    reporter = StepReporter(run, recorder)
    tokenizer = load_tokenizer(config.model, config.template, add_tokens=config.add_tokens)
    phases = PhasePeaks(run, recorder)
    reporter.highest = phases.highest
    session = _Session(run, config, tokenizer, reporter, recorder, recovery, phases)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, session.on_signal)
    try:
        return _train(session, resume=resume, started=started)
    except Stopped as stopped:
        session.say("interrupted", checkpoint=_checkpoint_name(run))
        return stopped.exit_status
    except RunFailedError:
        session.say("failed", checkpoint=_checkpoint_name(run))
        raise
    finally:
        with contextlib.suppress(RuntimeError, MemoryError):  # of less interest than what is raised
            recorder.stop()
        remove_token_files(run.tokens)


def _train(session: _Session, *, resume: bool | str, started: float) -> int:
    run, config = session.run, session.config
    session.note_lacking(check_machine(run, config, resume=bool(resume)))
    session.say("reading the data")
    rows = read_rows(config, session.tokenizer, run.tokens, session.tell_rows)
    session.say("loading the model")
    trained_rows = with_replayed(rows.train, config, run.tokens)
    trainer = build_trainer(session, trained_rows, rows.held_out)
    session.phases.end("load", trainer.model)
    asked = asked_rows(config, session.tokenizer, rows.asked)
    evaluator = Evaluator(trainer, session.tokenizer, config, asked, session.say)
    loaded = time.time()
    checkpoint = _checkpoint_of(session, resume)
    check_parts(checkpoint, trainer.args.world_size)
    if resume and trainer.is_world_process_zero():
        forget_rows_after(run, checkpoint)
    before = _earlier_evaluation(run) if resume else None
    if before is None:
        before = _evaluate(session, evaluator, "before")
    if trainer.is_world_process_zero():
        write_json(run.environment, environment())
    if checkpoint is None:
        _try_longest_batches(session, trainer)
    preparing = time.time()
    if session.cycle is not None:
        session.say("preparing the adapters")
        session.cycle.prepare(trainer, checkpoint)
    session.say("training", step=trainer.state.global_step)
    began = time.time()
    keep_checkpoints(session, trainer)
    session.training = True
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    session.training = False
    trained = time.time()
    if session.stopping.exit_status is not None:
        raise Stopped(session.stopping.exit_status)
    if session.guard is not None and session.guard.failure is not None:
        raise session.guard.failure
    memory = measured_memory(session.recorder, session.phases.highest())
    after = _evaluate(session, evaluator, "after", before)
    earlier = _of_stages(session, trainer, rows.train)
    session.say("saving")
    saving = time.time()
    output = session.recovery.saved(lambda: save(session, trainer), trainer)
    saved = time.time()
    session.phases.end("save")
    session.phases.tell()
    if trainer.is_world_process_zero():
        seconds = {"load": loaded - started, "train": trained - began, "save": saved - saving}
        if checkpoint is None or session.cycle is None:
            seconds["prepare"] = began - preparing
        seconds["total"] = time.time() - started
        record = make_record(session, trainer, rows, before, after, memory, seconds, output)
        record |= earlier | session.recovery.record() | preflight_record(run)
        write_card(run, record, run.root / output)
        write_json(run.record, record)
        session.say("finished")
    return 0


def _try_longest_batches(session: _Session, trainer: Any) -> None:
    """Where it is worth its time; once, however often the run is started."""
    run, recovery = session.run, session.recovery
    if recovery.tried or has_moved_weights(run) or not is_worth_trying(run, session.config):
        return
    session.say("trying the longest batches")
    try:
        row = try_longest_batches(trainer, run.read_plan()["predicted"])
    except WeightsMovedError:
        append_row(run.metrics, MOVED_ROW)  # by any rank: those that start anew read it
        raise StartAgain from None
    recovery.tried = True
    if trainer.is_world_process_zero():
        append_metric(run, row)
        session.say("trying the longest batches", measured=row["measured"])


def build_trainer(session: _Session, train_rows: TrainingRows, eval_rows: TrainingRows) -> Any:
    """The trainer with model, method and data in place."""
    config, run = session.config, session.run
    objective = config.objective
    planned = with_deepspeed(config.training_arguments, config.deepspeed)
    arguments = planned_arguments(objective, planned, str(run.checkpoints))
    settle_reporting(arguments, config.report_to, run)
    join(config.deepspeed)
    set_seed(arguments.seed)
    model = load_model(config.model, config.method_settings, arguments.device.type)
    add_rows(model, session.tokenizer)
    settle_ends(model, session.tokenizer)
    peft_config = apply_method(model, config.method, config.method_settings)
    if config.adapter is not None:
        model, peft_config = with_trained_adapter(model, peft_config, config.adapter), None
    tasks = TaskMix(config, train_rows.tasks) if train_rows.tasks is not None else None
    reporters: list[Any] = [TaskReporter(tasks)] if tasks and objective == "sft" else []
    common = {
        "model": model,
        "args": arguments,
        "train_dataset": train_rows.dataset,
        "eval_dataset": eval_rows.dataset,
        "row_lengths": train_rows.lengths,
        "micro_batches": config.micro_batches,
        "processing_class": session.tokenizer.tokenizer,
        "peft_config": peft_config,
        "callbacks": [*reporters, session.reporter, session.phases, session.stopping],
        **({"tasks": tasks} if tasks else {}),
    }
    if config.rewards:
        common["reward_funcs"] = reward_functions(config.rewards, arguments.device)
    with going_on(model), divided_on_processors():
        trainer = make_trainer(objective, config.loss, **common)
    settle_adapters(trainer.model, config.method_settings, tasks.losses if tasks else None)
    if config.method == "loftq" and config.adapter is None:
        begin_with_what_is_lost(trainer.model, config.model)
    if config.adapter is None:
        begin_with_words(trainer.model, session.tokenizer.tokenizer, config.method_settings)
    optim = config.training_arguments["optim"]
    settle_optimizer(trainer, config.method, optim, config.method_settings)
    save_rows_alone(trainer.model)
    for reporter in (*reporters, session.reporter):
        reporter.trainer = trainer
    session.guard = StepGuard(trainer, run, config, train_rows, session.reporter)
    trainer.add_callback(session.guard)
    trainer.add_callback(Heartbeat(run))
    session.cycle = add_cycle(trainer, run, config, session.recorder)
    if session.cycle is not None:
        session.cycle.notice = session.notice
    session.recovery.apply(trainer)
    spread(trainer)
    return trainer


def planned_arguments(
    objective: str, training_arguments: Mapping[str, Any], output_dir: str
) -> Any:
    """The configuration of the objective's trainer."""
    if objective == "sft":  # rows come in tokens, with their labels
        as_they_are = {"skip_prepare_dataset": True}
        return sft_arguments(training_arguments, output_dir, dataset_kwargs=as_they_are)
    return trainer_arguments(objective, training_arguments, output_dir)


def sft_arguments(training_arguments: Mapping[str, Any], output_dir: str, **more: Any) -> Any:
    """TRL's configuration of plain fine-tuning: the loss is that of the answers."""
    return trainer_arguments(
        "sft", training_arguments, output_dir, completion_only_loss=True, **more
    )


def _evaluate(
    session: _Session, evaluator: Evaluator, when: str, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the model can do now; kept in metrics.jsonl for a resume."""
    trainer, began = evaluator.trainer, time.monotonic()
    result = session.recovery.evaluated(lambda: evaluator.evaluate(when, before), trainer)
    result["seconds"] = round(time.monotonic() - began, 3)
    session.phases.end("evaluation")
    session.phases.tell()
    if evaluator.trainer.is_world_process_zero():
        append_metric(session.run, result)
    return result


def _of_stages(session: _Session, trainer: Any, own: TrainingRows) -> dict[str, Any]:
    """Of a stage: rows kept for the later ones, and what has become of the earlier ones, for
    record.json."""
    stage = session.config.stage
    if stage is None:
        return {}
    keep_rows(session.run, trainer, own, stage)
    session.say("evaluating the earlier stages")
    found = [to_builtins(kept) for kept in look_back(stage, trainer, _arguments_of(session))]
    if trainer.is_world_process_zero():
        for kept in found:
            append_metric(session.run, {"event": "evaluation of an earlier stage", **kept})
    return {"earlier": found}


def _arguments_of(session: _Session) -> Callable[[TrainConfig], Any]:
    folder = str(session.run.checkpoints)
    return lambda config: planned_arguments(config.objective, config.training_arguments, folder)


def _earlier_evaluation(run: RunDir) -> dict[str, Any] | None:
    """The evaluation before training of the attempt that is being resumed."""
    rows = (row for row in run.metric_rows() if row.get("when") == "before" and "shown" in row)
    return next(rows, None)


def _checkpoint_of(session: _Session, resume: bool | str) -> Path | None:
    """What to go on from; None to begin."""
    if isinstance(resume, str):
        return session.run.checkpoints / resume
    if not resume:
        return None
    session.say("checking the checkpoints")
    return session.run.last_checkpoint(session.notice, hashes=True)


def forget_rows_after(run: RunDir, checkpoint: Path | None) -> None:
    """Take what is going to be repeated out of metrics.jsonl: all after the checkpoint, without one
    all of training. What was given up for lack of memory stays given up."""
    if not run.metrics.is_file():
        return
    length = read_manifest(checkpoint).get("metrics_bytes") if checkpoint else 0
    if length is None:
        return
    written = run.metrics.read_bytes()
    kept = [written[:length]]
    for line in written[length:].splitlines(keepends=True):
        row = parsed_row(line) or {}
        before_training = checkpoint is None and not {"step", "at_step"} & set(row)
        if row and (row.get("event") == OUT_OF_MEMORY or before_training):
            kept.append(line)
    write_bytes(run.metrics, b"".join(kept))


def keep_checkpoints(session: _Session, trainer: Any) -> None:
    """From now on the trainer's checkpoints are whole or absent."""
    parts = [session.cycle] if session.cycle is not None else []
    trainer.keeper = session.stopping.keeper = CheckpointKeeper(
        session.run, trainer, session.notice, parts
    )


def save(session: _Session, trainer: PlannedTrainer) -> str:
    """The trained weights, as safetensors, with the tokenizer; returns the folder's name."""
    run = session.run
    method, cycle = resolve_method(session.config.method), session.cycle
    folder = run.adapter if method.adapter and not method.merges else run.model
    if isinstance(cycle, Restarts):
        cycle.merge_last(trainer)
    # All processes give their parts, once, however often the first has to wait for room.
    state = whole_state(trainer) if is_divided(trainer.model) else None

    def write(beside: Path) -> None:
        if isinstance(cycle, Restarts):
            cycle.save(trainer, beside)
        elif state is None:
            trainer.save_model(str(beside))
        elif trainer.is_world_process_zero():
            trainer._save(str(beside), state_dict=state)
        if trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_tokenizer(model, session.tokenizer, beside)
            (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle; plan.yaml says it

    if trainer.is_world_process_zero():
        spare = trainer.keeper.spare if trainer.keeper else lambda: None
        write_whole(folder, write, session.notice, spare)
    else:
        write(folder)
    return folder.name


def make_record(
    session: _Session,
    trainer: PlannedTrainer,
    rows: RunRows,
    before: dict[str, Any],
    after: dict[str, Any],
    memory: dict[str, int | None],
    seconds: dict[str, float],
    output: str,
) -> dict[str, Any]:
    """record.json: predicted beside measured, evaluation before and after, what was made."""
    plan = session.run.read_plan()
    config = session.config
    steps = [row for row in session.run.metric_rows() if "step" in row]
    tokens = sum(row["tokens"] for row in steps)
    spent = sum(row["seconds"] for row in steps)
    return {
        "schema": 1,
        "name": session.run.root.name,
        "model": plan["model"],
        "device": plan["device"]["name"],
        "method": config.method,
        "num_trainable_parameters": count_trainable(trainer.model),
        "steps": trainer.state.global_step,
        "predicted": plan["predicted"],
        "measured": {
            **memory,
            "step_seconds": mean_step_seconds([row["seconds"] for row in steps]),
            "tokens_per_second_per_gpu": tokens / spent if spent else None,
            "settled_tokens_per_second_per_gpu": settled_tokens_per_second(steps),
            "train_seconds": spent,
            "evaluation_seconds": _evaluation_seconds(before, after, seconds),
            "seconds": seconds,
            "micro_batch_tokens": dict(
                zip(("first", "later"), session.reporter.longest, strict=True)
            ),
            "phases": session.phases.to_list(),
        },
        "sampled": sampled_peaks(session.run),
        "evaluation": evaluation_record(config.objective, before, after, len(trainer.eval_dataset)),
        "forgetting": forgetting_record(config, before, after),
        **_tasks_record(trainer, before, after),
        "samples": samples_record(before, after),
        "overlong": overlong_to_dict(
            config.overlong, config.max_length, rows.train.counts, rows.held_out.counts
        ),
        "tokenizer": {
            "chat_template": config.template.name,
            "vocab_size": len(session.tokenizer.tokenizer),
            "added_tokens": list(session.tokenizer.added),
            "trained_token_ids": config.method_settings.get("trained_token_ids", []),
            "end_token_ids": session.tokenizer.end_ids,
            "pad_token_id": session.tokenizer.tokenizer.pad_token_id,
        },
        "data_sha256": config.data.sha256,
        "eval_data_sha256": config.eval_data.sha256 if config.eval_data else None,
        **rows.hashes.to_dict(),
        "output": output,
    }


def _evaluation_seconds(
    before: Mapping[str, Any], after: Mapping[str, Any], seconds: Mapping[str, float]
) -> float | None:
    """Of both evaluations and of preparing the adapters; None where an attempt before this one,
    which did a part of that, did not tell."""
    if "seconds" not in before or "prepare" not in seconds:
        return None
    return float(before["seconds"] + after["seconds"] + seconds["prepare"])


def _tasks_record(
    trainer: Any, before: dict[str, Any], after: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """`tasks`: of each, its rows, the share drawn, and the held-out loss before and after."""
    tasks: TaskMix | None = getattr(trainer, "tasks", None)
    if tasks is None:
        return {}
    sides = {"before": before, "after": after}
    losses = {when: side.get("eval_loss_by_task") or {} for when, side in sides.items()}
    return {
        "tasks": {
            name: {**told, **{when: by_task.get(name) for when, by_task in losses.items()}}
            for name, told in tasks.drawn().items()
        }
    }


def environment() -> dict[str, Any]:
    """Versions and machine; no environment variables, which may hold secrets."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed(),
        "num_threads": torch.get_num_threads(),
        **machine_facts(),
        "argv": sys.argv[1:],
    }


def _checkpoint_name(run: RunDir) -> str | None:
    checkpoint = run.last_checkpoint()
    return checkpoint.name if checkpoint else None
