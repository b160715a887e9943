"""Dry runs of GRPO against TRL's trainer on the processor, which generates token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.step import dry_run
from ftplan.launcher.emit import method_settings, training_arguments
from ftplan.launcher.training.build import apply_method, count_trainable, load_model
from ftplan.launcher.training.objectives import trainer_arguments
from ftplan.launcher.training.online import PlannedGRPOTrainer, PlannedRLOOTrainer
from ftplan.launcher.training.rewards import RewardModel
from ftplan.launcher.training.stacks import blank_tokenizer
from ftplan.planner.step_trace import GENERATION_PHASE, SCORING_PHASE
from tests.dry_runs import GPT2, GPT2_MODULES, LLAMA, PHASES, QLORA, QWEN3, STEPS, case, mark
from tests.test_dry_run_objectives import measured, seed_model

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

COMPLETION = 32
GRPO: dict[str, Any] = {
    **{"objective": "grpo", "loss": "trl-fused"},
    **{"num_generations": 2, "max_completion_length": COMPLETION},
}
BETA: dict[str, Any] = {"beta": 0.1}
RLOO: dict[str, Any] = {"objective": "rloo"}
JUDGED: dict[str, Any] = {"reward_config": {**LLAMA, "intermediate_size": 2048}}
FULL: dict[str, Any] = {"method": "full"}
# oneDNN, which multiplies bf16 on processors, lays blocks out anew for as long as a product takes;
# how many bytes depends on the processor (18 KiB on one with AVX-512, next to none on others).
ONEDNN_BLOCKS_BYTES = 20 * 1024
NO_TOKEN = 10**6  # no vocabulary has it: completions end at their full length


@pytest.fixture(scope="module", autouse=True)
def narrow_tiles() -> Iterator[None]:
    """Beside the usual tiles of 32,768 entries so small a model would not show."""
    with mock.patch("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 512):
        yield


class _Marked:
    """Leaves the names of phases in the profile; prompts are of one length."""

    prompt_length: int

    @property
    def _trainer(self) -> Any:
        return super()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        mark("forward")
        return self._trainer.training_step(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return [[2] * self.prompt_length for _ in prompts], None, {}

    def _generate(self, prompts: list[Any]) -> Any:
        mark(GENERATION_PHASE)
        generated = self._trainer._generate(prompts)
        assert all(len(ids) == COMPLETION for ids in generated[1])
        return generated

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        mark("forward" if kwargs.get("compute_entropy") else SCORING_PHASE)
        return self._trainer._get_per_token_logps_and_entropies(*args, **kwargs)


class MarkedGRPOTrainer(_Marked, PlannedGRPOTrainer):
    """TRL's."""


class MarkedRLOOTrainer(_Marked, PlannedRLOOTrainer):
    """TRL's."""


MARKED: dict[str, Any] = {"grpo": MarkedGRPOTrainer, "rloo": MarkedRLOOTrainer}


class FullRows(RewardModel):
    """Judges rows as long as a micro-batch's may be, whatever was generated."""

    def __call__(self, *, completions: Any, **_: Any) -> list[float]:
        mark(SCORING_PHASE)
        scores = []
        for start in range(0, len(completions), self.rows):
            rows = min(self.rows, len(completions) - start)
            scores += self._scores([[3] * self.max_length] * rows)
        return [score + number for number, score in enumerate(scores)]


def reward_of(dry_case: DryRunCase) -> Any:
    """A rule that needs no memory, or a model of random weights."""
    if dry_case.reward_config is None:
        return lambda completions, **_: [float(n) for n, _ in enumerate(completions)]
    config = AutoConfig.for_model(**dry_case.reward_config, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)
    rows = dry_case.plan.per_device_train_batch_size
    return FullRows(model, None, rows=rows, max_length=dry_case.row_length)  # type: ignore[arg-type]


def real_trainer(dry_case: DryRunCase, folder: Path) -> Any:
    plan, settings = dry_case.plan, method_settings(dry_case.plan)
    set_seed(0)
    seed_model(dry_case, folder / "model")
    model = load_model(str(folder / "model"), settings, "cpu")
    # The second generation has optimizer states beside it.
    steps = STEPS + plan.generated_rows // plan.per_device_train_batch_size
    planned = training_arguments(plan, "cpu") | {"max_steps": steps}
    arguments = trainer_arguments(plan.objective, planned, str(folder))
    arguments.save_strategy = "no"
    trainer = MARKED[plan.objective](
        model=model,
        reward_funcs=reward_of(dry_case),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [""] * 8}),
        processing_class=blank_tokenizer(),
        peft_config=apply_method(model, plan.method, settings),
    )
    trainer.prompt_length = dry_case.row_length - COMPLETION
    trainer.eos_token_ids = [NO_TOKEN]
    trainer.generation_config.eos_token_id = NO_TOKEN
    trainer.generation_kwargs["eos_token_id"] = NO_TOKEN
    return trainer


@pytest.mark.parametrize(
    "dry_case",
    [
        pytest.param(case(config, **{**GRPO, **settings}), id=name)
        for name, config, settings in (
            ("lora, reference", LLAMA, BETA),
            ("lora, many rows", QWEN3, {"steps_per_generation": 4}),
            ("full, reference", LLAMA, {**FULL, **BETA}),
            ("full, autocast", QWEN3, {**FULL, "mixed_precision": "bf16"}),
            ("gpt2, lora", GPT2, {"target_modules": GPT2_MODULES, "attn_implementation": "eager"}),
            ("rloo, lora", LLAMA, RLOO),
            ("rloo, full", QWEN3, {**RLOO, **FULL}),
            ("judged, lora", LLAMA, JUDGED),
            ("rloo, judged, full", QWEN3, {**RLOO, **JUDGED, **FULL}),
            ("qlora, accumulation", LLAMA, {**QLORA, "gradient_accumulation_steps": 2}),
        )
    ],
)
def test_a_dry_run_takes_what_trls_steps_take(dry_case: DryRunCase, tmp_path: Path) -> None:
    """As near as for other objectives, but for what products in bf16 take on some processors."""
    trainer = real_trainer(dry_case, tmp_path)
    real = measured(trainer)
    done = dry_run(structs.replace(dry_case, few_layers=False))
    assert done.num_trainable_parameters == count_trainable(trainer.model)
    peaks = {phase: peak.allocated_bytes for phase, peak in done.record.phase_peaks().items()}
    assert (SCORING_PHASE in real) is (SCORING_PHASE in peaks)
    for phase in (GENERATION_PHASE, SCORING_PHASE, *PHASES):
        if phase in real:
            blocks = ONEDNN_BLOCKS_BYTES if dry_case.plan.autocast else 0
            near = max(0.01 * real[phase], blocks)
            assert peaks[phase] == pytest.approx(real[phase], abs=near), phase
