"""What goes with which training objective, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ftplan.launcher.cli import main
from ftplan.planner.errors import InputError
from ftplan.planner.model_spec import ModelSpec
from ftplan.planner.objectives import OBJECTIVES
from ftplan.planner.plan import TrainingPlan
from ftplan.planner.recipe import estimate_recipe

SMALLEST: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {},
    "orpo": {},
    "simpo": {},
    "kto": {"per_device_train_batch_size": 2},
    "reward": {"loss": "stock"},
    "grpo": {"per_device_train_batch_size": 8},
    "rloo": {"per_device_train_batch_size": 8},
}


def plan(objective: str, **settings: Any) -> TrainingPlan:
    return TrainingPlan(**{"objective": objective, **SMALLEST[objective], **settings})


@pytest.mark.parametrize(
    ("objective", "settings", "said"),
    [
        ("dpo", {"loss": "stock"}, "whole logits never exist"),
        ("kto", {"loss": "liger"}, "has no `--loss liger`"),
        ("reward", {"loss": "trl-fused"}, "one score"),
        ("dpo", {"trainer": "transformers"}, "`--trainer transformers` has it not"),
        ("reward", {"trainer": "loop"}, "`--trainer loop` has it not"),
        ("sft", {"precompute_ref_log_probs": True}, "has no reference"),
        ("reward", {"precompute_ref_log_probs": True}, "has no reference"),
        ("kto", {"per_device_train_batch_size": 1}, "2 or more"),
        ("orpo", {"precompute_ref_log_probs": True}, "has no reference"),
        ("sft", {"beta": 0.1}, "`--beta` is for `--objective` `dpo`"),
        ("dpo", {"beta": 0.0}, "nothing to learn from"),
        ("dpo", {"gamma_beta_ratio": 0.5}, "is for `--objective` `simpo`"),
        ("simpo", {"loss_type": "ipo"}, "is for `--objective` `dpo`, and this is `simpo`"),
        ("dpo", {"loss_type": "aot"}, "micro-batch"),
        ("dpo", {"reward_model": "runs/first"}, "is for `--objective grpo` and `rloo`"),
        ("grpo", {"reward": ("exact_match",)}, "unknown reward `exact_match`"),
        ("dpo", {"loss_type": "robust"}, "label_smoothing"),
        ("dpo", {"loss_type": "ippo"}, "unknown loss type `ippo`"),
        (
            "reward",
            {
                **{"method": "qlora", "quantization": "nf4"},
                "mixed_precision": "no",
                "dtype": "float32",
            },
            "cannot compute in float32",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(
    objective: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as raised:
        plan(objective, **settings)
    assert raised.value.hint


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_not_given_follows_from_the_objective(
    objective: str, small_llama: ModelSpec
) -> None:
    reasoned = estimate_recipe(small_llama, None, {"objective": objective})
    expected = plan(objective)
    for name in ("loss", "per_device_train_batch_size"):
        assert getattr(reasoned.plan, name) == getattr(expected, name)
        if name in SMALLEST[objective]:
            assert reasoned.reasons[name].origin == "derived"


def test_an_unknown_objective_is_answered_with_the_nearest(small_llama: ModelSpec) -> None:
    with pytest.raises(InputError, match="unknown objective `dpoo`") as raised:
        estimate_recipe(small_llama, None, {"objective": "dpoo"})
    assert "`dpo`" in str(raised.value.hint)


@pytest.mark.parametrize("words", [["plan", "rows.jsonl"], ["auto", "rows.jsonl", "--yes"]])
def test_no_run_is_planned_that_needs_a_reward_function(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And that is said before the data is read."""
    if words[0] == "auto":
        pytest.importorskip("trl", reason="needs the `train` extra")
    assert main([*words, "--objective", "rloo"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing here rewards them" in said and "--reward-model RUN_DIR" in said


@pytest.mark.train
def test_each_has_a_trainer_and_a_dry_one() -> None:
    pytest.importorskip("trl", reason="needs the `train` extra")
    from ftplan.launcher.dry_run.objectives import DRY_TRAINERS
    from ftplan.launcher.training.model_classes import MODEL_CLASSES
    from ftplan.launcher.training.objectives import TRAININGS

    assert set(TRAININGS) == set(MODEL_CLASSES) == set(OBJECTIVES) == {"sft", *DRY_TRAINERS}
    for name, dry in DRY_TRAINERS.items():
        trainer = TRAININGS[name].trainer
        assert trainer is not None and issubclass(dry, trainer)
