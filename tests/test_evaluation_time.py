"""How long evaluations take: counted a second way, and how it follows plan and data."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from msgspec import structs

from ftplan.planner.batching import mean_padded_rows
from ftplan.planner.cycles import scoring_steps
from ftplan.planner.data_profile import DataProfile
from ftplan.planner.evaluating import (
    GENERAL_TEXT_SECONDS,
    LEAST_PIECES,
    PIECE_TOKENS,
    SCORING_SECONDS,
    SHOWN_NEW_TOKENS,
    SHOWN_ROWS,
    Questions,
)
from ftplan.planner.evaluation_time import EvaluationTime, evaluation_time
from ftplan.planner.hardware_spec import Device
from ftplan.planner.overlong import RowCounts
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.space import Batches
from ftplan.planner.step_settings import mean_model_rows
from ftplan.planner.step_time import estimate_step_time
from ftplan.planner.weights import weight_memory_bytes
from ftplan.profiles import find_gpu, require_model

MODEL = require_model("smollm2-135m").spec
GPU = find_gpu("A100 80GB SXM").device()
# It computes and moves slowly enough that calling operations takes no time beside.
PROCESSOR = Device(
    name="a processor",
    kind="cpu",
    total_bytes=2**35,
    free_bytes=2**34,
    memory_bandwidth_bytes_per_second=1e9,
    peak_flops_per_second={"float32": 1e9},
    context_bytes=0,
)
PLAN = TrainingPlan(
    method="lora",
    dtype="float32",
    mixed_precision="no",
    loss="stock",
    optim="adamw_torch",
    per_device_train_batch_size=4,
    max_length=256,
)
QUESTIONS = Questions(
    num_rows=20,
    prompt_tokens=50,
    shown_prompt_tokens=30,
    longest_prompt_tokens=90,
    answer_tokens=70,
)
PIECES = 50


def data(rows: int = 40, length: int = 100, questions: Questions = QUESTIONS) -> DataProfile:
    counts = RowCounts(num_rows=rows, num_rows_left=rows, num_tokens=rows * length)
    return DataProfile(
        path="rows.jsonl",
        sha256="",
        format="instruction",
        objective="instruction tuning",
        num_rows=rows + 200,
        num_usable_rows=rows + 200,
        num_eval_rows=rows,
        lengths=(length,) * 200,
        exact=True,
        train_counts=RowCounts(num_rows=200, num_rows_left=200, num_tokens=200 * length),
        eval_counts=counts,
        longest_evaluated=length,
        questions=questions,
    )


def time_of(
    plan: TrainingPlan = PLAN,
    device: Device = PROCESSOR,
    profile: DataProfile | None = None,
    pieces: int = PIECES,
) -> EvaluationTime:
    profile = profile or data()
    tokens, length = mean_model_rows(plan, Batches(profile).mean_tokens(plan))
    step = estimate_step_time(
        MODEL, plan, device, tokens_per_micro_batch=tokens, mean_length=length
    )
    return evaluation_time(MODEL, plan, device, profile, step, steps=100, num_pieces=pieces)


def test_held_out_rows_are_a_forward_pass_twice() -> None:
    """Two FLOPs a parameter and token, more for attention and adapters; and what is moved."""
    flops = 2 * 40 * 100 * 2 * MODEL.num_parameters
    seconds = time_of().held_out.expected
    arithmetic = flops / PROCESSOR.peak_flops_per_second["float32"]
    assert arithmetic < seconds < 1.5 * arithmetic
    assert time_of(profile=data(rows=80)).held_out.expected == pytest.approx(2 * seconds)
    assert time_of(profile=data(rows=0)).held_out.expected == 0


def test_rows_of_an_evaluation_are_padded_in_no_order() -> None:
    lengths = (9, 7, 4, 2, 1)
    batches = list(itertools.product(lengths, repeat=3))
    mean = sum(map(max, batches)) / len(batches)
    assert mean_padded_rows(lengths, 3, 100) == pytest.approx(mean)
    assert mean_padded_rows(lengths, 1, 100) == pytest.approx(sum(lengths) / 5)
    assert mean_padded_rows(lengths, 3, 4) < mean


def test_answers_read_all_weights_for_each_token() -> None:
    seconds = time_of().answers
    weights = weight_memory_bytes(MODEL, PLAN) / PROCESSOR.memory_bandwidth_bytes_per_second
    tokens = SHOWN_ROWS * (30 + SHOWN_NEW_TOKENS)
    products = 2 * tokens * MODEL.num_parameters / PROCESSOR.peak_flops_per_second["float32"]
    assert seconds.expected == pytest.approx(2 * (SHOWN_NEW_TOKENS * weights + products), rel=0.2)
    # An answer may end at once: the prompts' pass alone is left.
    assert seconds.least < 2 * products
    nobody = data(questions=Questions())
    assert time_of(profile=nobody).answers.expected == 0


def test_short_answers_are_scored_while_there_is_time() -> None:
    short = structs.replace(QUESTIONS, are_short=True, answer_tokens=3, num_rows=64)
    slow = time_of(profile=data(questions=short)).answers.expected / 2
    assert SCORING_SECONDS < slow < 4 * SCORING_SECONDS
    fast = structs.replace(
        PROCESSOR, memory_bandwidth_bytes_per_second=1e12, peak_flops_per_second={"float32": 1e12}
    )
    many = time_of(device=fast, profile=data(questions=short)).answers.expected
    few = structs.replace(short, num_rows=32)
    assert many == pytest.approx(
        2 * time_of(device=fast, profile=data(questions=few)).answers.expected, rel=0.3
    )


def test_general_text_is_read_while_there_is_time() -> None:
    flops = 2 * PIECE_TOKENS * MODEL.num_parameters
    piece = flops / PROCESSOR.peak_flops_per_second["float32"]
    assert LEAST_PIECES * piece > GENERAL_TEXT_SECONDS  # so slow is this one
    seconds = time_of().general_text.expected / 2
    assert LEAST_PIECES * piece < seconds < 1.3 * LEAST_PIECES * piece
    on_gpu = time_of(device=GPU).general_text.expected
    assert on_gpu < 2 * GENERAL_TEXT_SECONDS
    assert time_of(device=GPU, pieces=2 * PIECES).general_text.expected == pytest.approx(2 * on_gpu)


def test_bounds_hold_the_estimate_and_parts_are_summed() -> None:
    for device in (PROCESSOR, GPU):
        found = time_of(device=device)
        for part in (*found.parts.values(), found.whole):
            assert part.least <= part.expected <= part.most
        told: dict[str, Any] = found.to_dict()
        assert told["seconds"] == pytest.approx(sum(told["parts"].values()))


def test_lora_drop_trains_to_find_the_layers_that_matter() -> None:
    plan = PLAN.replace(method="lora-drop")
    tokens, length = mean_model_rows(plan, Batches(data()).mean_tokens(plan))
    step = estimate_step_time(
        MODEL, plan, PROCESSOR, tokens_per_micro_batch=tokens, mean_length=length
    )
    found = time_of(plan)
    assert found.scoring.expected == scoring_steps(100) * step.step_seconds
    assert time_of().scoring.expected == 0


def test_a_reward_model_is_asked_nothing() -> None:
    found = time_of(PLAN.replace(objective="reward"))
    assert found.answers.expected == found.general_text.expected == 0 < found.held_out.expected


def test_pairs_are_read_with_both_answers_and_by_the_reference() -> None:
    """By step and by evaluation: DPO's reference reads both answers of a row, too."""
    plan = PLAN.replace(objective="dpo", loss="trl-fused")
    one = time_of(PLAN.replace(loss="trl-fused")).held_out.expected
    assert time_of(plan).held_out.expected == pytest.approx(4 * one, rel=0.15)
    tokens, length = mean_model_rows(plan, Batches(data()).mean_tokens(plan))
    assert (tokens, length) == (2 * 4 * 100, 100)


def test_completions_are_generated_for_held_out_prompts() -> None:
    plan = PLAN.replace(
        objective="grpo", loss="trl-fused", max_completion_length=64, num_generations=4
    )
    found = time_of(plan).held_out.expected
    weights = weight_memory_bytes(MODEL, PLAN) / PROCESSOR.memory_bandwidth_bytes_per_second
    batches = 40 / 4
    assert found > 2 * batches * 64 * weights


def test_gpus_share_the_held_out_rows_and_all_of_them_answer() -> None:
    alone = time_of(device=GPU)
    together = time_of(PLAN.replace(num_gpus=4), GPU)
    assert together.held_out.expected == pytest.approx(alone.held_out.expected / 4)
    assert together.answers.expected == pytest.approx(alone.answers.expected)
    divided = time_of(
        PLAN.replace(num_gpus=4, sharding="fsdp"), structs.replace(GPU, link_bytes_per_second=1e9)
    )
    assert divided.answers.expected > 2 * alone.answers.expected  # each token gathers all weights


def test_what_is_computed_again_in_training_changes_nothing() -> None:
    some = PLAN.replace(gradient_checkpointing=True, every_n_layers=3)
    assert time_of(some) == time_of()
    gpus = {"method": "full", "num_gpus": 3, "tp_size": 3}
    linked = structs.replace(GPU, link_bytes_per_second=1e9)
    both = [time_of(plan.replace(**gpus), linked) for plan in (some, PLAN)]
    assert both[0].whole == both[1].whole


def test_learned_tokens_in_front_of_rows_take_their_time() -> None:
    def seconds(tokens: int) -> float:
        plan = PLAN.replace(method="prompt-tuning", peft_config=(f"num_virtual_tokens={tokens}",))
        size = {"tokens_per_micro_batch": 400.0, "mean_length": 100.0}
        return estimate_step_time(MODEL, plan, PROCESSOR, **size).step_seconds

    assert seconds(101) == pytest.approx(2 * seconds(1), rel=0.1)
