"""What a model can do before and after training: scores of answers, general text, records."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the `train` extra")

import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from ftplan.launcher import views
from ftplan.launcher.data.general_pieces import general_pieces
from ftplan.launcher.data.rows import Row
from ftplan.launcher.data.tokens import RowTokenizer
from ftplan.launcher.merging.check import CHECKED_TOKENS, TOLERATED_EPSILONS
from ftplan.launcher.model_card import card
from ftplan.launcher.training.answer_scores import normalized, score, token_f1
from ftplan.launcher.training.answering import answers, stop_tokens
from ftplan.launcher.training.evaluation import (
    Evaluator,
    asked_rows,
    evaluation_record,
    forgetting_record,
    samples_record,
)
from ftplan.launcher.training.general_text import general_loss
from ftplan.launcher.training.labels import NO_LOSS, predicted
from ftplan.launcher.training.rows import _Asked
from ftplan.launcher.training.tasks import _summed_loss
from ftplan.launcher.training.trainer import PlannedTrainer
from ftplan.launcher.ui import Ui
from ftplan.planner.evaluating import (
    ASKED_ROWS,
    GENERAL_TEXT_SECONDS,
    LEAST_PIECES,
    MOST_SCORED_TOKENS,
    PIECE_TOKENS,
    SCORING_SECONDS,
    SHORT_ANSWER_TOKENS,
    SHOWN_ROWS,
    are_short,
)
from ftplan.planner.forgetting import PERPLEXITY_RISE, has_forgotten, what_helps
from ftplan.planner.labels import MAX_LABELS
from ftplan.profiles.text_facts import general_text
from tests.launcher_fixtures import CHATML, chat, tiny_tokenizer
from tests.test_plan_views import rendered


class TestScores:
    def test_answers_are_compared_as_squad_does(self) -> None:
        assert normalized("The  Eiffel-Tower, a tower.") == "eiffeltower tower"
        found = score(["The sea!", "red car"], ["sea", "a red bus"])
        assert found.exact_match == 0.5
        assert found.f1 == pytest.approx((1 + 0.5) / 2)
        assert found.macro_f1 is None  # two answers, two of them: no labels

    def test_labels_have_the_mean_of_their_f1(self) -> None:
        """Yes: precision 2/3, recall 1, F1 0.8; no: precision 1, recall 1/2, F1 2/3; a word that
        is no label counts as a miss."""
        found = score(["yes", "yes", "yes", "no", "eh"], ["yes", "yes", "no", "no", "no"])
        assert found.exact_match == 0.6
        assert found.macro_f1 == pytest.approx((0.8 + 2 * 1 / (1 + 3)) / 2)
        assert found.majority_share == 0.6

    def test_many_different_answers_are_no_labels(self) -> None:
        few = [str(n % MAX_LABELS) for n in range(4 * MAX_LABELS)]
        many = [str(n % (MAX_LABELS + 1)) for n in range(4 * MAX_LABELS)]
        assert score(few, few).macro_f1 == 1.0
        assert score(many, many).macro_f1 is None

    def test_answers_are_short_by_their_median(self) -> None:
        assert are_short([1, 2, 500]) and not are_short([1, 50, 50]) and not are_short([])

    @given(st.text(max_size=30), st.text(max_size=30))
    def test_f1_is_a_share_that_does_not_ask_which_came_first(self, one: str, other: str) -> None:
        one, other = normalized(one), normalized(other)
        assert 0 <= token_f1(one, other) == token_f1(other, one) <= 1
        assert token_f1(one, one) == 1


class TestForgetting:
    def test_it_is_said_past_the_threshold(self) -> None:
        assert has_forgotten(20.0, 20.0 * (1 + PERPLEXITY_RISE) + 0.01)
        assert not has_forgotten(20.0, 20.0 * (1 + PERPLEXITY_RISE) - 0.01)

    def test_the_threshold_is_half_a_model_of_a_billion_parameters(self) -> None:
        """The scaling law that the module cites."""
        lost = 406.4 / 1e9**0.34 * (2**0.34 - 1)
        assert math.log1p(PERPLEXITY_RISE) == pytest.approx(lost, rel=0.02)

    def test_advice_follows_the_run(self) -> None:
        full = what_helps(
            adapter=False, lora_rank=None, learning_rate=1e-5, num_train_epochs=3, max_steps=None
        )
        assert full[0] == "adapters: `--method lora`"
        assert "fewer passes: `--num-train-epochs 1.5`" in full
        assert not any("--learning-rate" in helps for helps in full)
        lora = what_helps(
            adapter=True, lora_rank=32, learning_rate=2e-4, num_train_epochs=3, max_steps=100
        )
        assert "a lower rate: `--learning-rate 0.0001`" in lora
        assert "fewer steps: `--max-steps 50`" in lora
        assert "a lower rank: `--lora-rank 16`" in lora
        assert not any("--method" in helps for helps in lora)

    def test_the_text_is_varied_and_its_kinds_alternate(self) -> None:
        """So that a slow machine, which reads its beginning only, has some of each."""
        kinds = [passage.kind for passage in general_text().texts]
        assert len(kinds) >= 40 and set(kinds[:6]) == set(kinds)
        assert sorted(kinds).count("code") == len(kinds) // 6


@pytest.fixture(scope="module")
def tokenizer() -> RowTokenizer:
    return RowTokenizer(tiny_tokenizer(CHATML, pad_token="<|bos|>"))


@pytest.fixture(scope="module")
def trainer(tokenizer: RowTokenizer) -> Any:
    """As much of a trainer as evaluation asks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer.tokenizer), "hidden_size": 32, "intermediate_size": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3},
        eos_token_id=tokenizer.tokenizer.eos_token_id,
    )
    return SimpleNamespace(
        model=LlamaForCausalLM(config).train(),
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        autocast_smart_context_manager=contextlib.nullcontext,
        evaluate=lambda: {"eval_loss": 2.0, "eval_rewards/accuracies": 0.75},
    )


@pytest.mark.parametrize("stock_loss", [True, False])
def test_the_held_out_loss_is_a_mean_over_tokens_whatever_the_batch(
    stock_loss: bool, trainer: Any, tokenizer: RowTokenizer, tmp_path: Path
) -> None:
    ids = list(range(len(tokenizer.tokenizer)))
    rows = [
        {"input_ids": ids[:n], "labels": [NO_LOSS] * asked + ids[asked:n]}
        for n, asked in ((30, 3), (4, 1), (17, 16), (9, 0), (25, 20))
    ]
    nats, num_tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = torch.tensor([row["labels"]])
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits
            nats += float(_summed_loss(logits[0, :-1], labels[0, 1:]))
            num_tokens += int(predicted(labels).sum())
    found = []
    for size in (1, 2, 5):
        real = PlannedTrainer(
            model=trainer.model,
            args=SFTConfig(
                output_dir=str(tmp_path),
                per_device_eval_batch_size=size,
                use_cpu=True,
                report_to=[],
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer.tokenizer,
            stock_loss=stock_loss,
        )
        found.append(real.evaluate()["eval_loss"])
    trainer.model.train()
    assert found == pytest.approx([nats / num_tokens] * 3, rel=1e-4)


def test_a_batch_padded_on_the_left_answers_as_each_alone(
    trainer: Any, tokenizer: RowTokenizer
) -> None:
    texts = ["Where?", "Where is the question, and where the answer?", "The answer is"]
    prompts = [tokenizer.prompt_ids(chat(text).messages) for text in texts]
    many = answers(trainer, tokenizer, prompts, max_new_tokens=12, tokens_at_once=10_000)
    alone = answers(trainer, tokenizer, prompts, max_new_tokens=12, tokens_at_once=1)
    assert many == alone and len(set(many)) == 3
    assert trainer.model.training, "as it was before"


def test_answers_end_where_time_does(trainer: Any, tokenizer: RowTokenizer) -> None:
    prompts = [tokenizer.prompt_ids(chat("Where?").messages)] * 5
    limits = {"max_new_tokens": 4, "tokens_at_once": 1}
    assert len(answers(trainer, tokenizer, prompts, seconds=0.0, **limits)) == 1
    assert len(answers(trainer, tokenizer, prompts, **limits)) == 5


def test_an_answer_ends_with_the_templates_token(trainer: Any) -> None:
    """Which is not always the tokenizer's end token."""
    other = tiny_tokenizer(CHATML, eos_token="<|bos|>")
    made = RowTokenizer(other)
    assert made.end_ids == [other.convert_tokens_to_ids("<|im_end|>"), other.bos_token_id]
    assert set(made.end_ids) <= set(stop_tokens(trainer.model, made))
    assert RowTokenizer(tiny_tokenizer()).end_ids == [tiny_tokenizer().eos_token_id]


def test_general_text_is_read_in_pieces_as_in_one(trainer: Any, tokenizer: RowTokenizer) -> None:
    found = general_loss(trainer, tokenizer, num_pieces=3)
    assert (found.num_pieces, found.num_tokens) == (3, 3 * (PIECE_TOKENS - 1))
    pieces = torch.tensor(general_pieces(tokenizer)[:3])
    with torch.no_grad():
        wanted = trainer.model.eval()(input_ids=pieces, labels=pieces).loss
    assert found.loss == pytest.approx(float(wanted), rel=1e-4)
    trainer.model.train()
    few = general_loss(trainer, tokenizer, most_seconds=0.0)
    assert 0 < few.num_pieces < len(general_pieces(tokenizer))


def config(objective: str = "sft") -> Any:
    arguments = {
        **{"per_device_eval_batch_size": 4, "max_length": 128, "learning_rate": 2e-4},
        **{"num_train_epochs": 3.0, "max_steps": -1},
    }
    settings = {"lora_rank": 16}
    return SimpleNamespace(
        objective=objective,
        method="lora",
        training_arguments=arguments,
        method_settings=settings,
        task_number=lambda row: 0,
    )


def labelled_rows(count: int) -> list[Row]:
    return [chat(f"Row {n} is?", ("good", "bad")[n % 2], line=n) for n in range(count)]


def test_short_answers_are_scored_on_the_same_rows_twice(
    trainer: Any, tokenizer: RowTokenizer
) -> None:
    rows = asked_rows(config(), tokenizer, labelled_rows(10))
    evaluator = Evaluator(trainer, tokenizer, config(), rows, lambda stage: None)
    before = evaluator.evaluate("before")
    assert before["num_scored"] == 10 and before["scores"]["macro_f1"] is not None
    assert len(before["shown"]) == SHOWN_ROWS
    after = evaluator.evaluate("after", {**before, "num_scored": 4})
    assert after["num_scored"] == 4
    assert after["general"] == before["general"]
    record = evaluation_record("sft", before, after, 10)
    assert record["perplexity"]["before"] == pytest.approx(7.389, abs=0.01)
    assert record["exact_match"] == {"before": 0.0, "after": 0.0}
    assert len(samples_record(before, after)) == SHOWN_ROWS
    json.dumps([before, record])


def test_long_answers_are_shown_and_not_scored(trainer: Any, tokenizer: RowTokenizer) -> None:
    rows = [chat(f"Row {n}?", "A long answer. " * 9, line=n) for n in range(6)]
    asked = asked_rows(config(), tokenizer, rows)
    found = Evaluator(trainer, tokenizer, config(), asked, lambda stage: None).evaluate("before")
    assert found["scores"] is None and found["num_scored"] == 0
    assert len(found["shown"]) == SHOWN_ROWS


@pytest.mark.parametrize(("objective", "speaks"), [("dpo", True), ("reward", False)])
def test_preferences_have_an_accuracy(
    objective: str, speaks: bool, trainer: Any, tokenizer: RowTokenizer
) -> None:
    asked = asked_rows(config(), tokenizer, labelled_rows(4))
    evaluator = Evaluator(trainer, tokenizer, config(objective), asked, lambda stage: None)
    before = evaluator.evaluate("before")
    record = evaluation_record(objective, before, before, 4)
    assert record["accuracy"] == {"before": 0.75, "after": 0.75}
    assert record["perplexity"] is None and record["exact_match"] is None
    assert bool(before["shown"]) == speaks
    assert (forgetting_record(config(objective), before, before) is None) != speaks


def test_rows_that_cannot_be_asked_are_left_out(tokenizer: RowTokenizer) -> None:
    rows = [chat("Where? " * 200, "Here."), chat("Where?", "Here.")]
    assert [one.row for one in asked_rows(config(), tokenizer, rows)] == rows[1:]


def test_the_rows_that_are_asked_are_any_of_them_and_always_the_same() -> None:
    def kept() -> list[int]:
        asked = _Asked()
        for row in labelled_rows(1000):
            asked.take(row)
        asked.take(Row(number=1, text="plain text"))
        return [row.number for row in asked.rows]

    assert kept() == kept() and len(set(kept())) == ASKED_ROWS
    assert 300 < sum(kept()) / ASKED_ROWS < 700


def record(**changed: Any) -> dict[str, Any]:
    figures = {"allocated_bytes": 2**30, "device_bytes": 2**31, "step_seconds": 1.0}
    return {
        **{"name": "mine", "method": "lora", "output": "adapter", "steps": 8, "device": "L4"},
        "model": {"name": "tiny", "hub_id": "org/tiny", "num_parameters": 10**9},
        **{"num_trainable_parameters": 10**6, "predicted": figures, "measured": figures},
        "evaluation": {
            **{"before": 2.0, "after": 1.0, "num_rows": 30, "num_scored": 28},
            "perplexity": {"before": 7.39, "after": 2.72},
            "exact_match": {"before": 0.0, "after": 0.75},
        },
        "forgetting": {
            **{"num_tokens": 6528, "before": 20.0, "after": 25.0, "threshold": 0.1},
            **{"forgotten": True, "what_helps": ["fewer passes: `--num-train-epochs 1`"]},
        },
        "samples": [{"prompt": "PRIVATE?", "reference": "SECRET", "before": "b", "after": "a"}],
        "overlong": {"train": {"num_rows_left": 270, "num_tokens": 15_613}},
        **{"data_sha256": "d" * 64, "template_sha256": "e" * 64},
        **changed,
    }


def test_the_report_shows_all_measures_side_by_side() -> None:
    shown = "\n".join(rendered(views.evaluation_table(record())))
    for words in (
        "loss, 30 rows                 2.000   1.000      -50.0 %",
        "exact match, 28 answers         0 %    75 %   +75 points",
        "perplexity of general text    20.00   25.00      +25.0 %",
    ):
        assert words in shown
    assert "SECRET" in "\n".join(rendered(views.samples_view(record()["samples"])))
    said = views.said_forgetting(record())
    assert said is not None and "25.0 %" in said and "`--num-train-epochs 1`" in said
    assert views.said_forgetting(record(forgetting=None)) is None


PLAN = {
    "ftplan": "0.1.0",
    "plan": {
        name: {"value": value}
        for name, value in {
            **{"objective": "sft", "lora_rank": 16, "target_modules": ["all-linear"]},
            **{"learning_rate": 2e-4, "packing": False, "num_trainable_layers": 2, "beta": 0.0},
        }.items()
    },
}


def test_a_model_card_says_what_was_done_and_nothing_of_the_rows() -> None:
    text = card(record(), PLAN, {"python": "3.11", "packages": {"torch": "2.13.0"}})
    _, front, body = text.split("---\n", 2)
    assert "base_model: org/tiny\n" in front and "library_name: peft\n" in front
    for words in (
        *("AutoPeftModelForCausalLM", "| loss | 2 | 1 |", "| exact match, share | 0 | 0.75 |"),
        *("| lora_rank | 16 |", "| learning_rate | 0.0002 |", "all linear layers", "torch 2.13.0"),
        *("d" * 64, "20.00 before, 25.00 after", "1.00 GiB"),
    ):
        assert words in body, words
    for words in ("PRIVATE", "SECRET", "packing", "num_trainable_layers", "beta"):
        assert words not in text, words


def test_a_merged_models_card_is_that_of_a_model() -> None:
    merged = {"dtype": "bfloat16", "check": {"difference": 0.0081}}
    text = card(record(), PLAN, {}, merged)
    assert "library_name: transformers\n" in text and "AutoModelForCausalLM" in text
    assert "in bfloat16; logits differ from unmerged ones by 0.81%" in text
    nameless = record(model={"name": "tiny", "hub_id": None, "num_parameters": 5})
    assert "base_model" not in card(nameless, PLAN, {})


def test_warnings_of_forgetting_go_beside_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    Ui(as_json=True).warn(views.said_forgetting(record()) or "")
    captured = capsys.readouterr()
    assert captured.out == "" and "has forgotten" in captured.err


def test_the_page_states_the_constants() -> None:
    text = " ".join((Path(__file__).parents[1] / "docs/after-training.md").read_text().split())
    for said in (
        f"median is at most {SHORT_ANSWER_TOKENS} tokens",
        f"at most {MAX_LABELS} different ones",
        f"at most {ASKED_ROWS} held-out questions",
        f"at most 4 tokens more than the longest in the data, and {MOST_SCORED_TOKENS} at most",
        f"after {SCORING_SECONDS:g} seconds before training",
        f"in pieces of {PIECE_TOKENS} tokens",
        f"begun after {GENERAL_TEXT_SECONDS:g} seconds, though {LEAST_PIECES} there are",
        f"read {CHECKED_TOKENS} tokens in float32",
        f"more than {TOLERATED_EPSILONS} epsilons".replace("more", "More"),
    ):
        assert said in text, said
