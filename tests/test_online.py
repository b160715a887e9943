"""Training on completions of the model's own: what rewards them, and runs from data to weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForSequenceClassification
from trl import GRPOConfig

from ftplan.launcher.data.data_file import read_data
from ftplan.launcher.data.overlong import Rule
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.launching import write_run
from ftplan.launcher.reward_source import find_reward_source
from ftplan.launcher.run_dir import RunDir
from ftplan.launcher.training import loop
from ftplan.launcher.training.online import PlannedGRPOTrainer
from ftplan.launcher.training.rewards import RULES, RewardModel
from ftplan.launcher.training.stacks import blank_tokenizer
from ftplan.planner.errors import InputError
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.rewards import RULE_REWARDS
from ftplan.planner.run_time import steps_per_epoch
from tests.dry_runs import LLAMA
from tests.launcher_fixtures import CHATML, tiny_tokenizer
from tests.test_training import kept_signals, model_folder, planned  # noqa: F401

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

SMALL: dict[str, Any] = {"max_completion_length": 8, "num_generations": 2, "method": "lora"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(folder: Path) -> Path:
    rows = [{"prompt": f"q {i}", "chosen": "the answer", "rejected": "no"} for i in range(24)]
    return write(folder / "pairs.jsonl", rows)


def prompts(folder: Path) -> Path:
    return write(folder / "prompts.jsonl", [{"prompt": f"q {i}"} for i in range(24)])


def answered(folder: Path) -> Path:
    rows = [{"question": f"q {i}", "answer": "the"} for i in range(24)]
    return write(folder / "answered.jsonl", rows)


# --- rules and reward models ---------------------------------------------------------------------


def test_rules_compare_with_the_rows_answers() -> None:
    assert set(RULES) == set(RULE_REWARDS)
    said = {"completions": ["Four.", " 4\n", "it is 4", ""], "answer": ["4", "4", "4", "4"]}
    assert RULES["exact-match"](**said) == [0, 1, 0, 0]
    assert RULES["contains-answer"](**said) == [0, 1, 1, 0]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_reward_model_judges_whole_conversations_as_it_was_trained(rows: int) -> None:
    """However many are padded together."""
    torch.manual_seed(0)
    tokenizer = RowTokenizer(tiny_tokenizer(CHATML))
    from transformers import AutoConfig

    config = AutoConfig.for_model(**LLAMA, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    judge = RewardModel(model, tokenizer, rows=rows, max_length=200)
    asked = json.dumps([{"role": "user", "content": "q"}])
    made = ["the answer", "no", "the question is here"]
    scores = judge(completions=made, conversation=[asked] * 3, answer=[""] * 3)
    for completion, score in zip(made, scores, strict=True):
        text = tokenizer.tokenizer.apply_chat_template(
            [*json.loads(asked), {"role": "assistant", "content": completion}], tokenize=False
        )
        ids = tokenizer.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, 0].item()
        assert score == pytest.approx(expected, abs=1e-5)


def test_what_gives_no_score_is_no_reward_model(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="no reward model") as raised:
        find_reward_source(str(model_folder))
    assert "--objective reward" in str(raised.value.hint)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM"}))
    with pytest.raises(InputError, match="gives no score"):
        find_reward_source(str(adapter))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.yaml").write_text("")
    with pytest.raises(InputError, match="has made no model yet"):
        find_reward_source(str(tmp_path / "run"))


# --- rows and steps ------------------------------------------------------------------------------


def test_questions_are_taken_and_those_too_long_left_out(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a"}, {"question": "q " * 40, "answer": "a"}]
    rule = Rule("truncate", 60, completion_length=20)
    tokenizer = RowTokenizer(tiny_tokenizer(CHATML))
    path = write(tmp_path / "rows.jsonl", rows)
    data = read_data([path], objective="grpo", tokenizer=tokenizer, rule=rule)
    fate = data.fate(lambda group: True)
    assert fate.counts.num_rows_left == fate.counts.num_without_answer == 1
    (prompt,) = tokenizer.tokenize([next(data.rows()).as_prompt()])
    assert fate.left == [len(prompt.input_ids) + 20]


@pytest.mark.parametrize(
    ("rows", "micro_batch", "accumulated", "generated"),
    [(24, 2, 4, None), (25, 2, 4, None), (24, 4, 1, 2), (7, 2, 2, 4), (10, 8, 1, None)],
)
def test_an_epochs_steps_are_trls(
    rows: int, micro_batch: int, accumulated: int, generated: int | None, tmp_path: Path
) -> None:
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM

    plan = TrainingPlan(
        objective="grpo",
        num_generations=2,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=generated,
    )
    trainer = PlannedGRPOTrainer(
        model=AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)),
        reward_funcs=RULES["exact-match"],
        args=GRPOConfig(
            str(tmp_path),
            num_generations=2,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulated,
            steps_per_generation=generated,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": [1, 2]}] * rows),
        processing_class=blank_tokenizer(),
    )
    batches = len(trainer.get_train_dataloader())
    assert -(-batches // accumulated) == steps_per_epoch(plan, rows)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:  # noqa: F811
    """A run that has trained a reward model."""
    folder = tmp_path_factory.mktemp("judge")
    plan = planned(model_folder, pairs(folder), folder, objective="reward", method="lora")
    run = write_run(plan, "judge", folder)
    assert loop.train(run, resume=False) == 0
    return run


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
@pytest.mark.parametrize("beta", [None, 0.1])
@pytest.mark.usefixtures("kept_signals")
def test_prompts_train_with_a_reward_model(
    objective: str,
    beta: float | None,
    model_folder: Path,  # noqa: F811
    judge: RunDir,
    tmp_path: Path,
) -> None:
    """The objective follows from the reward; figures of rewards are kept, weights load again."""
    given = {**SMALL, "reward_model": str(judge.root), "beta": beta}
    if objective == "rloo":
        given["objective"] = objective
    given = {name: value for name, value in given.items() if value is not None}
    plan = planned(model_folder, prompts(tmp_path), tmp_path, **given)
    assert plan.chosen.plan.objective == objective
    run = write_run(plan, None, tmp_path)
    assert loop.train(run, resume=False) == 0
    record = run.read_record()
    assert record["steps"] == 2 and record["evaluation"]["before"] is None
    assert record["evaluation"]["reward"] is not None
    steps = [row for row in run.metric_rows() if "step" in row]
    assert all("rewards/reward_model/mean" in row and row["tokens"] > 0 for row in steps)
    measured = record["measured"]["allocated_bytes"]
    assert record["predicted"]["allocated_bytes"] == pytest.approx(measured, rel=0.15)
    AutoPeftModelForCausalLM.from_pretrained(run.adapter)


@pytest.mark.usefixtures("kept_signals")
def test_answers_train_by_a_rule(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """The whole model; half of all tokens would be an answer that contains nothing else."""
    given = {**SMALL, "objective": "rloo", "reward": ("contains-answer",), "method": "full"}
    plan = planned(model_folder, answered(tmp_path), tmp_path, **given)
    run = write_run(plan, None, tmp_path)
    assert loop.train(run, resume=False) == 0
    record = run.read_record()
    assert record["output"] == "model"
    assert 0 <= record["evaluation"]["reward"]["before"] <= 1
    steps = [row for row in run.metric_rows() if "step" in row]
    assert all("rewards/contains_answer/mean" in row for row in steps)


def test_a_rule_needs_answers(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="has questions alone"):
        planned(model_folder, prompts(tmp_path), tmp_path, **SMALL, reward=("exact-match",))


def test_nothing_is_planned_that_nobody_rewards(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match="nothing here rewards them"):
        planned(model_folder, prompts(tmp_path), tmp_path)
