"""ORPO and SimPO: the papers' formulas, and what the trainers make of them."""

from __future__ import annotations

from math import exp, log
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from ftplan.launcher.emit import training_arguments
from ftplan.launcher.training.objectives import TRAININGS, trainer_arguments
from ftplan.launcher.training.reference_free import orpo_loss, simpo_loss
from ftplan.launcher.training.stacks import blank_tokenizer
from ftplan.planner.plan import TrainingPlan
from tests.dry_runs import GPT2, LLAMA

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12, 13]},
    {"prompt_ids": [5], "chosen_ids": [14, 15, 16], "rejected_ids": [17]},
    {"prompt_ids": [6, 6], "chosen_ids": [9], "rejected_ids": [18, 19]},
    {"prompt_ids": [7, 5, 5, 5], "chosen_ids": [20, 21], "rejected_ids": [22]},
]


def test_orpo_is_the_answers_likelihood_and_a_share_of_the_odds_ratio() -> None:
    """Odds of 1 and 1/3: their ratio is 3, and sigmoid(log 3) is 3/4."""
    loss = orpo_loss(torch.tensor([log(0.5)]), torch.tensor([log(0.25)]), beta=0.1)
    assert loss.item() == pytest.approx(log(2) + 0.1 * log(4 / 3), rel=1e-6)


def test_simpo_asks_for_a_margin() -> None:
    """The averages differ by log 2: sigmoid(2 log 2 - 1) is 4 / (4 + e)."""
    averages = torch.tensor([log(0.5)]), torch.tensor([log(0.25)])
    loss = simpo_loss(*averages, beta=2.0, gamma_beta_ratio=0.5)
    assert loss.item() == pytest.approx(-log(4 / (4 + exp(1))), rel=1e-6)


@pytest.mark.parametrize("probability", [-1e-12, 0.0, -90.0])
def test_answers_that_are_certain_or_impossible_have_a_gradient(probability: float) -> None:
    chosen = torch.tensor([probability], requires_grad=True)
    loss = orpo_loss(chosen, torch.tensor([-1.0]), beta=0.1)
    loss.backward()
    assert torch.isfinite(loss) and chosen.grad is not None and torch.isfinite(chosen.grad)


def trainer_of(folder: Path, config: dict[str, Any], **settings: Any) -> Any:
    torch.manual_seed(0)
    plan = TrainingPlan(
        **{
            **{"method": "full", "dtype": "float32", "mixed_precision": "no"},
            **{"gradient_checkpointing": False, "max_length": 16, **settings},
        }
    )
    arguments = trainer_arguments(plan.objective, training_arguments(plan, "cpu"), str(folder))
    arguments.save_strategy = "no"
    trainer = TRAININGS[plan.objective].trainer
    assert trainer is not None
    rows = Dataset.from_list(PAIRS)
    return trainer(
        model=AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=blank_tokenizer(),
    )


def averages_by_whole_logits(model: Any, answers: str) -> torch.Tensor:
    """Of each of PAIRS, a row at a time: nothing is padded, and no tile is involved."""
    found = []
    for pair in PAIRS:
        prompt, answer = pair["prompt_ids"], pair[answers]
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        terms = [logits[place, token] for place, token in zip(places, answer, strict=True)]
        found.append(torch.stack(terms).mean())
    return torch.stack(found)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_a_batchs_loss_is_the_formula_on_whole_logits(
    objective: str, rows: int, config: dict[str, Any], tmp_path: Path
) -> None:
    """However many rows are padded together."""
    trainer = trainer_of(tmp_path, config, objective=objective, per_device_train_batch_size=rows)
    model = trainer.model.eval()
    with torch.no_grad():
        averages = [averages_by_whole_logits(model, f"{one}_ids") for one in ("chosen", "rejected")]
    if objective == "orpo":
        expected = orpo_loss(*averages, beta=0.1).mean().item()
    else:
        expected = simpo_loss(*averages, beta=2.0, gamma_beta_ratio=0.5).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_pairs_are_learned_however_they_are_accumulated(objective: str, tmp_path: Path) -> None:
    losses = []
    for rows, steps in ((4, 1), (1, 4)):
        trainer = trainer_of(
            tmp_path,
            LLAMA,
            objective=objective,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            learning_rate=1e-3,
            max_steps=8,
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        losses.append(after["eval_loss"])
        assert after["eval_loss"] < 0.9 * before["eval_loss"]
        assert after["eval_rewards/accuracies"] == 1.0
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_loss_type_reaches_trls_trainer(tmp_path: Path) -> None:
    """And IPO's loss of a model that is its own reference is (1 / 2 beta) squared."""
    whole = {"dtype": "float32", "mixed_precision": "no"}
    plan = TrainingPlan(objective="dpo", loss_type="ipo", beta=0.5, **whole)
    arguments = trainer_arguments("dpo", training_arguments(plan, "cpu"), str(tmp_path))
    assert (arguments.loss_type, arguments.beta) == (["ipo"], 0.5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = TRAININGS["dpo"].trainer
    assert trainer is not None
    rows = Dataset.from_list(PAIRS)
    made = trainer(
        model=loaded,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=blank_tokenizer(),
    )
    assert made.evaluate()["eval_loss"] == pytest.approx(1.0, rel=1e-4)
