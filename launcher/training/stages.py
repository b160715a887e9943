"""A run that is one stage of several: it goes on with an adapter, keeps what later stages look
back on, and looks back on the earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_from_disk
from msgspec import structs
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ftplan.launcher.model_source import check_safetensors
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training.config import StageConfig, TrainConfig, read_train_config
from ftplan.launcher.training.objectives import make_trainer
from ftplan.launcher.training.rows import TrainingRows, process_rank
from ftplan.launcher.training.token_file import COLUMNS, TokenFile, mapped
from ftplan.planner.errors import InputError
from ftplan.planner.stages import Kept, evenly


def with_trained_adapter(
    model: PreTrainedModel, config: PeftConfig | None, folder: Path
) -> PeftModel:
    """The model with a trained adapter that is trained further, under `config`: its rates of
    dropout may be new. Raises InputError where the folder holds none."""
    assert config is not None, "a method of PEFT's goes on"
    check_safetensors(folder)
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the adapter of the stage before cannot be loaded from `{folder}`: {first_line}",
            "run the stages again with `ftplan launch`",
        ) from error


@contextmanager
def going_on(model: Any) -> Iterator[None]:
    """While a trainer is made for a model whose adapter goes on being trained.

    TRL adds a copy named `ref` by the adapter's own configuration. An initialization that takes
    its weights from the base, such as PiSSA's, would take them once more. The copy is not needed
    once its log-probabilities are there.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    config = model.active_peft_config
    initialization = getattr(config, "init_lora_weights", None)
    if initialization is not None:
        config.init_lora_weights = True
    try:
        yield
    finally:
        if initialization is not None:
            config.init_lora_weights = initialization
        forget_reference(model)


def forget_reference(model: Any) -> None:
    """Without TRL's copy of the adapter that is the reference."""
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")


def with_replayed(rows: TrainingRows, config: TrainConfig, folder: Path) -> TrainingRows:
    """A stage's own rows, and after them those that earlier stages have kept for it."""
    if config.stage is None or not config.stage.replayed:
        return rows
    path = folder / f"replayed-{process_rank()}.arrow"
    with TokenFile(path, COLUMNS[config.objective]) as file:
        for place in config.stage.replayed:
            kept = load_from_disk(str(place)).to_list()
            file.write(kept, (len(row["input_ids"]) for row in kept))
    return structs.replace(
        rows,
        dataset=concatenate_datasets([rows.dataset, mapped(path)]),
        lengths=[*rows.lengths, *file.lengths],
    )


def keep_rows(run: RunDir, trainer: Any, own: TrainingRows, stage: StageConfig) -> None:
    """What later stages take of this one: its held-out rows, with what the reference says of them,
    and rows that they replay, evenly spaced by length."""
    held_out = _referenced(trainer) if stage.keeps else None
    if not trainer.is_world_process_zero():
        return
    if held_out is not None:
        held_out.save_to_disk(str(run.held_out))
    longest_first = sorted(range(len(own.lengths)), key=lambda row: -own.lengths[row])
    for wanted in stage.keeps_to_replay:
        short = [row for row in longest_first if own.lengths[row] <= wanted.max_length]
        rows = [short[place] for place in evenly(len(short), wanted.rows)]
        own.dataset.select(rows).save_to_disk(str(run.replay / wanted.stage))


def _referenced(trainer: Any) -> Dataset:
    """The held-out rows; of an objective that compares, with the reference's log-probabilities."""
    rows = trainer.eval_dataset
    if not hasattr(trainer, "_precompute_ref_logps"):
        return rows
    return trainer._precompute_ref_logps(rows, "eval", trainer.args.per_device_eval_batch_size)


def look_back(
    stage: StageConfig, trainer: Any, arguments_of: Callable[[TrainConfig], Any]
) -> list[Kept]:
    """The held-out losses of the earlier stages, each computed as at its end.

    It makes trainers around the trained model, so it comes last before saving.
    """
    kept = []
    for run in stage.earlier:
        config = read_train_config(run)
        if config.stage is None or not config.stage.keeps:
            continue
        rows = load_from_disk(str(run.held_out))
        with going_on(trainer.model):
            evaluating = make_trainer(
                config.objective,
                config.loss,
                model=trainer.model,
                args=_as_now(arguments_of(config), trainer.args),
                train_dataset=rows,
                eval_dataset=rows,
                processing_class=trainer.processing_class,
            )
        evaluation = run.read_record()["evaluation"]
        kept.append(
            Kept(
                stage=run.root.name,
                objective=config.objective,
                before=evaluation["before"],
                at_its_end=evaluation["after"],
                after=float(evaluating.evaluate()["eval_loss"]),
            )
        )
    return kept


def _as_now(arguments: Any, now: Any) -> Any:
    """The arguments of an earlier stage, in the precision of the process."""
    arguments.bf16, arguments.fp16, arguments.use_cpu = now.bf16, now.fp16, now.use_cpu
    return arguments
