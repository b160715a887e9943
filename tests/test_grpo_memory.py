"""GRPO: the closed form beside dry runs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

pytest.importorskip("trl", reason="needs the `train` extra")

from ftplan.launcher.dry_run.case import DryRunCase
from ftplan.launcher.dry_run.step import dry_run
from ftplan.planner.combinations import check_together
from ftplan.planner.errors import InputError
from ftplan.planner.explain import GENERATION_EQUATION, explain
from ftplan.planner.families import spec_from_config
from ftplan.planner.generation import Generation
from ftplan.planner.memory import estimate_memory
from ftplan.planner.objectives import with_score
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe
from ftplan.planner.replayed import MOST_APART, replayed_memory
from ftplan.planner.step_trace import GENERATION_PHASE, SCORING_PHASE
from ftplan.planner.tape import value
from tests.dry_runs import (
    BF16,
    DEEPSEEK,
    GPT2_MODULES,
    LLAMA,
    QLORA,
    QWEN3,
    QWEN3_MOE,
    assert_equal_records,
    cuda_case,
)
from tests.sweeps import named
from tests.test_objectives_memory import (
    CHECKPOINTING,
    CUDA,
    EAGER,
    FULL,
    SHARE_OF_PEAK,
    SLACK,
    WIDE_GEMMA2,
    WIDE_GPT2,
    WIDE_LLAMA,
    WIDE_QWEN3,
    closed_peaks,
    dry_peaks,
    wide_case,
)

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("on_the_processor")]

GRPO: dict[str, Any] = {
    **{"objective": "grpo", "loss": "trl-fused"},
    **{"num_generations": 2, "max_completion_length": 128},
}
BETA: dict[str, Any] = {"beta": 0.1}
RLOO: dict[str, Any] = {"objective": "rloo"}
# Larger than what is trained, so that its pass is the highest of scoring.
JUDGED: dict[str, Any] = {"reward_config": {**WIDE_LLAMA, "intermediate_size": 4096}}
# So many rows at once that their cache is what generation holds most of.
MANY: dict[str, Any] = {
    **{"num_generations": 16, "max_completion_length": 480},
    **{"gradient_accumulation_steps": 8, "steps_per_generation": 16},
}
ON_PROCESSOR: dict[str, Any] = {"kind": "cpu", "dtype": "float32", "mixed_precision": "no"}
WIDE_QWEN2 = {**WIDE_LLAMA, "model_type": "qwen2"}

JOINED = {
    *("lora, llama", "lora, eager", "full, gpt2", "cpu, lora", "rloo, judged, lora"),
    "cpu, judged, lora",
}

TOLERANCE = {GENERATION_PHASE: 0.01}
OTHER_TOLERANCE = 0.005


def grpo_case(config: dict[str, Any], **settings: Any) -> DryRunCase:
    return wide_case(config, **{**CUDA, **GRPO, **settings})


@pytest.mark.parametrize(
    "dry_case",
    [
        named(name, grpo_case(config, **settings), joined=JOINED)
        for name, config, settings in (
            ("lora, llama", WIDE_LLAMA, BETA),
            ("lora, qwen2, checkpointing", WIDE_QWEN2, CHECKPOINTING),
            ("lora, many rows", WIDE_LLAMA, MANY),
            ("lora, eager", WIDE_GEMMA2, {**EAGER, **MANY}),
            ("lora, gpt2", WIDE_GPT2, {**MANY, "target_modules": GPT2_MODULES}),
            ("qlora, checkpointing", WIDE_LLAMA, {**QLORA, **CHECKPOINTING, **MANY, **BETA}),
            ("full, gpt2", WIDE_GPT2, {**FULL, **BETA, "max_length": 400}),
            ("full, fp32, many rows", WIDE_QWEN3, {**FULL, **MANY, **BETA, "dtype": "float32"}),
            (
                "lora, generated within a step",
                WIDE_QWEN3,
                {**CHECKPOINTING, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
            ),
            ("cpu, lora", WIDE_LLAMA, {**ON_PROCESSOR, **MANY}),
            ("rloo, lora", WIDE_LLAMA, {**RLOO, **MANY}),
            ("rloo, full, no reference", WIDE_QWEN3, {**RLOO, **FULL, "beta": 0.0}),
            ("judged, lora, checkpointing", WIDE_QWEN3, {**CHECKPOINTING, **JUDGED}),
            ("rloo, judged, lora", WIDE_LLAMA, {**RLOO, **JUDGED, **MANY}),
            ("cpu, judged, lora", WIDE_LLAMA, {**ON_PROCESSOR, **JUDGED}),
        )
    ],
)
def test_every_phase_is_what_a_dry_run_has(dry_case: DryRunCase) -> None:
    dry, closed = dry_peaks(dry_case), closed_peaks(dry_case)
    assert closed.keys() == dry.keys()
    assert GENERATION_PHASE in dry
    least = SHARE_OF_PEAK * max(dry.values())
    for phase, peak in dry.items():
        if peak > least:
            tolerance = TOLERANCE.get(phase, OTHER_TOLERANCE)
            assert closed[phase] == pytest.approx(peak, rel=tolerance, abs=SLACK), phase


@pytest.mark.parametrize(
    "settings",
    [{**FULL, **BETA}, {**QLORA, **CHECKPOINTING, "steps_per_generation": 2}],
    ids=["full", "qlora"],
)
def test_few_layers_stand_for_all(settings: dict[str, Any]) -> None:
    dry_case = cuda_case(LLAMA, num_layers=5, **GRPO | {"max_completion_length": 16} | settings)
    few = dry_run(dry_case)
    every = dry_run(structs.replace(dry_case, few_layers=False))
    assert few.num_layers_traced == 4 < every.num_layers_traced
    assert_equal_records(few.record, every.record)


def test_a_reward_model_is_held_and_its_pass_is_seen() -> None:
    """Beside a model that is small, in the plan's dtype."""
    judged, alone = (
        closed_peaks(grpo_case(WIDE_LLAMA, **JUDGED)),
        closed_peaks(grpo_case(WIDE_LLAMA)),
    )
    held = 2 * with_score(spec_from_config(JUDGED["reward_config"], "")).num_parameters
    for phase in ("load", "micro-batch", "save"):
        assert judged[phase] - alone[phase] == held, phase
    assert SCORING_PHASE in judged and SCORING_PHASE not in alone


# --- the closed form alone -----------------------------------------------------------------------


def peaks(**settings: Any) -> dict[str, int]:
    return closed_peaks(grpo_case(WIDE_LLAMA, **settings))


def test_prompts_and_last_token_in_a_micro_batchs_rows() -> None:
    """Any size of either pass, at the rows and tokens that it really has."""
    generation = Generation(
        completion_length=5, micro_batches=3, meets_gradients=False, scores_policy=False
    )
    form = (7, 11, 13, 17, 19)
    rows, length = 2, 64
    assert value(generation.of_prompts(form), rows, length) == value(form, 6, 59)
    a, b, c, d, e = form
    last_token = a + c + 6 * (b + d + e * (length - 1))
    assert value(generation.of_last_token(form), rows, length) == last_token


def test_the_cache_is_what_many_rows_hold() -> None:
    """Twice as many rows hold a cache more, and one layer's keys and values besides."""
    config = {**WIDE_LLAMA, "num_hidden_layers": 32, "vocab_size": 64}
    grown = [
        closed_peaks(grpo_case(config, **MANY | {"steps_per_generation": steps}))[GENERATION_PHASE]
        for steps in (64, 128)
    ]
    keys_and_values = 2 * 2 * config["num_key_value_heads"] * (256 // 4)
    rows, tokens = 2 * 64, 512 - 1
    cache = 32 * keys_and_values * rows * tokens
    assert grown[1] - grown[0] == pytest.approx(cache, rel=0.05)
    assert grown[1] - grown[0] > cache


def test_log_probabilities_are_asked_for_where_they_are_needed() -> None:
    assert SCORING_PHASE not in peaks()
    assert SCORING_PHASE in peaks(**BETA)
    assert SCORING_PHASE in peaks(steps_per_generation=2)
    assert SCORING_PHASE not in peaks(steps_per_generation=2, gradient_accumulation_steps=4)


def test_a_reference_model_is_held_for_a_beta() -> None:
    assert peaks(**FULL, **BETA)["save"] - peaks(**FULL)["save"] == pytest.approx(
        2 * spec_from_config(WIDE_LLAMA, "").num_parameters, rel=0.01
    )
    assert peaks(**BETA)["load"] == peaks()["load"]


def test_gradients_are_there_where_a_step_generates_twice() -> None:
    """Six micro-batches do not divide into steps of four; four and eight do."""
    four, six, eight = (
        peaks(**FULL, gradient_accumulation_steps=4, steps_per_generation=steps)[GENERATION_PHASE]
        for steps in (4, 6, 8)
    )
    gradients = 2 * spec_from_config(WIDE_LLAMA, "").num_parameters
    assert six - (four + eight) / 2 == pytest.approx(gradients, rel=0.01)


def test_the_replay_holds_what_the_moments_say() -> None:
    plan = grpo_case(WIDE_LLAMA, **MANY).plan
    model = spec_from_config(WIDE_LLAMA, "")
    memory = replayed_memory(model, plan)
    assert memory.reserved_peak_bytes != round(1.04 * memory.allocated_peak_bytes)
    assert memory.reserved_peak_bytes > memory.allocated_peak_bytes * (1 - MOST_APART)


def test_explained_by_an_equation_of_its_own() -> None:
    plan = grpo_case(WIDE_LLAMA, **CHECKPOINTING, **MANY).plan.replace(steps_per_generation=512)
    model = spec_from_config(WIDE_LLAMA, "")
    assert estimate_memory(model, plan).peak_phase.name == GENERATION_PHASE
    assert GENERATION_EQUATION in {term.equation for term in explain(model, plan)}


# --- settings and refusals -----------------------------------------------------------------------


def test_rows_make_whole_groups() -> None:
    model = spec_from_config(WIDE_LLAMA, "")

    def rows(**given: Any) -> int:
        return estimate_recipe(
            model, None, {"objective": "grpo", **given}
        ).plan.per_device_train_batch_size

    assert rows() == 8
    assert rows(gradient_accumulation_steps=4) == 2
    assert rows(num_generations=6, steps_per_generation=4) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "sft", "loss": "trl-fused", "beta": 0.1}, "is for `--objective` `dpo`"),
        ({**GRPO, "num_generations": 1}, "compared with the others"),
        ({**GRPO, "num_generations": 3}, "no whole groups"),
        ({**GRPO, "max_completion_length": 512, "max_length": 512}, "leaves no token"),
        ({**GRPO, "num_gpus": 2}, "on several GPUs is not modelled"),
        ({**GRPO, "loss": "liger"}, "has no `--loss liger`"),
        ({**GRPO, "precompute_ref_log_probs": True}, "has no reference"),
        ({**GRPO, "beta": -1.0}, "0 or above"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainingPlan(**{"per_device_train_batch_size": 2, **settings})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (DEEPSEEK, {}, "latent attention"),
        (WIDE_GEMMA2 | {"sliding_window": 64}, EAGER, "a sliding window"),
        (QWEN3, {"method": "prompt-tuning"}, "prompt-tuning` with `--objective grpo"),
    ],
    ids=["latent attention", "sliding window", "prompts"],
)
def test_what_the_closed_form_leaves_to_the_dry_run(
    config: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    plan = grpo_case(config, **settings).plan
    with pytest.raises(InputError, match=message):
        estimate_memory(spec_from_config(config, ""), plan)


def test_experts_are_not_generated_with() -> None:
    plan = TrainingPlan(**BF16, **GRPO, per_device_train_batch_size=2)
    with pytest.raises(InputError, match="copies the weights of its experts"):
        check_together(spec_from_config(QWEN3_MOE, ""), plan)
