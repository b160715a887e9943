"""Dry runs of preference and reward training against TRL's trainers on the processor."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.emit import method_settings, training_arguments
from ftplan.launcher.training.build import apply_method, count_trainable, load_model
from ftplan.launcher.training.measure import live_bytes, storage_sizes
from ftplan.launcher.training.objectives import TRAININGS, trainer_arguments
from ftplan.launcher.training.stacks import blank_tokenizer
from ftplan.launcher.training.trainer import models_beside
from ftplan.planner.errors import InputError
from ftplan.planner.step_trace import REFERENCE_PHASE
from tests.dry_runs import (
    BF16,
    GENERATOR_STATE_BYTES,
    LLAMA,
    NUM_LAYERS,
    PHASES,
    QLORA,
    QWEN3,
    STEPS,
    assert_equal_records,
    case,
    cuda_case,
    mark,
    measured_peaks,
)
from tests.sweeps import named

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

DPO: dict[str, Any] = {"objective": "dpo", "loss": "trl-fused"}
ORPO: dict[str, Any] = {"objective": "orpo", "loss": "trl-fused"}
SIMPO: dict[str, Any] = {"objective": "simpo", "loss": "trl-fused"}
KTO: dict[str, Any] = {"objective": "kto", "loss": "trl-fused"}
REWARD: dict[str, Any] = {"objective": "reward"}
FULL: dict[str, Any] = {"method": "full"}
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}


@pytest.fixture(scope="module", autouse=True)
def narrow_tiles() -> Iterator[None]:
    """Beside the usual tiles of 32,768 entries so small a model would not show."""
    with mock.patch("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 512):
        yield


ACCUMULATION: dict[str, Any] = {"gradient_accumulation_steps": 2}
PRECOMPUTED: dict[str, Any] = {"precompute_ref_log_probs": True}

JOINED = {
    *("dpo, full, autocast", "dpo, lora, checkpointing", "simpo, freeze", "kto, lora, precomputed"),
    *("dpo, qlora, accumulation", "reward, full"),
}
JOINED_ON_GPU = {"kto, full", "reward, qlora"}


# --- the same steps for real ---------------------------------------------------------------------


def rows(objective: str, count: int, length: int) -> Dataset:
    """Rows as TRL's own tokenization makes them, all of the same length."""
    answer = [1] * (length - 1)
    if objective in ("dpo", "orpo", "simpo"):
        row = {"prompt_ids": [1], "chosen_ids": answer, "rejected_ids": answer}
        return Dataset.from_list([row] * count)
    if objective == "reward":
        return Dataset.from_list(
            [{"chosen_ids": [1, *answer], "rejected_ids": [1, *answer]}] * count
        )
    row = {"prompt_ids": [1], "completion_ids": answer, "KL_completion_ids": answer}
    return Dataset.from_list([{**row, "label": number % 2 == 0} for number in range(count)])


def real_trainer(case: DryRunCase, folder: Path) -> Any:
    """TRL's trainer on a model that was loaded from a folder; so it loads a reference itself."""
    plan, settings = case.plan, method_settings(case.plan)
    set_seed(0)
    training = TRAININGS[plan.objective]
    seed_model(case, folder / "model")
    model = load_model(str(folder / "model"), settings, "cpu")
    planned = training_arguments(plan, "cpu") | {"max_steps": STEPS}
    arguments = trainer_arguments(plan.objective, planned, str(folder))
    arguments.save_strategy = "no"
    count = STEPS * plan.per_device_train_batch_size * plan.gradient_accumulation_steps

    assert training.trainer is not None

    class Marked(training.trainer):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            mark("forward")
            return super().training_step(*args, **kwargs)

    return Marked(
        model=model,
        args=arguments,
        train_dataset=rows(plan.objective, count, case.row_length),
        processing_class=blank_tokenizer(),
        peft_config=apply_method(model, plan.method, settings),
    )


def seed_model(case: DryRunCase, folder: Path) -> None:
    """A model of random weights, in a folder."""
    config = AutoConfig.for_model(**case.config)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def measured(trainer: Any, **how: Any) -> dict[str, int]:
    """As for plain fine-tuning; models beside the trained one live through all phases."""
    held = sum(live_bytes(model, None) for model in models_beside(trainer))
    return {phase: peak + held for phase, peak in measured_peaks(trainer, **how).items()}


@pytest.mark.parametrize(
    "dry_case",
    [
        named(name, case(config, **settings), joined=JOINED)
        for name, config, settings in (
            ("dpo, full", LLAMA, {**DPO, **FULL}),
            ("dpo, full, autocast", QWEN3, {**DPO, **FULL, "mixed_precision": "bf16"}),
            ("dpo, full, precomputed", LLAMA, {**DPO, **FULL, **PRECOMPUTED}),
            ("dpo, freeze", LLAMA, {**DPO, "method": "freeze", "num_trainable_layers": 1}),
            ("dpo, lora", LLAMA, DPO),
            ("dpo, lora, checkpointing", LLAMA, {**DPO, **CHECKPOINTING}),
            ("dpo, qlora, accumulation", LLAMA, {**DPO, **QLORA, **ACCUMULATION}),
            ("dpo, lora, ipo", LLAMA, {**DPO, "loss_type": "ipo"}),
            ("orpo, full", QWEN3, {**ORPO, **FULL}),
            ("orpo, lora, checkpointing", LLAMA, {**ORPO, **CHECKPOINTING}),
            ("simpo, qlora, accumulation", LLAMA, {**SIMPO, **QLORA, **ACCUMULATION}),
            ("simpo, freeze", LLAMA, {**SIMPO, "method": "freeze", "num_trainable_layers": 1}),
            ("kto, full", LLAMA, {**KTO, **FULL}),
            ("kto, lora", LLAMA, KTO),
            ("kto, lora, precomputed", LLAMA, {**KTO, **PRECOMPUTED}),
            ("reward, full", LLAMA, {**REWARD, **FULL}),
            ("reward, lora", LLAMA, REWARD),
            (
                "reward, qlora, checkpointing",
                QWEN3,
                {**REWARD, **QLORA, **BF16, **CHECKPOINTING, "max_length": 240},
            ),
        )
    ],
)
def test_a_dry_run_takes_what_trls_steps_take(dry_case: DryRunCase, tmp_path: Path) -> None:
    """As near as for plain fine-tuning; see there. At its evaluation the real trainer has fetched
    the next batch already. (After training the reference is gone where it was not kept, and a
    quantized model evaluates on a processor by kernels of its own.)"""
    plan = dry_case.plan
    evaluates = not plan.precompute_ref_log_probs and plan.quantization == "none"
    trainer = real_trainer(dry_case, tmp_path)
    real = measured(trainer, evaluates=evaluates)
    done = dry_run(structs.replace(dry_case, few_layers=False))
    assert done.num_trainable_parameters == count_trainable(trainer.model)
    peaks = {phase: peak.allocated_bytes for phase, peak in done.record.phase_peaks().items()}
    # A layer that is computed again forks the generator: its state, and the layer's own, once more.
    unseen = GENERATOR_STATE_BYTES * (NUM_LAYERS + 2) * plan.gradient_checkpointing
    for phase in PHASES:
        assert peaks[phase] == pytest.approx(real[phase], rel=0.01), phase
        assert -2e-4 <= 1 - peaks[phase] / real[phase] <= unseen / real[phase] + 2e-4, phase
    if evaluates:
        assert peaks["evaluation"] == pytest.approx(real["evaluation"], rel=0.01)


@pytest.mark.parametrize("settings", [{**DPO, **FULL}, KTO], ids=["dpo, full", "kto, lora"])
def test_precomputing_takes_what_trls_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    """TRL computes when the trainer is made; here it computes once more, to be watched."""
    dry_case = case(**settings, **PRECOMPUTED)
    trainer = real_trainer(dry_case, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    level = live_bytes(trainer.model, None) + sum(storage_sizes(batch.values()).values())
    rises = allocated_levels(lambda: trainer.compute_ref_log_probs(trainer.model, batch))
    peaks = dry_run(dry_case).record.phase_peaks()
    assert peaks[REFERENCE_PHASE].allocated_bytes == pytest.approx(level + max(rises), rel=0.01)


def allocated_levels(function: Callable[[], Any]) -> list[int]:
    """Bytes that are allocated after each event of a call, above those before it."""
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    gc.enable()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    ordered = sorted(events, key=lambda event: event.start_ns())
    return list(accumulate(event.nbytes() for event in ordered if event.name() == "[memory]"))


# --- few layers for all --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dry_case", "traced"),
    [
        named(name, cuda_case(LLAMA, **{"num_layers": 5, **settings}), traced, joined=JOINED_ON_GPU)
        for name, traced, settings in (
            ("dpo, full", 4, {**DPO, **FULL, "dtype": "float32"}),
            (
                "dpo, freeze",
                5,
                {**DPO, "method": "freeze", "num_trainable_layers": 1, "num_layers": 6},
            ),
            ("dpo, qlora, precomputed", 4, {**DPO, **QLORA, **PRECOMPUTED, **CHECKPOINTING}),
            ("kto, full", 4, {**KTO, **FULL, **CHECKPOINTING}),
            ("reward, qlora", 4, {**REWARD, **QLORA, **CHECKPOINTING}),
        )
    ],
)
def test_few_layers_stand_for_all(dry_case: DryRunCase, traced: int) -> None:
    few = dry_run(dry_case)
    every = dry_run(structs.replace(dry_case, few_layers=False))
    assert few.num_layers_traced == traced < every.num_layers_traced == few.num_layers
    assert few.num_trainable_parameters == every.num_trainable_parameters
    assert_equal_records(few.record, every.record)


# --- what is held --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({**DPO, **FULL}, True),
        ({**KTO, "method": "freeze", "num_trainable_layers": 1}, True),
        (DPO, False),
        ({**KTO, **FULL, **PRECOMPUTED}, False),
        ({**REWARD, **FULL}, False),
    ],
)
def test_a_reference_model_is_as_large_as_the_model(settings: dict[str, Any], holds: bool) -> None:
    """And it is there from the start to the end, beneath a path of its own."""
    record = dry_run(case(**settings, max_length=16)).record
    for phase, _, end in record.phase_ranges():
        held = record.components_at(end - 1) if end else record.components_at(0)
        assert held["reference_model"] == (held["weights"] if holds else 0), phase
    paths = {s.module for s in record.storages if s.component == "reference_model"}
    assert all(path.startswith("ref_model") for path in paths)
    assert ("ref_model.model.layers.1.mlp.up_proj" in paths) is holds


def test_a_family_without_a_score_has_no_reward_model() -> None:
    with pytest.raises(InputError, match="no sequence classification model for `granite`"):
        dry_run(case({**LLAMA, "model_type": "granite"}, **REWARD))


def test_adapters_train_the_score_too() -> None:
    """PEFT copies the head of a reward model and trains the copy."""
    storages = dry_run(case(**REWARD, max_length=16)).record.storages
    score = {
        (s.component, s.shape) for s in storages if "score" in s.module and "load" in s.operation
    }
    assert score == {("weights", (1, 64)), ("adapters", (1, 64))}
